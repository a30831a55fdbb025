"""Does a rotation whose rate depends on the input help gated Taylor attention?

Rotary positions turn queries and keys by an angle that grows by the same amount with each token.
Here the amount depends on the token and the head: position p_t = sum over l <= t of
1 + tanh(w_h . x_l), where w starts at zero, as in Kumar et al. 2025, "Conformal Transformations for
Symmetric Power Transformers" (arXiv 2503.03269).

It trains that model as `cumulant compare --recipe gates` trains the others, so the rows of the two
folders can be compared. States of such a model would need a position for each head, which they do
not have; so contexts end at 4,096 tokens, which are read in one piece, and no states are passed on.

    python benchmarks/rotation_rate.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cumulant.bench.compare.recipes import GATED, find_recipe
from cumulant.bench.compare.work import run
from cumulant.models import mixers
from cumulant.nn import RotaryEmbedding, TaylorAttention
from cumulant.ops.pointwise import rotate_pairs


class InputRotation(RotaryEmbedding):
    """Rotary positions that advance by `rate [B, H, T]`, which the mixer sets before each call."""

    rate: Tensor

    def both(self, query: Tensor, key: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self.angles(self.rate.double().cumsum(-1))
        rows = (query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None])
        cosine, sine = cosine.flatten(0, 1), sine.flatten(0, 1)
        q, k = (rotate_pairs(x, cosine, sine).view_as(query) for x in rows)
        return q, k


class RotatingTaylorAttention(TaylorAttention):
    """Taylor attention with `InputRotation`, for windows that are read at once."""

    def __init__(self, dim: int, num_heads: int, **options: Any):
        super().__init__(dim, num_heads, **options)
        assert self.rotary is not None
        self.rotary = InputRotation(self.rotary.dim, self.rotary.base)
        self.rotation_rate = nn.Parameter(torch.zeros(num_heads, dim))

    def _attend_self(self, x: Tensor, rows: Any, local: Any, cu_seqlens: Any, state: Any, *r: Any):
        if not (rows is None and cu_seqlens is None and state is None):
            raise ValueError("rotation: expected a whole window, without mask, documents or state")
        self.rotary.rate = 1 + (x @ self.rotation_rate.T).tanh().mT
        return super()._attend_self(x, rows, local, cu_seqlens, state, *r)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/rotation-rate")
    parser.add_argument("--steps", type=int, help="of each training; default: the recipe's")
    options = parser.parse_args()
    mixers.TaylorAttention = RotatingTaylorAttention  # type: ignore[misc]
    mechanism = replace(GATED[1], name="gated_taylor, input-dependent rotation", style=None)
    recipe = replace(
        find_recipe("gates"),
        mechanisms=(mechanism.with_fields(rotary=True),),
        baseline=mechanism.name,
        reach=8,
        passing_steps=0,
    )
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    run("rotation-rate", recipe, options.output, console=Console())


if __name__ == "__main__":
    main()
