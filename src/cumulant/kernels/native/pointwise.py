"""Pointwise operations of a layer on the native kernels, in fp32, each in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import new_heads
from .library import (
    Array,
    Pointwise,
    array_of,
    call_library,
    instruction_set_number,
    materialized,
    pointer_to,
    require,
    thread_count,
)

OPERATIONS = (  # in the order of PointwiseOperation in src/abi.hpp
    *("swiglu_forward", "swiglu_backward", "rmsnorm_forward", "rmsnorm_backward"),
    *("convolve_forward", "convolve_backward", "turn"),
)
COST = 16  # multiplications that take as long as reading or writing a number


def _run_pointwise(operation: str, like: Tensor, **fields: object) -> None:
    """Call the C++ with these fields. like: a tensor with as many numbers as there is work."""
    for name, x in fields.items():
        if isinstance(x, Tensor):
            tall = name in ("x", "out", "dout", "dx")
            fields[name] = _rows_array(x) if tall else pointer_to(x)
    call_library(
        "cumulant_pointwise",
        Pointwise(
            operation=OPERATIONS.index(operation),
            threads=thread_count(COST * like.numel()),
            isa=instruction_set_number(),
            **fields,
        ),
    )


def _rows_array(x: Tensor) -> Array:
    """The address and strides of ``[B, T, n]``, ``[B, H, T, n]``, or contiguous numbers."""
    if x.dim() == 4:
        return array_of(x)
    return Array(x.data_ptr(), x.stride(0), 0, x.stride(1)) if x.dim() == 3 else Array(x.data_ptr())


def _checked_rows(x: Tensor, *shape: int) -> Tensor:
    """Check for fp32 on the CPU and this shape; the result's last dimension has stride 1."""
    require(x.shape == shape, "a tensor", list(shape), list(x.shape))
    require(
        x.dtype == torch.float32 and x.device.type == "cpu",
        "a tensor",
        "fp32 on the CPU",
        f"{x.dtype} on {x.device}",
    )
    x = materialized(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _checked_flat(x: Tensor, *shape: int) -> Tensor:
    """Check as `_checked_rows` does; the result is contiguous."""
    return _checked_rows(x, *shape).contiguous()


def swiglu(x: Tensor, up: Tensor) -> Tensor:
    """``silu(x) ⊙ up``."""
    x, up = _checked_flat(x, *x.shape), _checked_flat(up, *x.shape)
    out = torch.empty_like(x)
    _run_pointwise(
        "swiglu_forward", x, B=1, T=1, n=x.numel(), x=x.view(-1), second=up, out=out.view(-1)
    )
    return out


def swiglu_backward(x: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and up."""
    x, up, dout = (_checked_flat(y, *x.shape) for y in (x, up, dout))
    dx, dup = torch.empty_like(x), torch.empty_like(up)
    _run_pointwise(
        "swiglu_backward", x, B=1, T=1, n=x.numel(), x=x.view(-1), second=up, dout=dout.view(-1),
        dx=dx.view(-1), dsecond=dup,
    )  # fmt: skip
    return dx, dup


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x [B, T, n]`` with ``weight [n]``, and each token's factor ``[B, T]``."""
    (B, T, n), x = x.shape, _checked_rows(x, *x.shape)
    weight = None if weight is None else _checked_flat(weight, n)
    out, factors = x.new_empty(B, T, n), x.new_empty(B, T)
    _run_pointwise(
        "rmsnorm_forward", x, B=B, T=T, n=n, x=x, weight=weight, out=out, factors=factors,
        epsilon=epsilon,
    )  # fmt: skip
    return out, factors


def rms_norm_backward(
    x: Tensor, weight: Tensor | None, factors: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weight. factors: from `rms_norm`."""
    (B, T, n), x, dout = x.shape, _checked_rows(x, *x.shape), _checked_rows(dout, *x.shape)
    factors = _checked_flat(factors, B, T)
    weight = None if weight is None else _checked_flat(weight, n)
    dx, dweight = x.new_empty(B, T, n), None if weight is None else x.new_empty(n)
    _run_pointwise(
        "rmsnorm_backward", x, B=B, T=T, n=n, taps=1, x=x, weight=weight, factors=factors,
        dout=dout, dx=dx, dweight=dweight,
    )  # fmt: skip
    return dx, dweight


def convolve(x: Tensor, weight: Tensor, tail: Tensor | None, offset: Tensor | None) -> Tensor:
    """``y_t = Σ_j weight[j] ⊙ x_{t-j}``, for ``x [B, T, n]`` and ``weight [taps, n]``.

    tail: ``[B, taps - 1, n]``, the tokens before x. offset: ``[T]``, positions in packed sequences.
    """
    inputs = _convolution_fields(x, weight, tail, offset)
    out = x.new_empty(x.shape)
    _run_pointwise("convolve_forward", x, out=out, **inputs)
    return out


def convolve_backward(
    x: Tensor, weight: Tensor, tail: Tensor | None, offset: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight and tail."""
    inputs = _convolution_fields(x, weight, tail, offset)
    dout = _checked_rows(dout, *x.shape)
    dx, dweight = x.new_empty(x.shape), x.new_empty(weight.shape)
    dtail = None if tail is None else x.new_empty(tail.shape)
    _run_pointwise("convolve_backward", x, dout=dout, dx=dx, dweight=dweight, dtail=dtail, **inputs)
    return dx, dweight, dtail


def _convolution_fields(
    x: Tensor, weight: Tensor, tail: Tensor | None, offset: Tensor | None
) -> dict[str, object]:
    """The checked inputs of a convolution, as fields of the C++ struct."""
    (B, T, n), taps = x.shape, weight.shape[0]
    if offset is not None:
        fits = offset.shape == (T,) and offset.dtype == torch.int64
        require(fits, "offset", f"int64 [{T}]", f"{list(offset.shape)} in {offset.dtype}")
        offset = offset.contiguous()
    tail = None if tail is None else _checked_flat(tail, B, taps - 1, n)
    x, weight = _checked_rows(x, B, T, n), _checked_flat(weight, taps, n)
    return {
        "B": B, "T": T, "n": n, "taps": taps, "x": x, "weight": weight, "tail": tail,
        "offset": offset,
    }  # fmt: skip


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """Rotate pairs of ``x [B, H, T, n]`` by angles, or by their negatives if `back`.

    cosine, sine: of the angles, ``[T, n/2]`` or ``[B, T, n/2]``.
    """
    B, H, T, n = x.shape
    shape = (B, T, n // 2) if cosine.dim() == 3 else (T, n // 2)
    x = _checked_rows(x, B, H, T, n)
    cosine, sine = _checked_flat(cosine, *shape), _checked_flat(sine, *shape)
    out = new_heads(x, H, n)
    angles = T * (n // 2) if cosine.dim() == 3 else 0
    _run_pointwise(
        "turn", x, B=B, T=T, H=H, n=n, back=back, x=x, out=out, cosine=cosine, sine=sine,
        angles=angles,
    )  # fmt: skip
    return out
