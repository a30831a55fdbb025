"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.pointwise import rotate_pairs
from .checks import check_count, check_floats, check_positions
from .step import known_to_programs


@known_to_programs
class RotaryEmbedding(nn.Module):
    """Rotates neighbouring pairs of dimensions by angles that depend on the position.

    The angle of pair i at position t is ``t · base^(-2i/dim)``. It is reduced to one full rotation
    in fp64, so angles after a million tokens are as exact as at the start, in any dtype. The module
    has no parameters and no buffers.

    Source: Su et al. 2021, "RoFormer", eq. 34.

    Args:
        dim: rotated dimensions, even.
        base: the slowest pair makes one full rotation in about ``2π · base`` tokens.
    """

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        check_count("dim", dim)
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: rotary embedding needs an even number of dimensions, got {dim}")
        self.dim, self.base = dim, base

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base}"

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[..., T, dim/2]`` in fp32 for ``position [..., T]``."""
        exponent = (
            torch.arange(0, self.dim, 2, dtype=torch.float64, device=position.device) / -self.dim
        )
        rotations = position[..., None] * (self.base**exponent / (2 * torch.pi))
        angle = ((rotations - rotations.floor()) * (2 * torch.pi)).float()
        return angle.cos(), angle.sin()

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``x [B, H, T, dim]`` at ``position [T]`` or ``[B, T]``."""
        self._check_input(x, position, "x")
        return rotate_pairs(x, *self.angles(position))

    def both(self, query: Tensor, key: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at the same positions."""
        self._check_input(query, position, "query")
        self._check_input(key, position, "key")
        cosine, sine = self.angles(position)
        return rotate_pairs(query, cosine, sine), rotate_pairs(key, cosine, sine)

    def _check_input(self, x: Tensor, position: Tensor, name: str) -> None:
        check_floats(x, "[B, H, T, dim]", name)
        check_positions(position)
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{name}: expected [B, H, T, dim] with dim={self.dim}, got {list(x.shape)}"
            )
        if torch.compiler.is_compiling():  # comparing lengths would fix them in the graph
            return
        B, T = x.shape[0], x.shape[2]
        if position.shape not in ((T,), (1, T), (B, T)):
            raise ValueError(
                f"position: expected [T] or [B, T], [{T}] or [{B}, {T}] for {name} {list(x.shape)},"
                f" got {list(position.shape)}"
            )
