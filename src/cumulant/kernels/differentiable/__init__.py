"""The operations in plain PyTorch, chunk by chunk: O(T) time, differentiable any number of times in either mode.

Operators with hand-written backward passes know gradients of first order. Where more is asked for (tangents, gradients
of gradients, anything nested under `torch.func`), these take their place, with the same arguments. Nothing is written
in place and no value is read, but the bounds of packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def each_sequence(
    run: Callable[..., tuple[Tensor, ...]],
    tokens: tuple[Tensor, ...],
    key_mask: Tensor | None,
    cu_seqlens: Tensor,
    past: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """``run(*tokens, key_mask, *past)`` of each packed sequence by itself: outputs along T, zeros behind the last one;
    what else comes out, along N."""
    bounds = cu_seqlens.tolist()
    outs: list[Tensor] = []
    ends: list[tuple[Tensor, ...]] = []
    for i, (a, b) in enumerate(pairwise(bounds)):
        mask = None if key_mask is None else key_mask[:, a:b]
        row = [None if x is None else x[i : i + 1] for x in past]
        out, *end = run(*(x[:, :, a:b] for x in tokens), mask, *row)
        outs.append(out)
        ends.append(tuple(end))
    slack = tokens[0].shape[2] - bounds[-1]
    outs.append(outs[0].new_zeros(*outs[0].shape[:2], slack, outs[0].shape[3]))
    joined: list[Any] = [torch.cat(parts) for parts in zip(*ends, strict=True)]
    return torch.cat(outs, 2), *joined
