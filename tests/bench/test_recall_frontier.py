"""Which mechanism is best at each size of the state, and whether the seeds can tell."""

from __future__ import annotations

import statistics

import pytest

from cumulant.bench.recall import plots, sweep
from cumulant.bench.recall.best import best_rates
from cumulant.bench.recall.frontier import BUDGETS, best_within, owners, steps
from cumulant.bench.recall.report import report

from .test_recall import TINY, row


def rows_of(mechanism, kilobytes, accuracies, width=16, conv=True):
    return [
        row(mechanism, 1e-3, seed, x, width, state_bytes=int(1000 * kilobytes), conv=conv)
        for seed, x in enumerate(accuracies)
    ]


ROWS = [
    *rows_of("linear", 3, [0.20, 0.22, 0.21], 16),
    *rows_of("linear", 12, [0.50, 0.52, 0.51], 32),
    *rows_of("linear", 50, [0.40, 0.42, 0.41], 64),  # worse, though it has more
    *rows_of("taylor-8", 8, [0.60, 0.62, 0.61], 16),
    *rows_of("taylor-8", 30, [0.90, 0.99, 0.96], 32),
    *rows_of("softmax", 33, [0.97, 0.98, 0.99], 16),
    *rows_of("softmax", 500, [1.0, 1.0, 1.0], 64),
]


def test_a_mechanism_counts_from_the_state_that_it_needs():
    found = best_rates(ROWS)
    names = {b: [(x.mechanism, x.width) for x in best_within(found, b)] for b in BUDGETS}
    assert names == {
        4: [("linear", 16)],
        8: [("taylor-8", 16), ("linear", 16)],
        16: [("taylor-8", 16), ("linear", 32)],
        32: [("taylor-8", 32), ("linear", 32)],
        64: [("softmax", 16), ("taylor-8", 32), ("linear", 32)],
        128: [("softmax", 16), ("taylor-8", 32), ("linear", 32)],
    }
    assert best_within(found, 2.9) == []


def test_intervals_that_overlap_are_not_told_apart():
    found = {owner.budget: owner for owner in owners(best_rates(ROWS))}
    assert [(b, o.best.mechanism) for b, o in found.items()] == [
        (4, "linear"), (8, "taylor-8"), (16, "taylor-8"), (32, "taylor-8"), (64, "softmax"),
        (128, "softmax"),
    ]  # fmt: skip
    assert found[4].second is None
    assert found[4].alike == []
    assert found[16].second.mechanism == "linear"
    assert found[16].alike == []  # 0.61 ± 0.025 and 0.51 ± 0.025
    assert [b.mechanism for b in found[64].alike] == ["taylor-8"]


def test_an_interval_is_student_s():
    (found,) = best_rates(rows_of("linear", 3, [0.2, 0.3, 0.7]))
    half = 4.30 * statistics.stdev([0.2, 0.3, 0.7]) / 3**0.5
    assert found.interval == pytest.approx((0.0, min(0.4 + half, 1.0)))
    (found,) = best_rates(rows_of("linear", 3, [0.50, 0.51, 0.52]))
    assert found.interval == pytest.approx(
        (0.51 - 4.30 * 0.01 / 3**0.5, 0.51 + 4.30 * 0.01 / 3**0.5)
    )


def test_one_seed_can_tell_nothing():
    """Neither of the best one, nor of any other."""
    one, three = rows_of("linear", 3, [0.2]), rows_of("softmax", 3, [0.9, 0.91, 0.92])
    for found in (best_rates(one), best_rates(one + three)):
        assert {owner.alike for owner in owners(found)} == {None}


def test_a_line_never_falls():
    found = best_rates(ROWS)
    line = steps([b for b in found if b.mechanism == "linear"])
    assert [(b.width, round(b.hardest_accuracy, 2)) for b in line] == [(16, 0.21), (32, 0.51)]


def test_the_page_says_who_is_best(tmp_path, monkeypatch):
    """The picture has a line and a band for each mechanism, up to the largest budget."""
    drawn = {}
    real = plots.add_legend

    def keep(panel, title):
        drawn.setdefault(panel.get_xlabel(), []).append(panel)
        real(panel, title)

    monkeypatch.setattr(plots, "add_legend", keep)
    folder = sweep.Folder.start(str(tmp_path), "recall", sweep.asdict(TINY))
    folder.append(*ROWS, *rows_of("softmax", 3, [0.3, 0.3, 0.3], conv=False))
    page = report(folder)
    assert page.answer[1] == (
        "Best at 8 pairs by size of the state, behind a short convolution: up to 4 kB linear (21%),"
        " 8 kB taylor-8 (61%), 16 kB taylor-8 (61%), 32 kB taylor-8 (95%), 64 kB softmax (98%),"
        " 128 kB softmax (98%)."
    )
    text = (tmp_path / "report.md").read_text()
    assert (
        "| 64 kB | softmax | 16 | 98.0% (95.5% to 100.0%) | 33.0 | taylor-8 95.0% | taylor-8 |"
        in text
    )
    assert "| 16 kB | taylor-8 | 16 | 61.0% (58.5% to 63.5%) | 8.0 | linear 51.0% | none |" in text
    panel, alone = drawn["state of at most, kB"]
    lines = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
    assert lines == {"linear": [3, 12, 128], "taylor-8": [8, 30, 128], "softmax": [33, 128]}
    assert (len(panel.collections), len(alone.collections)) == (3, 1)
