"""Packed sequences, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

Inputs = TypeVar("Inputs", bound=Any)


def each_sequence(
    run: Callable[[Inputs], Any],
    inputs: Inputs,
    by_token: Sequence[str],
    by_sequence: Sequence[str] = (),
) -> Any:
    """``run(inputs)`` of each packed sequence by itself, joined.

    Outputs are joined along T, with zeros behind the last sequence; states are joined along N.
    by_token and by_sequence name the inputs ``[1, heads, T, ...]`` and ``[N, ...]``; an input may
    be None.
    """
    bounds = inputs.cu_seqlens.tolist()
    results = []
    for i, (a, b) in enumerate(pairwise(bounds)):
        own: dict[str, Any] = {}
        for name in by_token:
            x = getattr(inputs, name)
            own[name] = None if x is None else x[:, :, a:b]
        for name in by_sequence:
            x = getattr(inputs, name)
            own[name] = None if x is None else x[i : i + 1]
        if getattr(inputs, "key_mask", None) is not None:
            own["key_mask"] = inputs.key_mask[:, a:b]
        results.append(run(inputs._replace(cu_seqlens=None, **own)))
    outs, *ends = zip(*results, strict=True)
    slack = getattr(inputs, by_token[0]).shape[2] - bounds[-1]
    behind = outs[0].new_zeros(*outs[0].shape[:2], slack, outs[0].shape[3])
    return type(results[0])(torch.cat((*outs, behind), 2), *(torch.cat(parts) for parts in ends))
