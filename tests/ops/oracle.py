"""The exact output of each case in float64, written from the formula alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import cumulant as cm

from .cases import Case, elita_logits, linear_part, log_decays


def oracle(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The definition, one batch row, head and query at a time, over the keys it may see."""
    q, k, v = q.double(), k.double(), v.double()
    H, G = q.shape[1], k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(H):
            keys, values = k[b, h // (H // G)], v[b, h // (H // G)]
            for i in range(q.shape[2]):
                seen = (
                    torch.ones(len(keys), dtype=torch.bool)
                    if key_mask is None
                    else key_mask[b].clone()
                )
                if is_causal:
                    seen[i + 1 :] = False
                if case.op is cm.mixed_chunk_attention:
                    out[b, h, i] = _mixed(case, q[b, h], keys, values, h, i, seen, is_causal)
                elif case.op is cm.elita_attention:
                    out[b, h, i] = _elita(case, q[b, h, i], keys, values, i, seen)
                elif case.op is cm.gated_attention:
                    bias = case.bias(q, k.shape[2]).get("bias")
                    row = None if bias is None else bias[h, i, seen]
                    out[b, h, i] = _gated(case, q[b, h, i], keys[seen], values[seen], row)
                elif seen.any():
                    factors = _decays(keys[seen]) if case.decays else None
                    out[b, h, i] = _attend(case, q[b, h, i], keys[seen], values[seen], factors)
    return out


def _decays(keys: Tensor) -> Tensor:
    """The decay of each key: the product over the keys after it."""
    logs = log_decays(keys)
    return torch.stack([logs[j + 1 :].sum().exp() for j in range(len(logs))])


def _elita(case: Case, q: Tensor, keys: Tensor, values: Tensor, i: int, seen: Tensor) -> Tensor:
    """The softmax of row i over the keys up to i, and over the token itself once more."""
    c, r, s = elita_logits(case, q[None], keys)
    logits, chosen = (c + r)[seen], values[seen]
    if seen[i]:
        logits, chosen = torch.cat((logits, s)), torch.cat((chosen, values[i : i + 1]))
    if len(logits) == 0:
        return torch.zeros_like(values[0])
    weights = (logits - logits.max()).exp()
    return weights @ chosen / weights.sum()


def _weight(case: Case, x: Tensor) -> Tensor:
    if case.options.get("activation", "relu2") == "relu2":
        return torch.where(x > 0, x * x, 0)
    y = (math.sqrt(0.5) - x) * math.sqrt(
        2 * math.pi
    )  # torch.special.ndtr is zero where this is still 1e-17
    return torch.tensor([math.erfc(z) / 2 for z in y.flatten().tolist()], dtype=torch.float64).view(
        x.shape
    )


def _gated(case: Case, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    scores = keys @ q / case.options.get("length_scale", max(len(keys), 1))
    return _weight(case, scores if bias is None else scores + bias) @ values


def _mixed(
    case: Case,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    h: int,
    i: int,
    seen: Tensor,
    is_causal: bool,
) -> Tensor:
    """The output at query i, token by token; masked tokens do not count."""
    tokens = seen.nonzero()[:, 0].tolist()
    out = torch.zeros_like(values[0])
    if i not in tokens:
        return out
    g, bias, at = (
        case.options["group_size"],
        case.bias(q.expand(1, h + 1, *q.shape), 8).get("bias"),
        tokens.index(i),
    )
    lin_query, lin_key = linear_part(q, keys)
    for place, j in enumerate(tokens):
        if place // g == at // g:
            x = q[i] @ keys[j] / g + (0 if bias is None else bias[h, at % g, place % g])
            out = out + _weight(case, x) * values[j]
        if is_causal and place // g < at // g:
            out = out + (lin_query[i] @ lin_key[j]) * values[j] / g
        if not is_causal and (
            case.options.get("reduce_group_non_causal_attn", True) or place // g == at // g
        ):
            out = out + (lin_query[i] @ lin_key[j]) * values[j] / len(tokens)
    return out


def _attend(
    case: Case, q: Tensor, keys: Tensor, values: Tensor, decays: Tensor | None = None
) -> Tensor:
    options, decays = case.options, torch.ones(()) if decays is None else decays
    if case.op is cm.taylor_attention:
        x = (keys @ q) * options.get("scale", 1 / math.sqrt(len(q)))
        terms = [x**p / math.factorial(p) for p in range(options.get("order", 2) + 1)]
        weights = torch.stack(terms if options.get("constant_term", True) else terms[1:]).sum(0)
        weights = weights * decays
        return weights @ values / weights.sum()
    q = q * options.get("scale", 1.0)
    name = options.get("feature_map", "elu")
    if name == "softmax" and not options.get("normalize", True):
        return torch.softmax(q, -1) @ (keys.exp().T @ values)
    if (
        name == "softmax"
    ):  # a softmax over tokens in each feature, mixed by the query's softmax over features
        return torch.softmax(q, -1) @ (torch.softmax(keys, 0).T @ values)
    phi = {
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: x.clamp(min=0),
        "identity": lambda x: x,
    }.get(name, name)
    phi_q, phi_k = phi if isinstance(phi, tuple) else (phi, phi)
    weights = phi_k(keys) @ phi_q(q) * decays
    total = weights.sum()
    if options.get("normalize", True):
        return weights @ values / total if total != 0 else torch.zeros_like(values[0])
    return weights @ values
