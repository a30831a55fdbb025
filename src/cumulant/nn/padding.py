"""Masked tokens do not exist: how modules hold to that, wherever the padding lies.

A module moves the tokens that count to the front of each row (`compact`), works on rows padded on
the right, where a causal mixer's outputs cannot see the padding, and puts its outputs back
(`restore`). Left padding, right padding and holes then give the same outputs, gradients and states
as no padding at all. Where neither neighbours nor positions matter, tokens stay where they are
(`hide`) and the operation's own mask does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which slots hold a token ``[B, T]``, how many do ``[B]``, and where each position went (None:
    nowhere).
    """

    mask: Tensor
    tokens: Tensor
    inverse: Tensor | None


def compact(x: Tensor, key_mask: Tensor) -> tuple[Tensor, Rows]:
    """Tokens that count to the front of each row, zeros behind them: ``[B, T, D]``."""
    count, index = key_mask.sum(1), torch.arange(x.shape[1], device=x.device)
    # where each goes: a stable partition, without the sort that ONNX has not
    place = torch.where(
        key_mask, key_mask.cumsum(1) - 1, count[:, None] + (~key_mask).cumsum(1) - 1
    )
    order = torch.zeros_like(place).scatter(1, place, index.expand_as(place))
    mask = index < count[:, None]
    x = x.gather(1, order[..., None].expand_as(x)).masked_fill(~mask[..., None], 0)
    return x, Rows(mask, count, place)


def hide(x: Tensor, key_mask: Tensor) -> tuple[Tensor, Rows]:
    """Zeros for masked tokens, all others in place: ``[B, T, D]``."""
    return x.masked_fill(~key_mask[..., None], 0), Rows(key_mask, key_mask.sum(1), None)


def restore(y: Tensor, rows: Rows | None) -> Tensor:
    """Outputs back where their tokens stood; zeros at masked positions."""
    if rows is None:
        return y
    y = y.masked_fill(~rows.mask[..., None], 0)
    if rows.inverse is None:
        return y
    return y.gather(1, rows.inverse[..., None].expand_as(y))


def last_tokens(x: Tensor, padding: Tensor | None, n: int) -> Tensor:
    """The last `n` tokens of each row of ``x [B, L, D]``, its final ``padding [B]`` entries left
    out: ``[B, n, D]``.
    """
    if padding is None:
        return x[:, x.shape[1] - n :].clone()  # a view would keep the whole sequence alive
    index = x.shape[1] - n - padding[:, None] + torch.arange(n, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def clear_slack(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``x [1, T, D]`` with zeros after the last packed sequence: what stands there reaches no
    gradient.
    """
    return x.masked_fill((torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-1])[:, None], 0)


def offsets(length: int, cu_seqlens: Tensor) -> Tensor:
    """Index of each packed token in its own sequence ``[T]``; rows after the last sequence count
    on.
    """
    index = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]


def positions(
    length: int, start: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of each token in its sequence: ``[T]``, or ``[B, T]`` after a state that ends at
    `start` ``[B]``.
    """
    if cu_seqlens is not None:
        return offsets(length, cu_seqlens)
    index = torch.arange(length, device=device)
    return index if start is None else start[:, None] + index
