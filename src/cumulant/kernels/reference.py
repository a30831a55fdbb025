"""References: the quadratic form and the token-by-token recurrence, as the formulas stand, differentiable.

Every other implementation is tested against these; none imports them. They are slow and hold T x S weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement, pairwise

import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]
Similarity = Callable[[Tensor, Tensor], Tensor]
Sums = tuple[Tensor, Tensor | None]  # numerator [B,G,F,V], denominator [B,G,F]


def taylor_similarity(order: int, constant_term: bool) -> Similarity:
    """Σ_p (q·k)^p / p! for p from 0 (or 1) to `order`; ``[..., T, K]``, ``[..., S, K]`` -> ``[..., T, S]``."""

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        x = q @ k.mT
        first = 0 if constant_term else 1
        return torch.stack([x**p / math.factorial(p) for p in range(first, order + 1)]).sum(0)

    return similarity


def taylor_features(order: int, constant_term: bool) -> Features:
    """Distinct monomials up to `order`, each times sqrt(multinomial(m) / p!) so that φ(q)·φ(k) is the Taylor sum."""

    def features(x: Tensor) -> Tensor:
        columns = []
        for p in range(0 if constant_term else 1, order + 1):
            for monomial in combinations_with_replacement(range(x.shape[-1]), p):
                multinomial = math.factorial(p)
                for i in set(monomial):
                    multinomial //= math.factorial(monomial.count(i))
                weight = math.sqrt(multinomial / math.factorial(p))
                columns.append(weight * x[..., list(monomial)].prod(-1))
        return torch.stack(columns, -1)

    return features


def dot_similarity(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


def quadratic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    similarity: Similarity,
    features: Features,
    normalize: bool,
    is_causal: bool,
    key_mask: Tensor | None = None,
    state: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """Weights of every query on every key, then their (normalised) sum of values, in fp32 (fp64 for fp64)."""
    groups = query.shape[1] // key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    seen = k.new_ones(k.shape[0], 1, k.shape[2], dtype=torch.bool) if key_mask is None else key_mask[:, None]
    k, v = k.masked_fill(~seen[..., None], 0), v.masked_fill(~seen[..., None], 0)
    phi_k = features(k).masked_fill(~seen[..., None], 0)
    total = phi_k.mT @ v, phi_k.sum(-2) if normalize else None
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    weights = similarity(q, k).masked_fill(~seen[:, :, None], 0)
    if is_causal:
        weights = weights.tril()
    numerator, denominator = weights @ v, weights.sum(-1)
    if state is not None:
        phi_q = features(q)
        numerator = numerator + phi_q @ state[0].repeat_interleave(groups, 1)
        if state[1] is not None:
            denominator = denominator + (phi_q @ state[1].repeat_interleave(groups, 1)[..., None])[..., 0]
            total = total[0], None if total[1] is None else total[1] + state[1]
        total = total[0] + state[0], total[1]
    out = _divide(numerator, denominator) if normalize else numerator
    return out.to(query.dtype), total


def recurrent_attention(
    query: Tensor, key: Tensor, value: Tensor, *, features: Features, normalize: bool, state: Sums | None = None
) -> tuple[Tensor, Sums]:
    """The causal form as a recurrence: S += φ(k) vᵀ, z += φ(k), out = φ(q)ᵀS / φ(q)ᵀz, one token after another."""
    groups = query.shape[1] // key.shape[1]
    phi_q, phi_k = features(query), features(key)
    S = phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[-1], value.shape[-1]) if state is None else state[0]
    z = phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[-1]) if state is None or state[1] is None else state[1]
    outputs = []
    for t in range(query.shape[2]):
        S = S + phi_k[:, :, t, :, None] * value[:, :, t, None, :]
        z = z + phi_k[:, :, t]
        numerator = torch.einsum("bhf,bhfv->bhv", phi_q[:, :, t], S.repeat_interleave(groups, 1))
        denominator = torch.einsum("bhf,bhf->bh", phi_q[:, :, t], z.repeat_interleave(groups, 1))
        outputs.append(_divide(numerator, denominator) if normalize else numerator)
    out = torch.stack(outputs, 2) if outputs else value.new_zeros(*query.shape[:3], value.shape[-1])
    return out, (S, z if normalize else None)


def packed(
    attend: Callable[..., tuple[Tensor, Sums]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    key_mask: Tensor | None = None,
    state: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """Each packed sequence by itself; rows after the last one are zero."""
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for i, (a, b) in enumerate(pairwise(bounds)):
        rows = slice(a, b)
        initial = None if state is None else tuple(None if s is None else s[i : i + 1] for s in state)
        mask = None if key_mask is None else key_mask[:, rows]
        out, total = attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], key_mask=mask, state=initial)
        outputs.append(out)
        states.append(total)
    slack = query.shape[2] - (bounds[-1] if bounds else 0)
    outputs.append(value.new_zeros(1, query.shape[1], slack, value.shape[-1]))
    numerator = torch.cat([s[0] for s in states])
    denominators = [s[1] for s in states if s[1] is not None]
    return torch.cat(outputs, 2), (numerator, torch.cat(denominators) if denominators else None)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Plain division; zero where the denominator is zero (nothing to attend to)."""
    empty = denominator == 0
    return torch.where(empty[..., None], 0, numerator / torch.where(empty, 1, denominator)[..., None])
