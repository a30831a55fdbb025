"""Linear maps of outer products of two vectors, without forming all outer products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.bilinear import bilinear as kernel
from ..kernels.bilinear import formula, unblocked
from ..kernels.transforms import needs_formula, transformed
from .dispatch import exports_to_onnx


def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map outer products linearly: ``y_k = Σ_{f,i} weight[k, f·A + i] b_f a_i + bias_k``.

    The outer products ``[..., F·A]`` exist for one block of tokens at a time, and none is kept for
    the backward pass.

    Args:
        a: ``[..., A]``.
        b: ``[..., F]``.
        weight: ``[D, F·A]``.
        bias: ``[D]``.

    Returns:
        ``[..., D]``, in a's dtype.
    """
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b = a.to(dtype), b.to(dtype)
    rows = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]).to(a.dtype)
    run = formula if transformed() or needs_formula(torch.compiler.is_compiling()) else kernel
    if exports_to_onnx():
        run = unblocked
    out: Tensor = run(*rows, weight.to(a.dtype)).view(*a.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)
