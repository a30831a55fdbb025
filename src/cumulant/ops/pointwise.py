"""Pointwise operations of a layer: SwiGLU, RMSNorm, short convolutions and rotations.

Each is a formula of PyTorch's operators. For fp32 on a CPU a native kernel computes it, and reads
and writes each number once. Gradients of gradients come from the formulas. Half precision is
widened for convolutions and rotations, so that a sum is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.product import is_plain_call
from .dispatch import native_by_default

HALF = (torch.bfloat16, torch.float16)
LEAST = 1 << 14  # with fewer numbers PyTorch's operators are as fast


def _runs_natively(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the native kernel computes a call: many fp32 numbers on a CPU, in a plain call."""
    return (
        not torch.compiler.is_compiling()
        and x.numel() >= LEAST
        and all(
            y is None or (y.dtype == torch.float32 and y.device.type == "cpu") for y in (x, *others)
        )
        and native_by_default(x)
        and is_plain_call(x, *others)
    )


def _formula_gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor | None]:
    """Gradients by PyTorch's operators, which can be differentiated again and mapped."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another. Views keep that dependence out of the gradients.
        own = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        wanted = [x for x in own if x is not None and x.requires_grad]
        found = iter(
            torch.autograd.grad(formula(*own), wanted, dout, create_graph=again, allow_unused=True)
        )
    return [next(found) if x is not None and x.requires_grad else None for x in own]


def _is_plain_backward(dout: Tensor) -> bool:
    """Whether a backward pass is a plain call, which nothing differentiates or maps."""
    return not torch.is_grad_enabled() and is_plain_call(dout)


def swiglu(x: Tensor, up: Tensor) -> Tensor:
    """``silu(x) ⊙ up``; x and up have the same shape."""
    if x.shape != up.shape or not _runs_natively(x, up):
        return _swiglu_formula(x, up)
    return _SwiGLU.apply(x, up)  # type: ignore[no-any-return, no-untyped-call]


def _swiglu_formula(x: Tensor, up: Tensor) -> Tensor:
    return F.silu(x) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor) -> Tensor:
        from ..kernels.native import pointwise

        ctx.save_for_backward(x, up)
        return pointwise.swiglu(x, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels.native import pointwise

        if not _is_plain_backward(dout):
            return tuple(_formula_gradients(_swiglu_formula, ctx.saved_tensors, dout))
        x, up = ctx.saved_tensors
        return pointwise.swiglu_backward(x, up, dout)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) ⊙ weight``, for ``x [..., D]``, ``weight [D]``, mean over D."""
    if (
        x.dim() != 3
        or (weight is not None and weight.shape != x.shape[-1:])
        or not _runs_natively(x, weight)
    ):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        from ..kernels.native import pointwise

        y, factors = pointwise.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, factors)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels.native import pointwise

        x, weight, factors = ctx.saved_tensors
        if not _is_plain_backward(dout):
            return (
                *_formula_gradients(
                    lambda x, w: F.rms_norm(x, x.shape[-1:], w, ctx.eps), (x, weight), dout
                ),
                None,
            )
        return *pointwise.rms_norm_backward(x, weight, factors, dout), None


def short_convolution(
    x: Tensor, weight: Tensor, tail: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution: ``y_t = Σ_j weight[j] ⊙ x_{t-j}``.

    Args:
        x: ``[B, T, D]``.
        weight: ``[size, D]``, the newest token's first.
        tail: ``[B, size - 1, D]``, the tokens before x; zeros if None.
        offset: ``[T]`` int64, the position of each token in its packed sequence. Packed sequences
            do not see each other.
    """
    if x.dtype in HALF:
        wide_tail = None if tail is None else tail.float()
        return short_convolution(x.float(), weight.float(), wide_tail, offset).to(x.dtype)
    fits = (
        x.dim() == 3
        and weight.shape[1:] == x.shape[2:]
        and (offset is None or offset.shape == x.shape[1:2])
    )
    if tail is not None:
        fits = fits and tail.shape == (x.shape[0], weight.shape[0] - 1, x.shape[2])
    if not fits or not _runs_natively(x, weight, tail):
        return _convolution_formula(x, weight, tail, offset)
    return _Convolution.apply(x, weight, tail, offset)  # type: ignore[no-any-return, no-untyped-call]


def _convolution_formula(
    x: Tensor, weight: Tensor, tail: Tensor | None, offset: Tensor | None
) -> Tensor:
    n, T = weight.shape[0] - 1, x.shape[1]
    tail = x.new_zeros(x.shape[0], n, x.shape[2]) if tail is None else tail
    weight, buffer = weight.to(x.dtype), torch.cat((tail, x), 1).to(x.dtype)
    y = buffer[:, n:] * weight[0]
    for j in range(1, n + 1):
        tap = buffer[:, n - j : n - j + T]
        if offset is not None:
            tap = tap.masked_fill((offset < j)[:, None], 0)
        y = torch.addcmul(y, tap, weight[j])
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tail: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        from ..kernels.native import pointwise

        ctx.save_for_backward(x, weight, tail, offset)
        return pointwise.convolve(x, weight, tail, offset)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels.native import pointwise

        if not _is_plain_backward(dout):
            return tuple(_formula_gradients(_convolution_formula, ctx.saved_tensors, dout))
        x, weight, tail, offset = ctx.saved_tensors
        return *pointwise.convolve_backward(x, weight, tail, offset, dout), None


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
    """Rotate neighbouring pairs of ``x [B, H, T, D]`` by angles, or by their negatives if `back`.

    cosine, sine: of the angles, ``[T, D/2]`` or ``[B, T, D/2]`` in fp32.
    """
    if x.dtype in HALF:
        return rotate_pairs(x.float(), cosine, sine, back).to(x.dtype)
    fits = (
        x.dim() == 4
        and cosine.shape == sine.shape
        and cosine.shape[-2:] == (x.shape[2], x.shape[3] // 2)
    )
    fits = fits and (cosine.dim() == 2 or cosine.shape[:-2] == x.shape[:1])
    if (
        not fits
        or cosine.requires_grad
        or sine.requires_grad
        or not _runs_natively(x, cosine, sine)
    ):
        return _rotation_formula(x, cosine, sine, back)
    return _RotatePairs.apply(x, cosine, sine, back)  # type: ignore[no-any-return, no-untyped-call]


def _rotation_formula(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    if cosine.dim() == 3:
        cosine, sine = cosine[:, None], sine[:, None]
    sine = -sine if back else sine
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1)
    return rotated.reshape(x.shape)


class _RotatePairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
        from ..kernels.native import pointwise

        ctx.save_for_backward(cosine, sine)
        ctx.back = back
        return pointwise.rotate_pairs(x, cosine, sine, back)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return rotate_pairs(dout, cosine, sine, not ctx.back), None, None, None
