"""Dense float64 forms of every operation, from the formulas alone: differentiable, stateless.

They import nothing that they are an oracle for, and hold ``[B, H, T, S]`` weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def visible(
    B: int, T: int, S: int, is_causal: bool, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """``[B, T, S]``: True where query i may see key j."""
    seen = torch.ones(B, T, S, dtype=torch.bool)
    if is_causal:
        seen = seen.tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None]
    if cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(T), cu_seqlens, right=True)
        inside = sequence <= len(cu_seqlens) - 1
        seen = seen & (sequence[:, None] == sequence) & inside
    return seen


def spread(x: Tensor, H: int) -> Tensor:
    """Repeats each key head for every query head that reads it."""
    return x.repeat_interleave(H // x.shape[1], 1)


def weighted(weights: Tensor, v: Tensor, normalize: bool) -> Tensor:
    out = weights @ v
    if not normalize:
        return out
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, out / torch.where(total == 0, 1, total))


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    feature_map: str,
    scale: float,
    normalize: bool,
) -> Tensor:
    H = q.shape[1]
    k, v, q = spread(k, H), spread(v, H), q * scale
    if feature_map == "softmax":
        phi_q = q.softmax(-1)
        each = torch.einsum("bhtf,bts,bhsf->bhtsf", phi_q, seen.double(), k.exp())
        if normalize:  # a softmax over the keys that a query sees, in each feature
            total = torch.einsum("bts,bhsf->bhtf", seen.double(), k.exp())[:, :, :, None]
            each = each / torch.where(total == 0, 1, total)
        return each.sum(-1) @ v
    maps = {
        "elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
        "relu": lambda x: x.clamp(min=0),
        "identity": lambda x: x,
    }
    weights = maps[feature_map](q) @ maps[feature_map](k).mT
    return weighted(weights * seen[:, None], v, normalize)


def taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    order: int,
    scale: float | None,
    constant_term: bool,
) -> Tensor:
    H = q.shape[1]
    x = (q @ spread(k, H).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = sum(
        (x**p / math.factorial(p) for p in range(1, order + 1)),
        torch.full_like(x, float(constant_term)),
    )
    return weighted(weights * seen[:, None], spread(v, H), True)


def elita(c: Tensor, r: Tensor, s: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """A masked token, or one behind the last sequence, has no term of its own either."""
    H, T = r.shape[1], r.shape[2]
    logits = (spread(c, H)[:, :, None] + r[..., None]).masked_fill(~seen[:, None], -math.inf)
    alone = s.masked_fill(~seen.diagonal(dim1=1, dim2=2)[:, None], -math.inf)
    rows = torch.cat((logits, alone[..., None]), -1)
    empty = (rows == -math.inf).all(-1, keepdim=True)
    weights = rows.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights[..., :T] @ spread(v, H) + weights[..., T:] * spread(v, H)


def activate(x: Tensor, name: str) -> Tensor:
    if name == "relu2":
        return x.clamp(min=0).square()
    return torch.special.erfc((math.sqrt(0.5) - x) * math.sqrt(2 * math.pi)) / 2


def gated(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, activation: str, length_scale: float | None
) -> Tensor:
    H = q.shape[1]
    n = seen.sum(-1).clamp(min=1)[:, None, :, None] if length_scale is None else length_scale
    weights = activate(q @ spread(k, H).mT / n, activation) * seen[:, None]
    return weights @ spread(v, H)


def mixed_chunk(
    q: Tensor,
    k: Tensor,
    r: Tensor,
    s: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    group_size: int,
    activation: str,
    reduce_group_non_causal_attn: bool,
    is_causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Groups count the tokens that are not masked, from the beginning of each sequence."""
    B, H, T = q.shape[:3]
    there = torch.ones(B, T, dtype=torch.bool) if key_mask is None else key_mask
    same = visible(B, T, T, False, None, cu_seqlens)
    place = (same & there[:, None]).tril().sum(-1) - 1
    group = place.div(group_size, rounding_mode="floor")
    together = (group[:, :, None] == group[:, None]) & seen & there[:, :, None]
    total = (same & there[:, None]).sum(-1).clamp(min=1)[:, None, :, None]
    if is_causal:
        across, n = (group[:, :, None] > group[:, None]) & seen & there[:, :, None], group_size
    else:
        across, n = (seen if reduce_group_non_causal_attn else together) & there[:, :, None], total
    k, s, v = spread(k, H), spread(s, H), spread(v, H)
    weights = activate(q @ k.mT / group_size, activation) * together[:, None]
    return (weights + (r @ s.mT) / n * across[:, None]) @ v


FORMS: dict[str, Any] = {
    "linear": linear,
    "taylor": taylor,
    "elita": elita,
    "gated": gated,
    "mixed_chunk": mixed_chunk,
}
