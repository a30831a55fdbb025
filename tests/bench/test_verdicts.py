"""`cumulant bench` gives no verdict where times scatter too much for one."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from cumulant.bench.speed import measure as speed
from cumulant.bench.speed.load import Load
from cumulant.bench.speed.recipes import Recipe
from cumulant.bench.speed.verdicts import (
    CANNOT_TELL,
    PASSES,
    answers,
    overtaking_length,
    time_interval,
)

NAMES = ["softmax", "linear"]


def cell(mechanism, T, low, high, kind="forward"):
    row = {"length": T, "pass": kind, "mechanism": mechanism, "status": "measured"}
    return {**row, "median": (low + high) / 2, "low": low, "high": high}


def test_intervals_that_part():
    rows = [cell("softmax", 8, 1.0, 1.1), cell("linear", 8, 2.0, 2.2)]
    rows += [cell("softmax", 16, 4.0, 4.4), cell("linear", 16, 2.0, 2.2)]
    assert overtaking_length(rows, "forward", "linear") == 16
    (line,) = answers(rows, NAMES)
    assert (
        line
        == "On this machine, forward: linear beats softmax from T = 16 (1.8 to 2.2 times as fast at"
        " 16)."
    )
    (line,) = answers(rows[:2], NAMES)
    assert (
        line == "On this machine, forward: linear does not beat softmax (0.45 to 0.55 times as fast"
        " at 8)."
    )


def test_intervals_that_overlap_are_no_verdict():
    """No mechanism is called faster, whatever the medians are."""
    for own in ((3.9, 4.6), (3.0, 4.05), (4.3, 6.0)):
        (line,) = answers([cell("softmax", 8, 4.0, 4.4), cell("linear", 8, *own)], NAMES)
        assert line == f"On this machine, forward: whether linear beats softmax, {CANNOT_TELL}."
    rows = [
        cell("softmax", 8, 4.0, 4.4),
        cell("linear", 8, 3.0, 4.1),
        cell("softmax", 16, 8.0, 8.1),
    ]
    assert overtaking_length([*rows, cell("linear", 16, 3.0, 3.1)], "forward", "linear") == 16


def test_a_pass_that_scatters_says_nothing_and_the_others_speak():
    rows = [cell("softmax", T, 1.0, 5.0) for T in (8, 16)] + [
        cell("linear", T, 0.1, 0.9) for T in (8, 16)
    ]
    rows += [cell("softmax", 8, 2.0, 2.1, "decode"), cell("linear", 8, 1.0, 1.1, "decode")]
    forward, decode = answers(rows, NAMES)
    assert forward == f"On this machine, forward: {CANNOT_TELL}."
    assert "linear beats softmax" in decode


def test_rows_without_rounds_have_their_deviation():
    old = {"median": 2.0, "deviation": 0.5}
    assert time_interval(old) == (1.5, 2.5)
    assert time_interval({"median": 2.0, "deviation": 9.0})[0] == 0.0


@pytest.mark.parametrize("faster", [0.5, 1.0, 2.0])
def test_on_a_busy_machine_nothing_wrong_is_said(faster, monkeypatch, tmp_path):
    """Every run is up to ten times too long, in stretches longer than a round."""
    for seed in range(20):
        noise = random.Random(seed)

        def times(recipe, shape, kind, mechanism, with_memory=True, noise=noise):
            slow = noise.choice([1.0, 1.0, 3.0, 10.0])
            true = 1.0 if mechanism == "softmax" else 1 / faster
            return [true * slow * noise.uniform(1.0, 1.2) for _ in range(3)], None

        monkeypatch.setattr(speed, "_run_times", times)
        recipe = Recipe(("softmax", "linear"), PASSES, (8, 16, 32), seconds=1e3, budget=1e3)
        done = {}
        for group in recipe.groups():
            done |= speed._measure_group(recipe, group, "cpu", done)
        said = " ".join(answers(list(done.values()), NAMES))
        if faster <= 1:
            assert "linear beats softmax" not in said, (seed, said)
        if faster >= 1:
            assert "does not beat" not in said, (seed, said)


def test_rounds_take_turns(monkeypatch):
    """Each mechanism is measured before one is repeated; a run as long as the budget is not."""
    asked = []

    def times(recipe, shape, kind, mechanism, with_memory=True):
        asked.append(mechanism)
        return [9.0 if mechanism == "flash" else 0.1], None

    monkeypatch.setattr(speed, "_run_times", times)
    recipe = Recipe(("softmax", "linear", "flash"), ("forward",), (8,))
    rows = speed._measure_group(recipe, next(recipe.groups()), "cpu", {})
    assert asked == ["softmax", "linear", "flash", "softmax", "linear", "softmax", "linear"]
    assert {cell[2]: row["runs"] for cell, row in rows.items()} == {
        "softmax": 3,
        "linear": 3,
        "flash": 1,
    }


def test_times_that_agree_beside_other_work_are_no_verdict():
    """A busy machine's time slices of 8.0 ms are the same for every mechanism."""
    rows = [cell("softmax", T, 7.97, 8.0, "decode") for T in (512, 8192)]
    rows += [cell("linear", T, 0.2, 0.21, "decode") for T in (512, 8192)]
    assert "linear beats softmax" in answers([{**row, "others": 0.02} for row in rows], NAMES)[0]
    assert answers([{**row, "others": 0.9} for row in rows], NAMES) == [
        f"On this machine, decode: {CANNOT_TELL}."
    ]


