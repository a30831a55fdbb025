"""The page of `cumulant compare`, from invented rows."""

import math

import pytest

from cumulant.bench.compare import report as compare_report
from cumulant.bench.compare.plots import _seeds
from cumulant.bench.compare.results import Mean, results
from cumulant.bench.redraw import redraw
from cumulant.bench.reports.folder import Folder

from .comparisons import Note


def made(ends):
    """Rows of runs with these results: (mechanism, rate, seed) -> bits per byte."""
    cost = {"row": "cost", "seconds": 1.0, "kept_bytes": 1, "state_bytes": 1, "differs": {}}
    names = dict.fromkeys(name for name, _, _ in ends)
    return [cost | {"mechanism": name} for name in names] + [
        {
            "row": "run",
            "mechanism": m,
            "learning_rate": rate,
            "seed": seed,
            "parameters": 1,
            "heldout": [[1, x]],
        }
        for (m, rate, seed), x in ends.items()
    ]


def test_a_run_that_diverged_is_no_best_rate():
    found = made(
        {("softmax", 1.0, 0): math.nan, ("softmax", 0.1, 0): 2.0, ("softmax", 0.01, 0): 3.0}
    )
    (result,) = results(found, "softmax")
    assert result.rate == 0.1
    assert not result.at_edge
    assert result.sweep[1.0] == math.inf


def drawn(found, tmp_path, settings):
    """The page of these rows."""
    text = {"row": "text", "bytes": 9, "heldout_bytes": 9, "steps": 1}
    shape = {
        "baseline": "softmax",
        "context": 4,
        "batch": 1,
        "accumulate": 1,
        "data": "x",
        "recipe": "tiny",
    }
    folder = Folder.start(str(tmp_path), "compare", shape | settings)
    folder.append(text, *found)
    redraw(str(tmp_path), Note())
    return (tmp_path / "report.md").read_text()


def test_a_seed_that_diverged_is_told(tmp_path):
    found = made(
        {("softmax", 0.1, seed): 2.0 for seed in range(3)}
        | {("far", 0.1, 0): 1.5, ("far", 0.1, 1): math.nan}
    )
    page = drawn(found, tmp_path, {})
    assert "| far | diverged | diverged | 0.1 | 2 |" in page
    assert "Different from softmax at 95% over the seeds: none." in page


def test_seeds_evaluated_at_other_steps_are_drawn_together():
    steps, values = _seeds([[(3, 4.0), (6, 1.0), (8, 1.0)], [(4, 2.0), (8, 0.0)]])
    assert steps.tolist() == [4, 8]
    assert values.tolist() == [[3.0, 1.0], [2.0, 0.0]]


def test_seeds_that_diverged_on_both_sides_are_told(tmp_path):
    ends = {("softmax", 0.1, 0): 2.0, ("softmax", 0.1, 1): 2.0, ("softmax", 0.1, 2): math.nan}
    ends |= {("far", 0.1, 0): 2.0, ("far", 0.1, 1): math.inf, ("far", 0.1, 2): 2.0}
    assert "| far | diverged | diverged | 0.1 | 3 |" in drawn(made(ends), tmp_path, {})


def test_what_a_context_is_worth_comes_first(tmp_path):
    """Beyond the training length against within it; the farthest span that was read within it."""
    found = made({("softmax", 0.1, 0): 2.0, ("far", 0.1, 0): 2.0})
    for name, beyond, second in (("softmax", 3.0, 1.0), ("far", 2.0, 1.5)):
        row = {"row": "context", "mechanism": name, "learning_rate": 0.1, "seed": 0}
        contexts = [[32, 64, 2.5, 100], [64, 128, 2.0, 100], [128, 256, beyond, 100]]
        copies = [[32, second, 2.0, 48], [64, 0.1, 2.0, 48]]  # 64 + 2 * 48 is more than 128
        found.append({**row, "contexts": contexts, "copying": copies})
    page = drawn(found, tmp_path, {"context": 128})
    assert (
        "Change of the loss on the same tokens, from windows of 128 tokens as in training to 256:"
        " softmax +1.000, far +0.000." in page
    )
    assert (
        "Loss on a span that is repeated after 32 tokens, relative to one that is not:"
        " softmax 50%, far 75%." in page
    )


def test_longer_windows_are_told_by_steps_of_four(tmp_path):
    """Up to 64 times the length of training, and the longest in any case."""
    found = made({("softmax", 0.1, 0): 2.0})
    contexts = [[2**i, 2 ** (i + 1), 2.0 + 0.1 * max(i - 6, 0), 100] for i in range(5, 13)]
    row = {"row": "context", "mechanism": "softmax", "learning_rate": 0.1, "seed": 0}
    found.append({**row, "contexts": contexts, "copying": []})
    page = drawn(found, tmp_path, {"context": 128})
    told = [line for line in page.splitlines() if "Change of the loss" in line]
    ends = ("512: softmax +0.200.", "2,048: softmax +0.400.", "8,192: softmax +0.600.")
    assert len(told) == 3
    assert all(line.endswith(end) for line, end in zip(told, ends, strict=True))


def test_mechanisms_that_only_diverged_are_told(tmp_path):
    found = made(
        {("softmax", 1.0, 0): math.nan, ("softmax", 0.1, 0): math.inf, ("far", 0.1, 0): math.nan}
    )
    page = drawn(found, tmp_path, {})
    assert "softmax diverged, far diverged" in page


def test_what_is_apart_and_what_is_at_the_end_of_the_sweep():
    ends = {("softmax", 0.1, seed): 2.0 + 0.1 * seed for seed in range(3)}
    ends |= {("near", 0.1, seed): 2.0 + 0.1 * seed + (0.01, -0.01, 0.02)[seed] for seed in range(3)}
    ends |= {("far", 0.1, seed): 2.2 + 0.1 * seed + (0.01, -0.01, 0.02)[seed] for seed in range(3)}
    ends |= {("far", 1.0, 0): 4.0}
    found = {r.mechanism: r for r in results(made(ends), "softmax")}
    assert not found["near"].difference.differs_from_zero()
    assert found[
        "far"
    ].difference.differs_from_zero()  # paired by seed: the seeds' own spread does not count
    assert found["far"].final.error > found["far"].difference.error
    assert found["far"].at_edge
    assert not found["near"].at_edge  # there was nothing to sweep
    other = {
        r.mechanism: r for r in results(made(ends), "far")
    }  # wherever the baseline stands among the rows
    assert other["softmax"].difference.value == pytest.approx(-found["far"].difference.value)
    assert other["far"].difference is None
    assert not Mean.from_values([0.5]).differs_from_zero()
    settings = {"baseline": "softmax", "context": 4, "batch": 1, "accumulate": 1, "data": "x"}
    answer = compare_report._answer_lines(list(found.values()), settings, {"steps": 10})
    assert answer[1] == "Different from softmax at 95% over the seeds: far (+0.2067)."
