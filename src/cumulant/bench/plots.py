"""What all pictures share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by the colour-blind as well, with darker ones of the same family, for up to eleven
# lines, which also differ by mark
PALETTE = (
    "#000000",
    "#999999",
    "#666666",
    "#E69F00",
    "#56B4E9",
    "#0072B2",
    "#004C7A",
    "#CC79A7",
    "#009E73",
    "#D55E00",
    "#8C6D1F",
)
SHAPES = ("o", "v", "^", "s", "D", "P", "X", "<", ">", "h", "*")


def pyplot() -> Any:
    """matplotlib, drawing to files; a clear error where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'cumulant[text]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    matplotlib.rcParams["svg.hashsalt"] = "cumulant"  # the same picture is the same file
    return plt


def add_legend(figure: Any, panels: Iterable[Any]) -> None:
    """Beside the panels, of all that any of them shows."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found = {**dict(zip(labels, handles, strict=True)), **found}
    figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False)


def save(figure: Any, folder: Path, name: str) -> str:
    """The figure as PNG and SVG; its name."""
    for path in (folder / f"{name}.png", folder / f"{name}.svg"):
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    return name
