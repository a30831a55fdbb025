"""Pictures of `cumulant bench approximation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..reports.palette import BLACK, Style, styles_for
from ..reports.plots import add_legend, label_ticks, panel_column, save_figure
from .cases import ORDERS, SIZES, STYLES, Case, order_name

ERROR = "error against softmax attention"
FILLS = ("full", "none", "top", "left")  # of the markers, by model
HIGHEST = 10.0  # the upper end of the errors' axis


def draw_exponential(folder: Path) -> str:
    """The exponential and its expansions, and their relative difference (Mercat 2020, figure 1)."""
    x = np.linspace(-4, 4, 801)
    figure, (weights, differences) = panel_column(2)
    weights.plot(x, np.exp(x), color=BLACK.colour, linewidth=2, label="exp(x)")
    for order in ORDERS[1:]:
        expansion = sum(x**p / math.factorial(p) for p in range(order + 1))
        line = {"color": STYLES[order].colour, "label": order_name(order)}
        weights.plot(x, expansion, **line)
        differences.plot(x, np.abs(expansion / np.exp(x) - 1), **line)
    weights.set(xlabel="score x", ylabel="weight", ylim=(-4, 16))
    weights.axhline(0, color="black", linewidth=0.5)
    differences.set(
        xlabel="score x", ylabel="|expansion / exp(x) − 1|", yscale="log", ylim=(1e-4, 100)
    )
    add_legend(weights, "exp and its Taylor expansions")
    add_legend(differences, "relative error of a weight")
    return save_figure(figure, folder, "exponential")


def draw_error(cases: list[Case], folder: Path) -> str:
    """Error against softmax attention.

    The panels show it by size of the scores, by head dim, by alpha, and in trained heads.
    """
    trained = [c for c in cases if c.kind == "trained"]
    random = [c for c in cases if c.kind == "random"]
    figure, (by_size, by_dim, by_alpha, *heads) = panel_column(4 if trained else 3)
    for order, style in _styles(cases).items():
        own = [c for c in random if c.order == order]
        _draw_line(by_size, order, style, [(c.size, c.error) for c in own if c.head_dim == 16])
        # the cases of a head dim are in the order of SIZES
        at_one = [c for i, c in enumerate(own) if i % len(SIZES) == SIZES.index(1.0)]
        _draw_line(by_dim, order, style, [(c.head_dim, c.error) for c in at_one])
        normalised = [
            c for c in cases if c.kind == "normalised" and c.order == order and c.head_dim == 16
        ]
        _draw_line(by_alpha, order, style, [(c.alpha or 1, c.error) for c in normalised])
    _finish_panel(
        by_size,
        "random q and k, K = 16",
        "size of the scores (root mean square)",
        (0.125, 0.25, 0.5, 1, 2, 4),
    )
    _finish_panel(by_dim, "random q and k, scores of size 1", "head dim K", (4, 8, 16, 32, 64))
    _finish_panel(
        by_alpha, "LayerNorm of q and k, scores / (α √K), K = 16", "α", (0.5, 1, 2, 3, 4, 6)
    )
    for panel in heads:
        _draw_heads(panel, trained)
        _finish_panel(
            panel,
            "each head of trained models",
            "size of the scores (root mean square)",
            (0.5, 1, 2, 3, 4, 6),
        )
        panel.set_ylim(0.1, HIGHEST)
    return save_figure(figure, folder, "error")


def _styles(cases: list[Case]) -> dict[int, Style]:
    """The style of each order among the cases."""
    names = {order_name(order): order for order in sorted({c.order for c in cases})}
    known = {order_name(order): style for order, style in STYLES.items()}
    return {names[name]: style for name, style in styles_for(names, known).items()}


def _draw_line(panel: Any, order: int, style: Style, points: list[tuple[float, float]]) -> None:
    if points:
        panel.plot(
            *zip(*sorted(points), strict=True), label=order_name(order), **style.line_options()
        )


def _draw_heads(panel: Any, cases: list[Case]) -> None:
    """A column of marks for each head, filled by model; errors beyond the axis are at its end."""
    models = [_model_name(case) for case in cases]
    fills = {model: FILLS[i % len(FILLS)] for i, model in enumerate(dict.fromkeys(models))}
    styles = _styles(cases)
    for model, fill in fills.items():
        for order, style in styles.items():
            own = [
                c for c, of in zip(cases, models, strict=True) if c.order == order and of == model
            ]
            options = {**style.line_options(), "linestyle": "", "fillstyle": fill}
            label = order_name(order) if model == models[0] else None
            panel.plot(
                [c.size for c in own],
                [min(c.error, 0.95 * HIGHEST) for c in own],
                label=label,
                **options,
            )
    for model, fill in fills.items():
        panel.plot(
            [], [], linestyle="", marker="s", color="black", fillstyle=fill, label=f"{model} model"
        )


def _model_name(case: Case) -> str:
    """The model that a trained head belongs to."""
    return (case.where or "").rpartition(", layer")[0]


def _finish_panel(panel: Any, title: str, x: str, ticks: Sequence[float]) -> None:
    panel.set(xlabel=x, ylabel=ERROR, xscale="log", yscale="log", ylim=(1e-6, HIGHEST))
    label_ticks(panel.xaxis, ticks)
    add_legend(panel, title)
