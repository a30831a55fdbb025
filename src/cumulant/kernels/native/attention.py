"""The operator of linear and Taylor attention on the native kernels.

The C++ walks each sequence a chunk at a time: the tokens' features are formed in the first cache, a slab at a time, and
multiplied at once with the sums, so that memory is read and written once. See docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import mappable
from .library import (
    CHUNK,
    MAX_ORDER,
    TYPES,
    Attention,
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

ACTIVATIONS = ("identity", "elu", "relu")


def _size(K: int, order: int, constant_term: bool) -> int:
    """C(K + order, order) Taylor features, one fewer without the constant; K for the identity (order 0)."""
    if order == 0:
        return K
    size = 1
    for p in range(1, order + 1):
        size = size * (K + p) // p
    return size if constant_term else size - 1


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: tuple[int, bool, str, float, bool, bool, int, int],
) -> None:
    """What the C++ takes for granted."""
    order, constant_term, activation, _, _, is_causal, chunk, span = options
    (B, H, T, K), (G, S), V = query.shape, key.shape[1:3], value.shape[-1]

    check_inputs(query=(query, (B, H, T, K)), key=(key, (B, G, S, K)), value=(value, (B, G, S, V)))
    need(G > 0 and H % G == 0, "key", f"heads that divide query's {H}", G)
    need(max(H * K, G * V, 1) < 2**31, "value", "fewer than 2**31 numbers a token", max(H * K, G * V))
    need(not is_causal or T == S, "key", f"{T} tokens, as many as queries", S)
    if key_mask is not None:
        need(key_mask.shape == (B, S), "key_mask", str([B, S]), list(key_mask.shape))
    need(0 <= order <= MAX_ORDER, "order", f"at most {MAX_ORDER}", order)
    need(_size(K, order, constant_term) < 2**31, "order", "fewer than 2**31 features", order)
    need(activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", activation)
    need(1 <= chunk <= CHUNK, "chunk", f"1 to {CHUNK}", chunk)
    need(span >= 1, "span", "at least 1", span)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        rising = bounds == sorted(bounds) and len(bounds) > 0 and bounds[0] == 0 and bounds[-1] <= T
        need(rising and B == 1 and T == S, "cu_seqlens", f"offsets that rise from 0 to at most {T}, and B = 1", bounds)


class _Call(Held):
    """The arguments of one call."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        options: tuple[int, bool, str, float, bool, bool, int, int],
    ):
        _check(query, key, value, key_mask, cu_seqlens, options)
        order, constant_term, activation, scale, normalize, is_causal, chunk, span = options
        (B, H, T, K), (_, G, S, _), V = query.shape, key.shape, value.shape[3]
        super().__init__(torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype))
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.F = _size(K, order, constant_term)
        a = self.arguments = Attention(
            B, self.N, H, G, T, S, K, V, self.F, chunk, span,
            TYPES[self.dtype], order, constant_term, ACTIVATIONS.index(activation),
            normalize, is_causal, threads(max(T, S) * B * H * (self.F * V + chunk * (K + V))), instruction_set(),
            scale,
        )  # fmt: skip
        a.query, a.key, a.value = (self.array(x) for x in (query, key, value))
        if key_mask is not None:
            a.key_mask = self.pointer(key_mask, torch.bool)
        if cu_seqlens is not None:
            a.offsets = self.pointer(cu_seqlens.to("cpu"), torch.int64)

    def check_sums(self, G: int, V: int, **sums: Tensor | None) -> None:
        """Numerators ``[N, G, F, V]`` and denominators ``[N, G, F]``, by the ends of their names."""
        for name, x in sums.items():
            if x is not None:
                shape = (self.N, G, self.F)
                check_inputs(**{name: (x, (*shape, V) if name.endswith("numerator") else shape)})


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    denominator: Tensor | None,
    want_state: bool,
    order: int,
    constant_term: bool,
    activation: str,
    scale: float,
    normalize: bool,
    is_causal: bool,
    chunk: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, in the dtype of sums, its denominators ``[B,H,T]``, and the state: numerator ``[N,G,F,V]``,
    denominator ``[N,G,F]``. Denominators are empty when not normalised, the state when neither wanted nor needed: in
    both directions it always is.

    chunk: tokens a chunk, at most 64; span: the fewest tokens that a thread takes when a sequence is shared out.
    """
    options = (order, constant_term, activation, scale, normalize, is_causal, chunk, span)
    c = _Call(query, key, value, key_mask, cu_seqlens, options)
    a, G, V = c.arguments, key.shape[1], value.shape[3]
    c.check_sums(G, V, numerator=numerator, denominator=denominator)
    need(
        not normalize or (numerator is None) == (denominator is None), "denominator", "with the numerator", denominator
    )
    want_state = want_state or not is_causal
    out = new_heads(query, query.shape[1], V, c.real)
    den = query.new_empty(query.shape[:3] if normalize else (0,), dtype=c.real)
    S = query.new_empty((c.N, G, c.F, V) if want_state else (0,), dtype=c.real)
    Z = query.new_empty((c.N, G, c.F) if want_state and normalize else (0,), dtype=c.real)
    a.out = array(out)
    a.numerator, a.denominator = c.pointer(numerator, c.real), c.pointer(denominator, c.real)
    a.denominators = pointer(den)
    if want_state:
        a.final_numerator, a.final_denominator = pointer(S), pointer(Z) if normalize else None
    call("cumulant_attention_forward", a)
    return out, den, S, Z


native_attention = torch.library.custom_op("cumulant::native_attention", _forward, mutates_args=(), device_types="cpu")


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`native_attention`, without an operator's cost where nothing watches."""
    return (_forward if unwatched(*arguments[:7]) else _mapped)(*arguments)


