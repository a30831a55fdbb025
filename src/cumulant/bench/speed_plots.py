"""Pictures of `cumulant bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .folder import Row
from .plots import SHAPES, add_legend, pyplot, save
from .verdicts import BASELINE, crossing

COLOURS = {
    "softmax": "#000000", "naive softmax": "#999999", "linear": "#E69F00", "taylor": "#0072B2", "flash": "#009E73",
    "elita": "#CC79A7",
}  # fmt: skip


def _styles(mechanisms: list[str]) -> dict[str, dict[str, Any]]:
    """An implementation has its mechanism's colour and mark, and a broken line."""

    def style(name: str) -> dict[str, Any]:
        mechanism, _, impl = name.partition(", ")
        marker = SHAPES[list(COLOURS).index(mechanism)]
        line, fill = ("--", "none") if impl else ("-", "full")
        return {"color": COLOURS[mechanism], "marker": marker, "markersize": 5, "linestyle": line, "fillstyle": fill}

    return {name: style(name) for name in mechanisms}


def _drawn(rows: list[Row], mechanisms: list[str], value: str, unit: float, label: str) -> tuple[Any, dict[str, Any]]:
    """A panel for each pass in which the value was measured, with a line for each mechanism, in `unit`s by length."""
    plt, styles = pyplot(), _styles(mechanisms)
    kinds = list(dict.fromkeys(row["pass"] for row in rows if row.get(value)))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.6 * len(kinds) + 1.6, 4.4), layout="constrained", squeeze=False
    )
    panels = dict(zip(kinds, axes[0], strict=True))
    for kind, panel in panels.items():
        for name in mechanisms:
            points = _points(rows, kind, name, value)
            if points:
                panel.plot([T for T, _ in points], [x / unit for _, x in points], label=name, **styles[name])
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=kind)
        lengths = sorted({row["length"] for row in rows if row["pass"] == kind and row.get(value)})
        ticks = lengths[:: -(-len(lengths) // 4)]
        panel.set_xticks(ticks, [f"{T:,}" for T in ticks])
        panel.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    add_legend(figure, panels.values())
    return figure, panels


def _points(rows: list[Row], kind: str, mechanism: str, value: str) -> list[tuple[int, float]]:
    cells = (row for row in rows if (row["pass"], row["mechanism"]) == (kind, mechanism) and row.get(value))
    return sorted((row["length"], row[value]) for row in cells)


def draw_times(rows: list[Row], mechanisms: list[str], folder: Path) -> str:
    """Milliseconds by length, with the lengths from which each mechanism beats softmax."""
    figure, panels = _drawn(rows, mechanisms, "median", 1e-3, "milliseconds")
    for kind, panel in panels.items():
        for name in mechanisms:
            points = _points(rows, kind, name, "median")
            ahead = None if name == BASELINE or not points else crossing(rows, kind, name)
            if ahead is not None and ahead != points[0][0]:
                ring = {"marker": "o", "markersize": 12, "fillstyle": "none", "color": COLOURS[name.partition(", ")[0]]}
                panel.plot([ahead], [dict(points)[ahead] * 1e3], linestyle="", **ring)
    return save(figure, folder, "times")


def draw_memory(rows: list[Row], mechanisms: list[str], folder: Path) -> str:
    """MiB by length."""
    figure, _ = _drawn(rows, mechanisms, "peak_bytes", 2**20, "most memory held, MiB")
    return save(figure, folder, "memory")
