"""Operators under `torch.func` and forward-mode differentiation, shared by the implementations.

A `torch.library` operator knows gradients of first order alone. Under the transforms of
`torch.func` it goes through an autograd function that can be mapped: a mapped dimension is folded
into the batch, or into the heads of packed sequences, so that a kernel runs once for all.
Forward-mode and nested derivatives are taken of `differentiable` forms instead; `needs_formula`
says when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ALONE = ("bias", "cu_seqlens", "first", "seed")  # mapped over, these have no place in one call
HEADLESS = (
    "key_mask",
    "position",
    "scale",
)  # nor these beside packed sequences, which are folded into heads


def needs_formula(compiling: bool = False) -> bool:
    """Whether derivatives may be asked for that kernels do not know: tangents, gradients of
    gradients, and in graphs all those of `torch.func`."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    kind = torch._C._functorch.TransformType
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return kind.Jvp in levels or levels.count(kind.Grad) > (0 if compiling else 1)


def transformed() -> bool:
    """Whether transforms of `torch.func` are active."""
    return torch._C._are_functorch_transforms_active()


def readable(*tensors: Tensor | None) -> bool:
    """Whether values can be read, for checks: not while something traces, and not of tensors
    without numbers of their own, such as fake ones and those that stand for many."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
    ):
        return False
    return all(x is None or _has_values(x) for x in tensors)


def longest_sequence(cu_seqlens: Tensor | None, length: int) -> int:
    """Tokens of the longest packed sequence; `length` where none are packed, or nothing can be
    read.
    """
    return (
        length if cu_seqlens is None or not readable(cu_seqlens) else int(cu_seqlens.diff().max())
    )


def _has_values(x: Tensor) -> bool:
    if not transformed():
        return type(x) in (Tensor, Parameter) and not x.is_meta
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return type(x) in (Tensor, Parameter) and not x.is_meta


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products in the precision of their factors; devices such as meta know no autocast."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else nullcontext()
    )


# Under dynamo these run while a graph is made: what torch.compiler.assume_constant_result does,
# which would import all of torch.compile with this file.
needs_formula._dynamo_marked_constant = True  # type: ignore[attr-defined]
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mappable(
    operator: Any, save: Callable[..., None] | None = None, differentiate: Any = None
) -> Callable[..., Any]:
    """`operator`, also under transforms. Without `save` and `differentiate`, as for a backward
    pass, it has no
    gradient: asking for one is an error."""
    names = [argument.name for argument in operator._opoverload._schema.arguments]

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{operator._qualname}: no gradients of gradients across the edge of torch.func; nest"
            " them, as in torch.func.grad(torch.func.grad(f)), or pass impl='reference'"
        )

    def forward(*arguments: Any) -> Any:
        return operator(*arguments)

    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        return folded(names, info.batch_size, in_dims, arguments, call)

    function: Any = type(
        f"Mapped_{operator._name}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(save or _save_nothing),
            "backward": staticmethod(differentiate or refuse),
            "vmap": staticmethod(vmap),
        },
    )
    operator.register_vmap(vmap)  # reached in graphs

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not transformed():
            return operator(*arguments)
        return function.apply(*arguments)

    return call


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def folded(
    names: Sequence[str],
    n: int,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
    call: Callable[..., Any],
) -> tuple[Any, Any]:
    """The results of `call` for n calls at once, and where that dimension is: by one call, where
    they fit into one.

    Tensors are ``[B, heads, ...]`` but for those in ALONE and HEADLESS; results too, or empty
    ``[0]``.
    """
    given = {
        name: x if dim is None else x.movedim(dim, 0)
        for name, x, dim in zip(names, arguments, in_dims, strict=True)
    }
    mapped = {name for name, dim in zip(names, in_dims, strict=True) if dim is not None}
    packed, bias = given.get("cu_seqlens") is not None, given.get("bias") is not None
    alone = bool(mapped & set(ALONE)) or given.get("seed") is not None
    alone |= bias and (packed or "dout" in names)  # whose gradient is a sum over the batch
    alone |= packed and bool(mapped & set(HEADLESS))
    if alone:
        each = [
            call(*(x[i] if name in mapped else x for name, x in given.items())) for i in range(n)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])
    side = 1 if packed else 0
    rows = next(x.shape[name in mapped] for name, x in given.items() if isinstance(x, Tensor))
    out = call(*(_fold(name, x, n, name in mapped, side, rows) for name, x in given.items()))
    split = [_split(x, n, side) for x in ((out,) if isinstance(out, Tensor) else out)]
    results, dims = zip(*split, strict=True)
    return (results[0], dims[0]) if isinstance(out, Tensor) else (results, dims)


def _fold(name: str, x: Any, n: int, mapped: bool, side: int, rows: int) -> Any:
    """n calls' tensors ``[n, ...]``, or one for all of them, as one tensor, with their dimension in
    that of `side`.
    """
    if not isinstance(x, Tensor) or name in ("cu_seqlens", "first"):
        return x
    shape = x.shape[1:] if mapped else x.shape
    if len(shape) == 1 and shape[0] == 0 and name != "position":
        return x.new_empty(0)
    shared = (
        name in HEADLESS
        if side
        else (name in ("bias", "scale") and (len(shape) == 3 or shape[0] == 1))
    )
    if shared and not mapped:
        return x
    x = x if mapped else x.expand(n, *shape)
    if name == "scale":
        x = x.expand(n, rows, *shape[1:])
    return x.movedim(0, side).flatten(side, side + 1)


def _split(x: Tensor, n: int, side: int) -> tuple[Tensor, int | None]:
    if x.dim() == 1 and x.shape[0] == 0:
        return x, None
    return x.unflatten(side, (n, x.shape[side] // n)), side


class _Product(torch.autograd.Function):
    """a @ b, without autocast in its gradients either."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with without_autocast(a):
            return a @ b

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with without_autocast(a):
            da = product(dout, b.mT).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
            return da, product(a.mT, dout).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` whose gradients are as exact as itself where a backward pass runs under
    autocast.
    """
    if not torch.is_grad_enabled() or not readable(a, b) or transformed() or needs_formula():
        return a @ b
    out: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return out
