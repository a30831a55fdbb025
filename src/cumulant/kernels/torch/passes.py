"""Outputs of linear and Taylor attention, chunk by chunk.

Shapes, with ``n`` sequences alive, ``G`` key/value heads, ``M = (H/G) * C`` query rows, ``C`` keys
in a chunk: ``q [n,G,K,M]``, ``k [n,G,K,C]`` (token-minor), ``v [n,G,C,V]``, state ``S [n,G,F,V]``,
``Z [n,G,F]``.

Features exist for one chunk at a time. `gradients` has the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec
from .features import Expansion, activate, activate_vjp
from .layout import Chunk, Dense, Packed, sort_rows, unsort_rows


class Tokens(NamedTuple):
    """The inputs, and methods that read a chunk of them."""

    inputs: AttentionInputs
    queries: Dense | Packed
    keys: Dense | Packed
    spec: AttentionSpec
    dtype: torch.dtype

    @property
    def key_heads(self) -> int:
        return self.inputs.key.shape[1]

    def expansion(self) -> Expansion:
        key, spec = self.inputs.key, self.spec
        return Expansion.cached(
            key.shape[-1], spec.order, spec.constant_term, self.dtype, key.device
        )

    def load_query(self, c: Chunk) -> Tensor:
        x = self.queries.load_tokens(
            self.inputs.query, c, self.key_heads, self.dtype
        ).mT.contiguous()
        return activate(x if self.spec.scale == 1.0 else x * self.spec.scale, self.spec.activation)

    def query_gradient(self, activated: Tensor, grad: Tensor) -> Tensor:
        grad = activate_vjp(activated, grad, self.spec.activation).mT
        return grad if self.spec.scale == 1.0 else grad * self.spec.scale

    def load_key_value(self, c: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key, value and mask ``[n, 1, 1, C]`` of a chunk.

        Masked keys and values are zero, even where the input is NaN.
        """
        k = self.keys.load_tokens(self.inputs.key, c, self.key_heads, self.dtype).mT
        v = self.keys.load_tokens(self.inputs.value, c, self.key_heads, self.dtype)
        mask = self.keys.load_mask(self.inputs.key_mask, c)
        if mask is None:
            return activate(k.contiguous(), self.spec.activation), v, None
        mask = mask[:, None, None, :]
        k = activate(k.masked_fill(~mask, 0), self.spec.activation).masked_fill(~mask, 0)
        return k.contiguous(), v.masked_fill(~mask.mT, 0), mask


def level_queries(t: Tokens) -> tuple[Tokens, Tensor | float]:
    """The same attention with each query's largest feature near 1, and the factor of its gradient.

    A normalised output is a quotient, so a query's features may be multiplied by any number. Where
    features are the activated vectors themselves, this keeps products with small keys in range:
    1e-20 times 1e-20 has few digits in fp32. The second result multiplies the gradient at the
    leveled query, and makes it the gradient at the query.
    """
    spec = t.spec
    if spec.order or not spec.normalize:
        return t, 1.0
    x, finite = t.inputs.query.to(t.dtype) * spec.scale, torch.finfo(t.dtype)

    def scaled(query: Tensor) -> Tokens:
        return t._replace(inputs=t.inputs._replace(query=query), spec=spec._replace(scale=1.0))

    if spec.activation == "elu":  # exp(x) below zero: adding to x multiplies exp(x)
        top = x.amax(-1, keepdim=True).clamp(min=finite.min / 2, max=0)
        return scaled(x - top), spec.scale
    top = (x if spec.activation == "relu" else x.abs()).amax(-1, keepdim=True)
    power = top / (2 * torch.frexp(top).mantissa)  # of two, so that nothing is rounded
    power = power.masked_fill(~(power.isfinite() & (top > 0)), 1).clamp(min=finite.tiny)
    return scaled(x / power), spec.scale / power


def masked_features(features: Expansion, k: Tensor, mask: Tensor | None) -> Tensor:
    """φ(k), zero at masked keys: the constant feature is 1 even for a key of zeros."""
    phi = features.expand(k)
    return phi if mask is None or features.order == 0 else phi * mask


