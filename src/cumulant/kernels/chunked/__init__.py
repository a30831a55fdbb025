"""Chunk-parallel implementation in plain PyTorch: O(T) time and memory, any device.

The passes are opaque operators (`torch.library`), so that `torch.compile` and `torch.export` see one node for any
length instead of an unrolled loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import mappable
from .features import size_of
from .layout import Dense, Packed
from .passes import Spec, Tokens, backward, compute_dtype, forward


def _tokens(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, spec: Spec
) -> Tokens:
    T, S = query.shape[2], key.shape[2]
    queries: Dense | Packed
    queries = Dense(query.shape[0], T, spec.chunk) if cu_seqlens is None else Packed.offsets(cu_seqlens, T, spec.chunk)
    keys = queries if S == T else Dense(key.shape[0], S, spec.chunk)
    return Tokens(query, key, value, key_mask, queries, keys, spec, compute_dtype(query.dtype))


@torch.library.custom_op("cumulant::chunked_attention", mutates_args=())
def chunked_attention(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, in the dtype of sums, its denominators ``[B,H,T]``, and the state: numerator ``[N,G,F,V]``,
    denominator ``[N,G,F]``. Denominators are empty when not normalised, the state when not wanted."""
    spec = Spec(order, constant_term, activation, scale, normalize, is_causal, chunk)
    with torch.autocast(query.device.type, enabled=False):
        t = _tokens(query, key, value, key_mask, cu_seqlens, spec)
        out, den, S, Z = forward(t, numerator, denominator, want_state)
    den, S, Z = (query.new_empty(0, dtype=compute_dtype(query.dtype)) if x is None else x for x in (den, S, Z))
    return out, den, S, Z


@chunked_attention.register_fake
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, T, K = query.shape
    G, V = key.shape[1], value.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    F, dtype = size_of(K, order, constant_term), compute_dtype(query.dtype)
    return (
        query.new_empty((B, H, T, V), dtype=dtype),
        query.new_empty((B, H, T) if normalize else (0,), dtype=dtype),
        query.new_empty((N, G, F, V) if want_state else (0,), dtype=dtype),
        query.new_empty((N, G, F) if want_state and normalize else (0,), dtype=dtype),
    )


@torch.library.custom_op("cumulant::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
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
    want_state: bool,
    order: int,
    constant_term: bool,
    activation: str,
    scale: float,
    normalize: bool,
    is_causal: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = Spec(order, constant_term, activation, scale, normalize, is_causal, chunk)
    with torch.autocast(query.device.type, enabled=False):
        grads = backward(
            _tokens(query, key, value, key_mask, cu_seqlens, spec),
            dout,
            dnumerator,
            ddenominator if normalize else None,
            out,
            denominators if normalize else None,
            numerator,
            denominator,
            (final_numerator, final_denominator if normalize else None),
            want_state,
        )
    dS, dZ = (query.new_empty(0) if x is None else x for x in (grads.S, grads.Z))
    return grads.query, grads.key, grads.value, dS, dZ


@chunked_attention_backward.register_fake
def _(dout, dnumerator, ddenominator, query, key, value, key_mask, cu_seqlens, numerator, denominator, *rest):  # type: ignore[no-untyped-def]
    # fresh tensors are contiguous, whatever the inputs' strides
    inputs = (query, key, value, numerator, denominator)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, want_state, order, constant_term, activation, scale, normalize, is_causal, chunk = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (want_state, order, constant_term, activation, scale, normalize, is_causal, chunk)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, _ddenominators, dS, dZ):  # type: ignore[no-untyped-def]
    query, key, value, key_mask, cu_seqlens, S0, Z0, out, den, S, Z = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    if S.numel() == 0:  # a state that nobody wanted, whatever gradient came for it
        dS = dZ = None
    dq, dk, dv, dS0, dZ0 = _backward(
        dout, dS, dZ, query, key, value, key_mask, cu_seqlens, S0, Z0, out, den, S, Z, *ctx.options
    )
    return dq, dk, dv, None, None, dS0 if S0 is not None else None, dZ0 if Z0 is not None else None, *[None] * 8


chunked_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(chunked_attention_backward)
attention = mappable(chunked_attention, _save, _differentiate)
