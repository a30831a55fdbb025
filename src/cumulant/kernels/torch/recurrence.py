"""First-order linear recurrences ``h_t = d_t h_{t-1} + x_t``, every chunk of tokens one step at a
time, side by side.

Walking C tokens through T / C chunks at once takes C steps of large operations. What reaches a
chunk from those before it is a recurrence over T / C chunks, of the same kind, and so on: O(T) work
in O(C log T / log C) operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# advance(h [B, G, n, V], at): h, before the tokens at `at` of n chunks, becomes h after them, in
# place
Advance = Callable[[Tensor, slice], object]


def steps(length: int, chunk: int, reverse: bool = False) -> list[tuple[slice, int]]:
    """Token i of every chunk, for all i, and how many chunks have one; `reverse`: from the last i
    to the first.
    """
    found = [(slice(i, None, chunk), -(-(length - i) // chunk)) for i in range(min(chunk, length))]
    return found[::-1] if reverse else found


def carried(
    advance: Advance,
    decay: Tensor,
    start: Tensor,
    chunk: int,
    reverse: bool = False,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h before each chunk ``[B, G, P, V]`` in `dtype`, and after all tokens ``[B, G, V]`` in
    start's.

    decay: d, ``[B, G, T]`` with T >= 1, by which `advance` multiplies h; in fp64, as products of
    many factors near 1 would not be 1e-5 exact in fp32. start: h before the first token. `reverse`:
    tokens run from the last to the first, and "before" a chunk is to its right.
    """
    walk = steps(decay.shape[2], chunk, reverse)
    chunks = -(-decay.shape[2] // chunk)
    own = start.new_zeros(
        *start.shape[:2], chunks, start.shape[2], dtype=dtype
    )  # h from zero over each chunk
    product = decay.new_ones(*start.shape[:2], chunks)
    for at, n in walk:
        advance(own[:, :, :n], at)
        product[:, :, :n].mul_(decay[:, :, at])
    if chunks == 1:
        before = start[:, :, None].to(dtype, copy=True)
        return before, torch.addcmul(own[:, :, 0].to(start.dtype), start, product.to(start.dtype))

    over = product.to(dtype)

    def chunkwise(h: Tensor, at: slice) -> None:
        h.mul_(over[:, :, at, None]).add_(own[:, :, at])

    h, end = carried(chunkwise, product, start, chunk, reverse, dtype=dtype)
    before = torch.empty_like(own)
    for at, n in steps(chunks, chunk, reverse):
        before[:, :, at] = h[:, :, :n]
        chunkwise(h[:, :, :n], at)
    return before, end


def scan(decay: Tensor, x: Tensor, start: Tensor, chunk: int, reverse: bool = False) -> Tensor:
    """h after every token, of numbers: ``decay``, ``x [B, G, T]``, ``start [B, G]`` ->
    ``[B, G, T]``.
    """
    each = decay.to(x.dtype)

    def advance(h: Tensor, at: slice) -> None:
        h.mul_(each[:, :, at, None]).add_(x[:, :, at, None])

    out = torch.empty_like(x)
    h, _ = carried(advance, decay, start[:, :, None], chunk, reverse, dtype=x.dtype)
    for at, n in steps(x.shape[2], chunk, reverse):
        advance(h[:, :, :n], at)
        out[:, :, at] = h[:, :, :n, 0]
    return out


def segment_maximum(x: Tensor, first: Tensor | None) -> Tensor:
    """Running maximum along T of ``x [B, G, T]``, anew from every True of ``first [T]``."""
    if first is None:
        return x.cummax(-1).values
    index = torch.arange(x.shape[-1], device=x.device)
    index = index - torch.where(first, index, 0).cummax(0).values  # place in its segment
    reach = 1
    while reach < x.shape[-1]:
        before = x[..., :-reach].masked_fill(index[reach:] < reach, -torch.inf)
        x = torch.cat((x[..., :reach], torch.maximum(x[..., reach:], before)), -1)
        reach *= 2
    return x
