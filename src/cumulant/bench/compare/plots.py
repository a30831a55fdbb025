"""Pictures of `cumulant compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..reports.palette import Style, styles_for
from ..reports.plots import add_legend, label_ticks, panel_column, pyplot, save_figure
from .recipes import STYLES
from .results import Result

LOSS = "held-out bits per byte"
MOST_TICKS = 8  # numbers that fit below a panel


def _styles(found: list[Result]) -> dict[str, Style]:
    return styles_for([result.mechanism for result in found], STYLES)


def draw_curves(found: list[Result], settings: dict[str, Any], folder: Path) -> str:
    """Bits per byte by step and by time: the mean over the seeds, and their range."""
    styles = _styles(found)
    figure, panels = panel_column(2, height=2.6, sharey=True)
    longest = max(r.cost["seconds"] * settings["accumulate"] * r.curve[0][-1][0] for r in found)
    unit, name = (
        (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    )
    ends = []
    for result in found:
        steps, values = _seeds(result.curve)
        ends.append(values[:, len(steps) // 5 :])
        style = styles[result.mechanism]
        for panel, scale in zip(
            panels, (1.0, result.cost["seconds"] * settings["accumulate"] / unit), strict=True
        ):
            x = steps * scale
            panel.plot(x, values.mean(0), label=result.mechanism, **style.line_options())
            panel.fill_between(
                x, values.min(0), values.max(0), color=style.colour, alpha=0.15, linewidth=0
            )
    late = np.concatenate([values.ravel() for values in ends])
    late = late[np.isfinite(late)]
    if late.size:  # the first points would flatten the rest
        margin = 0.05 * max(late.max() - late.min(), 1e-3)
        panels[0].set_ylim(late.min() - margin, late.max() + margin)
    for panel, x, title in zip(
        panels, ("step", name), ("by step", "by time in training steps"), strict=True
    ):
        panel.set(xlabel=x, ylabel=LOSS)
        add_legend(panel, title)
    return save_figure(figure, folder, "compare_curves")


def _seeds(curves: list[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the values of each seed at these steps.

    They are interpolated for a seed that was evaluated at other steps.
    """
    steps = np.array([step for step, _ in max(curves, key=lambda curve: curve[0][0])])
    return steps, np.array(
        [np.interp(steps, [s for s, _ in curve], [x for _, x in curve]) for curve in curves]
    )


def draw_sweep(found: list[Result], folder: Path) -> str:
    """Bits per byte at the end of training by learning rate."""
    lines = {result.mechanism: sorted(result.sweep.items()) for result in found}
    rates = sorted({rate for result in found for rate in result.sweep})
    return _draw_panel(found, lines, ("peak learning rate", LOSS), rates, folder, "compare_sweep")


def draw_contexts(tested: list[Result], context: int, folder: Path) -> str:
    """Bits per byte of the same tokens by the length of their window."""
    return _draw_contexts(tested, "contexts", context, folder)


def draw_passing(tested: list[Result], context: int, folder: Path) -> str:
    """The same after some steps with states passed on."""
    return _draw_contexts(tested, "passing", context, folder)


def _draw_contexts(tested: list[Result], field: str, context: int, folder: Path) -> str:
    losses = {result.mechanism: getattr(result, field) for result in tested}
    lines = {name: [(last, bits) for _, last, bits in found] for name, found in losses.items()}
    lengths = [last for _, last, _ in losses[tested[0].mechanism]]
    axes = "window, tokens (half to all of them before)", "bits per byte of the same tokens"
    return _draw_panel(tested, lines, axes, lengths, folder, f"compare_{field}", context=context)


def draw_copying(tested: list[Result], context: int, folder: Path) -> str:
    """Loss on repeated spans, relative to the loss on the same spans that are not repeated."""
    lines = {
        result.mechanism: [
            (distance, second / control) for distance, second, control, _ in result.copying
        ]
        for result in tested
    }
    distances = [distance for distance, *_ in tested[0].copying]
    axes = "tokens between", "relative loss on repeated spans"
    return _draw_panel(
        tested, lines, axes, distances, folder, "compare_copying", context=context, percent=True
    )


def _draw_panel(
    found: list[Result],
    lines: dict[str, list[tuple[Any, Any]]],
    axes: tuple[str, str],
    ticks: list[Any],
    folder: Path,
    name: str,
    *,
    context: int | None = None,
    percent: bool = False,
) -> str:
    """One panel with a line for each mechanism, and a broken line at the training length."""
    styles = _styles(found)
    figure, (panel,) = panel_column(1, height=2.8)
    for mechanism, points in lines.items():
        panel.plot(*zip(*points, strict=True), label=mechanism, **styles[mechanism].line_options())
    if context is not None:
        panel.axvline(
            context, color="#666666", linestyle="--", linewidth=1, label="training length"
        )
    panel.set(xscale="log", xlabel=axes[0], ylabel=axes[1])
    ticks = ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    label_ticks(panel.xaxis, ticks, "{:g}" if context is None else "{:,}")
    if percent:
        panel.yaxis.set_major_formatter(pyplot().matplotlib.ticker.PercentFormatter(1))
    add_legend(panel)
    return save_figure(figure, folder, name)
