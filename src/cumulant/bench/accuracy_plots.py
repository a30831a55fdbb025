"""The picture of `cumulant bench accuracy`."""

from __future__ import annotations

from pathlib import Path

from .folder import Row
from .plots import add_legend, pyplot, save

COLOURS = {"fp32": "#0072B2", "bf16": "#D55E00", "fp16": "#009E73", "fp64": "#000000"}
MARKS = {"reference": "x", "torch": "s", "native": "o", "one token at a time": "^"}


def draw(rows: list[Row], folder: Path) -> str:
    """Error by length: a panel for each operation, a colour for each dtype, a mark for each implementation."""
    plt = pyplot()
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    columns = min(3, len(operations))
    lines = -(-len(operations) // columns)
    size = (4 * columns + 2.6, 3.6 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for panel in axes.flat[len(operations) :]:
        panel.set_visible(False)
    for panel, operation in zip(axes.flat, operations):
        for dtype, colour in COLOURS.items():
            for impl, mark in MARKS.items():
                wanted = (operation, dtype, impl)
                own = [r for r in rows if (r["operation"], r["dtype"], r["implementation"]) == wanted]
                points = sorted((row["length"], max(row["error"], 1e-17)) for row in own)
                if points:
                    style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1, "fillstyle": "none"}
                    panel.plot(*zip(*points, strict=True), label=f"{dtype}, {impl}", **style)
        panel.set(xscale="log", yscale="log", title=operation, xlabel="tokens")
        panel.grid(alpha=0.3)
    figure.supylabel("error against float64")
    add_legend(figure, axes.flat)
    return save(figure, folder, "accuracy")
