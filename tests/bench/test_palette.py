"""A mechanism is one entry, with its style; it looks the same in every picture."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cumulant.bench.compare import recipes
from cumulant.bench.dtypes import DTYPES
from cumulant.bench.recall import mechanisms
from cumulant.bench.redraw import redraw
from cumulant.bench.reports.palette import BLACK, BLUE, PALETTE, Style, by_name, styles_for
from cumulant.bench.speed import measure, plots
from cumulant.bench.speed.recipes import Recipe
from cumulant.bench.speed.subjects import SUBJECTS, Linear, Softmax

TABLES = (
    {name: subject.style for name, subject in SUBJECTS.items()},
    mechanisms.STYLES,
    recipes.STYLES,
)


def test_a_colour_has_one_marker():
    """And the other way round, so that lines are told apart without colours."""
    styles = {*PALETTE, *(style for table in TABLES for style in table.values())}
    pairs = {(style.colour, style.marker) for style in styles}
    assert (
        len(pairs) == len({colour for colour, _ in pairs}) == len({marker for _, marker in pairs})
    )
    assert {dtype.colour for dtype in DTYPES.values()} <= {style.colour for style in PALETTE}


@pytest.mark.parametrize("name", sorted({name for table in TABLES for name in table}))
def test_a_mechanism_looks_the_same_everywhere(name):
    assert len({table[name] for table in TABLES if name in table}) == 1


def test_lines_of_one_picture_differ():
    assert all(len(set(table.values())) == len(table) for table in TABLES[:2])
    assert all(
        mechanism.style for recipe in recipes.RECIPES.values() for mechanism in recipe.mechanisms
    )


def test_a_mechanism_without_a_style_is_no_mechanism():
    """It fails where it is defined, not after all has been measured."""
    with pytest.raises(TypeError, match="style"):
        Linear("new")
    with pytest.raises(TypeError, match="style"):
        mechanisms.Mechanism("new", mixer="linear")
    with pytest.raises(ValueError, match="'old' and 'new' share"):
        by_name([Softmax("old", BLACK), Linear("new", BLACK)])
    with pytest.raises(ValueError, match="'old' is defined twice"):
        by_name([Softmax("old", BLACK), Linear("old", BLUE)])
    two = (
        recipes.Mechanism("a", "linear", style=BLUE),
        recipes.Mechanism("b", "taylor", style=BLUE),
    )
    with pytest.raises(ValueError, match="style: two of a, b share one"):
        recipes.Comparison(two, (1e-3,), 8, 1, 1, 1000, 8, 1)


def test_a_new_mechanism_is_one_entry(tmp_path, monkeypatch):
    """From the measurement to the page, and drawn in its own style."""
    style = PALETTE[-1]
    monkeypatch.setitem(SUBJECTS, "new", Linear("new", style))
    drawn = []
    monkeypatch.setattr(plots, "add_legend", lambda panel, title: drawn.extend(panel.lines))
    recipe = Recipe(
        ("softmax", "new"), ("forward",), (8, 16), heads=1, dim=8, repeats=1, budget=0.01
    )
    console = Console(file=io.StringIO())
    folder = measure.run(
        recipe, str(tmp_path), device="cpu", threads=0, force=False, console=console
    )
    assert {row["mechanism"] for row in folder.rows()} == {"softmax", "new"}
    looks = {line.get_label(): (line.get_color(), line.get_marker()) for line in drawn}
    assert looks["new"] == (style.colour, style.marker)
    assert "new" in (tmp_path / "report.md").read_text()


def test_names_that_nobody_knows_get_free_styles():
    known = {"a": PALETTE[0], "b": PALETTE[1]}
    names = ["a", "new", "b", *(f"new {i}" for i in range(30))]
    found = styles_for(names, known)
    assert list(found) == names
    assert found["a"] == PALETTE[0]
    assert found["new"] == PALETTE[2]
    assert len(set(found.values())) == len(names)
    assert (
        len(styles_for(map(str, range(1000)), known)) == 1000
    )  # there are not so many, but that is no error
    assert isinstance(found["new 29"], Style)


HEADERS = {
    "bench": {"mechanisms": ["softmax", "mamba"], "passes": ["forward"], "batch": 1, "heads": 1,
    "dim": 8,
              "dtype": "fp32", "causal": True, "device": "cpu", "threads": 1},
    "recall": {"length": 128},
    "bench accuracy": {},
}  # fmt: skip
ROWS = {
    "bench": {"length": 8, "pass": "forward", "status": "measured", "median": 1.0,
    "deviation": 0.1, "low": 0.9,
              "high": 1.1, "peak_bytes": 100},
    "recall": {"conv": True, "width": 8, "learning_rate": 0.1, "seed": 0, "accuracy": {"2": 0.5},
    "state_bytes": 9,
               "parameters": 9, "seconds": 1.0},
    "bench accuracy": {"operation": "mamba", "length": 8, "dtype": "fp8", "error": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_another_version_are_drawn(kind, tmp_path):
    """With mechanisms, dtypes and implementations that this version does not measure."""
    field = "implementation" if kind == "bench accuracy" else "mechanism"
    rows = [{field: name, **ROWS[kind]} for name in ("softmax", "mamba")]
    lines = [{"kind": kind, "settings": HEADERS[kind], "environment": {}}, *rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    redraw(str(tmp_path), Console(file=io.StringIO()))
    assert "mamba" in (tmp_path / "report.md").read_text()


def test_folders_keep_no_styles():
    """A comparison that an earlier version began goes on."""
    for recipe in recipes.RECIPES.values():
        settings = recipe.settings()
        assert all(
            set(mechanism) == {"name", "preset", "fields"} for mechanism in settings["mechanisms"]
        )
        json.dumps(settings)
