"""Pictures of `cumulant bench approximation`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .approximation import ORDERS, SIZES, Case
from .plots import pyplot, save

COLOURS = {0: "#999999", 1: "#E69F00", 2: "#0072B2", 3: "#CC79A7", 4: "#009E73"}
MARKERS = {0: "", 1: "o", 2: "s", 3: "^", 4: "D"}


def _name(order: int) -> str:
    return "averaging" if order == 0 else f"order {order}"


def draw_exponential(folder: Path) -> str:
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
    for panel in (left, right):
        panel.legend(frameon=False)
    return save(figure, folder, "exponential")


def draw_error(cases: list[Case], folder: Path) -> str:
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
    for panel in (by_size, by_dim, by_alpha):
        panel.legend(frameon=False)
    return save(figure, folder, "error")


def _draw_heads(panel: Any, cases: list[Case]) -> None:
    """A column of marks for each head, filled by model; errors beyond the axis lie on its edge."""
    fills = ("full", "none", "top", "left")
    models = list(dict.fromkeys((c.where or "").rpartition(", layer")[0] for c in cases))
    for model, fill in zip(models, fills):
        for order in ORDERS:
            chosen = [c for c in cases if c.order == order and (c.where or "").rpartition(", layer")[0] == model]
            style = {"marker": MARKERS[order] or "x", "markersize": 5, "color": COLOURS[order], "fillstyle": fill}
            label = _name(order) if model == models[0] else None
            panel.plot(
                [c.size for c in chosen], [min(c.error, 9.5) for c in chosen], linestyle="", label=label, **style
            )
        panel.plot([], [], linestyle="", marker="s", color="black", fillstyle=fill, label=f"{model} model")
    panel.set(xlabel="size of the scores (root mean square)", title="each head of trained models", xscale="log")
    panel.set_xticks((0.5, 1, 2, 3, 4, 6), ["0.5", "1", "2", "3", "4", "6"])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="lower left")


def _line(panel: Any, points: list[tuple[float, Case]], style: dict[str, Any]) -> None:
    points = sorted(points, key=lambda p: p[0])
    panel.plot([x for x, _ in points], [c.error for _, c in points], **style)
