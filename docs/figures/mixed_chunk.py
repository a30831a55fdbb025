"""Draws docs/figures/mixed_chunk.png: which keys each query reads, and how.

With the identity for values, the operation's output is the weights.

    python docs/figures/mixed_chunk.py
"""

from pathlib import Path

import matplotlib
import torch

import cumulant as cm

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

TOKENS, GROUP = 24, 6
FORMS = {
    "causal": {"is_causal": True},
    "both directions": {},
    "both directions,\nreduce_group_non_causal_attn=False": {
        "reduce_group_non_causal_attn": False
    },
}


def seen(quadratic: bool, linear: bool, **options: bool) -> torch.Tensor:
    """Where a query's weight on a key is not zero: ``[T, T]``."""
    ones = torch.ones(1, 1, TOKENS, 1)
    parts = (quadratic * ones, quadratic * ones, linear * ones, linear * ones)
    return (
        cm.mixed_chunk_attention(
            *parts, torch.eye(TOKENS)[None, None], group_size=GROUP, **options
        )[0, 0]
        != 0
    )


def main() -> None:
    colours = ["#ffffff", "#f2b880", "#4a7fb5", "#24476b"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.4))
    for axis, (title, options) in zip(axes, FORMS.items(), strict=True):
        picture = (
            seen(False, True, **options).int()
            + 2 * seen(True, False, **options).int()
        )
        axis.imshow(picture, cmap=ListedColormap(colours), vmin=0, vmax=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
        for edge in range(GROUP, TOKENS, GROUP):
            axis.axhline(edge - 0.5, color="#888888", lw=0.6)
            axis.axvline(edge - 0.5, color="#888888", lw=0.6)
        axis.set_xticks(range(0, TOKENS, GROUP))
        axis.set_yticks(range(0, TOKENS, GROUP))
    names = ["not seen", "linear", "quadratic", "quadratic and linear"]
    patches = [
        Patch(facecolor=c, edgecolor="#888888", label=n)
        for c, n in zip(colours, names, strict=True)
    ]
    figure.legend(handles=patches, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
