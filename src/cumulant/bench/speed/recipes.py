"""What `cumulant bench` measures in one report: mechanisms, passes and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..dtypes import DTYPES, require_dtype
from .subjects import SUBJECTS, Shape
from .verdicts import BASELINE, PASSES

Cell = tuple[int, str, str]  # length, pass, mechanism
QUICK_LIMIT = 30.0  # seconds of a minute; the rest is for the start and the report


@dataclass(frozen=True)
class Recipe:
    """Cells that are measured: each mechanism, in each pass, at each length.

    batch: sequences. heads, dim: heads, and numbers in the value of one.
    repeats: runs of a cell, at most.
    budget: seconds after which a cell is not run again, over all its rounds.
    seconds: the most that a single run may take.
    limit: seconds after which nothing more is measured; None: all is.
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
    limit: float | None = None

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
        for name in ("budget", "seconds", "limit"):
            value = getattr(self, name)
            if not (name == "limit" and value is None) and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    def quick(self) -> Recipe:
        """Every second length up to 8192, with fewer runs, and only as many cells as time allows.

        With the command's start and the drawing of the report it stays under a minute, on a busy
        machine too.
        """
        lengths = tuple(T for T in self.lengths if T <= 8192)[::2]
        return replace(self, lengths=lengths, repeats=9, budget=0.3, seconds=1.0, limit=QUICK_LIMIT)

    def groups(self) -> Iterator[list[Cell]]:
        """Groups of cells that are compared with one another, and so measured in turn."""
        for T in sorted(set(self.lengths)):
            for kind in dict.fromkeys(self.passes):
                mechanisms = dict.fromkeys(self.mechanisms)
                yield [(T, kind, name) for name in mechanisms if kind in SUBJECTS[name].passes]

    def cells(self) -> Iterator[Cell]:
        for group in self.groups():
            yield from group

    def shape(self, T: int, device: str) -> Shape:
        return Shape(
            self.batch, self.heads, T, self.dim, DTYPES[self.dtype].torch, device, self.causal
        )

    def obstacles(self, device: str) -> dict[str, str]:
        """The mechanisms that cannot be measured here, each with what it needs."""
        shape = self.shape(min(self.lengths), device)
        found = {name: SUBJECTS[name].obstacle(shape) for name in self.mechanisms}
        return {name: needed for name, needed in found.items() if needed}

    def possible(self, device: str) -> Recipe:
        """The recipe without the mechanisms that cannot be measured here."""
        lacking = self.obstacles(device)
        return replace(self, mechanisms=tuple(m for m in self.mechanisms if m not in lacking))


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
