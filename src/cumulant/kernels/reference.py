"""References: the quadratic form and the token-by-token recurrence, as the formulas stand,
differentiable.

Every other implementation is tested against these; none imports them. They are slow and hold T x S
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement, pairwise

import torch
from torch import Tensor

from .decay import decay_state, pair_decays
from .transforms import product

Features = Callable[[Tensor], Tensor]
Similarity = Callable[[Tensor, Tensor], Tensor]
Sums = tuple[Tensor, Tensor | None]  # numerator [B,G,F,V], denominator [B,G,F]


def taylor_similarity(order: int, constant_term: bool) -> Similarity:
    """Σ_p (q·k)^p / p! for p from 0 (or 1) to `order`; ``[..., T, K]``, ``[..., S, K]`` ->
    ``[..., T, S]``.
    """

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        x = product(q, k.mT)
        first = 0 if constant_term else 1
        return torch.stack([x**p / math.factorial(p) for p in range(first, order + 1)]).sum(0)

    return similarity


def _weight(monomial: tuple[int, ...]) -> float:
    """sqrt(multinomial / p!) of x_i x_j ..., given as (i, j, ...)."""
    orders = math.prod(math.factorial(monomial.count(i)) for i in set(monomial))
    return math.sqrt(1 / orders)


def taylor_features(order: int, constant_term: bool) -> Features:
    """Distinct monomials up to `order`, each times sqrt(multinomial(m) / p!) so that φ(q)·φ(k) is
    the Taylor sum.
    """

    def features(x: Tensor) -> Tensor:
        columns = []
        for p in range(0 if constant_term else 1, order + 1):
            monomials = list(combinations_with_replacement(range(x.shape[-1]), p))
            index = torch.tensor(monomials, dtype=torch.int64, device=x.device).view(
                len(monomials), p
            )
            columns.append(x[..., index].prod(-1) * x.new_tensor([_weight(m) for m in monomials]))
        return torch.cat(columns, -1)

    return features


def dot_similarity(q: Tensor, k: Tensor) -> Tensor:
    return product(q, k.mT)


def level_features(features: Features, exponential: bool) -> Features:
    """`features` of queries, each query's times a number that brings its largest near 1: quotients
    of sums are the same, and 1e-20 times 1e-20 has few digits in fp32.

    exponential: exp(x) below zero, so that the number is added to x.
    """

    def leveled(x: Tensor) -> Tensor:
        if exponential:
            return features(
                x
                - x.detach()
                .amax(-1, keepdim=True)
                .clamp_max(0.0)
                .clamp_min(torch.finfo(x.dtype).min / 2)
            )
        top = x.detach().abs().amax(-1, keepdim=True)
        return features(x / top.where((top > 0) & (top < math.inf), 1))

    return leveled


def quadratic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    similarity: Similarity,
    features: Features,
    query_features: Features | None = None,
    normalize: bool,
    is_causal: bool,
    key_mask: Tensor | None = None,
    state: Sums | None = None,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """Weights of every query on every key, then their (normalised) sum of values, in fp32 (fp64 for
    fp64).
    query_features: where they differ from the keys'."""
    groups = query.shape[1] // key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    seen = (
        k.new_ones(k.shape[0], 1, k.shape[2], dtype=torch.bool)
        if key_mask is None
        else key_mask[:, None]
    )
    k, v = k.masked_fill(~seen[..., None], 0), v.masked_fill(~seen[..., None], 0)
    phi_k = features(k).masked_fill(~seen[..., None], 0)
    decays = None if log_decay is None or not key.shape[2] else pair_decays(log_decay, key_mask)
    kept = phi_k if decays is None else phi_k * decays[:, :, -1:, 1:].mT.to(dtype)
    total = product(kept.mT, v), kept.sum(-2) if normalize else None
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    weights = similarity(q, k).masked_fill(~seen[:, :, None], 0)
    if is_causal:
        weights = weights.tril()
    if decays is not None:
        weights = weights * decays[..., 1:].to(dtype).repeat_interleave(groups, 1)
    numerator, denominator = product(weights, v), weights.sum(-1)
    if state is not None:
        phi_q = (query_features or features)(q)
        S, z = state
        last: Tensor | None = None
        if decays is not None:
            since = decays[..., :1].to(dtype)
            phi_q, last = phi_q * since.repeat_interleave(groups, 1), since[:, :, -1, 0]
        numerator = numerator + product(phi_q, S.repeat_interleave(groups, 1))
        total = total[0] + decay_state(S, last), total[1]
        if z is not None:
            by_head = z.repeat_interleave(groups, 1)[..., None]
            denominator = denominator + product(phi_q, by_head)[..., 0]
            total = total[0], None if total[1] is None else total[1] + decay_state(z, last)
    out = _divide(numerator, denominator) if normalize else numerator
    return out.to(query.dtype), total


