"""Feature maps for the chunk-parallel implementation, with hand-written derivatives.

Vectors are stored token-minor, ``[..., K, C]``: a feature is a row of ``C`` tokens, so gathering
the factors of a monomial copies whole rows. A map has two stages. The first is an elementwise
`activation` (elu + 1, relu, identity). The second is an `Expansion` (identity, or the Taylor
monomials), whose inner product is a polynomial of the plain inner product.
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
    """The elementwise stage of a feature map."""
    if activation == "elu":
        # elu(x) + 1 would round exp(x) - 1 and then add 1: small values would lose their digits
        return x.clamp(max=0).exp_().add_(x.relu())
    return x.relu() if activation == "relu" else x


def activate_vjp(activated: Tensor, grad: Tensor, activation: str) -> Tensor:
    """Gradient at the input, from the activated value, so that the input need not be kept."""
    if activation == "elu":  # slope: exp(x) = value below zero, 1 above it
        return grad * activated.clamp(max=1)
    return grad * (activated > 0) if activation == "relu" else grad


@lru_cache(maxsize=64)
def _monomials(dim: int, degree: int) -> tuple[list[int], list[int], list[float]]:
    """Parent, last factor and weight of each monomial of a degree, in lexicographic order.

    The parent is the index of the monomial without its last factor, among those one degree lower.
    The weight is sqrt(multinomial / degree!) = 1 / sqrt(prod m_i!).
    """
    lower = {m: i for i, m in enumerate(combinations_with_replacement(range(dim), degree - 1))}
    parents, lasts, weights = [], [], []
    for m in combinations_with_replacement(range(dim), degree):
        parents.append(lower[m[:-1]])
        lasts.append(m[-1])
        weights.append(1 / math.sqrt(math.prod(math.factorial(m.count(i)) for i in set(m))))
    return parents, lasts, weights


class _RowSum:
    """Adds rows of ``[..., n, C]`` into ``[..., size, C]`` by an index.

    Where the 0/1 matrix of the index is small, a product with it is faster than scattering.
    """

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
    to_parent: _RowSum
    to_last: _RowSum


class Expansion:
    """Features with ``expand(q)ᵀ expand(k) = polynomial(q·k)``.

    They are the vector itself for order 0, else the Taylor features of exp.
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
    def monomial_tables(self) -> list[_Degree]:
        """Tables of degree 2 and above, built when features are first formed.

        Short sequences never form features, so they need no tables.
        """
        tables = []
        with torch.inference_mode(False):
            for degree in range(2, self.order + 1):
                parents, lasts, weights = _monomials(self.dim, degree)
                parent, last = (torch.tensor(x, device=self.device) for x in (parents, lasts))
                weight = torch.tensor(weights, dtype=self.dtype, device=self.device)[:, None]
                below = math.comb(self.dim + degree - 2, degree - 1)
                sums = _RowSum(parent, below, self.dtype), _RowSum(last, self.dim, self.dtype)
                tables.append(_Degree(parent, last, weight, *sums))
        return tables

    @staticmethod
    @lru_cache(maxsize=64)
    def cached(
        dim: int, order: int, constant_term: bool, dtype: torch.dtype, device: torch.device
    ) -> Expansion:
        """The expansion for these sizes, shared by all calls, so that its tables are built once."""
        return Expansion(dim, order, constant_term, dtype, device)

    def polynomial(self, scores: Tensor) -> Tensor:
        """Σ_p scores^p / p!, by Horner's rule.

        Without the constant term no 1 is added at the end: it would cost small scores their digits.
        """
        if self.order == 0:
            return scores
        result = scores / self.order
        for p in range(self.order - 1, 0, -1):
            result = result.add_(1).mul_(scores).div_(p)
        return result.add_(1) if self.constant_term else result

    def slope(self, scores: Tensor) -> Tensor | None:
        """The polynomial's derivative, the same sum with one term fewer; None where it is 1."""
        if self.order <= 1:
            return None
        result = scores / (self.order - 1) + 1
        for p in range(self.order - 2, 0, -1):
            result = result.mul_(scores).div_(p).add_(1)
        return result

    def expand(self, x: Tensor) -> Tensor:
        """Features ``[..., F, C]`` of vectors ``[..., K, C]``."""
        if self.order == 0:
            return x
        out = x.new_empty(*x.shape[:-2], self.size, x.shape[-1])
        parts = list(out.split(self.sizes, -2))
        if self.constant_term:
            parts[0].fill_(1)
        parts[1].copy_(x)
        monomials = x
        for (parents, lasts, weights, *_), part in zip(
            self.monomial_tables, parts[2:], strict=True
        ):
            monomials = monomials.index_select(-2, parents).mul_(x.index_select(-2, lasts))
            torch.mul(monomials, weights, out=part)
        return out

    def expand_vjp(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient at `x` ``[..., K, C]`` from the gradient at its features ``[..., F, C]``."""
        if self.order == 0:
            return grad
        parts = list(grad.split(self.sizes, -2))
        # The monomials of each degree, without weights: they are the parents of the next degree.
        # The highest degree is nobody's parent, so it is not formed.
        levels = [x]
        for parents, lasts, *_ in self.monomial_tables[:-1]:
            levels.append(levels[-1].index_select(-2, parents) * x.index_select(-2, lasts))
        # A monomial is m = parent · x_last, so d parent = dm · x_last and d x_last = dm · parent.
        # From the highest degree down, so that dm is complete before it is passed on: the feature's
        # own gradient times its weight, and what its children of the next degree carried to it.
        result, carried = torch.zeros_like(x), None
        for i in reversed(range(len(self.monomial_tables))):
            parents, lasts, weights, to_parent, to_last = self.monomial_tables[i]
            part, lower = parts[2 + i], levels[i]
            local = part * weights if carried is None else (part * weights).add_(carried)
            result += to_last(lower.index_select(-2, parents) * local)
            carried = to_parent(local.mul_(x.index_select(-2, lasts)))
        # Degree 1 is x itself; its children's gradients are the last ones carried. The constant
        # feature has no gradient.
        result += parts[1]
        return result if carried is None else result.add_(carried)
