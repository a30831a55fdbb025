"""The passes over chunks: outputs forwards in time, gradients forwards (queries) and backwards
(keys, values).

Shapes, with ``n`` sequences alive, ``G`` key/value heads, ``M = (H/G) * C`` query rows, ``C`` keys
in a chunk: ``q [n,G,K,M]``, ``k [n,G,K,C]`` (token-minor), ``v [n,G,C,V]``, state ``S [n,G,F,V]``,
``Z [n,G,F]``.

Only the inputs, the output and the denominators are kept for the backward pass, the last two in
fp32 at least: where outputs hardly depend on the query, the gradient at a denominator, -(dout ·
out) / z, all but cancels in the queries' gradients, and an output rounded to 16 bits would leave
noise there. It walks the chunks twice: forwards, rebuilding S, for the queries' gradients and
everything inside a chunk; then backwards, carrying the gradient of the state, for the keys' and
values' gradients across chunks. Features exist for one chunk at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec
from .features import Expansion, activate, activate_vjp
from .layout import Chunk, Dense, Packed, sort_rows, unsort_rows


class Tokens(NamedTuple):
    """The inputs with what it takes to read a chunk of them."""

    inputs: AttentionInputs
    queries: Dense | Packed
    keys: Dense | Packed
    spec: AttentionSpec
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        return self.inputs.key.shape[1]

    def expansion(self) -> Expansion:
        key, spec = self.inputs.key, self.spec
        return Expansion.get(key.shape[-1], spec.order, spec.constant_term, self.dtype, key.device)

    def q(self, c: Chunk) -> Tensor:
        x = self.queries.load(self.inputs.query, c, self.groups, self.dtype).mT.contiguous()
        return activate(x if self.spec.scale == 1.0 else x * self.spec.scale, self.spec.activation)

    def grad_q(self, activated: Tensor, grad: Tensor) -> Tensor:
        grad = activate_vjp(activated, grad, self.spec.activation).mT
        return grad if self.spec.scale == 1.0 else grad * self.spec.scale

    def kv(self, c: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key, value and mask ``[n, 1, 1, C]`` of a chunk. What is masked is zero, even where the
        input is NaN.
        """
        k = self.keys.load(self.inputs.key, c, self.groups, self.dtype).mT
        v = self.keys.load(self.inputs.value, c, self.groups, self.dtype)
        mask = self.keys.mask(self.inputs.key_mask, c)
        if mask is None:
            return activate(k.contiguous(), self.spec.activation), v, None
        mask = mask[:, None, None, :]
        k = activate(k.masked_fill(~mask, 0), self.spec.activation).masked_fill(~mask, 0)
        return k.contiguous(), v.masked_fill(~mask.mT, 0), mask


def _level(t: Tokens) -> tuple[Tokens, Tensor | float]:
    """The same attention with queries whose largest feature is near 1, and what the gradient at
    them is multiplied by.

    Where features are the activated vectors, and outputs quotients, a query's may be multiplied by
    any number. So products with small keys, and quotients by them, neither vanish nor overflow:
    1e-20 times 1e-20 has few digits in fp32.
    """
    spec = t.spec
    if spec.order or not spec.normalize:
        return t, 1.0
    x, finite = t.inputs.query.to(t.dtype) * spec.scale, torch.finfo(t.dtype)

    def scaled(query: Tensor) -> Tokens:
        return t._replace(inputs=t.inputs._replace(query=query), spec=replace(spec, scale=1.0))

    if spec.activation == "elu":  # exp(x) below zero: what is added to x multiplies it
        top = x.amax(-1, keepdim=True).clamp(min=finite.min / 2, max=0)
        return scaled(x - top), spec.scale
    top = (x if spec.activation == "relu" else x.abs()).amax(-1, keepdim=True)
    power = top / (2 * torch.frexp(top).mantissa)  # of two, so that nothing is rounded
    power = power.masked_fill(~(power.isfinite() & (top > 0)), 1).clamp(min=finite.tiny)
    return scaled(x / power), spec.scale / power


def _expand(features: Expansion, k: Tensor, mask: Tensor | None) -> Tensor:
    phi = features.expand(k)
    return phi if mask is None or features.order == 0 else phi * mask


