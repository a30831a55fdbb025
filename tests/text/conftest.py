"""A small text, one finished run on it, and what a run wrote."""

import json
from pathlib import Path

import pytest

from cumulant.text.options import TrainingOptions
from cumulant.text.train import train

SMALL = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "context": 32,
    "batch": 4,
    "device": "cpu",
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(
            f"the {w} sat on the {v}; "
            for w in ["cat", "dog", "bat", "rat"]
            for v in ["mat", "hat"]
        )
        * 60
    )
    return path


@pytest.fixture(scope="session")
def run(text, tmp_path_factory):
    """One finished run."""
    output = str(tmp_path_factory.mktemp("run") / "out")
    return train(
        TrainingOptions(output=output, data=str(text), steps=160, evaluate_every=80, **SMALL),
        say=lambda _: None,
    )


def losses_in(output):
    return json.loads((Path(output) / "result.json").read_text())["losses"]
