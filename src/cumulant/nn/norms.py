"""Normalisation layers, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.pointwise import rms_norm
from .checks import check_count, check_floats

NORMS = ("layernorm", "rmsnorm", "scalenorm")


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over one dimension, in one pass over memory on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps)


class ScaleNorm(nn.Module):
    """``y = g x / max(|x| / sqrt(D), eps)`` with one learned number g for all channels.

    Source: Nguyen and Salazar 2019, "Transformers without Tears". The sqrt(D) is as in Hua et al.
        2022.

    Args:
        dim: channels D.
        eps: smallest divisor.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        check_count("dim", dim)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(1))

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        check_floats(x, "[..., D]")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected [..., D] with D={self.dim}, got {list(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # 1 / eps is beyond fp16
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * self.dim**-0.5
        y: Tensor = wide * (self.weight / size.clamp(min=self.eps))
        return y.to(x.dtype)


def make_norm(name: str, dim: int, eps: float | None = None, *, affine: bool = True) -> nn.Module:
    """A norm by name, by default with its usual epsilon. Without `affine` it learns nothing."""
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {name!r}")
    if name == "rmsnorm":
        return RMSNorm(dim, eps=1e-6 if eps is None else eps, elementwise_affine=affine)
    eps = 1e-5 if eps is None else eps
    if name == "layernorm":
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)
    if not affine:
        raise ValueError("affine: a scalenorm is its learned scale; choose layernorm or rmsnorm")
    return ScaleNorm(dim, eps=eps)
