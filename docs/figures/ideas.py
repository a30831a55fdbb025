"""Draws three pictures of ideas, as SVG beside this file.

- whole_split_step.svg: one call, any split, and steps give the same numbers
- chunk_walk.svg: how the native kernels walk the chunks of a sequence
- mixer_block.svg: a block of the language model and its mixer

    python docs/figures/ideas.py
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from cumulant.bench.reports import palette

matplotlib.rcParams["svg.hashsalt"] = "cumulant"  # same picture, same file
matplotlib.rcParams["font.size"] = 11

BLACK, ORANGE = palette.BLACK.colour, palette.ORANGE.colour
BLUE, GREEN = palette.BLUE.colour, palette.GREEN.colour
PALE = {
    ORANGE: "#F9E4B5",
    BLUE: "#BFDCEE",
    GREEN: "#BFE6DB",
    BLACK: "#EEEEEE",
}


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure; one unit of its axis is a hundredth of its width."""
    size = (4.8, 4.8 * height / width)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axis.axis("off")
    return figure, axis


def box(
    axis: Any, x: float, y: float, w: float, h: float, **style: Any
) -> None:
    """A rounded box with its text in the middle."""
    colour, text = style.pop("colour", BLACK), style.pop("text", "")
    shape = FancyBboxPatch(
        (x, y),
        w,
        h,
        boxstyle="round,pad=0,rounding_size=1",
        facecolor=PALE[colour],
        edgecolor=colour,
    )
    axis.add_patch(shape)
    axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", **style)


def cell(
    axis: Any, x: float, y: float, w: float, h: float, colour: str
) -> None:
    """A rectangle in a grid."""
    face = PALE[colour]
    axis.add_patch(
        Rectangle((x, y), w, h, facecolor=face, edgecolor="white", lw=0.5)
    )


def arrow(
    axis: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    **style: Any,
) -> None:
    """An arrow, black unless `color` says otherwise."""
    style = {"color": BLACK, "lw": 1.1, "mutation_scale": 9, **style}
    axis.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", shrinkA=0, shrinkB=0, **style
        )
    )


def label(axis: Any, x: float, y: float, text: str, **style: Any) -> None:
    """A text whose middle is at (x, y), unless `ha` says otherwise."""
    axis.text(x, y, text, **{"ha": "center", "va": "center", **style})


def save_figure(figure: Any, name: str) -> None:
    path = Path(__file__).with_name(f"{name}.svg")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_whole_split_step() -> None:
    """Three rows of the same twelve tokens, cut at different tokens."""
    figure, axis = canvas(100, 86)
    rows = {
        "whole: one call": [12],
        "split: any cuts, here after 7": [7, 5],
        "step: one token a call": [1] * 12,
    }
    unit = 5.6
    for n, (title, lengths) in enumerate(rows.items()):
        top, x = 3 + 26 * n, 0.0
        label(axis, 1, top, title, weight="bold", ha="left")
        room = (84 - unit * 12) / max(len(lengths) - 1, 1)
        for i, length in enumerate(lengths):
            box(axis, x, top + 4, unit * length, 8, colour=ORANGE)
            x += unit * length
            gap = room if i < len(lengths) - 1 else 89.5 - x
            arrow(axis, (x, top + 8), (x + gap, top + 8), color=BLUE)
            x += gap
        box(axis, 90, top + 3.5, 9, 9, colour=BLUE, text="state", fontsize=8)
        label(
            axis,
            1,
            top + 15.5,
            "outputs 1 to 12, the same in every row",
            fontsize=9,
            ha="left",
        )
    box(axis, 1, 79.5, 4, 4, colour=ORANGE)
    label(axis, 7, 81.5, "tokens of one call", fontsize=10, ha="left")
    arrow(axis, (47, 81.5), (54, 81.5), color=BLUE)
    label(axis, 56, 81.5, "state of fixed size", fontsize=10, ha="left")
    save_figure(figure, "whole_split_step")


