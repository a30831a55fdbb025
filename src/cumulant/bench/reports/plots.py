"""What all pictures share.

They have one panel a row, so that they can be read on a phone, and a legend above each panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# inches
WIDTH = 4.8  # of a picture, so that letters of 9 points are readable on a phone
LEGEND_WIDTH = 4.0  # from the left end of the axis
HANDLE = 0.6  # a line in the legend, with the space beside it
LETTER = 0.075  # a letter of the legend, on average
LEGEND_LINE = 0.19
OTHER_HEIGHT = 0.75  # the title above a panel and the axis below it


def pyplot() -> Any:
    """matplotlib, drawing to files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'cumulant[text]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    matplotlib.rcParams["svg.hashsalt"] = "cumulant"  # the same picture is the same file
    return plt


def panel_column(count: int, *, height: float = 2.3, **options: Any) -> tuple[Any, list[Any]]:
    """A figure and its panels, one below another.

    height: of a panel in inches. options: for ``subplots``.
    """
    figure, axes = pyplot().subplots(
        count,
        1,
        figsize=(WIDTH, (height + OTHER_HEIGHT) * count),
        layout="constrained",
        squeeze=False,
        **options,
    )
    panels = list(axes[:, 0])
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def add_legend(panel: Any, title: str | None = None) -> None:
    """Put the title and the names of the panel's lines above it, after the lines are drawn."""
    handles, labels = panel.get_legend_handles_labels()
    columns = _legend_columns(labels)
    panel.legend(
        handles,
        labels,
        title=title,
        title_fontproperties={"weight": "bold", "size": 10},
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        columnspacing=1.0,
        frameon=False,
        fontsize=9,
        ncols=columns,
    )
    width, height = panel.figure.get_size_inches()
    panel.figure.set_size_inches(width, height + LEGEND_LINE * math.ceil(len(labels) / columns))


def _legend_columns(labels: Sequence[str]) -> int:
    """The most columns that fit, filled evenly."""
    for columns in range(len(labels), 1, -1):
        lines = math.ceil(len(labels) / columns)
        longest = [max(map(len, labels[i : i + lines])) for i in range(0, len(labels), lines)]
        if (
            len(longest) == columns
            and sum(HANDLE + LETTER * letters for letters in longest) <= LEGEND_WIDTH
        ):
            return columns
    return 1


def label_ticks(axis: Any, ticks: Sequence[float], form: str = "{:g}") -> None:
    """Show ticks at these values only.

    axis: ``panel.xaxis`` or ``panel.yaxis``, after its scale is set.
    """
    axis.set_ticks(ticks, [form.format(tick) for tick in ticks])
    axis.set_minor_locator(pyplot().matplotlib.ticker.NullLocator())


def save_figure(
    figure: Any, folder: Path, name: str, suffixes: Sequence[str] = (".png", ".svg")
) -> str:
    """Write the figure as PNG and SVG, or with other suffixes, and return its name."""
    for path in (folder / f"{name}{suffix}" for suffix in suffixes):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    pyplot().close(figure)
    return name
