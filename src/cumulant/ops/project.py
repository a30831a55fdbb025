"""Linear maps of vectors, as fast as the machine multiplies matrices."""

from __future__ import annotations

from torch import Tensor

from ..kernels.product import linear


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` -> ``[..., N]``.

    This is `torch.nn.functional.linear`. On a CPU, oneDNN multiplies large fp32 matrices, in the
    same precision; see `cumulant.kernels.product`.
    """
    return linear(x, weight, bias)
