"""Draws docs/figures/elita_positions.png: a model's position logits P(i, j).

There is one picture for every layer and head of the trained model. After
`cumulant compare --recipe elita-wikitext --output runs/compare`:

    python docs/figures/elita_positions.py runs/compare/runs/elita-RATE-0
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from cumulant.text.checkpoint import load_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@torch.no_grad()
def logits(position: torch.nn.Module, length: int) -> torch.Tensor:
    """``[H, T, T]``, P(i, j) = P₂(i) + P₁(j) for j ≤ i; NaN above."""
    key, query = position(torch.arange(length))
    both = query.T[:, :, None] + key.T[:, None, :]
    return both.masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), torch.nan
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", help="folder of a trained model with ELiTA mixers"
    )
    parser.add_argument(
        "--output",
        default=str(Path(__file__).with_name("elita_positions.png")),
    )
    options = parser.parse_args()
    model, _ = load_checkpoint(options.run, "cpu")
    mixers = [
        block.mixer
        for block in model.model.layers
        if hasattr(block.mixer, "position")
    ]
    pictures = [
        logits(mixer.position, int(mixer.position.horizon))
        for mixer in mixers
    ]
    size = max(float(p.nan_to_num().abs().max()) for p in pictures)
    rows, columns = len(pictures), len(pictures[0])
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.2 * columns + 0.8, 1.25 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for row, picture in zip(axes, pictures, strict=True):
        for axis, head in zip(row, picture, strict=True):
            image = axis.imshow(
                head,
                cmap="RdBu_r",
                vmin=-size,
                vmax=size,
                interpolation="nearest",
            )
            axis.set(xticks=[], yticks=[])
    for i, row in enumerate(axes):
        row[0].set_ylabel(f"layer {i + 1}\nquery i")
    for h, axis in enumerate(axes[0]):
        axis.set_title(f"head {h + 1}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("key j")
    figure.colorbar(image, ax=axes, shrink=0.8, label="P(i, j)")
    figure.savefig(options.output, dpi=110, bbox_inches="tight")
    print(options.output)


if __name__ == "__main__":
    main()
