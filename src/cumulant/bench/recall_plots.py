"""Pictures of `cumulant recall`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mqar import MECHANISMS
from .plots import PALETTE, SHAPES, add_legend, pyplot, save

if TYPE_CHECKING:
    from .recall import Best


FORMS = {True: "behind a short convolution", False: "two layers of the mechanism alone"}


def _styles() -> dict[str, dict[str, object]]:
    return {
        name: {"color": PALETTE[i % len(PALETTE)], "marker": SHAPES[i % len(SHAPES)], "markersize": 5}
        for i, name in enumerate(MECHANISMS)
    }


def _panels(found: list[Best]) -> tuple[Any, dict[bool, Any]]:
    """A figure, and its panel for each form of the models."""
    plt = pyplot()
    forms = [conv for conv in (True, False) if any(b.conv == conv for b in found)]
    figure, axes = plt.subplots(
        1,
        len(forms),
        figsize=(5.2 * len(forms) + 2.2, 4.6),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels = dict(zip(forms, axes[0], strict=True))
    for conv, panel in panels.items():
        panel.set(title=FORMS[conv], xscale="log", ylim=(-0.03, 1.03))
        panel.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
        panel.grid(alpha=0.3)
    return figure, panels


def _save(figure: Any, panels: dict[bool, Any], folder: Path, name: str) -> str:
    add_legend(figure, panels.values())
    return save(figure, folder, name)


def draw_state(found: list[Best], folder: Path) -> str:
    """Accuracy at the most pairs against bytes of state: a line for each mechanism over its widths."""
    plt, styles = pyplot(), _styles()
    figure, panels = _panels(found)
    least, most = min(b.state_bytes for b in found), max(b.state_bytes for b in found)
    steps = (1, 2, 5) if most < 200 * least else (1,)
    ticks = [x * 10**p for p in range(12) for x in steps if least / 1.5 <= x * 10**p <= most * 1.5]
    for conv, panel in panels.items():
        for name in dict.fromkeys(b.mechanism for b in found):
            own = sorted((b for b in found if b.mechanism == name and b.conv == conv), key=lambda b: b.state_bytes)
            panel.plot([b.state_bytes for b in own], [b.hardest for b in own], label=name, **styles[name])
        panel.set_xlabel("state after the context")
        panel.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter("B", sep=" "))
        panel.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        panel.set_xticks(ticks)
    next(iter(panels.values())).set_ylabel(f"right answers at {list(found[0].accuracy)[-1]} pairs")
    return _save(figure, panels, folder, "recall_state")


def draw_pairs(found: list[Best], folder: Path) -> str:
    """Accuracy by number of pairs, each mechanism at its best width."""
    styles = _styles()
    figure, panels = _panels(found)
    for conv, panel in panels.items():
        for name in dict.fromkeys(b.mechanism for b in found):
            own = [b for b in found if b.mechanism == name and b.conv == conv]
            if not own:
                continue
            b = max(own, key=lambda b: b.hardest)
            means, deviations = zip(*b.accuracy.values(), strict=True)
            pairs = [int(n) for n in b.accuracy]
            panel.errorbar(
                pairs, means, yerr=deviations if b.seeds > 1 else None, capsize=3, label=name, **styles[name]
            )
        panel.set_xlabel("pairs in the context")
        panel.set_xticks(pairs, [str(n) for n in pairs])
        panel.minorticks_off()
    next(iter(panels.values())).set_ylabel("right answers")
    return _save(figure, panels, folder, "recall_pairs")
