"""Pictures of the measurements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .approximation import ORDERS, SIZES, Case

# Okabe and Ito's colours, told apart by the colour-blind as well; order 0 is grey
COLOURS = {0: "#999999", 1: "#E69F00", 2: "#0072B2", 3: "#CC79A7", 4: "#009E73"}
MARKERS = {0: "", 1: "o", 2: "s", 3: "^", 4: "D"}


# of the same family, for up to eleven lines, which also differ by mark
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


def save(figure: Any, folder: Path, name: str) -> str:
    """The figure as PNG and SVG; its name."""
    _save(figure, folder, name)
    return name


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    return paths


def _name(order: int) -> str:
    return "averaging" if order == 0 else f"order {order}"


def draw_exponential(folder: Path) -> list[Path]:
    """The exponential and its expansions, and their relative distance (Mercat 2020, figure 1)."""
    plt = pyplot()
    x = np.linspace(-4, 4, 801)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(x, np.exp(x), color="black", linewidth=2, label="exp(x)")
    for order in ORDERS[1:]:
        expansion = sum(x**p / math.factorial(p) for p in range(order + 1))
        left.plot(x, expansion, color=COLOURS[order], label=_name(order))
        right.plot(x, np.abs(expansion / np.exp(x) - 1), color=COLOURS[order], label=_name(order))
    left.set(xlabel="score x", ylabel="weight", ylim=(-4, 16), title="exp and its Taylor expansions")
    left.axhline(0, color="black", linewidth=0.5)
    right.set(xlabel="score x", ylabel="|expansion / exp(x) − 1|", yscale="log", ylim=(1e-4, 100))
    right.set_title("relative error of a weight")
    left.legend(frameon=False)
    return _save(figure, folder, "exponential")


def draw_error(cases: list[Case], folder: Path) -> list[Path]:
    """Error against softmax attention by size of the scores, head dim, alpha, and in trained heads."""
    plt = pyplot()
    trained = [c for c in cases if c.kind == "trained"]
    panels = 4 if trained else 3
    shape = {"nrows": 2, "ncols": 2, "figsize": (11, 8.5)} if trained else {"ncols": 3, "figsize": (14, 4.2)}
    figure, axes = plt.subplots(**shape, layout="constrained")
    by_size, by_dim, by_alpha, *rest = axes.flat[:panels]
    random = [c for c in cases if c.kind == "random"]
    for order in ORDERS:
        style = {"color": COLOURS[order], "marker": MARKERS[order], "markersize": 4, "label": _name(order)}
        style["linestyle"] = "--" if order == 0 else "-"
        _line(by_size, [(c.size, c) for c in random if c.head_dim == 16 and c.order == order], style)
        at_one = SIZES.index(1.0)
        of_order = [c for c in random if c.order == order]
        _line(by_dim, [(c.head_dim, c) for i, c in enumerate(of_order) if i % len(SIZES) == at_one], style)
        normalised = [c for c in cases if c.kind == "normalised" and c.order == order and c.head_dim == 16]
        _line(by_alpha, [(c.alpha or 1, c) for c in normalised], style)
    by_size.set(xlabel="size of the scores (root mean square)", title="random q and k, K = 16")
    by_dim.set(xlabel="head dim K", title="random q and k, scores of size 1")
    by_alpha.set(xlabel="α", title="LayerNorm of q and k, scores / (α √K), K = 16")
    for panel in rest:
        _draw_heads(panel, trained)
    for panel in axes.flat[:panels]:
        panel.set(yscale="log", ylim=(0.1, 10) if panel in rest else (1e-6, 10))
        panel.grid(alpha=0.3)
    for panel, ticks in (
        (by_size, (0.125, 0.25, 0.5, 1, 2, 4)),
        (by_dim, (4, 8, 16, 32, 64)),
        (by_alpha, (0.5, 1, 2, 3, 4, 6)),
    ):
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
    figure.supylabel("error of the output against softmax attention")
    by_size.legend(frameon=False)
    return _save(figure, folder, "error")


def _draw_heads(panel: Any, cases: list[Case]) -> None:
    """A column of marks for each head, filled by model; errors beyond the axis lie on its edge."""
    fills = ("full", "none", "top", "left")
    models = list(dict.fromkeys((c.where or "").split(",")[0] for c in cases))
    for model, fill in zip(models, fills):
        for order in ORDERS:
            chosen = [c for c in cases if c.order == order and (c.where or "").split(",")[0] == model]
            style = {"marker": MARKERS[order] or "x", "markersize": 5, "color": COLOURS[order], "fillstyle": fill}
            panel.plot([c.size for c in chosen], [min(c.error, 9.5) for c in chosen], linestyle="", **style)
        panel.plot([], [], linestyle="", marker="s", color="black", fillstyle=fill, label=f"{model} model")
    panel.set(xlabel="size of the scores (root mean square)", title="each head of trained models", xscale="log")
    panel.set_xticks((0.5, 1, 2, 3, 4, 6), ["0.5", "1", "2", "3", "4", "6"])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="lower left")


def _line(panel: Any, points: list[tuple[float, Case]], style: dict[str, Any]) -> None:
    points = sorted(points, key=lambda p: p[0])
    panel.plot([x for x, _ in points], [c.error for _, c in points], **style)
