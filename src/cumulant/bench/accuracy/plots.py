"""The picture of `cumulant bench accuracy`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..dtypes import DTYPES
from ..reports.folder import Row
from ..reports.palette import BLACK, GREY
from ..reports.plots import add_legend, panel_column, save_figure
from .subjects import IMPLEMENTATIONS


def draw_errors(rows: list[Row], folder: Path) -> str:
    """Error by length, in a panel for each operation.

    Colours are dtypes, and markers are implementations.
    """
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure, panels = panel_column(len(operations), sharey=True)
    for panel, operation in zip(panels, operations, strict=True):
        points: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if row["operation"] == operation:
                line = points.setdefault((row["dtype"], row["implementation"]), [])
                line.append((row["length"], max(row["error"], 1e-17)))
        for (dtype, implementation), line in points.items():
            style = {"color": _colour(dtype), "marker": _marker(implementation), "linewidth": 1}
            panel.plot(*zip(*sorted(line), strict=True), markersize=4, fillstyle="none", **style)
        _name_colours_and_markers(panel, points)
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="error against float64")
        add_legend(panel, operation)
    return save_figure(figure, folder, "accuracy")


def _name_colours_and_markers(panel: Any, lines: Iterable[tuple[str, str]]) -> None:
    dtypes, implementations = (dict.fromkeys(names) for names in zip(*lines, strict=True))
    for dtype in dtypes:
        panel.plot([], [], color=_colour(dtype), label=dtype)
    for implementation in implementations:
        label = (
            IMPLEMENTATIONS[implementation].label
            if implementation in IMPLEMENTATIONS
            else implementation
        )
        style = {"marker": _marker(implementation), "color": BLACK.colour, "fillstyle": "none"}
        panel.plot([], [], linestyle="", label=label, **style)


# rows of another version may have a dtype or an implementation that this one does not know


def _colour(dtype: str) -> str:
    return DTYPES[dtype].colour if dtype in DTYPES else GREY.colour


def _marker(implementation: str) -> str:
    return (
        IMPLEMENTATIONS[implementation].marker if implementation in IMPLEMENTATIONS else GREY.marker
    )
