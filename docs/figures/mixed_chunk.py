"""Draws docs/figures/mixed_chunk.svg: the keys that each query sees.

It runs the operation itself: with the identity for values, the output is the
weights.

    python docs/figures/mixed_chunk.py
"""

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap

import cumulant as cm
from cumulant.bench.reports.palette import BLUE, NAVY, ORANGE
from cumulant.bench.reports.plots import add_legend, panel_column, save_figure

TOKENS, GROUP = 24, 6
FORMS = {
    "causal": {"is_causal": True},
    "both directions": {},
    "reduce_group_non_causal_attn=False": {
        "reduce_group_non_causal_attn": False
    },
}
COLOURS = {
    "not seen": "#ffffff",
    "linear": ORANGE.colour,
    "quadratic": BLUE.colour,
    "quadratic and linear": NAVY.colour,
}


def seen(quadratic: bool, linear: bool, **options: bool) -> torch.Tensor:
    """Where a query's weight on a key is not zero: ``[T, T]``."""
    ones = torch.ones(1, 1, TOKENS, 1)
    parts = (quadratic * ones, quadratic * ones, linear * ones, linear * ones)
    values = torch.eye(TOKENS)[None, None]
    return (
        cm.mixed_chunk_attention(*parts, values, group_size=GROUP, **options)[
            0, 0
        ]
        != 0
    )


def main() -> None:
    figure, panels = panel_column(len(FORMS), height=2.3)
    for panel, (title, options) in zip(panels, FORMS.items(), strict=True):
        picture = (
            seen(False, True, **options).int()
            + 2 * seen(True, False, **options).int()
        )
        panel.imshow(
            picture,
            cmap=ListedColormap(list(COLOURS.values())),
            vmin=0,
            vmax=3,
        )
        panel.grid(False)
        panel.set(xlabel="key", ylabel="query")
        for edge in range(GROUP, TOKENS, GROUP):
            panel.axhline(edge - 0.5, color="#888888", lw=0.6)
            panel.axvline(edge - 0.5, color="#888888", lw=0.6)
        panel.set_xticks(range(0, TOKENS, GROUP))
        panel.set_yticks(range(0, TOKENS, GROUP))
        for name, colour in COLOURS.items():
            square = {
                "marker": "s",
                "markersize": 9,
                "markeredgecolor": "#888888",
            }
            panel.plot(
                [], [], linestyle="", color=colour, label=name, **square
            )
        add_legend(panel, title)
    save_figure(figure, Path(__file__).parent, "mixed_chunk", [".svg"])


if __name__ == "__main__":
    main()
