"""Linear and Taylor attention: scores inside a chunk, features and sums across chunks."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ..decay import Decay, decay_sums
from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec
from ..transforms import without_autocast
from .packed import each_sequence

CHUNK = 128


def attention(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    """Outputs and the state after all keys; it has a denominator also without `normalize`."""
    run = partial(_attend, spec=spec)
    with without_autocast(inputs.query):
        if inputs.cu_seqlens is None:
            return run(inputs)
        found: AttentionOutputs = each_sequence(
            run, inputs, ("query", "key", "value", "log_decay"), ("numerator", "denominator")
        )
        return found


def _attend(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    query, key, value, key_mask = inputs.query, inputs.key, inputs.value, inputs.key_mask
    S, Z = inputs.numerator, inputs.denominator
    (B, H, T, _), (G, tokens), V = query.shape, key.shape[1:3], value.shape[3]
    order, constant_term, chunk = spec.order, spec.constant_term, CHUNK
    dtype, hidden = inputs.dtype, None
    q, k, v = (
        _activate(query.to(dtype) * spec.scale, spec.activation),
        key.to(dtype),
        value.to(dtype),
    )
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    k = _activate(k, spec.activation)
    q = q.unflatten(1, (G, H // G))
    fresh, features = S is None, _expand(k[:, :, :0], order, constant_term).shape[-1]
    S = k.new_zeros(B, G, features, V) if S is None else S
    Z = k.new_zeros(B, G, features) if Z is None else Z

    def seen(x: Tensor, at: slice) -> Tensor:
        return x if hidden is None else x.masked_fill(hidden[:, :, at], 0)

    def joined(
        S: Tensor, Z: Tensor, at: slice, decay: Decay | None = None
    ) -> tuple[Tensor, Tensor]:
        phi = seen(_expand(k[:, :, at], order, constant_term), at)
        if decay is not None:
            S, Z = decay_sums(S, decay.whole()), decay_sums(Z, decay.whole())
            phi = phi * decay.to_end()[..., None]
        return S + phi.mT @ v[:, :, at], Z + phi.sum(2)

    if not spec.is_causal:
        for start in range(0, tokens, chunk):
            S, Z = joined(S, Z, slice(start, start + chunk))
    outs = [query.new_zeros(B, H, 0, V)]
    for start in range(0, T, chunk):
        at = slice(start, start + chunk)
        decay = _load_decay(inputs, at)
        part = q[:, :, :, at]
        y, z = k.new_zeros(()), k.new_zeros(())
        if spec.is_causal:
            weights = _polynomial(part @ k[:, :, None, at].mT, order, constant_term)
            weights = weights.tril()
            if hidden is not None:
                weights = weights.masked_fill(hidden[:, :, None, at].mT, 0)
            if decay is not None:
                weights = weights * decay.between()[:, :, None]
            y, z = weights @ v[:, :, None, at], weights.sum(-1)
        if not spec.is_causal or start or not fresh:
            phi = _expand(part, order, constant_term)
            if decay is not None:
                phi = phi * decay.from_start(phi.shape[-2])[:, :, None, :, None]
            # Sums that decay are in fp64.
            y = y + phi @ S[:, :, None].to(dtype)
            z = z + (phi @ Z[:, :, None, :, None].to(dtype)).squeeze(-1)
        if spec.is_causal:
            S, Z = joined(S, Z, at, decay)
        outs.append((_divide(y, z) if spec.normalize else y).flatten(1, 2).to(query.dtype))
    return AttentionOutputs(torch.cat(outs, 2), k.new_empty(0), S.to(dtype), Z.to(dtype))


def _load_decay(inputs: AttentionInputs, at: slice) -> Decay | None:
    """The decays of a chunk, None without."""
    if inputs.log_decay is None:
        return None
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, at]
    return Decay.from_logs(inputs.log_decay[:, :, at], mask, inputs.dtype)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is zero: nothing to attend to."""
    empty = (denominator == 0)[..., None]
    return (numerator / denominator[..., None].masked_fill(empty, 1)).masked_fill(empty, 0)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "elu":
        # the slope at 0 is 1 in every version of PyTorch; that of clamp there is 0 from 2.14 on
        return torch.where(x > 0, x + 1, x.masked_fill(x > 0, 0).exp())
    return x.relu() if activation == "relu" else x


def _polynomial(x: Tensor, order: int, constant_term: bool) -> Tensor:
    """Σ_p x^p / p!, by Horner's rule."""
    if order == 0:
        return x
    y = x / order
    for p in range(order - 1, 0, -1):
        y = (y + 1) * x / p
    return y + 1 if constant_term else y


@lru_cache(maxsize=64)
def _monomials(dim: int, degree: int) -> tuple[list[int], list[int], list[float]]:
    """Parent, last factor and weight 1 / sqrt(Π m_i!) of a degree's monomials, in order."""
    lower = {m: i for i, m in enumerate(combinations_with_replacement(range(dim), degree - 1))}
    found = list(combinations_with_replacement(range(dim), degree))
    weights = [1 / math.sqrt(math.prod(math.factorial(m.count(i)) for i in set(m))) for m in found]
    return [lower[m[:-1]] for m in found], [m[-1] for m in found], weights


def _expand(x: Tensor, order: int, constant_term: bool) -> Tensor:
    """``[..., K]`` -> Taylor features ``[..., F]``; the identity for order 0."""
    if order == 0:
        return x
    parts, monomials = [torch.ones_like(x[..., :1])] if constant_term else [], x
    for degree in range(1, order + 1):
        if degree > 1:
            parents, lasts, weights = _monomials(x.shape[-1], degree)
            index = [torch.tensor(i, device=x.device) for i in (parents, lasts)]
            monomials = monomials.index_select(-1, index[0]) * x.index_select(-1, index[1])
            parts.append(monomials * torch.tensor(weights, dtype=x.dtype, device=x.device))
        else:
            parts.append(x)
    return torch.cat(parts, -1)
