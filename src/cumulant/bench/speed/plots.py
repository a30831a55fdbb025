"""Pictures of `cumulant bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..reports.folder import Row
from ..reports.palette import Style, styles_for
from ..reports.plots import add_legend, label_ticks, panel_column, save_figure
from .subjects import SUBJECTS
from .verdicts import BASELINE, measured_interval, overtaking_length


def _styles(mechanisms: list[str]) -> dict[str, Style]:
    return styles_for(mechanisms, {name: subject.style for name, subject in SUBJECTS.items()})


def _draw_lines(
    rows: list[Row], mechanisms: list[str], field: str, unit: float, label: str
) -> tuple[Any, dict[str, Any]]:
    """A panel for each pass whose rows have the field.

    It has a line for each mechanism, by length, in units of `unit`.
    """
    styles = _styles(mechanisms)
    kinds = list(dict.fromkeys(row["pass"] for row in rows if row.get(field)))
    figure, axes = panel_column(len(kinds))
    panels = dict(zip(kinds, axes, strict=True))
    for kind, panel in panels.items():
        for name in mechanisms:
            points = _points(rows, kind, name, field)
            if points:
                panel.plot(
                    [T for T, _ in points],
                    [x / unit for _, x in points],
                    label=name,
                    **styles[name].line_options(),
                )
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        lengths = sorted({row["length"] for row in rows if row["pass"] == kind and row.get(field)})
        label_ticks(panel.xaxis, lengths[:: -(-len(lengths) // 4)], "{:,}")
    return figure, panels


def _save(figure: Any, panels: dict[str, Any], folder: Path, name: str) -> str:
    for kind, panel in panels.items():
        add_legend(panel, kind)
    return save_figure(figure, folder, name)


def _points(rows: list[Row], kind: str, mechanism: str, field: str) -> list[tuple[int, float]]:
    """Length and value, by length, of a mechanism's rows that have the field."""
    cells = (
        row
        for row in rows
        if (row["pass"], row["mechanism"]) == (kind, mechanism) and row.get(field)
    )
    return sorted((row["length"], row[field]) for row in cells)


def draw_times(rows: list[Row], mechanisms: list[str], folder: Path) -> str:
    """Milliseconds by length, with bands of their intervals.

    A ring marks where a mechanism becomes faster than softmax.
    """
    styles = _styles(mechanisms)
    figure, panels = _draw_lines(rows, mechanisms, "median", 1e-3, "milliseconds")
    ring = {"marker": "o", "fillstyle": "none", "linestyle": ""}
    for kind, panel in panels.items():
        overtaking = []
        for name in mechanisms:
            points = _points(rows, kind, name, "median")
            _draw_band(panel, rows, kind, name, styles[name].colour)
            ahead = None if name == BASELINE or not points else overtaking_length(rows, kind, name)
            if ahead is not None and ahead != points[0][0]:
                overtaking.append((ahead, dict(points)[ahead] * 1e3, styles[name].colour))
        for length, time, colour in overtaking:
            panel.plot([length], [time], color=colour, markersize=12, **ring)
        if overtaking:
            panel.plot([], [], color="#444444", markersize=8, label="overtakes softmax", **ring)
    return _save(figure, panels, folder, "times")


def _draw_band(panel: Any, rows: list[Row], kind: str, mechanism: str, colour: str) -> None:
    found = {
        row["length"]: [1e3 * seconds for seconds in measured_interval(row)]
        for row in rows
        if (row["pass"], row["mechanism"]) == (kind, mechanism) and row.get("median")
    }
    lows, highs = ([found[T][end] for T in sorted(found)] for end in (0, 1))
    panel.fill_between(sorted(found), lows, highs, color=colour, alpha=0.2, linewidth=0)


def draw_memory(rows: list[Row], mechanisms: list[str], folder: Path) -> str:
    """MiB by length."""
    figure, panels = _draw_lines(rows, mechanisms, "peak_bytes", 2**20, "most memory held, MiB")
    return _save(figure, panels, folder, "memory")
