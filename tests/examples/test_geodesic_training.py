"""The geodesic experiment trains, measures bits per byte, and says what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

from .geodesic import FOLDER, model, train


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 200)
    return path


TINY = [
    *("--dim=8", "--rank=2", "--hidden=8", "--batch=8", "--context=4", "--heldout=640"),
    "--learning-rate=0.03",
]


@pytest.mark.slow
def test_training(text, capsys):
    """Both models learn a text that repeats itself, and the last line has all results."""
    torch.set_default_dtype(torch.float32)
    results = train.main(["--data", str(text), *TINY, "--steps", "25"])
    for found in results.values():
        assert found["first loss, bits"] > 6
        assert found["last loss, bits"] < 4.5
        assert found["bits per byte"] < 4.5
    straight, geodesic = results["straight"], results["geodesic"]
    assert geodesic["parameters"] > straight["parameters"]
    assert 0 < geodesic["energy drift"] < 0.1
    assert 0 < geodesic["departure"] < 1
    assert geodesic["bits per byte, straightened"] != geodesic["bits per byte"]
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["results"] == results
    assert lines[0].startswith("straight ")
    again = train.main(
        ["--data", str(text), *TINY, "--steps", "25", "--models", "geodesic", "--checkpointing"]
    )
    assert again["geodesic"]["bits per byte"] == pytest.approx(geodesic["bits per byte"], abs=1e-3)


def test_bits_per_byte_is_the_code_length():
    """Against one byte at a time, over windows that do not divide the rows."""
    lm = model.GeodesicLanguageModel(256, 4, 1, hidden=4)
    rows = torch.randint(0, 256, (3, 18))
    bits, velocity = 0.0, None
    for t in range(17):
        logits, velocity = lm(rows[:, t : t + 1], velocity)
        bits -= float(logits.softmax(-1)[range(3), 0, rows[:, t + 1]].log2().sum().detach())
    assert train.bits_per_byte(lm, rows, window=5) == pytest.approx(bits / (3 * 17), rel=1e-10)


def test_the_last_tenth_is_held_out():
    text = bytes(i % 251 for i in range(5000))
    options = train.parse(["--batch", "4", "--context", "8", "--heldout", "200"])
    rows, heldout = train.data(text, options)
    assert bytes(rows.flatten().tolist()) == text[:4500]
    assert heldout.shape == (64, 3)
    assert bytes(heldout[9].tolist()) == text[4500 + 9 * 7 :][:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/file"], "data: No such file or directory: /no/such/file"),
        (["--data", str(FOLDER)], f"data: Is a directory: {FOLDER}"),
        (
            ["--data", "TEXT", "--batch", "600"],
            "data: expected at least 22,000 bytes for this batch and context, got 4,800",
        ),
        (["--dim", "0"], "dim: expected at least 1, got 0"),
        (["--rank", "-1"], "rank: expected at least 1, got -1"),
        (["--rk4-steps", "0"], "rk4-steps: expected at least 1, got 0"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--learning-rate", "nan"], "learning-rate: expected a positive number, got nan"),
        (["--metric-rate", "-1"], "metric-rate: expected a positive number, got -1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(arguments, message, text):
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        train.main(["--context", "32", *arguments])
    assert caught.value.code == message


def test_divergence_is_said(text):
    torch.set_default_dtype(torch.float32)
    with pytest.raises(SystemExit) as caught:
        train.main(["--data", str(text), *TINY, "--steps", "20", "--learning-rate", "1e30"])
    assert "loss not finite at step" in caught.value.code


def test_as_a_program(tmp_path):
    """It runs from any folder, and an error is one line without a traceback."""
    command = [sys.executable, str(FOLDER / "train.py"), "--data", "missing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "data: No such file or directory: missing\n"
