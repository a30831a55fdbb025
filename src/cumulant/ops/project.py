"""Linear maps of vectors, as fast as the machine multiplies matrices."""

from __future__ import annotations

from torch import Tensor

from ..kernels.product import linear


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` -> ``[..., N]``.

    `torch.nn.functional.linear`, but for large fp32 matrices on a CPU through oneDNN, in the same
    precision; see `cumulant.kernels.product`.
    """
    return linear(x, weight, bias)
