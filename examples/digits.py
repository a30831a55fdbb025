"""TaylorViT learns to read scikit-learn's handwritten digits, beside networks that mix tokens less.

It trains on 1,437 images of 8 x 8 pixels in 16 patches, moved by up to a pixel, and tests on 360.
It prints each network's accuracy on the test images, as they are and moved, and one JSON line.
About a minute on two cores:

    python examples/digits.py
"""

from __future__ import annotations

import argparse
import copy
import json
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cumulant.models import TaylorViT

# tokens are mixed by attention and the feed-forward's convolution, one of them, or neither
NETWORKS = {
    "taylor": {"mixer": "taylor"},
    "attention only": {"mixer": "taylor", "kernel_size": 1},
    "convolution only": {"mixer": "none"},
    "no mixing": {"mixer": "none", "kernel_size": 1},
}


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[N, 1, 8, 8]`` in [-1, 1], labels, and a stratified fifth to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    train, test, train_labels, test_labels = (torch.from_numpy(p) for p in parts)
    return train[:, None].float() / 8 - 1, train_labels, test[:, None].float() / 8 - 1, test_labels


def moved(images: Tensor, move: int) -> Tensor:
    """Images moved one pixel in direction 0 to 8 (4: not moved), with their border repeated."""
    row, column = divmod(move, 3)
    return F.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, row : row + 8, column : column + 8]


def scattered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved in a direction of its own."""
    moves = torch.randint(0, 9, (len(images),), generator=generator)
    out = torch.empty_like(images)
    for move in range(9):
        out[moves == move] = moved(images[moves == move], move)
    return out


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())


def without_attention(model: TaylorViT) -> TaylorViT:
    """The trained network with its attention switched off."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.attention = None
    return model


def fit(name: str, epochs: int, seed: int, batch: int = 64, peak: float = 3e-3) -> dict[str, float]:
    """Train one network; returns its test accuracies, its parameters and the seconds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels, test_images, test_labels = data(seed)
    model = TaylorViT(
        patch_size=2,
        patch_norm=False,
        channels=1,
        num_classes=10,
        dim=64,
        depth=2,
        num_heads=4,
        ff_mult=2,
        **NETWORKS[name],
    )
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps, pct_start=0.1
    )
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            loss = F.cross_entropy(
                model(scattered(images[chosen], generator)), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {
        "accuracy": accuracy(model, test_images, test_labels),
        "moved": (
            sum(accuracy(model, moved(test_images, move), test_labels) for move in range(9)) / 9
        ),
        "without attention": accuracy(without_attention(model), test_images, test_labels),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    results = {}
    for name in options.networks:
        results[name] = fit(name, options.epochs, options.seed)
        found = results[name]
        print(
            f"{name:<17} {100 * found['accuracy']:5.1f}% of 360 test images,"
            f" {100 * found['moved']:5.1f}% moved, {100 * found['without attention']:5.1f}% with"
            f" attention switched off   {found['parameters']:,} parameters,"
            f" {found['seconds']:.0f} s",
            flush=True,
        )
    print(
        json.dumps(
            {
                "epochs": options.epochs,
                "seed": options.seed,
                "torch": torch.__version__,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
