"""The error of Taylor attention against softmax attention, for one set of queries, keys and values.

The error is ``||taylor - softmax|| / ||softmax||`` over all outputs of causal attention, with
values drawn independently of the keys. "Order 0" is the mean of the values seen, which an
approximation must beat. The size of the scores is their root mean square over the pairs of query
and key that see each other; the expansion is around 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.taylor import taylor_attention
from ..reports.palette import BLUE, GREEN, GREY, ORANGE, PINK, Style

# the measured orders, with their styles
STYLES: dict[int, Style] = {0: GREY.variant(), 1: ORANGE, 2: BLUE, 3: PINK, 4: GREEN}
ORDERS = tuple(STYLES)
SIZES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
DIMS = (4, 8, 16, 32, 64)
ALPHAS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# tokens: one chunk of the torch implementation, which computes any order without features
LENGTH = 128


def order_name(order: int) -> str:
    return "averaging" if order == 0 else f"order {order}"


@dataclass(frozen=True)
class Case:
    """One measurement.

    kind: "random" (Gaussian q and k), "normalised" (q and k after LayerNorm, scores divided by
    ``alpha · sqrt(K)``) or "trained" (a head of a trained model, which `where` names). size: root
    mean square of the scores. error: see this module's docstring.
    """

    kind: str
    order: int
    head_dim: int
    size: float
    error: float
    alpha: float | None = None
    where: str | None = None


def softmax_output(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def taylor_output(query: Tensor, key: Tensor, value: Tensor, order: int) -> Tensor:
    """Causal Taylor attention; order 0 is the mean of the values so far."""
    if order == 0:
        count = torch.arange(1, value.shape[2] + 1, dtype=value.dtype, device=value.device)
        return value.cumsum(2) / count[:, None]
    out = taylor_attention(query, key, value, order, is_causal=True, impl="torch")
    assert isinstance(out, Tensor)
    return out


def measure_orders(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kind: str,
    *,
    alpha: float | None = None,
    where: str | None = None,
) -> list[Case]:
    """A case for each order; scores are q·k / sqrt(K)."""
    dim = query.shape[-1]
    expected = softmax_output(query, key, value)
    scores = (query @ key.mT / math.sqrt(dim))[..., torch.ones(LENGTH, LENGTH).tril().bool()]
    size = float(scores.square().mean().sqrt())
    cases = []
    for order in ORDERS:
        error = float((taylor_output(query, key, value, order) - expected).norm() / expected.norm())
        cases.append(Case(kind, order, dim, size, error, alpha, where))
    return cases


def random_cases(seed: int) -> list[Case]:
    """Cases of random queries and keys, for each head dim.

    They are Gaussian with scores of each size, then normalised with each alpha.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(dim: int, batch: int = 16) -> Tensor:
        return torch.randn(batch, 1, LENGTH, dim, generator=generator, dtype=torch.float64)

    cases = []
    for dim in DIMS:
        q, k, v = draw(dim), draw(dim), draw(64)
        for size in SIZES:
            cases += measure_orders(q * size, k, v, "random")
        q, k = F.layer_norm(q, (dim,)), F.layer_norm(k, (dim,))
        for alpha in ALPHAS:
            cases += measure_orders(q / alpha, k, v, "normalised", alpha=alpha)
    return cases