def _hide(spec: AttentionSpec, c: Chunk, x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero, in place, where a query must not look inside its chunk: at later keys, at masked keys.
    x ``[n,G,M,C]``.
    """
    if spec.is_causal and c.length > 1:
        x.unflatten(2, (-1, c.length)).tril_()
    return x if mask is None else x.masked_fill_(~mask, 0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is, or has lost its digits below the smallest normal number:
    nothing to attend to.
    """
    empty = denominator.abs() < torch.finfo(denominator.dtype).tiny
    return (numerator / denominator.masked_fill(empty, 1)[..., None]).masked_fill_(
        empty[..., None], 0
    )


def _accumulate(S: Tensor, Z: Tensor | None, n: int, phi: Tensor, v: Tensor) -> None:
    """S += φ v, Z += Σ φ for the first n sequences; phi ``[n,G,F,C]``, v ``[n,G,C,V]``."""
    S[:n].flatten(0, 1).baddbmm_(phi.flatten(0, 1), v.flatten(0, 1))
    if Z is not None:
        Z[:n] += phi.sum(-1)


def _initial(t: Tokens, features: Expansion, needed: bool) -> tuple[Tensor, Tensor | None]:
    """The sums before the first token; empty unless `needed`."""
    S, Z = sort_rows(t.inputs.numerator, t.keys), sort_rows(t.inputs.denominator, t.keys)
    if S is None:
        value = t.inputs.value
        shape = (t.keys.batch, t.groups, features.size, value.shape[-1]) if needed else (0, 0, 0, 0)
        S = value.new_zeros(shape, dtype=t.dtype)
    if Z is None and t.spec.normalize:
        Z = S.new_zeros(S.shape[:3])
    return S, Z


def _context(t: Tokens, features: Expansion) -> tuple[Tensor, Tensor | None]:
    """The sums over all keys, for attention in both directions."""
    S, Z = _initial(t, features, needed=True)
    for c in t.keys.chunks:
        k, v, mask = t.kv(c)
        _accumulate(S, Z, c.rows, _expand(features, k, mask), v)
    return S, Z


def _read(phi: Tensor, S: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """φᵀS and φ·Z: phi ``[n,G,F,M]``."""
    return phi.mT @ S, None if Z is None else (Z[:, :, None] @ phi).squeeze(2)


def forward(t: Tokens) -> AttentionOutputs:
    features, (t, _) = t.expansion(), _level(t)
    (query, _, value, *_), S0, wanted = t.inputs, t.inputs.numerator, t.spec.returns_state
    _B, H, T, V = *query.shape[:3], value.shape[-1]
    if T == 1 and S0 is not None and wanted and t.spec.is_causal and t.queries.order is None:
        return _step(t, features, S0, t.inputs.denominator)
    out = t.queries.new(H, T, V, query, t.dtype)
    den = t.queries.new(H, T, 1, query, t.dtype) if t.spec.normalize else None
    local = t.spec.is_causal or _one_block(t)
    if local:
        S, Z = _initial(t, features, needed=wanted or len(t.keys.chunks) > 1)
    else:
        S, Z = _context(t, features)
    for i, c in enumerate(t.queries.chunks):
        q, n = t.q(c), c.rows
        z: Tensor | None
        if local:
            k, v, mask = t.kv(c)
            y, z = _local(t.spec, features, c, q, k, v, mask)
            if S0 is not None or i > 0:
                y_state, z_state = _read(features.expand(q), S[:n], None if Z is None else Z[:n])
                y = y.add_(y_state)
                z = z.add_(z_state) if z is not None and z_state is not None else None
            if wanted or i + 1 < len(t.queries.chunks):
                _accumulate(S, Z, n, _expand(features, k, mask), v)
        else:
            y, z = _read(features.expand(q), S[:n], None if Z is None else Z[:n])
        if den is not None and z is not None:
            t.queries.store(den, c, z[..., None])
            y = _divide(y, z)
        t.queries.store(out, c, y)
    den = None if den is None else t.queries.finish(den)[..., 0].contiguous()
    if not wanted:
        return _outputs(t.queries.finish(out), den, None, None)
    return _outputs(
        t.queries.finish(out),
        den,
        unsort_rows(S, t.keys),
        None if Z is None else unsort_rows(Z, t.keys),
    )


def _outputs(
    out: Tensor, den: Tensor | None, S: Tensor | None, Z: Tensor | None
) -> AttentionOutputs:
    """With something empty for what is None."""
    return AttentionOutputs(out, *(out.new_empty(0) if x is None else x for x in (den, S, Z)))


def _step(t: Tokens, features: Expansion, S0: Tensor, Z0: Tensor | None) -> AttentionOutputs:
    """One token onto a state: update, then read."""
    (c,) = t.queries.chunks
    q, (k, v, mask) = t.q(c), t.kv(c)
    phi = _expand(features, k, mask)
    S = torch.addcmul(S0.contiguous(), phi, v)
    Z = None if Z0 is None else Z0.contiguous() + phi.squeeze(-1)
    y, z = _read(features.expand(q), S, Z)
    y = y if z is None else _divide(y, z)
    shape = t.inputs.query.shape[:3]
    out = y.view(*shape, v.shape[-1]).clone()  # a view could not be changed in place
    return _outputs(out, None if z is None else z.view(shape), S, Z)


def _one_block(t: Tokens) -> bool:
    """Bidirectional and short: the quadratic form in one block is cheaper than features."""
    one = len(t.keys.chunks) == 1 and len(t.queries.chunks) == 1
    return one and t.inputs.numerator is None and not t.spec.returns_state and t.keys is t.queries


def _local(
    spec: AttentionSpec,
    features: Expansion,
    c: Chunk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Numerator and denominator of a chunk's queries over the chunk's own keys, by the quadratic
    form.
    """
    weights = _hide(spec, c, features.polynomial(q.mT @ k), mask)
    return weights @ v, weights.sum(-1) if spec.normalize else None


def backward(t: Tokens, upstream: AttentionOutputs, outputs: AttentionOutputs) -> AttentionInputs:
    """Gradients of the inputs, for gradients at the output and, perhaps, at the state that came
    out.
    """
    features, (level, factor) = t.expansion(), _level(t)
    given, t = t.inputs, level
    (_, H, T, K), (_, G, keys, _), V = given.query.shape, given.key.shape, given.value.shape[3]
    dq = t.queries.new(H, T, K, given.query, t.dtype)
    dk, dv = (
        t.keys.new(G, keys, K, given.key, t.dtype),
        t.keys.new(G, keys, V, given.value, t.dtype),
    )
    at_outputs = _Upstream(t, upstream.out, outputs)
    S, Z, local = _sums_before(t, features, outputs)
    from_numerator = sort_rows(upstream.final_numerator, t.keys)
    from_denominator = sort_rows(upstream.final_denominator, t.keys) if t.spec.normalize else None
    from_state = from_numerator is not None or from_denominator is not None
    dS = torch.zeros_like(S) if from_numerator is None else from_numerator
    dZ = torch.zeros_like(Z) if from_denominator is None and Z is not None else from_denominator

    # Forwards in time: queries read S as the forward pass did, which is rebuilt chunk by chunk.
    for i, c in enumerate(t.queries.chunks):
        n, q = c.rows, t.q(c)
        dy, dz = at_outputs.load(c)
        if local:
            k, v, mask = t.kv(c)
        grad_q = (
            _local_backward(t, features, c, q, k, v, mask, dy, dz, dk, dv)
            if local
            else torch.zeros_like(q)
        )
        if not local or given.numerator is not None or i > 0:  # y += φ(q)ᵀ S, z += φ(q) · Z
            dphi = S[:n] @ dy.mT
            if dz is not None and Z is not None:
                dphi.addcmul_(Z[:n, :, :, None], dz[:, :, None, :])
            grad_q += features.expand_vjp(q, dphi)
        t.queries.store(dq, c, t.grad_q(q, grad_q))
        if local and i + 1 < len(t.queries.chunks):
            _accumulate(S, Z, n, _expand(features, k, mask), v)
        # every query reads the same sums, so that their gradient is complete before any key asks
        if not local:
            _accumulate_grad(features, q, dy, dz, dS, dZ, n)

    # Backwards in time: keys and values reach all later queries through S, whose gradient grows
    # with each chunk.
    across = (t.spec.returns_state and from_state) or not local or len(t.keys.chunks) > 1
    for i, c in (
        reversed(list(enumerate(t.keys.chunks))) if across or given.numerator is not None else ()
    ):
        k, v, mask = t.kv(c)
        _keys_backward(t, features, c, k, v, mask, dS, dZ, dk, dv, accumulate=local)
        if local and (i > 0 or given.numerator is not None):
            dy, dz = at_outputs.load(c)
            _accumulate_grad(features, t.q(c), dy, dz, dS, dZ, c.rows)
    # What is left in dS after the first chunk is the gradient of the state that came in.
    return AttentionInputs(
        t.queries.finish(dq).mul_(factor).to(given.query.dtype),
        t.keys.finish(dk).to(given.key.dtype),
        t.keys.finish(dv).to(given.value.dtype),
        numerator=None if given.numerator is None else unsort_rows(dS, t.keys),
        denominator=None if given.denominator is None or dZ is None else unsort_rows(dZ, t.keys),
    )


def _sums_before(
    t: Tokens, features: Expansion, outputs: AttentionOutputs
) -> tuple[Tensor, Tensor | None, bool]:
    """The sums that the first chunk reads, and whether chunks see their own keys by the quadratic
    form.
    """
    if t.spec.is_causal or _one_block(t):
        return *_initial(t, features, needed=t.spec.returns_state or len(t.keys.chunks) > 1), True
    if not t.spec.returns_state:
        return *_context(t, features), False
    S = sort_rows(outputs.final_numerator, t.keys)
    assert S is not None
    return S, sort_rows(outputs.final_denominator, t.keys) if t.spec.normalize else None, False


class _Upstream:
    """Gradients at numerator and denominator of a chunk: dy = dout / z, dz = -(dout · out) / z."""

    def __init__(self, t: Tokens, dout: Tensor, outputs: AttentionOutputs):
        self.t, self.dout, self.out = t, dout, outputs.out
        self.den = outputs.denominators if t.spec.normalize else None

    def load(self, c: Chunk) -> tuple[Tensor, Tensor | None]:
        t = self.t
        dout = t.queries.load(self.dout, c, t.groups, t.dtype)
        if self.den is None:
            return dout, None
        z = t.queries.load(self.den[..., None], c, t.groups, t.dtype)[..., 0]
        out = t.queries.load(self.out, c, t.groups, t.dtype)
        return _divide(dout, z), _divide(-(dout * out).sum(-1, keepdim=True), z)[..., 0]


def _accumulate_grad(
    features: Expansion,
    q: Tensor,
    dy: Tensor,
    dz: Tensor | None,
    dS: Tensor,
    dZ: Tensor | None,
    n: int,
) -> None:
    phi = features.expand(q)
    dS[:n].flatten(0, 1).baddbmm_(phi.flatten(0, 1), dy.flatten(0, 1))
    if dZ is not None and dz is not None:
        dZ[:n] += (phi @ dz[..., None]).squeeze(-1)


def _local_backward(
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
    scores = q.mT @ k
    slope = features.slope(scores)
    weights = _hide(t.spec, c, features.polynomial(scores), mask)
    dweights = dy @ v.mT
    if dz is not None:
        dweights += dz[..., None]
    dscores = _hide(t.spec, c, dweights if slope is None else dweights.mul_(slope), mask)
    grad_k = activate_vjp(k, q @ dscores, t.spec.activation)
    t.keys.store(dk, c, grad_k.mT)
    t.keys.store(dv, c, weights.mT @ dy)
    return k @ dscores.mT


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
    n = c.rows
    dphi = dS[:n] @ v.mT
    if dZ is not None:
        dphi += dZ[:n, :, :, None]
    grad_k = activate_vjp(k, features.expand_vjp(k, dphi), t.spec.activation)
    grad_v = features.expand(k).mT @ dS[:n]
    if mask is not None:
        grad_k, grad_v = grad_k * mask, grad_v * mask.mT
    t.keys.store(dk, c, grad_k.mT, accumulate)
    t.keys.store(dv, c, grad_v, accumulate)
