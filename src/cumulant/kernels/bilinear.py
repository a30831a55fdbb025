"""A linear map of outer products, a block of tokens at a time.

``out_n = W vec(b_n ⊗ a_n)``: the outer products ``[N, F·A]`` would be F times as large as a. They
exist for one block, forward and once more in the backward pass, which keeps a, b and W alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .product import matmul
from .transforms import without_autocast

BLOCK = 1 << 20  # numbers in the outer products of a block


def _blocks(a: Tensor, b: Tensor) -> list[slice]:
    rows = max(BLOCK // max(a.shape[1] * b.shape[1], 1), 1)
    return [slice(start, start + rows) for start in range(0, a.shape[0], rows)]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``[N, A]``, ``[N, F]`` -> ``[N, F·A]``, a's index fastest."""
    return (b[:, :, None] * a[:, None, :]).flatten(1)


def formula(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """`bilinear` in plain PyTorch, for tangents, gradients of gradients and `torch.func`."""
    with without_autocast(a):
        parts = [_outer(a[rows], b[rows]) @ weight.T for rows in _blocks(a, b)]
        return torch.cat(parts) if parts else a.new_empty(0, weight.shape[0])


def unblocked(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """`bilinear` in one product, for graphs of any length: blocks would fix the number of rows."""
    return _outer(a, b) @ weight.T


@torch.library.custom_op("cumulant::bilinear", mutates_args=())
def bilinear(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """``a [N, A]``, ``b [N, F]``, ``weight [D, F·A]`` -> ``[N, D]``."""
    out = a.new_empty(a.shape[0], weight.shape[0])
    with torch.autocast(a.device.type, enabled=False):
        for rows in _blocks(a, b):
            out[rows] = matmul(_outer(a[rows], b[rows]), weight.T)
    return out


@bilinear.register_fake
def _(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], weight.shape[0])


@torch.library.custom_op("cumulant::bilinear_backward", mutates_args=())
def bilinear_backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    dweight = weight.new_zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(a.device.type, enabled=False):
        for rows in _blocks(a, b):
            # out = W o with the outer products o = b ⊗ a: do = Wᵀ dout, dW += dout oᵀ. Then da sums
            # do over b's index, weighted by b, and db likewise. dW is a sum over all blocks, so it
            # is added up in fp32 at least.
            x, y, upstream = a[rows], b[rows], dout[rows]
            douter = matmul(upstream, weight).unflatten(1, (b.shape[1], a.shape[1]))
            da[rows] = (douter * y[:, :, None]).sum(1)
            db[rows] = (douter * x[:, None, :]).sum(2)
            dweight += matmul(upstream.T, _outer(x, y))
    return da, db, dweight.to(weight.dtype)


@bilinear_backward.register_fake
def _(dout: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout):  # type: ignore[no-untyped-def]
    return bilinear_backward(dout, *ctx.saved_tensors)


bilinear.register_autograd(_differentiate, setup_context=_save)
