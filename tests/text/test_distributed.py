"""Training in two processes: the same steps as in one, and mistakes are told once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cumulant.text.checkpoint import load_checkpoint

from .conftest import losses_in

pytestmark = pytest.mark.filterwarnings("ignore")
TWO_PROCESSES = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    *("-m", "cumulant"),
]


def run_to_its_end(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


def test_two_processes_say_once_what_is_wrong(tmp_path):
    """Found by the first process alone, which reads the text."""
    (tmp_path / "short.txt").write_text("a text that is too short for its windows. " * 100)
    options = ["--data", str(tmp_path / "short.txt"), "--context", "99999", "--device", "cpu"]
    done = subprocess.run(
        [*TWO_PROCESSES, "train", *options, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("cumulant: ")]
    assert len(said) == 1, done.stderr
    assert "too few for one window of 99999" in said[0]
    assert not (tmp_path / "run" / "tokens").exists()


@pytest.mark.parametrize(
    ("sharded", "carry"),
    [
        pytest.param(False, "none", id="ddp"),
        pytest.param(True, "none", id="fsdp", marks=pytest.mark.slow),
        pytest.param(False, "passing", id="passing", marks=pytest.mark.slow),
        pytest.param(False, "document", id="document", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(text, tmp_path, sharded, carry):
    """Over gloo, two processes with half of the batch each take the same steps as one."""
    common = [
        "--data",
        str(text),
        "--steps",
        "2",
        "--context",
        "32",
        "--width",
        "32",
        "--depth",
        "2",
        "--heads",
        "2",
    ]
    common += ["--device", "cpu", "--seed", "3", "--carry-state", carry]
    one = [
        sys.executable,
        "-m",
        "cumulant",
        "train",
        *common,
        "--batch",
        "8",
        "--output",
        str(tmp_path / "one"),
    ]
    run_to_its_end(one)
    two = [
        *TWO_PROCESSES,
        "train",
        *common,
        "--batch",
        "4",
        "--output",
        str(tmp_path / "two"),
        *["--fsdp"] * sharded,
    ]
    run_to_its_end(two, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert np.allclose(losses_in(tmp_path / "one"), losses_in(tmp_path / "two"), atol=1e-4)
    scores = [
        json.loads((tmp_path / n / "result.json").read_text())["bits_per_byte"]
        for n in ("one", "two")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    weights = [load_checkpoint(str(tmp_path / n))[0].state_dict() for n in ("one", "two")]
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-4)
