"""What `cumulant bench` measures in one report: mechanisms, passes and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..dtypes import require_dtype
from .subjects import SUBJECTS
from .verdicts import BASELINE, PASSES

Cell = tuple[int, str, str]  # length, pass, mechanism


@dataclass(frozen=True)
class Recipe:
    """Cells that are measured: each mechanism, in each pass, at each length.

    batch: sequences. heads, dim: heads, and numbers in the value of one.
    repeats: runs of a cell, at most.
    budget: seconds after which a cell is not run again, over all its rounds.
    seconds: the most that a single run may take.
    """

    mechanisms: tuple[str, ...]
    passes: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int = 1
    heads: int = 8
    dim: int = 64
    causal: bool = True
    repeats: int = 20
    budget: float = 2.0
    seconds: float = 20.0
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        for name in self.mechanisms:
            if name not in SUBJECTS:
                raise ValueError(f"mechanism: expected one of {', '.join(SUBJECTS)}, got {name!r}")
        for name in self.passes:
            if name not in PASSES:
                raise ValueError(f"pass: expected one of {', '.join(PASSES)}, got {name!r}")
        require_dtype(self.dtype)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"length: expected numbers of at least 1, got {list(self.lengths)}")
        for name in ("batch", "heads", "dim", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("budget", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def quick(self) -> Recipe:
        """Every second length up to 8192, with fewer runs."""
        lengths = tuple(T for T in self.lengths if T <= 8192)[::2]
        return replace(self, lengths=lengths, repeats=9, budget=0.5, seconds=2.0)

    def groups(self) -> Iterator[list[Cell]]:
        """Groups of cells that are compared with one another, and so measured in turn."""
        for T in sorted(set(self.lengths)):
            for kind in dict.fromkeys(self.passes):
                yield [(T, kind, mechanism) for mechanism in dict.fromkeys(self.mechanisms)]

    def cells(self) -> Iterator[Cell]:
        for group in self.groups():
            yield from group


FAIR = tuple(name for name, subject in SUBJECTS.items() if subject.fair)
RECIPES = {
    "fair": Recipe(FAIR, PASSES, tuple(2**p for p in range(7, 21))),
    # The choice of `impl="auto"` beside PyTorch's operations. It should be slower at no length.
    "implementations": Recipe(
        (
            BASELINE,
            *(
                f"{name}{impl}"
                for name in FAIR
                if f"{name}, torch" in SUBJECTS
                for impl in ("", ", torch")
            ),
        ),
        PASSES,
        tuple(2**p for p in range(4, 15, 2)),
    ),
    # "Linear Attention Is All You Need": one layer, d = 64, batch 32, forward, on a T4; mean and
    # deviation of 100 runs. Its softmax keeps all weights in memory. PyTorch's fused softmax and
    # Taylor attention are measured beside it.
    "blog": Recipe(
        ("naive softmax", "softmax", "linear", "taylor"),
        ("forward",),
        (128, 256, 512, 1000, 2000, 4000, 6000),
        batch=32,
        heads=1,
        causal=False,
        repeats=100,
        budget=20.0,
        seconds=60.0,
    ),
}