def recurrent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    features: Features,
    normalize: bool,
    state: Sums | None = None,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """The causal form as a recurrence: S += φ(k) vᵀ, z += φ(k), out = φ(q)ᵀS / φ(q)ᵀz, one token
    after another.
    """
    groups = query.shape[1] // key.shape[1]
    phi_q, phi_k = features(query), features(key)
    S = (
        phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[-1], value.shape[-1])
        if state is None
        else state[0]
    )
    z = (
        phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[-1])
        if state is None or state[1] is None
        else state[1]
    )
    outputs = []
    for t in range(query.shape[2]):
        if log_decay is not None:
            factor = log_decay[:, :, t].to(S.dtype).exp()
            S, z = S * factor[..., None, None], z * factor[..., None]
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
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """Each packed sequence by itself; rows after the last one are zero."""
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for i, (a, b) in enumerate(pairwise(bounds)):
        rows = slice(a, b)
        initial = (
            None if state is None else tuple(None if s is None else s[i : i + 1] for s in state)
        )
        mask = None if key_mask is None else key_mask[:, rows]
        more = {} if log_decay is None else {"log_decay": log_decay[:, :, rows]}
        tokens = (x[:, :, rows] for x in (query, key, value))
        out, total = attend(*tokens, key_mask=mask, state=initial, **more)
        outputs.append(out)
        states.append(total)
    slack = query.shape[2] - (bounds[-1] if bounds else 0)
    outputs.append(value.new_zeros(1, query.shape[1], slack, value.shape[-1]))
    numerator = torch.cat([s[0] for s in states])
    denominators = [s[1] for s in states if s[1] is not None]
    return torch.cat(outputs, 2), (numerator, torch.cat(denominators) if denominators else None)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Plain division; zero where the denominator is below the smallest normal number (nothing to
    attend to).
    """
    empty = denominator.abs() < torch.finfo(denominator.dtype).tiny
    return torch.where(
        empty[..., None], 0, numerator / torch.where(empty, 1, denominator)[..., None]
    )


def gated_weight(name: str) -> Callable[[Tensor], Tensor]:
    """relu², or the Laplace function ½ (1 + erf((x - √½) / (σ √2))), σ² = 1 / (4π)."""
    if name == "relu2":
        return lambda x: x.relu() ** 2
    sigma = math.sqrt(1 / (4 * math.pi))
    return lambda x: (
        torch.erfc((math.sqrt(0.5) - x) / (sigma * math.sqrt(2))) / 2
    )  # 1 + erf(-y) = erfc(y)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str,
    scale: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    dropout_p: float = 0.0,
) -> Tensor:
    """f(scale · q kᵀ + bias) v; scale ``[B or 1, T or 1]``, bias broadcast to ``[B, H, T, S]``."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = product(q * scale[:, None, :, None], k.mT)
    weights = gated_weight(activation)(scores if bias is None else scores + bias.to(dtype))
    if is_causal:
        weights = weights.tril(k.shape[2] - q.shape[2])
    return product(torch.nn.functional.dropout(weights, dropout_p), v).to(query.dtype)


def sliding_window_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, key_mask: Tensor | None = None
) -> Tensor:
    """softmax(q·k / √K) over the query's own token and the window - 1 tokens before it; masked ones
    do not count, and get zeros. ``[B, H, T, K]``, ``[B, G, T, K]``, ``[B, G, T, V]`` ->
    ``[B, H, T, V]``."""
    (B, _, T, K), groups = query.shape, query.shape[1] // key.shape[1]
    seen = query.new_ones(B, T, dtype=torch.bool) if key_mask is None else key_mask
    hidden = ~seen[:, None, :, None]
    q, k, v = (x.masked_fill(hidden, 0) for x in (query, key, value))
    place = seen.cumsum(1)  # of each token among those that count
    ahead = place[:, :, None] - place[:, None]
    visible = (ahead >= 0) & (ahead < window) & seen[:, None] & seen[:, :, None]
    scores = product(q, k.repeat_interleave(groups, 1).mT) / math.sqrt(K)
    weights = _softmax(scores.masked_fill(~visible[:, None], -math.inf))
    return product(weights, v.repeat_interleave(groups, 1))


MixedSums = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # sums [B,G,K,V]; of the open group quad_key, lin_key, value [B,G,g,·]


