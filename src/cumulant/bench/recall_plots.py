"""Pictures of `cumulant recall`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .mqar import MECHANISMS
from .plots import PALETTE, SHAPES, pyplot, save

if TYPE_CHECKING:
    from .recall import Best


def _styles() -> dict[str, dict[str, object]]:
    return {
        name: {"color": PALETTE[i % len(PALETTE)], "marker": SHAPES[i % len(SHAPES)], "markersize": 5}
        for i, name in enumerate(MECHANISMS)
    }


def draw_state(found: list[Best], folder: Path) -> str:
    """Accuracy at the most pairs against bytes of state: a line for each mechanism over its widths."""
    plt, styles = pyplot(), _styles()
    forms = [conv for conv in (True, False) if any(b.conv == conv for b in found)]
    figure, axes = plt.subplots(
        1, len(forms), figsize=(5.2 * len(forms) + 2.2, 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for panel, conv in zip(axes[0], forms, strict=True):
        for name in dict.fromkeys(b.mechanism for b in found):
            own = sorted((b for b in found if b.mechanism == name and b.conv == conv), key=lambda b: b.state_bytes)
            panel.plot([b.state_bytes for b in own], [b.hardest for b in own], label=name, **styles[name])
        panel.set(xscale="log", xlabel="state after the context", ylim=(-0.03, 1.03))
        panel.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter("B", sep=" "))
        panel.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        least, most = min(b.state_bytes for b in found), max(b.state_bytes for b in found)
        ticks = [x * 10**p for p in range(9) for x in (1, 2, 5) if least / 1.5 <= x * 10**p <= most * 1.5]
        panel.set_xticks(ticks)
        panel.set_title("behind a short convolution" if conv else "two layers of the mechanism alone")
        panel.grid(alpha=0.3)
    pairs = list(found[0].accuracy)[-1]
    axes[0][0].set_ylabel(f"right answers at {pairs} pairs")
    axes[0][0].yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return save(figure, folder, "recall_state")


def draw_pairs(found: list[Best], folder: Path) -> str:
    """Accuracy by number of pairs, each mechanism at its best width."""
    plt, styles = pyplot(), _styles()
    figure, panel = plt.subplots(figsize=(7.4, 4.6), layout="constrained")
    for name in dict.fromkeys(b.mechanism for b in found):
        b = max((b for b in found if b.mechanism == name), key=lambda b: b.hardest)
        means, deviations = zip(*b.accuracy.values(), strict=True)
        pairs = [int(n) for n in b.accuracy]
        panel.errorbar(pairs, means, yerr=deviations, capsize=3, label=f"{name}, width {b.width}", **styles[name])
    panel.set(xscale="log", xlabel="pairs in the context", ylabel="right answers", ylim=(-0.03, 1.03))
    panel.set_xticks(pairs, [str(n) for n in pairs])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return save(figure, folder, "recall_pairs")
