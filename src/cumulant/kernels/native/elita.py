"""The operator of ELiTA's attention on the native kernels.

Arguments and results are those of `chunked.elita`, but for the means that are kept for the backward pass. It walks
backwards, and would need a walk forwards of its own to form them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import mappable
from .library import (
    ELITA_BLOCK,
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


def _call(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    span: int,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the state after all tokens; what the backward pass needs goes to `kept`."""
    (B, G, T, V), H = value.shape, query_logit.shape[1]
    check_inputs(
        key_logit=(key_logit, (B, G, T)), query_logit=(query_logit, (B, H, T)), self_logit=(self_logit, (B, H, T))
    )
    c = _Call(value, H, key_logit.dtype, first, log_weight, mean, span)
    a = c.arguments
    out = new_heads(value, H, V)
    final = value.new_empty(B, G, dtype=torch.float64), value.new_empty(B, G, V, dtype=torch.float64)
    a.out = array(out)
    if kept is not None:
        a.key_odds, a.own_odds, a.means = (pointer(x) for x in kept)
    a.key_logit, a.query_logit, a.self_logit = (
        c.pointer(x, key_logit.dtype) for x in (key_logit, query_logit, self_logit)
    )
    a.final_log_weight, a.final_mean = (pointer(x) for x in final)
    call("cumulant_elita_forward", a)
    return out, *final


def _new_kept(value: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty odds of the gates, ``[B,G,T]`` and ``[B,H,T]``, and means before every block of tokens.

    One or two rows of means are never used: under `torch.export` a size that may be 1 would bound T.
    """
    (B, G, T, V), dtype = value.shape, real(value.dtype)
    return (
        value.new_empty((B, G, T), dtype=dtype),
        value.new_empty((B, heads, T), dtype=dtype),
        value.new_empty((B, G, T // ELITA_BLOCK + 2, V), dtype=torch.float64),
    )


@torch.library.custom_op("cumulant::native_elita_attention", mutates_args=(), device_types="cpu")
def elita_attention(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, the odds of the gates a ``[B,G,T]`` and g ``[B,H,T]``, the means before every block of 16
    tokens ``[B,G,T // 16 + 2,V]``, and the state after all tokens: m ``[B,G]`` and u ``[B,G,V]``. Means and state
    are in fp64.

    key_logit ``[B,G,T]``, query_logit and self_logit ``[B,H,T]`` of one dtype, fp32 or fp64, -inf where a key or a
    token itself has no weight; first ``[T]``: True where a sequence begins that sees nothing before it.
    """
    kept = _new_kept(value, query_logit.shape[1])
    kept[2][:, :, value.shape[2] // ELITA_BLOCK :] = 0
    out, m, u = _call(key_logit, query_logit, self_logit, value, first, log_weight, mean, span, kept)
    return out, *kept, m, u


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output and state of `elita_attention`, without an operator's cost where nothing watches."""
    if unwatched(*arguments[:7]):
        return _call(*arguments)
    out, *_, m, u = _mapped(*arguments)
    return out, m, u


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, G, _, V), H = value.shape, query_logit.shape[1]
    return (
        new_heads(value, H, V),
        *_new_kept(value, H),
        value.new_empty((B, G), dtype=torch.float64),
        value.new_empty((B, G, V), dtype=torch.float64),
    )


@torch.library.custom_op("cumulant::native_elita_attention_backward", mutates_args=(), device_types="cpu")
def elita_attention_backward(
    dout: Tensor,
    dlog_weight: Tensor | None,
    dmean: Tensor | None,
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    key_odds: Tensor,
    own_odds: Tensor,
    means: Tensor,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three logits, of the values and of the state.

    The logits are not read. They are arguments so that asking for gradients of these gradients is an error: without
    them, those would be taken for zero.
    """
    (B, G, T, V), H, dtype = value.shape, query_logit.shape[1], key_logit.dtype
    check_inputs(dout=(dout, (B, H, T, V)), key_odds=(key_odds, (B, G, T)), own_odds=(own_odds, (B, H, T)))
    check_inputs(means=(means, (B, G, T // ELITA_BLOCK + 2, V)))
    for name, x, shape in (("dlog_weight", dlog_weight, (B, G)), ("dmean", dmean, (B, G, V))):
        if x is not None:
            check_inputs(**{name: (x, shape)})
    c = _Call(value, H, dtype, first, log_weight, mean, span)
    e = c.arguments
    dv, dc, ds = new_heads(value, G, V), value.new_empty(B, G, T, dtype=c.real), value.new_empty(B, H, T, dtype=c.real)
    dm, du = means.new_empty(B, G), means.new_empty(B, G, V)
    e.dout, e.dvalue = c.array(dout), array(dv)
    e.key_odds, e.own_odds, e.means = (
        c.pointer(key_odds, c.real),
        c.pointer(own_odds, c.real),
        c.pointer(means, torch.float64),
    )
    e.dkey_logit, e.dself_logit = pointer(dc), pointer(ds)
    e.dfinal_log_weight, e.dfinal_mean = (c.pointer(x, torch.float64) for x in (dlog_weight, dmean))
    if log_weight is not None:
        e.dlog_weight, e.dmean = pointer(dm), pointer(du)
    call("cumulant_elita_backward", e)
    ds = ds.to(dtype)
    return dc.to(dtype), -ds, ds, dv, dm, du


@elita_attention_backward.register_fake
def _(dout, dlog_weight, dmean, key_logit, query_logit, self_logit, value, *rest):  # type: ignore[no-untyped-def]
    B, G, _, V = value.shape
    return (
        *(x.new_empty(x.shape) for x in (key_logit, query_logit, self_logit)),
        new_heads(value, G, V),
        value.new_empty((B, G), dtype=torch.float64),
        value.new_empty((B, G, V), dtype=torch.float64),
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.span = inputs
    _, *kept, _, _ = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, _key, _own, _means, dm, du):  # type: ignore[no-untyped-def]
    _, query_logit, _, value, _, log_weight, mean, *_ = ctx.saved_tensors
    if dout is None:
        dout = value.new_zeros((*query_logit.shape, value.shape[-1]))
    *grads, dm0, du0 = _backward(dout, dm, du, *ctx.saved_tensors, ctx.span)
    return *grads, None, None if log_weight is None else dm0, None if mean is None else du0, None


elita_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(elita_attention_backward)
_mapped = mappable(elita_attention, _save, _differentiate)
