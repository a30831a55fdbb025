"""Pictures of `cumulant compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import PALETTE, SHAPES, pyplot, save

if TYPE_CHECKING:
    from .compare_report import Result


def _style(number: int) -> dict[str, Any]:
    colours = (PALETTE[0], *PALETTE[3:])  # one grey is enough
    return {"color": colours[number % len(colours)], "marker": SHAPES[number % len(SHAPES)], "markersize": 4}


def draw_curves(found: list[Result], settings: dict[str, Any], folder: Path) -> str:
    """Bits per byte by step and by time: the mean over the seeds, and their range."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained", sharey=True)
    longest = max(r.cost["seconds"] * settings["accumulate"] * r.curve[0][-1][0] for r in found)
    unit, name = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    ends = []
    for number, result in enumerate(found):
        steps = np.array([step for step, _ in result.curve[0]])
        values = np.array([[value for _, value in curve] for curve in result.curve])
        ends.append(values[:, len(steps) // 5 :])
        for panel, scale in zip(panels, (1.0, result.cost["seconds"] * settings["accumulate"] / unit), strict=True):
            style = _style(number)
            panel.plot(steps * scale, values.mean(0), label=result.mechanism, **style)
            panel.fill_between(
                steps * scale, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
    low, high = min(np.nanmin(x) for x in ends), max(np.nanmax(x) for x in ends)
    panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))  # the first points would flatten the rest
    panels[0].set(xlabel="step", ylabel="bits per byte of the held-out text")
    panels[1].set(xlabel=f"time in training steps, {name}")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return save(figure, folder, "compare_curves")


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
    figure.legend(loc="outside right center", frameon=False)
    return save(figure, folder, "compare_sweep")


def draw_positions(asked: list[Result], context: int, folder: Path) -> str:
    """Bits per byte by tokens before; a line where training ended."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for number, result in enumerate(asked):
        middles = [(max(a, 4) * b) ** 0.5 for a, b, _ in result.positions]
        panel.plot(middles, [x for _, _, x in result.positions], label=result.mechanism, **_style(number))
    panel.axvline(context, color="#666666", linestyle="--", linewidth=1, label="training length")
    edges = [b for _, b, _ in asked[0].positions]
    panel.set(xscale="log", xlabel="tokens before", ylabel="bits per byte of the held-out text")
    panel.set_xticks(edges, [f"{b:,}" for b in edges])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return save(figure, folder, "compare_positions")


def draw_copying(asked: list[Result], context: int, folder: Path) -> str:
    """What a span costs the second time, of what it cost the first time."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for number, result in enumerate(asked):
        points = [(distance, second / first) for distance, first, second in result.copying]
        if points:
            panel.plot(*zip(*points, strict=True), label=result.mechanism, **_style(number))
    panel.axvline(context, color="#666666", linestyle="--", linewidth=1, label="training length")
    distances = [distance for distance, _, _ in asked[0].copying]
    panel.set(xscale="log", xlabel="tokens between", ylabel="bits of the second time, of the first")
    panel.set_xticks(distances, [f"{d:,}" for d in distances])
    panel.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1, decimals=0))
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return save(figure, folder, "compare_copying")
