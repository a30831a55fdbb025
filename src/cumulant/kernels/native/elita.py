"""The operator of ELiTA's attention on the native kernels; its arguments and results are those of `chunked.elita`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import mappable
from .library import (
    TYPES,
    Elita,
    Held,
    array,
    call,
    check_inputs,
    instruction_set,
    need,
    new_heads,
    pointer,
    real,
    threads,
    unwatched,
)


class _Call(Held):
    """The arguments of one call."""

    def __init__(
        self,
        value: Tensor,
        heads: int,
        logits: torch.dtype,
        first: Tensor | None,
        log_weight: Tensor | None,
        mean: Tensor | None,
        span: int,
    ):
        B, G, T, V = value.shape
        check_inputs(value=(value, (B, G, T, V)))
        need(G > 0 and heads % G == 0, "query_logit", f"heads that {G} divides", heads)
        need(logits in (torch.float32, torch.float64), "key_logit", "fp32 or fp64", logits)
        need(first is None or first.shape == (T,), "first", [T], None if first is None else list(first.shape))
        need((log_weight is None) == (mean is None), "mean", "a log-sum and a mean, or neither", mean)
        if log_weight is not None and mean is not None:
            check_inputs(log_weight=(log_weight, (B, G)), mean=(mean, (B, G, V)))
        need(span >= 1, "span", "at least 1", span)
        super().__init__(value.dtype)
        work = B * heads * T * (V + 16) * 8
        a = self.arguments = Elita(
            B, heads, G, T, V, span,
            TYPES[value.dtype], TYPES[logits], TYPES[self.real], threads(work), instruction_set(),
        )  # fmt: skip
        a.value = self.array(value)
        a.first = self.pointer(first, torch.bool)
        a.log_weight, a.mean = (self.pointer(x, torch.float64) for x in (log_weight, mean))


def _forward(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, the gates a ``[B,G,T]`` and g ``[B,H,T]``, and the state after all tokens: m ``[B,G]`` and
    u ``[B,G,V]``, in fp64.

    key_logit ``[B,G,T]``, query_logit and self_logit ``[B,H,T]`` of one dtype, fp32 or fp64, -inf where a key or a
    token itself has no weight; first ``[T]``: True where a sequence begins that sees nothing before it.
    """
    (B, G, T, V), H = value.shape, query_logit.shape[1]
    check_inputs(
        key_logit=(key_logit, (B, G, T)), query_logit=(query_logit, (B, H, T)), self_logit=(self_logit, (B, H, T))
    )
    c = _Call(value, H, key_logit.dtype, first, log_weight, mean, span)
    a = c.arguments
    out = new_heads(value, H, V)
    gates = (value.new_empty(B, heads, T, dtype=c.real) for heads in (G, H))
    key_gate, own_gate = gates
    final = value.new_empty(B, G, dtype=torch.float64), value.new_empty(B, G, V, dtype=torch.float64)
    a.out, a.a, a.g = array(out), pointer(key_gate), pointer(own_gate)
    a.key_logit, a.query_logit, a.self_logit = (
        c.pointer(x, key_logit.dtype) for x in (key_logit, query_logit, self_logit)
    )
    a.final_log_weight, a.final_mean = (pointer(x) for x in final)
    call("cumulant_elita_forward", a)
    return out, key_gate, own_gate, *final


elita_attention = torch.library.custom_op(
    "cumulant::native_elita_attention", _forward, mutates_args=(), device_types="cpu"
)


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`elita_attention`, without an operator's cost where nothing watches."""
    return (_forward if unwatched(*arguments[:7]) else _mapped)(*arguments)


@elita_attention.register_fake
def _(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, G, T, V), H, dtype = value.shape, query_logit.shape[1], real(value.dtype)
    return (
        new_heads(value, H, V),
        value.new_empty((B, G, T), dtype=dtype),
        value.new_empty((B, H, T), dtype=dtype),
        value.new_empty((B, G), dtype=torch.float64),
        value.new_empty((B, G, V), dtype=torch.float64),
    )


@torch.library.custom_op("cumulant::native_elita_attention_backward", mutates_args=(), device_types="cpu")
def elita_attention_backward(
    dout: Tensor,
    dlog_weight: Tensor | None,
    dmean: Tensor | None,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    out: Tensor,
    a: Tensor,
    g: Tensor,
    final_mean: Tensor,
    dtype: torch.dtype,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three logits, in `dtype`, of the values and of the state."""
    (B, G, T, V), H = value.shape, out.shape[1]
    check_inputs(dout=(dout, (B, H, T, V)), out=(out, (B, H, T, V)), a=(a, (B, G, T)), g=(g, (B, H, T)))
    check_inputs(final_mean=(final_mean, (B, G, V)))
    for name, x, shape in (("dlog_weight", dlog_weight, (B, G)), ("dmean", dmean, (B, G, V))):
        if x is not None:
            check_inputs(**{name: (x, shape)})
    c = _Call(value, H, dtype, first, log_weight, mean, span)
    e = c.arguments
    dv, dc, ds = new_heads(value, G, V), torch.empty_like(a), torch.empty_like(g)
    dm, du = final_mean.new_empty(B, G), final_mean.new_empty(B, G, V)
    e.out, e.dout, e.dvalue = c.array(out), c.array(dout), array(dv)
    e.a, e.g = c.pointer(a, c.real), c.pointer(g, c.real)
    e.dkey_logit, e.dself_logit, e.final_mean = pointer(dc), pointer(ds), c.pointer(final_mean, torch.float64)
    e.dfinal_log_weight, e.dfinal_mean = (c.pointer(x, torch.float64) for x in (dlog_weight, dmean))
    if log_weight is not None:
        e.dlog_weight, e.dmean = pointer(dm), pointer(du)
    call("cumulant_elita_backward", e)
    ds = ds.to(dtype)
    return dc.to(dtype), -ds, ds, dv, dm, du


@elita_attention_backward.register_fake
def _(dout, dlog_weight, dmean, value, first, log_weight, mean, out, a, g, final_mean, dtype, span):  # type: ignore[no-untyped-def]
    return (
        a.new_empty(a.shape, dtype=dtype),
        a.new_empty(out.shape[:3], dtype=dtype),
        a.new_empty(out.shape[:3], dtype=dtype),
        new_heads(value, *value.shape[1::2]),
        final_mean.new_empty(final_mean.shape[:2]),
        final_mean.new_empty(final_mean.shape),
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    key_logit, _, _, value, first, log_weight, mean, ctx.span = inputs
    out, a, g, _, final_mean = output
    ctx.mark_non_differentiable(a, g)
    ctx.dtype = key_logit.dtype
    ctx.save_for_backward(value, first, log_weight, mean, out, a, g, final_mean)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, _da, _dg, dm, du):  # type: ignore[no-untyped-def]
    value, first, log_weight, mean, out, a, g, final_mean = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    *grads, dm0, du0 = _backward(
        dout, dm, du, value, first, log_weight, mean, out, a, g, final_mean, ctx.dtype, ctx.span
    )
    return *grads, None, None if log_weight is None else dm0, None if mean is None else du0, None


elita_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(elita_attention_backward)
_mapped = mappable(elita_attention, _save, _differentiate)
