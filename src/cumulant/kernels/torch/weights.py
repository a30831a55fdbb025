"""Weights of gated attention inside a block: ``f(score + bias)``, causal zeros, and dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MEAN, _WIDTH = math.sqrt(0.5), math.sqrt(1 / (2 * math.pi))  # Laplace: ½ erfc((mean - x) / width)


def activate_in_place(name: str, x: Tensor) -> Tensor:
    """f(x), written over x."""
    if name == "relu2":
        return x.relu_().square_()
    # erfc, because 1 + erf would cancel where scores are small
    return x.sub_(_MEAN).div_(-_WIDTH).erfc_().mul_(0.5)


def activate_with_slope(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x); x is overwritten."""
    if name == "relu2":
        half = x.relu_()
        return half.square(), half.mul_(2)  # d relu(x)² = 2 relu(x)
    # d ½ erfc((mean - x) / width) = exp(-2π (x - mean)²) √2. It needs x, which f then overwrites.
    slope = (x - _MEAN).square_().mul_(-2 * math.pi).exp_().mul_(math.sqrt(2))
    return activate_in_place(name, x), slope


def hide_later(weights: Tensor, length: int, past: int = 0) -> Tensor:
    """Writes zeros where query i would see beyond key ``past + i``: ``[..., R * length, S]``."""
    weights.unflatten(-2, (-1, length)).tril_(past)
    return weights


def dropout_factors(weights: Tensor, p: float, seed: Tensor | None, block: int) -> Tensor | None:
    """Factors 0 or 1 / (1 - p); None without dropout.

    One seed and block always draw the same factors, so the backward pass can draw them again.
    """
    if p == 0.0 or seed is None:
        return None
    generator = torch.Generator(weights.device).manual_seed(int(seed) + block)
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
    factors: Tensor = torch.where(drawn >= p, 1 / (1 - p), 0.0).to(weights.dtype)
    return factors


def bias_rows(
    bias: Tensor | None, groups: int, heads: int, rows: slice, columns: int
) -> Tensor | None:
    """The bias of some queries and the first keys, in the shape of their weights.

    ``[..., 1 or H, T, S]`` -> ``[..., G, R * rows, columns]``.
    """
    if bias is None:
        return None
    part = bias[..., rows, :columns]
    if heads == 1:
        return part
    by_head: Tensor = part.expand(*part.shape[:-3], heads, *part.shape[-2:]).unflatten(
        -3, (groups, -1)
    )
    return by_head.flatten(-3, -2)
