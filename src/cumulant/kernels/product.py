"""Matrix products: oneDNN's for large fp32 matrices on other CPUs than Intel's, else torch's.

PyTorch multiplies fp32 matrices with MKL, which on processors of another maker leaves their widest
vectors unused; the oneDNN that comes with it does not. Same precision, and gradients of any order.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LARGE = 1 << 20  # multiplications below which a call of oneDNN costs more than it saves,
MATRIX = 1 << 18  # unless so large a matrix has to be read
ADDED = 1 << 19  # numbers of a product that are added to a sum at a time

CPUINFO = Path("/proc/cpuinfo")

# torch's name for oneDNN's product; None where this build of torch has none
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def _is_intel() -> bool:
    """Whether MKL finds a processor of its maker, for which it has its fastest products."""
    try:
        with CPUINFO.open(encoding="ascii", errors="replace") as file:
            found = file.read(1024)  # of the first core
    except OSError:
        found = os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
    return "GenuineIntel" in found


PREFERRED = not (torch.backends.mkl.is_available() and _is_intel())  # oneDNN to torch's products


def _suits(a: Tensor, rows: int, inner: int, columns: int) -> bool:
    return (
        not torch.compiler.is_compiling()  # first, as comparing sizes would fix them in a graph
        and PREFERRED
        and _onednn is not None
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and rows * inner * columns > 0
        and (rows * inner * columns >= LARGE or inner * columns >= MATRIX)
    )


def _dense(x: Tensor) -> Tensor:
    """Rows or columns one after another: oneDNN is slow on any other matrix."""
    if x.is_contiguous() or x.mT.is_contiguous():
        return x
    return x.mT.contiguous().mT if x.stride(-2) == 1 else x.contiguous()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a bᵀ`` for ``a [M, K]``, ``b [N, K]``, not differentiable."""
    assert _onednn is not None
    a, b = _dense(a), _dense(b)
    if bias is None and a.shape[0] > b.shape[0] and not a.is_contiguous() and not b.is_contiguous():
        turned: Tensor = _onednn(b, a, None, "none", [], "")  # up to twice as fast this way round
        shape = a.shape[0], b.shape[0]
        # its transpose in the same memory, which as a view could not be changed in place
        return turned.new_empty(0).set_(turned.untyped_storage(), 0, shape, (1, shape[0]))
    out: Tensor = _onednn(a, b, bias, "none", [], "")
    return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[..., M, K]`` and ``[..., K, N]`` with equal batch dims; no gradients."""
    batch = a.shape[:-2]
    if (
        batch != b.shape[:-2]
        or batch.numel() == 0
        or not _suits(a, a.shape[-2], a.shape[-1], b.shape[-1])
    ):
        return a @ b
    if batch.numel() == 1:
        return _product(a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:]).T).view(
            *batch, a.shape[-2], b.shape[-1]
        )
    pairs = zip(a.flatten(0, -3), b.flatten(0, -3).mT, strict=True)
    return torch.stack([_product(x, y) for x, y in pairs]).view(*batch, a.shape[-2], b.shape[-1])


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weightᵀ + bias``, in the memory of `out` where torch multiplies; no gradients."""
    if _suits(x, x.shape[0], x.shape[1], len(weight)):
        return _product(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """``total += a @ b`` of ``[M, K]`` and ``[K, N]``; no gradients. The sum may be wider.

    The first product is written over what is in `total`.
    """
    if total.dtype == a.dtype and not _suits(a, a.shape[0], a.shape[1], b.shape[1]):
        total.addmm_(a, b, beta=0 if first else 1)
        return
    rows = max(1, ADDED // b.shape[1])
    for sums, factor in zip(total.split(rows), a.split(rows), strict=True):
        found = matmul(factor, b)
        if first:
            sums.copy_(found)
        else:
            sums.add_(found.to(total.dtype))  # torch adds numbers of two dtypes far more slowly


class _Linear(torch.autograd.Function):
    """x wᵀ + bias of matrices; its gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else linear(grad, weight.T, None),
            None if x is None else linear(grad.T, x.T, None),
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`: ``x [..., K]``, ``weight [N, K]``, ``bias [N]``."""
    if not _plain(x, weight, bias) or not _suits(
        x, x.numel() // max(x.shape[-1], 1), *weight.shape[::-1]
    ):
        return torch.nn.functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Plain tensors in a plain call: nothing traces, transforms or counts it."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x is not None and not _owns_numbers(x):
            return False
    return (
        torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def _owns_numbers(x: Tensor) -> bool:
    """Its memory holds its numbers: not their negatives, not none, not those of many tensors that
    are mapped over.
    """
    plain = type(x) in (Tensor, Parameter) and not torch._C._dispatch_isTensorSubclassLike(x)
    return plain and not x.is_neg() and not x._is_zerotensor()


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain tensors that fit each other, in a plain call."""
    if not is_plain_call(x, weight, bias) or x.dim() == 0:
        return False
    fits = (
        x.shape[-1:] == weight.shape[1:] and weight.dtype == x.dtype and weight.device == x.device
    )
    if bias is not None:
        fits = fits and bias.shape == weight.shape[:1] and bias.dtype == x.dtype
    return fits and weight.dim() == 2 and not torch.is_autocast_enabled(x.device.type)
