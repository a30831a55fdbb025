"""Pictures of `cumulant compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import SHAPES, add_legend, pyplot, save

if TYPE_CHECKING:
    from .compare_report import Result


COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")  # as in PALETTE


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": SHAPES[number % len(SHAPES)], "markersize": 4}


def draw_curves(found: list[Result], settings: dict[str, Any], folder: Path) -> str:
    """Bits per byte by step and by time: the mean over the seeds, and their range."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained", sharey=True)
    longest = max(r.cost["seconds"] * settings["accumulate"] * r.curve[0][-1][0] for r in found)
    unit, name = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    ends = []
    for number, result in enumerate(found):
        steps, values = _seeds(result.curve)
        ends.append(values[:, len(steps) // 5 :])
        for panel, scale in zip(panels, (1.0, result.cost["seconds"] * settings["accumulate"] / unit), strict=True):
            style = _style(number)
            panel.plot(steps * scale, values.mean(0), label=result.mechanism, **style)
            panel.fill_between(
                steps * scale, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
    late = np.concatenate([values.ravel() for values in ends])
    late = late[np.isfinite(late)]
    if late.size:  # the first points would flatten the rest
        margin = 0.05 * max(late.max() - late.min(), 1e-3)
        panels[0].set_ylim(late.min() - margin, late.max() + margin)
    panels[0].set(xlabel="step", ylabel="bits per byte of the held-out text")
    panels[1].set(xlabel=f"time in training steps, {name}")
    for panel in panels:
        panel.grid(alpha=0.3)
    add_legend(figure, panels)
    return save(figure, folder, "compare_curves")


def _seeds(curves: list[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and each seed's values there; between those where it was evaluated, a straight line."""
    steps = np.array([step for step, _ in max(curves, key=lambda curve: curve[0][0])])
    return steps, np.array([np.interp(steps, [s for s, _ in curve], [x for _, x in curve]) for curve in curves])


def draw_sweep(found: list[Result], folder: Path) -> str:
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for number, result in enumerate(found):
        panel.plot(*zip(*sorted(result.sweep.items()), strict=True), label=result.mechanism, **_style(number))
    rates = sorted({rate for result in found for rate in result.sweep})
    panel.set(xscale="log", xlabel="peak learning rate", ylabel="bits per byte of the held-out text")
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    add_legend(figure, [panel])
    return save(figure, folder, "compare_sweep")


def draw_contexts(asked: list[Result], context: int, folder: Path) -> str:
    """Bits per byte of the same tokens by the window they stand in; a line where training ended."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for number, result in enumerate(asked):
        points = [(last, bits) for _, last, bits in result.contexts]
        panel.plot(*zip(*points, strict=True), label=result.mechanism, **_style(number))
    lengths = [b for _, b, _ in asked[0].contexts]
    panel.set(xlabel="window, tokens (half to all of them before)", ylabel="bits per byte of the same tokens")
    _by_tokens(figure, panel, lengths, context)
    return save(figure, folder, "compare_contexts")


def draw_copying(asked: list[Result], context: int, folder: Path) -> str:
    """What a span costs where it stood before, of what it costs where it did not."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for number, result in enumerate(asked):
        points = [(distance, second / control) for distance, second, control, _ in result.copying]
        panel.plot(*zip(*points, strict=True), label=result.mechanism, **_style(number))
    panel.set(xlabel="tokens between", ylabel="bits of a span seen before, of one that was not")
    panel.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    _by_tokens(figure, panel, [distance for distance, *_ in asked[0].copying], context)
    return save(figure, folder, "compare_copying")


def _by_tokens(figure: Any, panel: Any, ticks: list[int], context: int) -> None:
    panel.axvline(context, color="#666666", linestyle="--", linewidth=1, label="training length")
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    add_legend(figure, [panel])
