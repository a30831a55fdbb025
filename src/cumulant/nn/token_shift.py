"""Token shift (Peng et al., RWKV): half of the channels come from the token before."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_floats, check_tensor_like
from .padding import last_tokens


def token_shift(
    x: Tensor,
    *,
    tail: Tensor | None = None,
    offset: Tensor | None = None,
    padding: Tensor | None = None,
    first_half: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take the second half of the channels from the token before.

    Returns ``[B, T, D]`` and the new tail ``[B, 1, D/2]``.

    Args:
        x: ``[B, T, D]``.
        tail: shifted channels of the token before ``x``; zeros if None.
        offset: ``[T]`` index of each token in its packed sequence; first tokens see zeros.
        padding: ``[B]`` padding tokens at the end of each row, which are left out of the tail.
        first_half: shift the first half of the channels instead.
    """
    check_floats(x, "[B, T, D]")
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, T, D], got {list(x.shape)}")
    keep, shifted = x.split((x.shape[-1] + 1) // 2, -1)
    if first_half:
        keep, shifted = shifted, keep
    before = shifted.shape[0], 1, shifted.shape[2]
    if tail is not None:
        check_tensor_like(tail, "tail: expected", "[B, 1, D/2]", before, x)
    tail = shifted.new_zeros(before) if tail is None else tail.to(shifted.dtype)
    buffer = torch.cat((tail, shifted), 1)
    previous = buffer[:, :-1]
    if offset is not None:
        previous = previous.masked_fill((offset == 0)[:, None], 0)
    halves = (previous, keep) if first_half else (keep, previous)
    return torch.cat(halves, -1), last_tokens(buffer, padding, 1)
