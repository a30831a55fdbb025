"""What `cumulant bench` measures: every mechanism as a function of tensors, its inputs, and its step.

All are one layer's attention of H heads with values of d numbers each. Queries and keys have d numbers as well, 16 in
Taylor attention, 128 in FLASH, whose one head holds the values of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.elita import elita_attention
from ..ops.linear import linear_attention
from ..ops.mixed_chunk import mixed_chunk_attention
from ..ops.taylor import taylor_attention

GROUP = 256  # FLASH's


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads of d numbers."""

    B: int
    H: int
    T: int
    d: int
    dtype: torch.dtype
    device: str
    causal: bool = True

    def random(self, heads: int, size: int, tokens: int | None = None) -> Tensor:
        """``[B, heads, T, size]``, the heads of a token side by side in memory as projections leave them."""
        shape = (self.B, self.T if tokens is None else tokens, heads, size)
        return torch.randn(shape, dtype=self.dtype, device=self.device).transpose(1, 2)


class Subject:
    """A mechanism. quadratic: time grows as T². weights: numbers of a T × T matrix that it holds at once, a head."""

    quadratic = False
    weights = 0

    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        return tuple(shape.random(shape.H, shape.d) for _ in range(3))

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        raise NotImplementedError

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        """One more token onto a context of T, and the bytes that are kept of that."""
        raise NotImplementedError


class Softmax(Subject):
    """PyTorch's fused attention."""

    quadratic = True

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        q, k, v = inputs
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        q, (_, k, v) = shape.random(shape.H, shape.d, 1), self.inputs(shape)
        return lambda: self.run((q, k, v), False), k.nbytes + v.nbytes


class NaiveSoftmax(Softmax):
    """All weights at once, as the formula says."""

    weights = 2

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        q, k, v = inputs
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        out: Tensor = scores.softmax(-1) @ v
        return out


@dataclass(frozen=True)
class _Recurrent(Subject):
    """With a state of fixed size."""

    impl: str = "auto"

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        raise NotImplementedError

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        out: Tensor = self.call(inputs, causal)
        return out

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        state = self.call(self.inputs(shape), True, return_state=True)[1]
        token = tuple(x[:, :, :1] for x in self.inputs(shape))
        return lambda: self.call(token, True, state=state, return_state=True), state.nbytes


class Linear(_Recurrent):
    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        q, k, v = inputs
        return linear_attention(q, k, v, is_causal=causal, impl=self.impl, **options)


class Taylor(_Recurrent):
    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        return shape.random(shape.H, 16), shape.random(shape.H, 16), shape.random(shape.H, shape.d)

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        q, k, v = inputs
        return taylor_attention(q, k, v, is_causal=causal, impl=self.impl, **options)


class Flash(_Recurrent):
    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        return *(shape.random(1, 128) for _ in range(4)), shape.random(1, shape.H * shape.d)

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        return mixed_chunk_attention(*inputs, group_size=GROUP, is_causal=causal, impl=self.impl, **options)

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        """Onto a group half full, for what a step takes grows with it; up to half a group, onto all tokens."""
        half = GROUP // 2
        return super().step(replace(shape, T=max(shape.T // GROUP * GROUP - half, min(shape.T, half))))


class Elita(_Recurrent):
    """Causal whatever is asked: it has no other form."""

    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        logits = (shape.random(shape.H, 1)[..., 0] for _ in range(3))
        return *logits, shape.random(shape.H, shape.d)

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        return elita_attention(*inputs, impl=self.impl, **options)


SUBJECTS: dict[str, Subject] = {
    "softmax": Softmax(),
    "naive softmax": NaiveSoftmax(),
    "linear": Linear(),
    "taylor": Taylor(),
    "flash": Flash(),
    "elita": Elita(),
    "linear, torch": Linear("torch"),
    "taylor, torch": Taylor("torch"),
    "flash, torch": Flash("torch"),
    "elita, torch": Elita("torch"),
}
