"""Gradients of linear and Taylor attention: a walk over the chunks forwards, and one backwards.

Shapes are those of `passes`.

Only the inputs, the output and the denominators are kept for the backward pass, the last two in
fp32 at least. Where outputs hardly depend on the query, the gradient at a denominator,
-(dout · out) / z, all but cancels in the queries' gradients. An output rounded to 16 bits would
leave noise there.

The backward pass walks the chunks twice. The first walk goes forwards and rebuilds S; it forms the
queries' gradients, and all gradients inside a chunk. The second walk goes backwards and carries the
gradient of the state; it forms the keys' and values' gradients across chunks. Features exist for
one chunk at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionInputs, AttentionOutputs
from .features import Expansion, activate_vjp
from .layout import Chunk, sort_rows, unsort_rows
from .passes import (
    Tokens,
    add_keys,
    initial_sums,
    level_queries,
    masked_features,
    one_block,
    safe_divide,
    sum_all_keys,
    zero_unseen,
)


def backward_chunks(
    t: Tokens, upstream: AttentionOutputs, outputs: AttentionOutputs
) -> AttentionInputs:
    """Gradients of the inputs, from those at the output and perhaps at the final state."""
    features, (level, factor) = t.expansion(), level_queries(t)
    given, t = t.inputs, level
    (_, H, T, K), (_, G, keys, _), V = given.query.shape, given.key.shape, given.value.shape[3]
    dq = t.queries.new_buffer(H, T, K, given.query, t.dtype)
    dk = t.keys.new_buffer(G, keys, K, given.key, t.dtype)
    dv = t.keys.new_buffer(G, keys, V, given.value, t.dtype)
    at_outputs = _Upstream(t, upstream.out, outputs)
    S, Z, local = _sums_before(t, features, outputs)
    from_numerator = sort_rows(upstream.final_numerator, t.keys)
    from_denominator = sort_rows(upstream.final_denominator, t.keys) if t.spec.normalize else None
    from_state = from_numerator is not None or from_denominator is not None
    dS = torch.zeros_like(S) if from_numerator is None else from_numerator
    dZ = torch.zeros_like(Z) if from_denominator is None and Z is not None else from_denominator

    # Forwards in time: a query's gradient needs the sums that it read, so S is rebuilt chunk by
    # chunk as in the forward pass, instead of being kept for every chunk.
    for i, c in enumerate(t.queries.chunks):
        n, q = c.rows, t.load_query(c)
        dy, dz = at_outputs.load_chunk(c)
        grad_q = torch.zeros_like(q)
        if local:
            k, v, mask = t.load_key_value(c)
            grad_q = _inside_backward(t, features, c, q, k, v, mask, dy, dz, dk, dv)
        if not local or given.numerator is not None or i > 0:
            grad_q += _queries_backward(features, q, dy, dz, S[:n], None if Z is None else Z[:n])
        t.queries.store_tokens(dq, c, t.query_gradient(q, grad_q))
        if local and i + 1 < len(t.queries.chunks):
            add_keys(S, Z, n, masked_features(features, k, mask), v)
        # In both directions every query reads the same sums. Their gradient must be complete before
        # any key uses it, so it is summed up in this walk.
        if not local:
            _add_queries(features, q, dy, dz, dS, dZ, n)

    # Backwards in time: a key reaches all later queries through S. So dS sums over the queries of
    # later chunks, and a chunk's keys read it before the chunk's own queries are added: those
    # reached them inside the chunk.
    across = (t.spec.returns_state and from_state) or not local or len(t.keys.chunks) > 1
    for i, c in (
        reversed(list(enumerate(t.keys.chunks))) if across or given.numerator is not None else ()
    ):
        k, v, mask = t.load_key_value(c)
        _keys_backward(t, features, c, k, v, mask, dS, dZ, dk, dv, accumulate=local)
        if local and (i > 0 or given.numerator is not None):
            dy, dz = at_outputs.load_chunk(c)
            _add_queries(features, t.load_query(c), dy, dz, dS, dZ, c.rows)
    # After the first chunk, dS is the gradient of the initial state.
    return AttentionInputs(
        t.queries.finish_buffer(dq).mul_(factor).to(given.query.dtype),
        t.keys.finish_buffer(dk).to(given.key.dtype),
        t.keys.finish_buffer(dv).to(given.value.dtype),
        numerator=None if given.numerator is None else unsort_rows(dS, t.keys),
        denominator=None if given.denominator is None or dZ is None else unsort_rows(dZ, t.keys),
    )


def _sums_before(
    t: Tokens, features: Expansion, outputs: AttentionOutputs
) -> tuple[Tensor, Tensor | None, bool]:
    """The sums that the first chunk reads, and whether chunks attend to their own keys directly.

    In both directions all chunks read the sums over all keys: the forward pass kept them, or they
    are formed again.
    """
    if t.spec.is_causal or one_block(t):
        return *initial_sums(
            t, features, needed=t.spec.returns_state or len(t.keys.chunks) > 1
        ), True
    if not t.spec.returns_state:
        return *sum_all_keys(t, features), False
    S = sort_rows(outputs.final_numerator, t.keys)
    assert S is not None
    return S, sort_rows(outputs.final_denominator, t.keys) if t.spec.normalize else None, False


class _Upstream:
    """Gradients at numerator and denominator of a chunk, from those at its output.

    out = y / z, so dy = dout / z and dz = -(dout · y) / z² = -(dout · out) / z. Both are zero where
    the output is zero by definition.
    """

    def __init__(self, t: Tokens, dout: Tensor, outputs: AttentionOutputs):
        self.t, self.dout, self.out = t, dout, outputs.out
        self.den = outputs.denominators if t.spec.normalize else None

    def load_chunk(self, c: Chunk) -> tuple[Tensor, Tensor | None]:
        t = self.t
        dout = t.queries.load_tokens(self.dout, c, t.key_heads, t.dtype)
        if self.den is None:
            return dout, None
        z = t.queries.load_tokens(self.den[..., None], c, t.key_heads, t.dtype)[..., 0]
        out = t.queries.load_tokens(self.out, c, t.key_heads, t.dtype)
        return safe_divide(dout, z), safe_divide(-(dout * out).sum(-1, keepdim=True), z)[..., 0]


def _add_queries(
    features: Expansion,
    q: Tensor,
    dy: Tensor,
    dz: Tensor | None,
    dS: Tensor,
    dZ: Tensor | None,
    n: int,
) -> None:
    """dS += φ(q) dy, dZ += φ(q) dz for the first n sequences, as y = φ(q)ᵀS and z = φ(q)·Z."""
    phi = features.expand(q)
    dS[:n].flatten(0, 1).baddbmm_(phi.flatten(0, 1), dy.flatten(0, 1))
    if dZ is not None and dz is not None:
        dZ[:n] += (phi @ dz[..., None]).squeeze(-1)


def _inside_backward(
    t: Tokens,
    features: Expansion,
    c: Chunk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dy: Tensor,
    dz: Tensor | None,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Gradients inside a chunk; stores those of keys and values, returns the queries'."""
    # y = w v and z = Σ w with the weights w = p(q·k): dw = dy vᵀ + dz, dv = wᵀ dy, and the scores'
    # gradient is p' dw. The weights are formed again. They get the causal and masked zeros, and so
    # does the scores' gradient, which a dz would otherwise fill in.
    scores = q.mT @ k
    slope = features.slope(scores)
    weights = zero_unseen(t.spec, c, features.polynomial(scores), mask)
    dweights = dy @ v.mT
    if dz is not None:
        dweights += dz[..., None]
    dscores = zero_unseen(t.spec, c, dweights if slope is None else dweights.mul_(slope), mask)
    grad_k = activate_vjp(k, q @ dscores, t.spec.activation)
    t.keys.store_tokens(dk, c, grad_k.mT)
    t.keys.store_tokens(dv, c, weights.mT @ dy)
    return k @ dscores.mT


