"""The passes over chunks: outputs forwards in time, gradients forwards (queries) and backwards (keys, values).

Shapes, with ``n`` sequences alive, ``G`` key/value heads, ``M = (H/G) * C`` query rows, ``C`` keys in a chunk:
``q [n,G,K,M]``, ``k [n,G,K,C]`` (token-minor), ``v [n,G,C,V]``, state ``S [n,G,F,V]``, ``Z [n,G,F]``.

Only the inputs, the output and the denominators are kept for the backward pass, the last two in fp32 at least: where
outputs hardly depend on the query, the gradient at a denominator, -(dout · out) / z, all but cancels in the queries'
gradients, and an output rounded to 16 bits would leave noise there. It walks the chunks twice: forwards,
rebuilding S, for the queries' gradients and everything inside a chunk; then backwards, carrying the gradient of the
state, for the keys' and values' gradients across chunks. Features exist for one chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .features import Expansion, activate, activate_vjp
from .layout import Chunk, Dense, Packed, sort_rows, unsort_rows


@dataclass(frozen=True)
class Spec:
    order: int  # 0: the features are the (activated) vectors themselves; p: Taylor features up to degree p
    constant_term: bool
    activation: str
    scale: float
    normalize: bool
    is_causal: bool
    chunk: int


class Tokens(NamedTuple):
    """The inputs with what it takes to read a chunk of them."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    queries: Dense | Packed
    keys: Dense | Packed
    spec: Spec
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        return self.key.shape[1]

    def expansion(self) -> Expansion:
        return Expansion.get(
            self.key.shape[-1], self.spec.order, self.spec.constant_term, self.dtype, self.query.device
        )

    def q(self, c: Chunk) -> Tensor:
        x = self.queries.load(self.query, c, self.groups, self.dtype).mT.contiguous()
        return activate(x if self.spec.scale == 1.0 else x * self.spec.scale, self.spec.activation)

    def grad_q(self, activated: Tensor, grad: Tensor) -> Tensor:
        grad = activate_vjp(activated, grad, self.spec.activation).mT
        return grad if self.spec.scale == 1.0 else grad * self.spec.scale

    def kv(self, c: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key, value and mask ``[n, 1, 1, C]`` of a chunk. What is masked is zero, even where the input is NaN."""
        k = self.keys.load(self.key, c, self.groups, self.dtype).mT
        v = self.keys.load(self.value, c, self.groups, self.dtype)
        mask = self.keys.mask(self.key_mask, c)
        if mask is None:
            return activate(k.contiguous(), self.spec.activation), v, None
        mask = mask[:, None, None, :]
        k = activate(k.masked_fill(~mask, 0), self.spec.activation).masked_fill(~mask, 0)
        return k.contiguous(), v.masked_fill(~mask.mT, 0), mask


def _level(t: Tokens) -> tuple[Tokens, Tensor | float]:
    """The same attention with queries whose largest feature is near 1, and what the gradient at them is multiplied by.

    Where features are the activated vectors, and outputs quotients, a query's may be multiplied by any number. So
    products with small keys, and quotients by them, neither vanish nor overflow: 1e-20 times 1e-20 has few digits in
    fp32.
    """
    spec = t.spec
    if spec.order or not spec.normalize:
        return t, 1.0
    x, finite = t.query.to(t.dtype) * spec.scale, torch.finfo(t.dtype)
    if spec.activation == "elu":  # exp(x) below zero: what is added to x multiplies it
        top = x.amax(-1, keepdim=True).clamp(min=finite.min / 2, max=0)
        return t._replace(query=x - top, spec=replace(spec, scale=1.0)), spec.scale
    top = (x if spec.activation == "relu" else x.abs()).amax(-1, keepdim=True)
    power = top / (2 * torch.frexp(top).mantissa)  # of two, so that nothing is rounded
    power = power.masked_fill(~(power.isfinite() & (top > 0)), 1).clamp(min=finite.tiny)
    return t._replace(query=x / power, spec=replace(spec, scale=1.0)), spec.scale / power


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _expand(features: Expansion, k: Tensor, mask: Tensor | None) -> Tensor:
    phi = features.expand(k)
    return phi if mask is None or features.order == 0 else phi * mask


def _hide(spec: Spec, c: Chunk, x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero, in place, where a query must not look inside its chunk: at later keys, at masked keys. x ``[n,G,M,C]``."""
    if spec.is_causal and c.length > 1:
        x.unflatten(2, (-1, c.length)).tril_()
    return x if mask is None else x.masked_fill_(~mask, 0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is, or has lost its digits below the smallest normal number: nothing to attend to."""
    empty = denominator.abs() < torch.finfo(denominator.dtype).tiny
    return (numerator / denominator.masked_fill(empty, 1)[..., None]).masked_fill_(empty[..., None], 0)


def _accumulate(S: Tensor, Z: Tensor | None, n: int, phi: Tensor, v: Tensor) -> None:
    """S += φ v, Z += Σ φ for the first n sequences; phi ``[n,G,F,C]``, v ``[n,G,C,V]``."""
    S[:n].flatten(0, 1).baddbmm_(phi.flatten(0, 1), v.flatten(0, 1))
    if Z is not None:
        Z[:n] += phi.sum(-1)


def _initial(
    t: Tokens, features: Expansion, S0: Tensor | None, Z0: Tensor | None, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums before the first token; empty unless `needed`."""
    S, Z = sort_rows(S0, t.keys), sort_rows(Z0, t.keys)
    if S is None:
        shape = (t.keys.batch, t.groups, features.size, t.value.shape[-1]) if needed else (0, 0, 0, 0)
        S = t.value.new_zeros(shape, dtype=t.dtype)
    if Z is None and t.spec.normalize:
        Z = S.new_zeros(S.shape[:3])
    return S, Z


def _context(t: Tokens, features: Expansion, S0: Tensor | None, Z0: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The sums over all keys, for attention in both directions."""
    S, Z = _initial(t, features, S0, Z0, needed=True)
    for c in t.keys.chunks:
        k, v, mask = t.kv(c)
        _accumulate(S, Z, c.rows, _expand(features, k, mask), v)
    return S, Z


def _read(phi: Tensor, S: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """φᵀS and φ·Z: phi ``[n,G,F,M]``."""
    return phi.mT @ S, None if Z is None else (Z[:, :, None] @ phi).squeeze(2)


def forward(
    t: Tokens, S0: Tensor | None, Z0: Tensor | None, want_state: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Output ``[B,H,T,V]``, in the dtype of sums, denominators ``[B,H,T]`` (None if not normalised) and, if wanted, the
    state after the last token."""
    features, (t, _) = t.expansion(), _level(t)
    _B, H, T, V = *t.query.shape[:3], t.value.shape[-1]
    if T == 1 and S0 is not None and want_state and t.spec.is_causal and t.queries.order is None:
        return _step(t, features, S0, Z0)
    out = t.queries.new(H, T, V, t.query, t.dtype)
    den = t.queries.new(H, T, 1, t.query, t.dtype) if t.spec.normalize else None
    local = t.spec.is_causal or _one_block(t, S0, want_state)
    if local:
        S, Z = _initial(t, features, S0, Z0, needed=want_state or len(t.keys.chunks) > 1)
    else:
        S, Z = _context(t, features, S0, Z0)
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
            if want_state or i + 1 < len(t.queries.chunks):
                _accumulate(S, Z, n, _expand(features, k, mask), v)
        else:
            y, z = _read(features.expand(q), S[:n], None if Z is None else Z[:n])
        if den is not None and z is not None:
            t.queries.store(den, c, z[..., None])
            y = _divide(y, z)
        t.queries.store(out, c, y)
    if den is not None:
        den = t.queries.finish(den).squeeze(-1)
    if not want_state:
        return t.queries.finish(out), den, None, None
    return t.queries.finish(out), den, unsort_rows(S, t.keys), None if Z is None else unsort_rows(Z, t.keys)


def _step(
    t: Tokens, features: Expansion, S0: Tensor, Z0: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One token onto a state: update, then read."""
    (c,) = t.queries.chunks
    q, (k, v, mask) = t.q(c), t.kv(c)
    phi = _expand(features, k, mask)
    S = torch.addcmul(S0.contiguous(), phi, v)
    Z = None if Z0 is None else Z0.contiguous() + phi.squeeze(-1)
    y, z = _read(features.expand(q), S, Z)
    y = y if z is None else _divide(y, z)
    shape = t.query.shape[:3]
    out = y.view(*shape, v.shape[-1]).clone()  # a view could not be changed in place
    return out, None if z is None else z.view(shape), S, Z


def _one_block(t: Tokens, S0: Tensor | None, want_state: bool) -> bool:
    """Bidirectional and short: the quadratic form in one block is cheaper than features."""
    one = len(t.keys.chunks) == 1 and len(t.queries.chunks) == 1
    return one and S0 is None and not want_state and t.keys is t.queries


def _local(
    spec: Spec, features: Expansion, c: Chunk, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Numerator and denominator of a chunk's queries over the chunk's own keys, by the quadratic form."""
    weights = _hide(spec, c, features.polynomial(q.mT @ k), mask)
    return weights @ v, weights.sum(-1) if spec.normalize else None


class Grads(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    S: Tensor | None  # of the state that came in
    Z: Tensor | None


def backward(
    t: Tokens,
    dout: Tensor,
    dS_final: Tensor | None,
    dZ_final: Tensor | None,
    out: Tensor,
    den: Tensor | None,
    S0: Tensor | None,
    Z0: Tensor | None,
    state: tuple[Tensor, Tensor | None],
    want_state: bool,
) -> Grads:
    features, dtype, (t, factor) = t.expansion(), t.query.dtype, _level(t)
    (_, H, T, K), (_, G, keys, _) = t.query.shape, t.key.shape
    dq = t.queries.new(H, T, K, t.query, t.dtype)
    dk = t.keys.new(G, keys, K, t.key, t.dtype)
    dv = t.keys.new(G, keys, t.value.shape[3], t.value, t.dtype)
    upstream = _Upstream(t, dout, out, den)
    local = t.spec.is_causal or _one_block(t, S0, want_state)
    if local:
        S, Z = _initial(t, features, S0, Z0, needed=want_state or len(t.keys.chunks) > 1)
    elif want_state:
        S, Z = (s if s is None else sort_rows(s, t.keys) for s in state)  # type: ignore[assignment]
    else:
        S, Z = _context(t, features, S0, Z0)
    dS, dZ = sort_rows(dS_final, t.keys), sort_rows(dZ_final, t.keys)
    dS = torch.zeros_like(S) if dS is None else dS
    dZ = torch.zeros_like(Z) if dZ is None and Z is not None else dZ

    for i, c in enumerate(t.queries.chunks):
        n, q = c.rows, t.q(c)
        dy, dz = upstream.load(c)
        if local:
            k, v, mask = t.kv(c)
        grad_q = _local_backward(t, features, c, q, k, v, mask, dy, dz, dk, dv) if local else torch.zeros_like(q)
        if not local or S0 is not None or i > 0:
            dphi = S[:n] @ dy.mT
            if dz is not None and Z is not None:
                dphi.addcmul_(Z[:n, :, :, None], dz[:, :, None, :])
            grad_q += features.expand_vjp(q, dphi)
        t.queries.store(dq, c, t.grad_q(q, grad_q))
        if local and i + 1 < len(t.queries.chunks):
            _accumulate(S, Z, n, _expand(features, k, mask), v)
        if not local:
            _accumulate_grad(features, q, dy, dz, dS, dZ, n)

    from_state = dS_final is not None or dZ_final is not None
    across = (want_state and from_state) or not local or len(t.keys.chunks) > 1 or S0 is not None
    for i, c in reversed(list(enumerate(t.keys.chunks))) if across else ():
        k, v, mask = t.kv(c)
        _keys_backward(t, features, c, k, v, mask, dS, dZ, dk, dv, accumulate=local)
        if local and (i > 0 or S0 is not None):
            dy, dz = upstream.load(c)
            _accumulate_grad(features, t.q(c), dy, dz, dS, dZ, c.rows)
    finish_q, finish_k = t.queries.finish, t.keys.finish
    return Grads(
        finish_q(dq).mul_(factor).to(dtype),
        finish_k(dk).to(t.key.dtype),
        finish_k(dv).to(t.value.dtype),
        None if S0 is None else unsort_rows(dS, t.keys),
        None if Z0 is None or dZ is None else unsort_rows(dZ, t.keys),
    )


class _Upstream:
    """Gradients at numerator and denominator of a chunk: dy = dout / z, dz = -(dout · out) / z."""

    def __init__(self, t: Tokens, dout: Tensor, out: Tensor, den: Tensor | None):
        self.t, self.dout, self.out, self.den = t, dout, out, den

    def load(self, c: Chunk) -> tuple[Tensor, Tensor | None]:
        t = self.t
        dout = t.queries.load(self.dout, c, t.groups, t.dtype)
        if self.den is None:
            return dout, None
        z = t.queries.load(self.den[..., None], c, t.groups, t.dtype)[..., 0]
        out = t.queries.load(self.out, c, t.groups, t.dtype)
        return _divide(dout, z), _divide(-(dout * out).sum(-1, keepdim=True), z)[..., 0]


def _accumulate_grad(
    features: Expansion, q: Tensor, dy: Tensor, dz: Tensor | None, dS: Tensor, dZ: Tensor | None, n: int
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
