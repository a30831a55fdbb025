"""Gated attention, a block of queries at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..transforms import without_autocast
from . import compute_dtype

_MEAN, _WIDTH = math.sqrt(0.5), math.sqrt(1 / (2 * math.pi))  # Laplace: ½ erfc((mean - x) / width)


def activate(name: str, x: Tensor) -> Tensor:
    return x.relu().square() if name == "relu2" else torch.erfc((_MEAN - x) / _WIDTH) / 2


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    is_causal: bool,
    dropout_p: float,
    block: int,
) -> Tensor:
    """``f(scale · q kᵀ + bias) v``: scale ``[B or 1, T or 1]``, bias ``[B or 1, H or 1, T, S]``."""
    run: Callable[..., Tensor] = partial(
        _attend, activation=activation, is_causal=is_causal, dropout_p=dropout_p, block=block
    )
    with without_autocast(query):
        if cu_seqlens is None:
            return run(query, key, value, scale, bias)
        bounds, outs = cu_seqlens.tolist(), []
        for a, b in pairwise(bounds):
            own = scale if scale.shape[1] == 1 else scale[:, a:b]
            outs.append(
                run(
                    *(x[:, :, a:b] for x in (query, key, value)),
                    own,
                    None if bias is None else bias[..., : b - a, : b - a],
                )
            )
        outs.append(query.new_zeros(*query.shape[:2], query.shape[2] - bounds[-1], value.shape[3]))
        return torch.cat(outs, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    is_causal: bool,
    dropout_p: float,
    block: int,
) -> Tensor:
    (B, H, T, _), (G, S) = query.shape, key.shape[1:3]
    dtype = compute_dtype(query.dtype)
    q = (query.to(dtype) * scale[:, None, :, None]).unflatten(1, (G, H // G))
    k, v = key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]
    if bias is not None:
        bias = bias.to(dtype).expand(-1, H, -1, -1).unflatten(1, (G, H // G))
    outs = [query.new_zeros(B, H, 0, value.shape[3])]
    for start in range(0, T, block):
        rows, end = slice(start, start + block), min(start + block, T) + S - T if is_causal else S
        scores = q[:, :, :, rows] @ k[:, :, :, :end].mT
        weights = activate(activation, scores if bias is None else scores + bias[:, :, :, rows, :end])
        if is_causal:
            weights = weights.tril(S - T + start)
        weights = dropout(weights, dropout_p) if dropout_p else weights
        outs.append((weights @ v[:, :, :, :end]).flatten(1, 2).to(query.dtype))
    return torch.cat(outs, 2)
