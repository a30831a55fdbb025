"""Pictures: every line has its name above its own panel, and all can be read on a phone."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from cumulant.bench.accuracy import plots as accuracy_plots
from cumulant.bench.approximation import plots as approximation_plots
from cumulant.bench.approximation.cases import ORDERS, SIZES, Case
from cumulant.bench.compare import plots as compare_plots
from cumulant.bench.recall import plots as recall_plots
from cumulant.bench.redraw import redraw
from cumulant.bench.speed import plots as speed_plots

REPORTS = Path(__file__).parents[2] / "docs" / "reports"
PHONE = 358  # pixels that a picture has on a screen of 390
MODULES = (accuracy_plots, approximation_plots, compare_plots, recall_plots, speed_plots)


def width(svg):
    """In points."""
    return float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1])


def colours(svg):
    return set(re.findall(r"#[0-9a-f]{6}", svg))


def check_legends(figure):
    """Each panel names its own lines, above itself and within the picture."""
    renderer = figure.canvas.get_renderer()
    for panel in figure.axes:
        drawn = panel.get_legend_handles_labels()[1]
        assert drawn
        assert {text.get_text() for text in panel.get_legend().get_texts()} == set(drawn)
        legend, box = (x.get_window_extent(renderer) for x in (panel.get_legend(), panel))
        assert legend.y0 >= box.y1 - 1
        assert legend.x1 <= figure.bbox.x1 * 1.02


def check_columns(figure):
    """Panels stand one below another."""
    left = {round(panel.get_position().x0, 3) for panel in figure.axes}
    assert len(left) == 1


def check_letters(figure, svg):
    """No letter is smaller than 8 pixels where the picture is as wide as a phone."""
    sizes = [
        text.get_fontsize()
        for text in figure.findobj(lambda x: hasattr(x, "get_fontsize"))
        if text.get_text()
    ]
    assert min(sizes) * PHONE / width(svg) >= 8


@pytest.fixture
def figures(monkeypatch):
    found = []
    for module in MODULES:
        real = module.save_figure

        def note(figure, folder, name, real=real):
            found.append(name)
            figure.draw_without_rendering()
            check_legends(figure)
            check_columns(figure)
            real(figure, folder, name)
            check_letters(figure, (folder / f"{name}.svg").read_text())
            return name

        monkeypatch.setattr(module, "save_figure", note)
    return found


@pytest.mark.parametrize(
    ("report", "names"),
    [
        ("bench", {"times", "memory"}),
        pytest.param("blog", {"times", "memory"}, marks=pytest.mark.slow),
        ("recall", {"recall_state", "recall_pairs", "recall_frontier"}),
        pytest.param("accuracy", {"accuracy"}, marks=pytest.mark.slow),
        ("long", {f"compare_{name}" for name in ("curves", "sweep", "contexts", "copying")}),
    ],
)
def test_reports(report, names, tmp_path, figures):
    shutil.copy(REPORTS / report / "rows.jsonl", tmp_path)
    redraw(str(tmp_path), Console(file=io.StringIO()))
    assert set(figures) == names


@pytest.mark.parametrize("name", sorted({path.parent.name for path in REPORTS.rglob("*.svg")}))
def test_pictures_in_the_documentation_are_drawn_as_now(name, tmp_path):
    """They have the colours and the width of the pictures that `cumulant report` draws today."""
    shutil.copy(REPORTS / name / "rows.jsonl", tmp_path)
    redraw(str(tmp_path), Console(file=io.StringIO()))
    for picture in (REPORTS / name).glob("*.svg"):
        kept, new = (path.read_text() for path in (picture, tmp_path / picture.name))
        assert colours(kept) == colours(new), picture
        assert width(kept) == pytest.approx(width(new), rel=0.02), picture


def test_a_line_that_only_a_later_panel_has(figures, tmp_path):
    rows = [
        {
            "operation": "linear",
            "dtype": "fp32",
            "implementation": "torch",
            "length": 8,
            "error": 1e-7,
        },
        {
            "operation": "elita",
            "dtype": "bf16",
            "implementation": "native",
            "length": 8,
            "error": 1e-3,
        },
    ]
    accuracy_plots.draw_errors(rows, tmp_path)
    assert figures == ["accuracy"]


def test_approximation(figures, tmp_path):
    fields = {
        "kind": "random",
        "order": 1,
        "size": 1.0,
        "head_dim": 16,
        "alpha": None,
        "error": 0.1,
        "where": None,
    }
    known = Case.__dataclass_fields__
    cases = []
    for order in ORDERS:
        for kind, where in (
            ("random", None),
            ("normalised", None),
            ("trained", "softmax, layer 0"),
        ):
            for size in SIZES:
                made = {**fields, "order": order, "kind": kind, "where": where, "size": size}
                cases.append(Case(**{name: value for name, value in made.items() if name in known}))
    approximation_plots.draw_error(cases, tmp_path)
    approximation_plots.draw_exponential(tmp_path)
    assert figures == ["error", "exponential"]