def test_load_that_rises_is_no_verdict():
    """Lengths measured beside other work are upper bounds only, though most of a pass was quiet."""
    rows = [
        {**cell(name, T, low, 1.1 * low), "others": 0.9 if T == 64 else 0.02}
        for T in (8, 16, 32, 64)
        for name, low in (("softmax", T), ("linear", T / 4))
    ]
    assert time_interval(rows[-1]) == (0.0, pytest.approx(17.6))
    assert overtaking_length(rows, "forward", "linear") is None
    assert answers(rows, NAMES) == [
        f"On this machine, forward: whether linear beats softmax, {CANNOT_TELL}."
    ]
    assert "linear beats softmax from T = 8" in answers(rows[:-2], NAMES)[0]
    slower = [{**row, "mechanism": NAMES[row["mechanism"] == "softmax"]} for row in rows]
    assert "does not beat" not in answers(slower, NAMES)[0]


def test_other_programs_are_compared_by_intervals():
    """With the least and the greatest ratio that they allow, or not at all."""
    names = ["softmax", "linear", "linear, onnxruntime"]
    rows = [cell("linear", T, T, 1.25 * T) for T in (8, 16)]
    rows += [cell("linear, onnxruntime", 8, 5.0, 6.0), cell("linear, onnxruntime", 16, 64.0, 80.0)]
    rows += [cell("linear", 8, 1.0, 9.0, "decode")]
    rows += [cell("linear, onnxruntime", 8, 1.0, 9.0, "decode")]
    assert answers(rows, names) == [
        "Times as fast as onnxruntime's operators: linear forward 0.5 (at 8) to 5; linear decode:"
        f" {CANNOT_TELL}."
    ]
    busy = [{**row, "others": 1.0} for row in rows]
    assert answers(busy, names) == [
        f"Times as fast as onnxruntime's operators: linear forward, linear decode: {CANNOT_TELL}."
    ]


@pytest.mark.parametrize("priority", [0, 15])
def test_the_load_of_other_processes_is_seen(priority):
    """Of those with low priority too."""
    busy = subprocess.Popen(["nice", "-n", str(priority), sys.executable, "-c", "while True: pass"])
    try:
        load = Load()
        time.sleep(1.5)
        assert load.busy_processors() > 0.25
    finally:
        busy.kill()
        busy.wait()