def _queries_backward(
    features: Expansion, q: Tensor, dy: Tensor, dz: Tensor | None, S: Tensor, Z: Tensor | None
) -> Tensor:
    """Gradients that reach a chunk's queries through the sums that they read."""
    # y = φ(q)ᵀ S and z = φ(q) · Z, so dφ(q) = S dy + Z dz, in the sums' dtype.
    dphi = S @ dy.mT
    if dz is not None and Z is not None:
        dphi.addcmul_(Z[..., None], dz[:, :, None, :])
    return features.expand_vjp(q, dphi)


def _keys_backward(
    t: Tokens,
    features: Expansion,
    c: Chunk,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dS: Tensor,
    dZ: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
) -> None:
    """Gradients that reach a chunk's keys and values through the state."""
    # S = Σ φ(k) vᵀ and Z = Σ φ(k), so dφ(k) = dS v + dZ and dv = φ(k)ᵀ dS. Masked keys are not in
    # the sums: the constant feature, and dZ, would give them gradients.
    n = c.rows
    dphi = dS[:n] @ v.mT
    if dZ is not None:
        dphi += dZ[:n, :, :, None]
    grad_k = activate_vjp(k, features.expand_vjp(k, dphi), t.spec.activation)
    grad_v = features.expand(k).mT @ dS[:n]
    if mask is not None:
        grad_k, grad_v = grad_k * mask, grad_v * mask.mT
    t.keys.store_tokens(dk, c, grad_k.mT, accumulate)
    t.keys.store_tokens(dv, c, grad_v, accumulate)