def draw_chunk_walk() -> None:
    """The causal matrix of scores, and the terms of one chunk's outputs."""
    figure, axis = canvas(100, 128)
    chunks, now, size, left, top = 5, 3, 13.0, 22, 12
    across = left + chunks * size / 2
    label(axis, across, 3, "keys, in chunks of 64 tokens")
    label(axis, 9, top + chunks * size / 2, "queries", rotation=90)
    draw_scores(axis, left, top, size, chunks, now)
    y, below = top + now * size, top + size * (now + 1)
    frame = {"fill": False, "edgecolor": BLACK, "lw": 1.6}
    axis.add_patch(Rectangle((left, y), size * (now + 1), size, **frame))
    label(axis, left - 1.5, y + size / 2, "now", ha="right", weight="bold")
    y = 90
    text = "chunks before: sums S, z\nφ(q)ᵀ S"
    box(axis, 0, y, 44, 14, colour=BLUE, text=text, fontsize=10)
    text = "own chunk: scores, mask,\npolynomial × values"
    box(axis, 56, y, 44, 14, colour=ORANGE, text=text, fontsize=10)
    label(axis, 50, y + 7, "+", fontsize=15)
    arrow(axis, (left + size * 1.5, below), (22, y), color=BLUE)
    arrow(axis, (left + size * (now + 0.5), below), (76, y), color=ORANGE)
    arrow(axis, (50, y + 11), (50, y + 19))
    text = "outputs of this chunk;\nthen its keys join S and z"
    box(axis, 12, y + 19, 76, 14, colour=GREEN, text=text, fontsize=10)
    save_figure(figure, "chunk_walk")


def draw_scores(
    axis: Any, left: float, top: float, size: float, chunks: int, now: int
) -> None:
    """The lower triangle of scores; chunks after `now` are grey."""
    tokens = 4  # of a chunk, as drawn
    step = size / tokens
    for row in range(chunks * tokens):
        for column in range(row + 1):
            inside = row // tokens == column // tokens
            colour = ORANGE if inside else BLUE
            if row // tokens > now:
                colour = BLACK
            x, y = left + column * step, top + row * step
            cell(axis, x, y, step, step, colour)


def draw_mixer_block() -> None:
    """A block from its input, at the top, to its output."""
    figure, axis = canvas(100, 150)
    middle, wide = 34.0, 52.0
    rows = [
        (8, "norm", BLACK),
        (24, "projections: query, key, value", ORANGE),
        (40, "short convolution", ORANGE),
        (56, "rotary positions, if asked for", ORANGE),
        (72, "attention", ORANGE),
        (88, "output projection", ORANGE),
        (112, "norm", BLACK),
        (128, "feed-forward", GREEN),
    ]
    for y, text, colour in rows:
        left = middle - wide / 2
        box(axis, left, y, wide, 9, colour=colour, text=text, fontsize=10)
    for (y, *_), (below, *_) in pairwise(rows):
        arrow(axis, (middle, y + 9), (middle, below))
    arrow(axis, (middle, 1), (middle, 8))
    arrow(axis, (middle, 137), (middle, 149))
    label(axis, middle + 2, 3, "x  [B, T, D]", fontsize=10, ha="left")
    for start, end in ((5, 104.5), (106.5, 142)):  # the residual connections
        for corner in ([(middle, start), (3, start)], [(3, start), (3, end)]):
            axis.plot(*zip(*corner, strict=True), color=BLACK, lw=1.1)
        arrow(axis, (3, end), (middle - 1.6, end))
        label(
            axis,
            middle,
            end,
            "+",
            bbox={"boxstyle": "circle,pad=0.12", "fc": "white"},
        )
    axis.add_patch(
        Rectangle((6, 21), 92, 79, fill=False, edgecolor=ORANGE, ls="--")
    )
    label(
        axis, 97, 19, "the mixer", ha="right", color="#8C6D1F", weight="bold"
    )
    for y, text in ((44.5, "last tokens"), (76.5, "sums S, z")):
        box(axis, 70, y - 5, 26, 10, colour=BLUE, text=text, fontsize=10)
        arrow(axis, (70, y - 2), (60, y - 2), color=BLUE)
        arrow(axis, (60, y + 2), (70, y + 2), color=BLUE)
    label(axis, 83, 60.5, "state of\nfixed size", color=BLUE, fontsize=10)
    save_figure(figure, "mixer_block")


def main() -> None:
    draw_whole_split_step()
    draw_chunk_walk()
    draw_mixer_block()


if __name__ == "__main__":
    main()
