"""Absolute positions as sines and cosines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_count, check_positions
from .rotary import RotaryEmbedding
from .step import known_to_programs


@known_to_programs
class ScaledSinusoidalEmbedding(nn.Module):
    """``g [sin(t w), cos(t w)]`` with ``w_i = base^(-2i/dim)`` and one learned number g.

    g starts at 1 / sqrt(dim). Angles are exact for millions of tokens (see `RotaryEmbedding`).

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", appendix B.

    Args:
        dim: channels D, even.
        base: the slowest channel has a period of about ``2π · base`` tokens.
    """

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        check_count("dim", dim)
        if dim < 2 or dim % 2:
            raise ValueError(
                f"dim: sinusoidal positions need an even number of channels, got {dim}"
            )
        self.dim = dim
        self.angles = RotaryEmbedding(dim, base)
        self.scale = nn.Parameter(self.initial_scale())

    def initial_scale(self) -> Tensor:
        return torch.tensor([self.dim**-0.5])

    def forward(self, position: Tensor) -> Tensor:
        """``position [T]`` or ``[B, T]`` (integers) -> ``[..., T, D]`` in the scale's dtype."""
        check_positions(position)
        cos, sin = self.angles.angles(position)
        return torch.cat((sin, cos), -1).to(self.scale.dtype) * self.scale
