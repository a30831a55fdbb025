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

from ..decay import Decay, decay_sums
from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec
from .features import Expansion, activate, activate_vjp
from .layout import Chunk, Dense, Packed, sort_rows, unsort_rows

PART = 256  # features that are added up together: longer sums round more


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

    def load_decay(self, c: Chunk, mask: Tensor | None) -> Decay | None:
        """The decays of a chunk, None without. mask: as of `load_key_value`."""
        logs = self.inputs.log_decay
        if logs is None:
            return None
        logs = self.keys.load_tokens(logs[..., None], c, self.key_heads, torch.float64)[..., 0]
        return Decay.from_logs(logs, mask, self.dtype)


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


def multiply_heads(x: Tensor, factors: Tensor) -> Tensor:
    """x ``[n,G,M,C]`` times factors ``[n,G,C,C]``, the same for every query head, in place."""
    x.unflatten(2, (-1, factors.shape[2])).mul_(factors[:, :, None])
    return x


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where the denominator is below the smallest normal number.

    Such a query has no keys to attend to, or a denominator that has lost its digits.
    """
    empty = denominator.abs() < torch.finfo(denominator.dtype).tiny
    return (numerator / denominator.masked_fill(empty, 1)[..., None]).masked_fill_(
        empty[..., None], 0
    )


def add_keys(
    S: Tensor, Z: Tensor | None, n: int, phi: Tensor, v: Tensor, decay: Decay | None = None
) -> None:
    """S += φ v, Z += Σ φ for the first n sequences; phi ``[n,G,F,C]``, v ``[n,G,C,V]``.

    With decay, S and Z decay by the whole chunk first, and a key by the tokens after it.
    """
    if decay is not None:
        decay_rows(S, Z, n, decay)
        phi = phi * decay.to_end()[:, :, None]
    add_products(S[:n], phi, v)
    if Z is not None:
        Z[:n] += phi.sum(-1)


def sum_features(phi: Tensor, S: Tensor) -> Tensor:
    """φᵀS, ``[n,G,F,M]`` and ``[n,G,F,V]`` -> ``[n,G,M,V]``, by parts of the features."""
    y = phi[:, :, :PART].mT @ S[:, :, :PART]
    for begin in range(PART, phi.shape[2], PART):
        y += phi[:, :, begin : begin + PART].mT @ S[:, :, begin : begin + PART]
    return y


def add_products(S: Tensor, phi: Tensor, y: Tensor) -> None:
    """S += φ y, in S's dtype: sums that decay are in fp64."""
    if S.dtype == phi.dtype:
        S.flatten(0, 1).baddbmm_(phi.flatten(0, 1), y.flatten(0, 1))
    else:
        S += phi @ y


def decay_rows(S: Tensor, Z: Tensor | None, n: int, decay: Decay) -> None:
    """Multiplies the sums of the first n sequences by the decay of a whole chunk, in place."""
    S[:n] = decay_sums(S[:n], decay.whole())
    if Z is not None:
        Z[:n] = decay_sums(Z[:n], decay.whole())


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
    if t.inputs.log_decay is not None:
        S, Z = S.double(), None if Z is None else Z.double()
    return S, Z


def sum_all_keys(t: Tokens, features: Expansion) -> tuple[Tensor, Tensor | None]:
    """The sums over all keys, for attention in both directions."""
    S, Z = initial_sums(t, features, needed=True)
    for c in t.keys.chunks:
        k, v, mask = t.load_key_value(c)
        add_keys(S, Z, c.rows, masked_features(features, k, mask), v)
    return S, Z


def _read_sums(
    phi: Tensor, S: Tensor, Z: Tensor | None, decay: Decay | None = None
) -> tuple[Tensor, Tensor | None]:
    """φᵀS and φ·Z: phi ``[n,G,F,M]``. With decay, sums from before the chunk."""
    y = sum_features(phi, S.to(phi.dtype))
    z = None if Z is None else sum_features(phi, Z[..., None].to(phi.dtype)).squeeze(3)
    if decay is None:
        return y, z
    kept = decay.from_start(phi.shape[-1])
    return y.mul_(kept[..., None]), None if z is None else z.mul_(kept)


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
            decay = t.load_decay(c, mask)
            y, z = _attend_inside(t.spec, features, c, q, k, v, mask, decay)
            if S0 is not None or i > 0:
                y_state, z_state = _read_sums(
                    features.expand(q), S[:n], None if Z is None else Z[:n], decay
                )
                y = y.add_(y_state)
                z = z.add_(z_state) if z is not None and z_state is not None else None
            if wanted or i + 1 < len(t.queries.chunks):
                add_keys(S, Z, n, masked_features(features, k, mask), v, decay)
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
        unsort_rows(S.to(t.dtype), t.keys),
        None if Z is None else unsort_rows(Z.to(t.dtype), t.keys),
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
    S, Z = S0.contiguous(), None if Z0 is None else Z0.contiguous()
    if (decay := t.load_decay(c, mask)) is not None:
        S = decay_sums(S, decay.whole())
        Z = None if Z is None else decay_sums(Z, decay.whole())
    S = torch.addcmul(S, phi.to(S.dtype), v.to(S.dtype)).to(t.dtype)
    Z = None if Z is None else (Z + phi.squeeze(-1)).to(t.dtype)
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
    decay: Decay | None,
) -> tuple[Tensor, Tensor | None]:
    """Numerator and denominator of a chunk's queries over its own keys, by the quadratic form."""
    weights = zero_unseen(spec, c, features.polynomial(q.mT @ k), mask)
    if decay is not None:
        multiply_heads(weights, decay.between())
    return weights @ v, weights.sum(-1) if spec.normalize else None