def zero_unseen(spec: AttentionSpec, c: Chunk, x: Tensor, mask: Tensor | None) -> Tensor:
    """Writes zeros in x ``[n,G,M,C]`` at later keys of the chunk, if causal, and at masked keys."""
    if spec.is_causal and c.length > 1:
        x.unflatten(2, (-1, c.length)).tril_()
    return x if mask is None else x.masked_fill_(~mask, 0)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where the denominator is below the smallest normal number.

    Such a query has no keys to attend to, or a denominator that has lost its digits.
    """
    empty = denominator.abs() < torch.finfo(denominator.dtype).tiny
    return (numerator / denominator.masked_fill(empty, 1)[..., None]).masked_fill_(
        empty[..., None], 0
    )


def add_keys(S: Tensor, Z: Tensor | None, n: int, phi: Tensor, v: Tensor) -> None:
    """S += φ v, Z += Σ φ for the first n sequences; phi ``[n,G,F,C]``, v ``[n,G,C,V]``."""
    S[:n].flatten(0, 1).baddbmm_(phi.flatten(0, 1), v.flatten(0, 1))
    if Z is not None:
        Z[:n] += phi.sum(-1)


def initial_sums(t: Tokens, features: Expansion, needed: bool) -> tuple[Tensor, Tensor | None]:
    """The sums before the first token; empty unless `needed`."""
    S, Z = sort_rows(t.inputs.numerator, t.keys), sort_rows(t.inputs.denominator, t.keys)
    if S is None:
        value = t.inputs.value
        shape = (
            (t.keys.batch, t.key_heads, features.size, value.shape[-1]) if needed else (0, 0, 0, 0)
        )
        S = value.new_zeros(shape, dtype=t.dtype)
    if Z is None and t.spec.normalize:
        Z = S.new_zeros(S.shape[:3])
    return S, Z


def sum_all_keys(t: Tokens, features: Expansion) -> tuple[Tensor, Tensor | None]:
    """The sums over all keys, for attention in both directions."""
    S, Z = initial_sums(t, features, needed=True)
    for c in t.keys.chunks:
        k, v, mask = t.load_key_value(c)
        add_keys(S, Z, c.rows, masked_features(features, k, mask), v)
    return S, Z


def _read_sums(phi: Tensor, S: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """φᵀS and φ·Z: phi ``[n,G,F,M]``."""
    return phi.mT @ S, None if Z is None else (Z[:, :, None] @ phi).squeeze(2)


def forward_chunks(t: Tokens) -> AttentionOutputs:
    features, (t, _) = t.expansion(), level_queries(t)
    (query, _, value, *_), S0, wanted = t.inputs, t.inputs.numerator, t.spec.returns_state
    _B, H, T, V = *query.shape[:3], value.shape[-1]
    if T == 1 and S0 is not None and wanted and t.spec.is_causal and t.queries.order is None:
        return _step_token(t, features, S0, t.inputs.denominator)
    out = t.queries.new_buffer(H, T, V, query, t.dtype)
    den = t.queries.new_buffer(H, T, 1, query, t.dtype) if t.spec.normalize else None
    local = t.spec.is_causal or one_block(t)
    if local:
        S, Z = initial_sums(t, features, needed=wanted or len(t.keys.chunks) > 1)
    else:
        S, Z = sum_all_keys(t, features)
    for i, c in enumerate(t.queries.chunks):
        q, n = t.load_query(c), c.rows
        z: Tensor | None
        if local:
            k, v, mask = t.load_key_value(c)
            y, z = _attend_inside(t.spec, features, c, q, k, v, mask)
            if S0 is not None or i > 0:
                y_state, z_state = _read_sums(
                    features.expand(q), S[:n], None if Z is None else Z[:n]
                )
                y = y.add_(y_state)
                z = z.add_(z_state) if z is not None and z_state is not None else None
            if wanted or i + 1 < len(t.queries.chunks):
                add_keys(S, Z, n, masked_features(features, k, mask), v)
        else:
            y, z = _read_sums(features.expand(q), S[:n], None if Z is None else Z[:n])
        if den is not None and z is not None:
            t.queries.store_tokens(den, c, z[..., None])
            y = safe_divide(y, z)
        t.queries.store_tokens(out, c, y)
    den = None if den is None else t.queries.finish_buffer(den)[..., 0].contiguous()
    if not wanted:
        return _make_outputs(t.queries.finish_buffer(out), den, None, None)
    return _make_outputs(
        t.queries.finish_buffer(out),
        den,
        unsort_rows(S, t.keys),
        None if Z is None else unsort_rows(Z, t.keys),
    )


def _make_outputs(
    out: Tensor, den: Tensor | None, S: Tensor | None, Z: Tensor | None
) -> AttentionOutputs:
    """The outputs, with empty tensors in the place of None, as operators return no None."""
    return AttentionOutputs(out, *(out.new_empty(0) if x is None else x for x in (den, S, Z)))


def _step_token(t: Tokens, features: Expansion, S0: Tensor, Z0: Tensor | None) -> AttentionOutputs:
    """One token onto a state: update, then read."""
    (c,) = t.queries.chunks
    q, (k, v, mask) = t.load_query(c), t.load_key_value(c)
    phi = masked_features(features, k, mask)
    S = torch.addcmul(S0.contiguous(), phi, v)
    Z = None if Z0 is None else Z0.contiguous() + phi.squeeze(-1)
    y, z = _read_sums(features.expand(q), S, Z)
    y = y if z is None else safe_divide(y, z)
    shape = t.inputs.query.shape[:3]
    out = y.view(*shape, v.shape[-1]).clone()  # a view could not be changed in place
    return _make_outputs(out, None if z is None else z.view(shape), S, Z)


def one_block(t: Tokens) -> bool:
    """Whether one quadratic block does all the work: short, in both directions, no state."""
    one = len(t.keys.chunks) == 1 and len(t.queries.chunks) == 1
    return one and t.inputs.numerator is None and not t.spec.returns_state and t.keys is t.queries


def _attend_inside(
    spec: AttentionSpec,
    features: Expansion,
    c: Chunk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Numerator and denominator of a chunk's queries over its own keys, by the quadratic form."""
    weights = zero_unseen(spec, c, features.polynomial(q.mT @ k), mask)
    return weights @ v, weights.sum(-1) if spec.normalize else None
