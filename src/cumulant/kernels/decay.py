"""Decays of the tokens in a chunk.

A token's log decay d_i ≤ 0 multiplies all sums over earlier tokens by exp(d_i), before the token
itself is added. With the running sums c_i = d_1 + ... + d_i of a chunk, query i weighs key j by
exp(c_i - c_j), and reads what came before the chunk by exp(c_i).

Running sums are taken in fp64 and only differences of at most 0 are exponentiated: after a large
decay, fp32 sums would lose the small ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST = -750.0  # exp is 0 from here on in every dtype; sums of -inf would not be finite


class Decay(NamedTuple):
    """The running sums c ``[n, G, C]`` of a chunk, in fp64, and the dtype of factors."""

    running: Tensor
    dtype: torch.dtype

    @classmethod
    def from_logs(cls, logs: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Decay:
        """logs ``[n, G, C]``; a masked token decays nothing. mask: ``[n, 1, 1, C]``."""
        logs = logs.double() if mask is None else logs.double().masked_fill(~mask[:, :, 0], 0)
        return cls(logs.clamp(min=LEAST, max=0).cumsum(-1), dtype)

    def between(self) -> Tensor:
        """exp(c_i - c_j) ``[n, G, C, C]`` for j ≤ i; 1 for later keys, which nothing reads."""
        c = self.running
        return (c[..., None] - c[..., None, :]).clamp_(max=0).to(self.dtype).exp_()

    def from_start(self, queries: int) -> Tensor:
        """exp(c_i) for every query row ``[n, G, M]``, one head after another."""
        found = self.running.exp().to(self.dtype)
        return found.repeat(1, 1, queries // found.shape[-1])

    def to_end(self) -> Tensor:
        """exp(c_C - c_j) ``[n, G, C]``."""
        c = self.running
        return (c[..., -1:] - c).to(self.dtype).exp_()

    def whole(self) -> Tensor:
        """c_C ``[n, G]``: the log decay of what came before the chunk."""
        return self.running[..., -1]


def decay_sums(sums: Tensor, logs: Tensor) -> Tensor:
    """sums ``[n, G, ...]`` in fp64 times exp(logs) ``[n, G]``, in fp64.

    Sums that decay are carried in fp64 through a call. In fp32 a factor near 1, and the sum itself,
    would be rounded in every chunk, and for thousands of chunks in the same direction: sums over a
    million tokens with a log decay of -1e-6 were off by 2.5e-5.
    """
    return sums.double() * logs.exp().view(*logs.shape, *[1] * (sums.dim() - 2))


def sum_crossing_pairs(pairs: Tensor) -> Tensor:
    """Σ over i ≥ l > j of ``pairs [n, G, C, C]``, for every l: ``[n, G, C]``.

    It is the gradient of d_l, which is part of c_i - c_j exactly for these pairs.
    """
    return sum_earlier(pairs).tril().sum(-2)


def sum_later(x: Tensor) -> Tensor:
    """Σ over i ≥ l of ``x [..., C]``."""
    return x.flip(-1).cumsum(-1).flip(-1)


def sum_earlier(x: Tensor) -> Tensor:
    """Σ over j < l of ``x [..., C]``."""
    return pad(x[..., :-1], (1, 0)).cumsum(-1)


# The reference's own way: every sum for itself.


def decay_state(x: Tensor, factor: Tensor | None) -> Tensor:
    """x ``[B, G, ...]`` times factor ``[B, G]``; None for 1."""
    return x if factor is None else x * factor.view(*factor.shape, *[1] * (x.dim() - 2))


def pair_decays(log_decay: Tensor, key_mask: Tensor | None) -> Tensor:
    """exp(Σ of the log decays of tokens j + 1 to i), in fp64, for j ≤ i and 0 for later j.

    ``[B, G, T]`` -> ``[B, G, T, 1 + T]``; the first column is for what came before all tokens.
    Every sum is taken for itself, so that -inf among them gives 0 and nothing is a difference.
    """
    T = log_decay.shape[2]
    logs = log_decay.double()
    if key_mask is not None:
        logs = logs.masked_fill(~key_mask[:, None], 0)
    later = torch.ones(T, 1 + T, dtype=torch.bool, device=logs.device).tril()  # i > j - 1
    sums = logs[..., None].expand(*logs.shape, 1 + T).masked_fill(~later, 0).cumsum(2)
    seen = torch.ones_like(later).tril(1)
    return sums.exp().masked_fill(~seen, 0)