@native_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    denominator: Tensor | None,
    want_state: bool,
    order: int,
    constant_term: bool,
    activation: str,
    scale: float,
    normalize: bool,
    is_causal: bool,
    chunk: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, T, K), G, V = query.shape, key.shape[1], value.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    F, state = _size(K, order, constant_term), want_state or not is_causal
    dtype = real(torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype))
    return (
        new_heads(query, H, V, dtype),
        query.new_empty((B, H, T) if normalize else (0,), dtype=dtype),
        query.new_empty((N, G, F, V) if state else (0,), dtype=dtype),
        query.new_empty((N, G, F) if state and normalize else (0,), dtype=dtype),
    )


@torch.library.custom_op("cumulant::native_attention_backward", mutates_args=(), device_types="cpu")
def native_attention_backward(
    dout: Tensor,
    dnumerator: Tensor | None,
    ddenominator: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    denominator: Tensor | None,
    out: Tensor,
    denominators: Tensor,
    final_numerator: Tensor,
    final_denominator: Tensor,
    order: int,
    constant_term: bool,
    activation: str,
    scale: float,
    normalize: bool,
    is_causal: bool,
    chunk: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (order, constant_term, activation, scale, normalize, is_causal, chunk, span)
    c = _Call(query, key, value, key_mask, cu_seqlens, options)
    a = c.arguments
    dq, dk, dv = (new_heads(x, x.shape[1], x.shape[3], c.dtype) for x in (query, key, value))
    dS, dZ = (query.new_empty(0 if x is None else x.shape, dtype=c.real) for x in (numerator, denominator))
    shape, G, V = query.shape[:3], key.shape[1], value.shape[3]
    check_inputs(dout=(dout, (*shape, V)), out=(out, (*shape, V)))
    need(not normalize or denominators.shape == shape, "denominators", list(shape), list(denominators.shape))
    c.check_sums(G, V, numerator=numerator, denominator=denominator)
    c.check_sums(G, V, dnumerator=dnumerator, ddenominator=ddenominator if normalize else None)
    if not is_causal:
        c.check_sums(G, V, final_numerator=final_numerator, final_denominator=final_denominator if normalize else None)
    a.out, a.dout = c.array(out, c.real), c.array(dout, c.real)
    a.dquery, a.dkey, a.dvalue = array(dq), array(dk), array(dv)
    a.denominators = c.pointer(denominators, c.real)
    a.numerator, a.denominator = c.pointer(numerator, c.real), c.pointer(denominator, c.real)
    a.dfinal_numerator = c.pointer(dnumerator, c.real)
    a.dfinal_denominator = c.pointer(ddenominator if normalize else None, c.real)
    if not is_causal:
        a.final_numerator, a.final_denominator = (c.pointer(x, c.real) for x in (final_numerator, final_denominator))
    if numerator is not None:
        a.dnumerator = pointer(dS)
    if denominator is not None and normalize:
        a.ddenominator = pointer(dZ)
    call("cumulant_attention_backward", a)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dS, dZ


@native_attention_backward.register_fake
def _(dout, dnumerator, ddenominator, query, key, value, key_mask, cu_seqlens, numerator, denominator, *rest):  # type: ignore[no-untyped-def]
    dtype = real(torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype))
    dS, dZ = (query.new_empty(0 if x is None else x.shape, dtype=dtype) for x in (numerator, denominator))
    return *(new_heads(x, x.shape[1], x.shape[3]) for x in (query, key, value)), dS, dZ


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, key_mask, cu_seqlens, numerator, denominator, want_state, *options = inputs
    ctx.save_for_backward(query, key, value, key_mask, cu_seqlens, numerator, denominator, *output)
    ctx.want_state, ctx.options = want_state, options
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, _ddenominators, dS, dZ):  # type: ignore[no-untyped-def]
    query, key, value, key_mask, cu_seqlens, S0, Z0, out, den, S, Z = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    if not ctx.want_state:  # a state that nobody wanted, whatever gradient came for it
        dS = dZ = None
    dq, dk, dv, dS0, dZ0 = _backward(
        dout, dS, dZ, query, key, value, key_mask, cu_seqlens, S0, Z0, out, den, S, Z, *ctx.options
    )
    return dq, dk, dv, None, None, dS0 if S0 is not None else None, dZ0 if Z0 is not None else None, *[None] * 9


native_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(native_attention_backward)
_mapped = mappable(native_attention, _save, _differentiate)
