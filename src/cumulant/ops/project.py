"""Linear maps of vectors, as fast as the machine multiplies matrices."""

from __future__ import annotations

from torch import Tensor

from ..kernels.product import linear
from ..kernels.spec import accumulation_dtype
from ..kernels.transforms import without_autocast


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` -> ``[..., N]``.

    This is `torch.nn.functional.linear`. On CPUs other than Intel's, oneDNN multiplies large fp32
    matrices, in the same precision; see `cumulant.kernels.product`.
    """
    return linear(x, weight, bias)


def project_wide(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`project` in fp32 (fp64 for fp64), whatever the dtypes, and under autocast too."""
    dtype = accumulation_dtype(x)
    with without_autocast(x):
        return linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
