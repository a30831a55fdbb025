"""The mechanisms of `cumulant bench`, as functions of tensors, with their inputs and steps.

A new mechanism is one class and one entry of `_MECHANISMS`. Each is the attention of one layer with
H heads, whose values have d numbers. Queries and keys have d numbers as well, except for 16 in
Taylor attention, and 128 in FLASH, whose one head holds the values of all heads. onnxruntime's
operators are measured where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.elita import elita_attention
from ...ops.linear import linear_attention
from ...ops.mixed_chunk import mixed_chunk_attention
from ...ops.taylor import taylor_attention
from ..reports.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, Style, by_name
from .onnxruntime_calls import linear_call, missing_packages, softmax_call
from .verdicts import PASSES

GROUP = 256  # tokens in a group of FLASH


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads whose values have d numbers."""

    B: int
    H: int
    T: int
    d: int
    dtype: torch.dtype
    device: str
    causal: bool = True

    def random(self, heads: int, size: int, tokens: int | None = None) -> Tensor:
        """``[B, heads, T, size]``, random.

        The heads of a token are side by side in memory, as projections write them.
        """
        shape = (self.B, self.T if tokens is None else tokens, heads, size)
        return torch.randn(shape, dtype=self.dtype, device=self.device).transpose(1, 2)


@dataclass(frozen=True)
class Subject:
    """A mechanism that is measured.

    name, style: in tables and pictures. fair: it belongs to the recipe "fair".
    passes: those that it has.
    quadratic: its time grows as T².
    weights: numbers for each entry of a T × T matrix that it holds at once, for each head.
    """

    name: str
    style: Style
    fair: bool = True
    passes: ClassVar[tuple[str, ...]] = PASSES
    quadratic: ClassVar[bool] = False
    weights: ClassVar[int] = 0

    def obstacle(self, shape: Shape) -> str | None:
        """What it needs to be measured in this shape and is not there; None if nothing."""
        return None

    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        return tuple(shape.random(shape.H, shape.d) for _ in range(3))

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        """The outputs of all tokens."""
        raise NotImplementedError

    def forward(self, shape: Shape) -> Callable[[], Any]:
        """A function that computes the outputs of all tokens, without gradients."""
        inputs = self.inputs(shape)
        return torch.inference_mode()(lambda: self.run(inputs, shape.causal))

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        """A function that computes the token after a context of T, and the context's bytes."""
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
    """Softmax attention by its formula, with all T × T weights in memory."""

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
class Recurrent(Subject):
    """A mechanism whose state has a fixed size. impl: the implementation that runs."""

    impl: str = "auto"

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        """The operation. options: ``state`` and ``return_state``."""
        raise NotImplementedError

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        out: Tensor = self.call(inputs, causal)
        return out

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        state = self.call(self.inputs(shape), True, return_state=True)[1]
        token = tuple(x[:, :, :1] for x in self.inputs(shape))
        return lambda: self.call(token, True, state=state, return_state=True), state.nbytes


class Linear(Recurrent):
    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        q, k, v = inputs
        return linear_attention(q, k, v, is_causal=causal, impl=self.impl, **options)


class Taylor(Recurrent):
    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        return shape.random(shape.H, 16), shape.random(shape.H, 16), shape.random(shape.H, shape.d)

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        q, k, v = inputs
        return taylor_attention(q, k, v, is_causal=causal, impl=self.impl, **options)


class Flash(Recurrent):
    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        return *(shape.random(1, 128) for _ in range(4)), shape.random(1, shape.H * shape.d)

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        return mixed_chunk_attention(
            *inputs, group_size=GROUP, is_causal=causal, impl=self.impl, **options
        )

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        """A step onto a half full group, since its time grows with the group.

        Short contexts are used whole.
        """
        half = GROUP // 2
        return super().step(
            replace(shape, T=max(shape.T // GROUP * GROUP - half, min(shape.T, half)))
        )


class Elita(Recurrent):
    """ELiTA is always causal; it has no form for both directions."""

    def inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        logits = (shape.random(shape.H, 1)[..., 0] for _ in range(3))
        return *logits, shape.random(shape.H, shape.d)

    def call(self, inputs: tuple[Tensor, ...], causal: bool, **options: Any) -> Any:
        return elita_attention(*inputs, impl=self.impl, **options)


class OnnxLinear(Subject):
    """onnxruntime's linear attention, without feature map and normaliser."""

    passes = ("forward", "decode")

    def obstacle(self, shape: Shape) -> str | None:
        return _onnxruntime_obstacle(shape)

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        q, k, v = inputs
        return linear_call(q, k, v)()[0]

    def forward(self, shape: Shape) -> Callable[[], Any]:
        q, k, v = self.inputs(shape)
        return linear_call(q, k, v)

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        q, k, v = self.inputs(shape)
        state = linear_call(q, k, v)()[1]
        q, k, v = self.inputs(replace(shape, T=1))
        return linear_call(q, k, v, state), state.nbytes


class OnnxSoftmax(Subject):
    """onnxruntime's fused softmax attention."""

    passes = ("forward", "decode")
    quadratic = True

    def obstacle(self, shape: Shape) -> str | None:
        return _onnxruntime_obstacle(shape)

    def run(self, inputs: tuple[Tensor, ...], causal: bool) -> Tensor:
        q, k, v = inputs
        return softmax_call(q, k, v)()[0]

    def forward(self, shape: Shape) -> Callable[[], Any]:
        q, k, v = self.inputs(shape)
        return softmax_call(q, k, v)

    def step(self, shape: Shape) -> tuple[Callable[[], Any], int]:
        q, (_, k, v) = shape.random(shape.H, shape.d, 1), self.inputs(shape)
        return softmax_call(q, k, v), k.nbytes + v.nbytes


def _onnxruntime_obstacle(shape: Shape) -> str | None:
    if shape.dtype != torch.float32 or shape.device != "cpu" or not shape.causal:
        return "causal attention in fp32 on the CPU"
    return missing_packages()


_MECHANISMS: tuple[Subject, ...] = (
    Softmax("softmax", BLACK),
    NaiveSoftmax("naive softmax", GREY, fair=False),
    Linear("linear", ORANGE),
    Taylor("taylor", BLUE),
    Flash("flash", GREEN),
    Elita("elita", PINK),
)
# the same in PyTorch's operations, where the implementation can be chosen
_IN_TORCH = (
    replace(m, name=f"{m.name}, torch", style=m.style.variant(), fair=False, impl="torch")
    for m in _MECHANISMS
    if isinstance(m, Recurrent)
)
_IN_ONNXRUNTIME = (
    OnnxSoftmax("softmax, onnxruntime", BLACK.variant(2)),
    OnnxLinear("linear, onnxruntime", ORANGE.variant(2)),
)
SUBJECTS: dict[str, Subject] = by_name([*_MECHANISMS, *_IN_TORCH, *_IN_ONNXRUNTIME])