def mixed_chunk_attention(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    *,
    activation: str,
    group_size: int,
    is_causal: bool,
    reduce_groups: bool,
    bias: Tensor | None,
    key_mask: Tensor | None = None,
    state: MixedSums | None = None,
    position: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, MixedSums]:
    """T x T weights: quadratic ones inside a group, linear ones on earlier groups or everywhere.

    The linear ones are on earlier groups if causal. Groups count tokens from `position` ``[B]`` on,
    without masked tokens.
    """
    (B, _, T, _), groups, g = quad_query.shape, quad_query.shape[1] // quad_key.shape[1], group_size
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    seen = value.new_ones(B, T, dtype=torch.bool) if key_mask is None else key_mask
    start = seen.new_zeros(B, dtype=torch.int64) if position is None else position
    place = start[:, None] + seen.cumsum(1) - 1
    keys = [x.to(dtype).masked_fill(~seen[:, None, :, None], 0) for x in (quad_key, lin_key, value)]
    queries = [x.to(dtype).masked_fill(~seen[:, None, :, None], 0) for x in (quad_query, lin_query)]
    key_place, exists = place, seen
    if state is not None:  # the open group's tokens come first
        slot = torch.arange(g, device=value.device).expand(B, g)
        keys = [torch.cat((x, y), 2) for x, y in zip(state[1:], keys, strict=True)]
        key_place = torch.cat(((start - start % g)[:, None] + slot, place), 1)
        exists = torch.cat((slot < (start % g)[:, None], seen), 1)
    group, key_group = place.div(g, rounding_mode="floor"), key_place.div(g, rounding_mode="floor")
    inside = (
        (group[:, :, None] == key_group[:, None]) & exists[:, None] & seen[:, :, None]
    )  # [B, T, S]
    k, lk, v = (x.repeat_interleave(groups, 1) for x in keys)
    scores = product(queries[0], k.mT) / g
    if bias is not None:
        rows, columns = (place % g)[:, :, None], (key_place % g)[:, None]
        scores = scores + bias.to(dtype)[:, rows, columns].transpose(0, 1)
    weights = gated_weight(activation)(scores)
    if is_causal:
        inside = inside & (key_place[:, None] <= place[:, :, None])
    weights = torch.nn.functional.dropout(weights.where(inside[:, None], 0), dropout_p)
    linear = product(queries[1], lk.mT)
    if is_causal:
        across, divisor = (
            (key_group[:, None] < group[:, :, None]) & exists[:, None] & seen[:, :, None],
            float(g),
        )
    else:
        across = inside if not reduce_groups else exists[:, None] & seen[:, :, None]
        divisor = seen.sum(1).clamp(min=1)[:, None, None, None]  # type: ignore[assignment]
    weights = weights + (linear / divisor).where(across[:, None], 0)
    out = product(weights, v)
    if state is not None:
        out = out + product(queries[1], state[0].repeat_interleave(groups, 1)) / g
    closed = (key_group < (start + seen.sum(1)).div(g, rounding_mode="floor")[:, None]) & exists
    sums, *rest = _mixed_state(keys, closed, exists & ~closed, key_place % g, g)
    sums = sums if state is None else sums + state[0]
    return out.to(value.dtype), (sums, rest[0], rest[1], rest[2])


def _mixed_state(
    keys: list[Tensor], closed: Tensor, still_open: Tensor, slot: Tensor, g: int
) -> list[Tensor]:
    """The sums over tokens of whole groups, and the open group's tokens in their slots."""
    sums = product((keys[1] * closed[:, None, :, None]).mT, keys[2])
    # one-hot rows [B, g, S] carry each token of the open group to its slot
    slots = slot[:, None] == torch.arange(g, device=slot.device)[:, None]
    slots = slots & still_open[:, None]
    return [sums, *(product(slots[:, None].to(keys[0].dtype), x) for x in keys)]


def elita_attention(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The softmax of each row, in fp64: over r_i + m₀ of the state, r_i + c_j of the keys up to i,
    and s_i of the token itself, with values u₀, v_j and v_i."""
    (B, G, T, _), groups = value.shape, query_logit.shape[1] // value.shape[1]
    seen = value.new_ones(B, T, dtype=torch.bool) if key_mask is None else key_mask
    c, r, s = (x.double() for x in (key_logit, query_logit, self_logit))
    c, s = (x.masked_fill(~seen[:, None], -math.inf) for x in (c, s))
    r, v = r.masked_fill(~seen[:, None], 0), value.double().masked_fill(~seen[:, None, :, None], 0)
    nothing = c.new_full((B, G), -math.inf), v.new_zeros(B, G, v.shape[-1])
    past = nothing if state is None else state
    keys, values = torch.cat((past[0][..., None], c), -1), torch.cat((past[1][:, :, None], v), 2)
    each = keys.repeat_interleave(groups, 1)[:, :, None] + r[..., None]  # [B, H, T, 1 + T]
    each = each.masked_fill(each.new_ones(T, T + 1, dtype=torch.bool).triu(2), -math.inf)
    weights = _softmax(torch.cat((each, s[..., None]), -1))
    out = weights[..., :-1] @ values.repeat_interleave(groups, 1)
    out = out + weights[..., -1:] * v.repeat_interleave(groups, 1)
    mean = (_softmax(keys)[:, :, None] @ values)[:, :, 0].clone()
    return out.to(value.dtype), (_logsumexp(keys), mean)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dim; zeros for a row of nothing but -inf, and gradients too."""
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _logsumexp(logits: Tensor) -> Tensor:
    """Over the last dim; -inf for a row of nothing but -inf, with gradients of zero."""
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
