"""Feature maps for the chunk-parallel implementation, with hand-written derivatives.

Vectors are stored token-minor, ``[..., K, C]``: a feature is a row of ``C`` tokens, so that
gathering the factors of a monomial copies whole rows. A map has two stages: an elementwise
`activation` (elu + 1, relu, identity) and an `Expansion` (identity, or the Taylor monomials), whose
inner product is a polynomial of the plain inner product.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import feature_count


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "elu":
        return (
            x.clamp(max=0).exp_().add_(x.relu())
        )  # unlike elu(x) + 1, exact to the last bits where it is small
    return x.relu() if activation == "relu" else x


def activate_vjp(activated: Tensor, grad: Tensor, activation: str) -> Tensor:
    """Gradient at the input from the activated value: elu + 1 has slope min(value, 1), relu slope
    [value > 0].
    """
    if activation == "elu":
        return grad * activated.clamp(max=1)
    return grad * (activated > 0) if activation == "relu" else grad


@lru_cache(maxsize=64)
def _monomials(dim: int, degree: int) -> tuple[list[int], list[int], list[float]]:
    """Monomials of a degree over `dim` variables, lexicographic: index of the monomial without its
    last factor (among those one degree lower), that last factor, and the weight sqrt(multinomial /
    degree!) = 1 / sqrt(prod m_i!).
    """
    lower = {m: i for i, m in enumerate(combinations_with_replacement(range(dim), degree - 1))}
    parents, lasts, weights = [], [], []
    for m in combinations_with_replacement(range(dim), degree):
        parents.append(lower[m[:-1]])
        lasts.append(m[-1])
        weights.append(1 / math.sqrt(math.prod(math.factorial(m.count(i)) for i in set(m))))
    return parents, lasts, weights


class _Sum:
    """Adds rows of ``[..., n, C]`` into ``[..., size, C]`` by an index: a product with a 0/1
    matrix, which is faster than scattering, where that matrix is small."""

    LARGEST = 4_000_000

    def __init__(self, index: Tensor, size: int, dtype: torch.dtype):
        self.index, self.size = index, size
        self.matrix = None
        if size * len(index) <= self.LARGEST:
            self.matrix = torch.nn.functional.one_hot(index, size).to(dtype).mT.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrix is not None:
            return self.matrix @ x
        return x.new_zeros(*x.shape[:-2], self.size, x.shape[-1]).index_add_(-2, self.index, x)


class _Degree(NamedTuple):
    """The monomials of one degree: see `_monomials`."""

    parents: Tensor
    lasts: Tensor
    weights: Tensor
    to_parent: _Sum
    to_last: _Sum


class Expansion:
    """``expand(q)ᵀ expand(k) = polynomial(q·k)``: the identity for order 0, else the Taylor
    features of exp.
    """

    def __init__(
        self, dim: int, order: int, constant_term: bool, dtype: torch.dtype, device: torch.device
    ):
        self.dim, self.order, self.constant_term = dim, order, constant_term
        self.dtype, self.device = dtype, device
        degrees = [math.comb(dim + p - 1, p) for p in range(2, order + 1)]
        self.sizes = [dim] if order == 0 else [int(constant_term), dim, *degrees]
        self.size = feature_count(dim, order, constant_term)

    @cached_property
    def tables(self) -> list[_Degree]:
        """Built when features are first formed: short sequences never do."""
        tables = []
        with torch.inference_mode(False):
            for degree in range(2, self.order + 1):
                parents, lasts, weights = _monomials(self.dim, degree)
                parent, last = (torch.tensor(x, device=self.device) for x in (parents, lasts))
                weight = torch.tensor(weights, dtype=self.dtype, device=self.device)[:, None]
                below = math.comb(self.dim + degree - 2, degree - 1)
                sums = _Sum(parent, below, self.dtype), _Sum(last, self.dim, self.dtype)
                tables.append(_Degree(parent, last, weight, *sums))
        return tables

    @staticmethod
    @lru_cache(maxsize=64)
    def get(
        dim: int, order: int, constant_term: bool, dtype: torch.dtype, device: torch.device
    ) -> Expansion:
        """The expansion with its index tables, built once."""
        return Expansion(dim, order, constant_term, dtype, device)

    def polynomial(self, scores: Tensor) -> Tensor:
        """Σ_p scores^p / p!, by Horner's rule; without the constant never adding the 1 that would
        swallow digits.
        """
        if self.order == 0:
            return scores
        result = scores / self.order
        for p in range(self.order - 1, 0, -1):
            result = result.add_(1).mul_(scores).div_(p)
        return result.add_(1) if self.constant_term else result

    def slope(self, scores: Tensor) -> Tensor | None:
        """The polynomial's derivative: the same sum with one term fewer. None where it is 1
        everywhere.
        """
        if self.order <= 1:
            return None
        result = scores / (self.order - 1) + 1
        for p in range(self.order - 2, 0, -1):
            result = result.mul_(scores).div_(p).add_(1)
        return result

    def expand(self, x: Tensor) -> Tensor:
        """``[..., K, C]`` -> ``[..., F, C]``."""
        if self.order == 0:
            return x
        out = x.new_empty(*x.shape[:-2], self.size, x.shape[-1])
        parts = list(out.split(self.sizes, -2))
        if self.constant_term:
            parts[0].fill_(1)
        parts[1].copy_(x)
        monomials = x
        for (parents, lasts, weights, *_), part in zip(self.tables, parts[2:], strict=True):
            monomials = monomials.index_select(-2, parents).mul_(x.index_select(-2, lasts))
            torch.mul(monomials, weights, out=part)
        return out

    def expand_vjp(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient at `x` ``[..., K, C]`` from the gradient at its features ``[..., F, C]``."""
        if self.order == 0:
            return grad
        parts = list(grad.split(self.sizes, -2))
        levels = [x]
        for parents, lasts, *_ in self.tables[:-1]:
            levels.append(levels[-1].index_select(-2, parents) * x.index_select(-2, lasts))
        result, carried = torch.zeros_like(x), None
        for i in reversed(range(len(self.tables))):
            parents, lasts, weights, to_parent, to_last = self.tables[i]
            part, lower = parts[2 + i], levels[i]
            local = part * weights if carried is None else (part * weights).add_(carried)
            result += to_last(lower.index_select(-2, parents) * local)
            carried = to_parent(local.mul_(x.index_select(-2, lasts)))
        result += parts[1]
        return result if carried is None else result.add_(carried)
