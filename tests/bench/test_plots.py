"""Every line in a picture has its name: in the panel's own legend, or beside all panels."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from cumulant.bench import accuracy_plots, approximation_plots, compare_plots, recall_plots, speed_plots
from cumulant.bench.approximation import ORDERS, SIZES, Case
from cumulant.bench.reports import draw

REPORTS = Path(__file__).parents[2] / "docs" / "reports"


def check(figure):
    beside = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    for panel in figure.axes:
        own = panel.get_legend()
        named = beside | ({text.get_text() for text in own.get_texts()} if own else set())
        drawn = set(panel.get_legend_handles_labels()[1])
        assert drawn <= named, panel.get_title()
        if panel.get_visible() and panel.lines:
            assert drawn


@pytest.fixture
def figures(monkeypatch):
    found = []
    for module in (accuracy_plots, approximation_plots, compare_plots, recall_plots, speed_plots):
        real = module.save

        def note(figure, folder, name, real=real):
            found.append(name)
            check(figure)
            return real(figure, folder, name)

        monkeypatch.setattr(module, "save", note)
    return found


@pytest.mark.parametrize(
    ("report", "names"),
    [("bench", {"times", "memory"}), ("recall", {"recall_state", "recall_pairs"}), ("accuracy", {"accuracy"})],
)
def test_reports(report, names, tmp_path, figures):
    shutil.copy(REPORTS / report / "rows.jsonl", tmp_path)
    draw(str(tmp_path), Console(file=io.StringIO()))
    assert set(figures) == names


def test_a_line_that_only_a_later_panel_has(figures, tmp_path):
    rows = [
        {"operation": "linear", "dtype": "fp32", "implementation": "torch", "length": 8, "error": 1e-7},
        {"operation": "elita", "dtype": "bf16", "implementation": "native", "length": 8, "error": 1e-3},
    ]
    accuracy_plots.draw(rows, tmp_path)
    assert figures == ["accuracy"]


def test_approximation(figures, tmp_path):
    fields = {"kind": "random", "order": 1, "size": 1.0, "head_dim": 16, "alpha": None, "error": 0.1, "where": None}
    known = Case.__dataclass_fields__
    cases = []
    for order in ORDERS:
        for kind, where in (("random", None), ("normalised", None), ("trained", "softmax, layer 0")):
            for size in SIZES:
                made = {**fields, "order": order, "kind": kind, "where": where, "size": size}
                cases.append(Case(**{name: value for name, value in made.items() if name in known}))
    approximation_plots.draw_error(cases, tmp_path)
    approximation_plots.draw_exponential(tmp_path)
    assert figures == ["error", "exponential"]
