"""First-order linear recurrences ``h_t = d_t h_{t-1} + x_t``, all chunks side by side.

A step advances every chunk by one token, so T / C chunks of C tokens take C large operations. The
values that enter the chunks follow a recurrence of the same kind over T / C chunks, and so on. In
all it is O(T) work in O(C log T / log C) operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# advance(h [B, G, n, V], at): h is the value before the tokens at `at` of n chunks. The function
# overwrites it with the value after them.
Advance = Callable[[Tensor, slice], object]


def token_steps(length: int, chunk: int, reverse: bool = False) -> list[tuple[slice, int]]:
    """For each i, the slice of token i of every chunk, and how many chunks have such a token.

    `reverse` runs from the last i to the first.
    """
    found = [(slice(i, None, chunk), -(-(length - i) // chunk)) for i in range(min(chunk, length))]
    return found[::-1] if reverse else found


def carry_chunks(
    advance: Advance,
    decay: Tensor,
    start: Tensor,
    chunk: int,
    reverse: bool = False,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h before each chunk ``[B, G, P, V]`` in `dtype`, and after all tokens ``[B, G, V]``.

    decay is d ``[B, G, T]`` with T >= 1, by which `advance` multiplies h. It is in fp64, because
    fp32 products of many factors near 1 would be wrong by more than 1e-5. start is h before the
    first token; the last h has its dtype. With `reverse`, tokens run from the last to the first,
    and "before" a chunk is to its right.
    """
    walk = token_steps(decay.shape[2], chunk, reverse)
    chunks = -(-decay.shape[2] // chunk)
    # Over a chunk h becomes product · h + own: own is the result from h = 0.
    own = start.new_zeros(*start.shape[:2], chunks, start.shape[2], dtype=dtype)
    product = decay.new_ones(*start.shape[:2], chunks)
    for at, n in walk:
        advance(own[:, :, :n], at)
        product[:, :, :n].mul_(decay[:, :, at])
    if chunks == 1:
        before = start[:, :, None].to(dtype, copy=True)
        return before, torch.addcmul(own[:, :, 0].to(start.dtype), start, product.to(start.dtype))

    over = product.to(dtype)

    def advance_chunk(h: Tensor, at: slice) -> None:
        h.mul_(over[:, :, at, None]).add_(own[:, :, at])

    h, end = carry_chunks(advance_chunk, product, start, chunk, reverse, dtype=dtype)
    before = torch.empty_like(own)
    for at, n in token_steps(chunks, chunk, reverse):
        before[:, :, at] = h[:, :, :n]
        advance_chunk(h[:, :, :n], at)
    return before, end


def scan_tokens(
    decay: Tensor, x: Tensor, start: Tensor, chunk: int, reverse: bool = False
) -> Tensor:
    """h after every token, for numbers: decay and x ``[B, G, T]``, start ``[B, G]``."""
    each = decay.to(x.dtype)

    def advance(h: Tensor, at: slice) -> None:
        h.mul_(each[:, :, at, None]).add_(x[:, :, at, None])

    out = torch.empty_like(x)
    h, _ = carry_chunks(advance, decay, start[:, :, None], chunk, reverse, dtype=x.dtype)
    for at, n in token_steps(x.shape[2], chunk, reverse):
        advance(h[:, :, :n], at)
        out[:, :, at] = h[:, :, :n, 0]
    return out


def segment_maximum(x: Tensor, first: Tensor | None) -> Tensor:
    """Running maximum of ``x [B, G, T]`` along T, which restarts at every True of ``first [T]``."""
    if first is None:
        return x.cummax(-1).values
    index = torch.arange(x.shape[-1], device=x.device)
    index = index - torch.where(first, index, 0).cummax(0).values  # in its segment
    reach = 1
    while reach < x.shape[-1]:
        before = x[..., :-reach].masked_fill(index[reach:] < reach, -torch.inf)
        x = torch.cat((x[..., :reach], torch.maximum(x[..., reach:], before)), -1)
        reach *= 2
    return x
