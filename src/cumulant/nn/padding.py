"""Masks in modules: padding, wherever it is, changes nothing.

A module moves the tokens to the front of each row (`compact_rows`) and works on rows padded on the
right, where the outputs of a causal mixer cannot depend on padding. Then it moves its outputs back
(`restore_rows`). So padding on the left, on the right and between tokens gives the same outputs,
gradients and states as none. Where neither neighbours nor positions matter, tokens stay where they
are (`zero_masked`), and the operation's own mask does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The tokens of padded rows, and where they were moved.

    mask: ``[B, T]``, True at tokens. tokens: ``[B]``, their number. inverse: ``[B, T]``, the new
    index of each old one; None if nothing was moved.
    """

    mask: Tensor
    tokens: Tensor
    inverse: Tensor | None


class LocalRows(NamedTuple):
    """Where rows end and packed sequences begin, for token shift and convolution.

    padding: ``[B]`` padding tokens at the end of each row. offset: ``[T]`` index of each token in
    its packed sequence.
    """

    padding: Tensor | None
    offset: Tensor | None


def compact_rows(x: Tensor, key_mask: Tensor) -> tuple[Tensor, Rows]:
    """Move tokens to the front of each row, with zeros behind them: ``[B, T, D]``."""
    count, index = key_mask.sum(1), torch.arange(x.shape[1], device=x.device)
    # the new index of each entry, by a stable partition; ONNX has no stable sort
    new_index = torch.where(
        key_mask, key_mask.cumsum(1) - 1, count[:, None] + (~key_mask).cumsum(1) - 1
    )
    order = torch.zeros_like(new_index).scatter(1, new_index, index.expand_as(new_index))
    mask = index < count[:, None]
    x = x.gather(1, order[..., None].expand_as(x)).masked_fill(~mask[..., None], 0)
    return x, Rows(mask, count, new_index)


def zero_masked(x: Tensor, key_mask: Tensor) -> tuple[Tensor, Rows]:
    """Set masked tokens to zero and leave the others where they are: ``[B, T, D]``."""
    return x.masked_fill(~key_mask[..., None], 0), Rows(key_mask, key_mask.sum(1), None)


def restore_rows(y: Tensor, rows: Rows | None) -> Tensor:
    """Move outputs back to the old indices of their tokens, with zeros at masked positions."""
    if rows is None:
        return y
    y = y.masked_fill(~rows.mask[..., None], 0)
    if rows.inverse is None:
        return y
    return y.gather(1, rows.inverse[..., None].expand_as(y))


def last_tokens(x: Tensor, padding: Tensor | None, n: int) -> Tensor:
    """The last `n` tokens of each row of ``x [B, L, D]`` before its ``padding [B]`` entries."""
    if padding is None:
        return x[:, x.shape[1] - n :].clone()  # a view would keep the whole sequence in memory
    index = x.shape[1] - n - padding[:, None] + torch.arange(n, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def zero_after_packed(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``x [1, T, D]`` with zeros after the last packed sequence, so no gradient depends on it."""
    return x.masked_fill((torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-1])[:, None], 0)


def packed_positions(length: int, cu_seqlens: Tensor) -> Tensor:
    """The index of each packed token in its own sequence ``[T]``."""
    index = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]


def token_positions(
    length: int, start: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """The position of each token in its sequence, ``[T]``, or ``[B, T]`` from ``start [B]`` on."""
    if cu_seqlens is not None:
        return packed_positions(length, cu_seqlens)
    index = torch.arange(length, device=device)
    return index if start is None else start[:, None] + index
