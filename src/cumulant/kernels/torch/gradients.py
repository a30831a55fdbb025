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

from ..decay import Decay, sum_crossing_pairs, sum_earlier, sum_later
from ..spec import AttentionInputs, AttentionOutputs
from .features import Expansion, activate_vjp
from .layout import Chunk, sort_rows, unsort_rows
from .passes import (
    Tokens,
    add_keys,
    add_products,
    decay_rows,
    initial_sums,
    level_queries,
    masked_features,
    multiply_heads,
    one_block,
    safe_divide,
    sum_all_keys,
    sum_features,
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
    dk, dv = (t.keys.new_buffer(G, keys, n, given.key, t.dtype) for n in (K, V))
    decays = None if given.log_decay is None else _DecayGradient(t, features)
    at_outputs = _Upstream(t, upstream.out, outputs)
    S, Z, local = _sums_before(t, features, outputs)
    dS, dZ, from_state = _final_state_gradient(t, upstream, S, Z)
    decay: Decay | None = None

    # Forwards in time: a query's gradient needs the sums that it read, so S is rebuilt chunk by
    # chunk as in the forward pass, instead of being kept for every chunk.
    for i, c in enumerate(t.queries.chunks):
        n, q = c.rows, t.load_query(c)
        grad_q, (dy, dz) = torch.zeros_like(q), at_outputs.load_chunk(c)
        if local:
            k, v, mask = t.load_key_value(c)
            decay = t.load_decay(c, mask)
            grad_q = _inside_backward(t, features, c, q, k, v, mask, decay, decays, dy, dz, dk, dv)
        if not local or given.numerator is not None or i > 0:
            dy, dz = _decay_upstream(dy, dz, decay)
            sums = S[:n].to(t.dtype), None if Z is None else Z[:n].to(t.dtype)
            dphi = _query_features_gradient(dy, dz, *sums)
            grad_q += features.expand_vjp(q, dphi)
            if decays is not None:
                decays.add_queries(i, c, features.expand(q), dphi, *sums)
        t.queries.store_tokens(dq, c, t.query_gradient(q, grad_q))
        if local and i + 1 < len(t.queries.chunks):
            add_keys(S, Z, n, masked_features(features, k, mask), v, decay)
        # In both directions every query reads the same sums. Their gradient must be complete before
        # any key uses it, so it is summed up in this walk.
        if not local:
            _add_queries(features, q, dy, dz, dS, dZ, n)

    # Backwards in time: a key reaches all later queries through S. So dS sums over the queries of
    # later chunks, and a chunk's keys read it before the chunk's own queries are added: those
    # reached them inside the chunk.
    across = not local or len(t.keys.chunks) > 1 or given.numerator is not None or from_state
    for i, c in reversed(list(enumerate(t.keys.chunks))) if across else ():
        n, (k, v, mask) = c.rows, t.load_key_value(c)
        decay = t.load_decay(c, mask)
        _keys_backward(t, features, c, k, v, mask, decay, decays, dS, dZ, dk, dv, accumulate=local)
        if local and (i > 0 or given.numerator is not None):
            if decay is not None and decays is not None:
                decays.pass_chunk(i, c, decay, dS[:n], None if dZ is None else dZ[:n])
            dy, dz = _decay_upstream(*at_outputs.load_chunk(c), decay)
            _add_queries(features, t.load_query(c), dy, dz, dS, dZ, n)
    # After the first chunk, dS is the gradient of the initial state.
    return AttentionInputs(
        t.queries.finish_buffer(dq).mul_(factor).to(given.query.dtype),
        t.keys.finish_buffer(dk).to(given.key.dtype),
        t.keys.finish_buffer(dv).to(given.value.dtype),
        numerator=_state_gradient(t, given.numerator, dS),
        denominator=_state_gradient(t, given.denominator, dZ),
        log_decay=None if decays is None else decays.finish(),
    )


def _final_state_gradient(
    t: Tokens, upstream: AttentionOutputs, S: Tensor, Z: Tensor | None
) -> tuple[Tensor, Tensor | None, bool]:
    """Gradients at the sums after the last chunk, zero without any, and whether there are any."""
    dS = sort_rows(upstream.final_numerator, t.keys)
    dZ = sort_rows(upstream.final_denominator, t.keys) if t.spec.normalize else None
    given = t.spec.returns_state and (dS is not None or dZ is not None)
    dS = torch.zeros_like(S) if dS is None else dS.to(S.dtype)
    if Z is not None:
        dZ = torch.zeros_like(Z) if dZ is None else dZ.to(Z.dtype)
    return dS, dZ, given


def _state_gradient(t: Tokens, given: Tensor | None, dsums: Tensor | None) -> Tensor | None:
    return None if given is None or dsums is None else unsort_rows(dsums.to(t.dtype), t.keys)


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


class _DecayGradient:
    """The gradient at the log decays ``[B, G, S]``, summed up over both walks.

    d_l multiplies what tokens i ≥ l read of keys j < l. Both may lie in l's chunk, or the key
    before it, or the query after it, or both outside: then the sums S before the chunk meet the
    gradient dS after it, ⟨S, dS⟩. Every term is summed for itself. The shorter way by q·dq - k·dk
    takes differences of sums over the whole sequence, which lose the digits of a strong decay.

    S is known in the walk forwards and dS in the walk backwards, so the sums before chunks are
    kept: before every chunk while they take no more memory than the inputs, else before every
    `stride` chunks. In between, ⟨S, dS⟩ follows from a neighbour's and the terms of its chunk.
    """

    def __init__(self, t: Tokens, features: Expansion):
        self.t, x = t, t.inputs
        logs, G = x.log_decay, t.key_heads
        assert logs is not None
        self.out = t.keys.new_buffer(G, logs.shape[2], 1, x.key, torch.float64).zero_()
        tokens = x.query.shape[1] // G * x.query.shape[3] + x.key.shape[3] + x.value.shape[3]
        size = features.size * (x.value.shape[3] + 1)
        self.stride = max(1, size // (tokens * t.spec.chunk))
        self.sums: dict[int, tuple[int, Tensor, Tensor | None]] = {}  # before chunk i, rows from
        self.queries: dict[int, Tensor] = {}  # the queries' terms of chunk i, summed up: [n, G]
        self.keys = self.out.new_zeros(())  # the keys' terms of the last chunk walked, likewise
        self.across = self.out.new_zeros(t.keys.batch, G)  # ⟨S, dS⟩ after the chunk to be walked

    def _add(self, c: Chunk, terms: Tensor) -> None:
        self.t.keys.store_tokens(self.out, c, terms.double()[..., None], accumulate=True)

    def add_pairs(self, c: Chunk, pairs: Tensor) -> None:
        """Query and key inside the chunk: pairs ``[n,G,M,C]``."""
        self._add(c, sum_crossing_pairs(pairs.unflatten(2, (-1, c.length)).sum(2)))

    def add_queries(
        self, i: int, c: Chunk, phi: Tensor, dphi: Tensor, S: Tensor, Z: Tensor | None
    ) -> None:
        """Queries of chunk i that read the sums before it, which are kept."""
        self._keep_sums(i, S, Z)
        terms = (phi * dphi).sum(2).double().unflatten(-1, (-1, c.length)).sum(2)
        self.queries[i] = terms.sum(-1)
        self._add(c, sum_later(terms))

    def add_keys(self, c: Chunk, phi: Tensor, dphi: Tensor) -> None:
        """Keys of the chunk that later chunks read."""
        terms = (phi * dphi).sum(2).double()
        self.keys = terms.sum(-1)
        self._add(c, sum_earlier(terms))

    def _keep_sums(self, i: int, S: Tensor, Z: Tensor | None) -> None:
        """Keeps the sums before chunk i: of all sequences, or of those that end in it."""
        chunks, first = self.t.keys.chunks, 0
        if i % self.stride and i + 1 < len(chunks):
            first = chunks[i + 1].rows
        self.sums[i] = first, S[first:].clone(), None if Z is None else Z[first:].clone()

    def pass_chunk(self, i: int, c: Chunk, decay: Decay, dS: Tensor, dZ: Tensor | None) -> None:
        """Sums before chunk i that later chunks read; decays dS and dZ, in place, by the chunk.

        S after the chunk is exp(c_C) S before it, plus the chunk's keys.
        """
        decay_rows(dS, dZ, c.rows, decay)
        first, S, Z = self.sums.pop(i)
        known = (S * dS[first:]).sum((2, 3)).double()
        if Z is not None and dZ is not None:
            known += (Z * dZ[first:]).sum(2)
        across = torch.cat(((self.across[: c.rows] - self.keys)[:first], known))
        self.across[: c.rows] = across + self.queries.pop(i)
        self._add(c, across[..., None].expand(-1, -1, c.length))

    def finish(self) -> Tensor:
        """In the dtype of the log decays; zero at masked tokens, which decay nothing."""
        x = self.t.inputs
        assert x.log_decay is not None
        found = self.t.keys.finish_buffer(self.out)[..., 0]
        if x.key_mask is not None:
            found = found.masked_fill(~x.key_mask[:, None], 0)
        return found.to(x.log_decay.dtype, memory_format=torch.contiguous_format)


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
    add_products(dS[:n], phi, dy)
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
    decay: Decay | None,
    decays: _DecayGradient | None,
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
    # With decay w = e^(c_i - c_j) p(q·k), so the gradient at c_i - c_j is w dw.
    if decay is not None and decays is not None:
        factors = decay.between()
        multiply_heads(weights, factors)
        decays.add_pairs(c, weights * dweights)
        multiply_heads(dweights, factors)
    dscores = zero_unseen(t.spec, c, dweights if slope is None else dweights.mul_(slope), mask)
    grad_k = activate_vjp(k, q @ dscores, t.spec.activation)
    t.keys.store_tokens(dk, c, grad_k.mT)
    t.keys.store_tokens(dv, c, weights.mT @ dy)
    return k @ dscores.mT


def _query_features_gradient(dy: Tensor, dz: Tensor | None, S: Tensor, Z: Tensor | None) -> Tensor:
    """Gradients that reach the features of a chunk's queries through the sums that they read."""
    # y = φ(q)ᵀ S and z = φ(q) · Z, so dφ(q) = S dy + Z dz, in the sums' dtype.
    dphi = S @ dy.mT
    if dz is not None and Z is not None:
        dphi.addcmul_(Z[..., None], dz[:, :, None, :])
    return dphi


def _decay_upstream(
    dy: Tensor, dz: Tensor | None, decay: Decay | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients at what queries read from before the chunk, which has decayed by exp(c_i)."""
    if decay is None:
        return dy, dz
    kept = decay.from_start(dy.shape[2])
    return dy * kept[..., None], None if dz is None else dz * kept


def _keys_backward(
    t: Tokens,
    features: Expansion,
    c: Chunk,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    decay: Decay | None,
    decays: _DecayGradient | None,
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
    dS = dS[:n].to(v.dtype)
    dphi = dS @ v.mT
    if dZ is not None:
        dphi += dZ[:n, :, :, None]
    phi = features.expand(k)
    grad_v = sum_features(phi, dS)
    if decay is not None and decays is not None:  # a key decays until the end of the chunk
        kept = decay.to_end()
        dphi *= kept[:, :, None]
        grad_v *= kept[..., None]
        decays.add_keys(c, phi if mask is None else phi * mask, dphi)
    grad_k = activate_vjp(k, features.expand_vjp(k, dphi), t.spec.activation)
    if mask is not None:
        grad_k, grad_v = grad_k * mask, grad_v * mask.mT
    t.keys.store_tokens(dk, c, grad_k.mT, accumulate)
    t.keys.store_tokens(dv, c, grad_v, accumulate)
