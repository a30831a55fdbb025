"""Pictures of `cumulant recall`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..reports.palette import styles_for
from ..reports.plots import add_legend, label_ticks, panel_column, pyplot, save_figure
from .best import Best
from .frontier import BUDGETS, steps
from .mechanisms import STYLES

FORMS = {True: "behind a short convolution", False: "two layers of the mechanism alone"}


def _panels(found: list[Best], label: str, **options: Any) -> tuple[Any, dict[bool, Any]]:
    """A figure, and its panel for each form of the models."""
    forms = [conv for conv in (True, False) if any(b.conv == conv for b in found)]
    figure, axes = panel_column(len(forms), height=2.6, sharex=True, sharey=True)
    panels = dict(zip(forms, axes, strict=True))
    for panel in panels.values():
        panel.set(xscale="log", ylim=(-0.03, 1.03), ylabel=label, **options)
        panel.yaxis.set_major_formatter(pyplot().matplotlib.ticker.PercentFormatter(1))
        panel.tick_params(labelbottom=True)
    return figure, panels


def _save(figure: Any, panels: dict[bool, Any], folder: Path, name: str) -> str:
    for conv, panel in panels.items():
        add_legend(panel, FORMS[conv])
    return save_figure(figure, folder, name)


def _styles(found: list[Best]) -> dict[str, dict[str, Any]]:
    return {
        name: style.line_options()
        for name, style in styles_for([b.mechanism for b in found], STYLES).items()
    }


def draw_state(found: list[Best], folder: Path) -> str:
    """Accuracy at the most pairs by bytes of state: a line for each mechanism over its widths."""
    ticker, styles = pyplot().matplotlib.ticker, _styles(found)
    most_pairs = list(found[0].accuracy)[-1]
    figure, panels = _panels(
        found, f"accuracy at {most_pairs} pairs", xlabel="state after the context"
    )
    least, most = min(b.state_bytes for b in found), max(b.state_bytes for b in found)
    steps = (1, 2, 5) if most < 200 * least else (1,)
    ticks = [x * 10**p for p in range(12) for x in steps if least / 1.5 <= x * 10**p <= most * 1.5]
    for conv, panel in panels.items():
        for name, style in styles.items():
            own = sorted(
                (b for b in found if b.mechanism == name and b.conv == conv),
                key=lambda b: b.state_bytes,
            )
            panel.plot(
                [b.state_bytes for b in own], [b.hardest_accuracy for b in own], label=name, **style
            )
        panel.xaxis.set_major_formatter(ticker.EngFormatter("B", sep=" "))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xticks(ticks)
    return _save(figure, panels, folder, "recall_state")


def draw_frontier(found: list[Best], folder: Path) -> str:
    """The best accuracy at the most pairs within a size of the state, and its 95% interval."""
    styles, first, last = _styles(found), BUDGETS[0], BUDGETS[-1]
    figure, panels = _panels(
        found, f"accuracy at {list(found[0].accuracy)[-1]} pairs", xlabel="state of at most, kB"
    )
    for conv, panel in panels.items():
        for name, style in styles.items():
            own = steps([b for b in found if b.mechanism == name and b.conv == conv])
            inside = [b for b in own if b.state_bytes <= 1000 * last]
            if not inside:
                continue
            x = [*(b.state_bytes / 1000 for b in inside), last]
            held = [*inside, inside[-1]]
            look = style | {"markevery": list(range(len(inside)))}
            y = [b.hardest_accuracy for b in held]
            panel.plot(x, y, drawstyle="steps-post", label=name, **look)
            bands = [b.interval or (b.hardest_accuracy, b.hardest_accuracy) for b in held]
            low, high = zip(*bands, strict=True)
            colour = style["color"]
            panel.fill_between(x, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        panel.set_xlim(first / 1.1, last * 1.1)
        label_ticks(panel.xaxis, BUDGETS)
    return _save(figure, panels, folder, "recall_frontier")


def draw_pairs(found: list[Best], folder: Path) -> str:
    """Accuracy by number of pairs, each mechanism at its best width."""
    styles = _styles(found)
    figure, panels = _panels(found, "accuracy", xlabel="pairs in the context")
    for conv, panel in panels.items():
        for name, style in styles.items():
            own = [b for b in found if b.mechanism == name and b.conv == conv]
            if not own:
                continue
            b = max(own, key=lambda b: b.hardest_accuracy)
            means, deviations = zip(*b.accuracy.values(), strict=True)
            pairs = [int(n) for n in b.accuracy]
            panel.errorbar(
                pairs,
                means,
                yerr=deviations if b.seeds > 1 else None,
                capsize=3,
                label=name,
                **style,
            )
        panel.set_xticks(pairs, [str(n) for n in pairs])
        panel.minorticks_off()
    return _save(figure, panels, folder, "recall_pairs")
