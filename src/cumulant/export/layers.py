"""Layers that several mixers share, as ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantizedEmbedding, QuantizedLinear, ScaleNorm
from ..nn.norms import RMSNorm
from ..nn.rotary import RotaryEmbedding
from .graph import LAST, POSITION, TYPES, GraphBuilder, Value

NORM_EPSILON = 1e-5  # of torch.nn.functional.layer_norm


def add(b: GraphBuilder, *values: Value) -> Value:
    total = values[0]
    for value in values[1:]:
        total = b.op("Add", total, value)
    return total


def scale(b: GraphBuilder, x: Value, factor: float) -> Value:
    return x if factor == 1 else b.op("Mul", x, b.constant(factor, "float32"))


def silu(b: GraphBuilder, x: Value) -> Value:
    return b.op("Mul", x, b.op("Sigmoid", x))


def reshape(b: GraphBuilder, x: Value, *shape: int) -> Value:
    """A size of 0 stays as it is, and -1 takes what is left."""
    return b.op("Reshape", x, b.constant(shape))


def split(b: GraphBuilder, x: Value, *sizes: int, axis: int = -1) -> list[Value]:
    if len(sizes) == 1:
        return [x]
    return b.ops("Split", len(sizes), x, b.constant(sizes), axis=axis)


def cut(
    b: GraphBuilder, x: Value, start: int | Value, end: int | Value = LAST, *, axis: int
) -> Value:
    """``x[start:end]`` along an axis; a value is an int64 ``[1]``."""
    bounds = [b.constant([at]) if isinstance(at, int) else at for at in (start, end)]
    return b.op("Slice", x, *bounds, b.constant([axis]))


def concat(b: GraphBuilder, *values: Value, axis: int) -> Value:
    return values[0] if len(values) == 1 else b.op("Concat", *values, axis=axis)


def unsqueeze(b: GraphBuilder, x: Value, *axes: int) -> Value:
    return b.op("Unsqueeze", x, b.constant(axes))


def squeeze(b: GraphBuilder, x: Value, *axes: int) -> Value:
    return b.op("Squeeze", x, b.constant(axes))


def cast(b: GraphBuilder, x: Value, dtype: str) -> Value:
    return b.op("Cast", x, to=TYPES[dtype])


def length(b: GraphBuilder) -> Value:
    """The number T of tokens in this call, ``[1]``."""
    return b.once("length", lambda: b.op("Shape", "input_ids", start=1, end=2))


def positions(b: GraphBuilder) -> Value:
    """The position of each token of this call, ``[T]``."""
    if b.step:
        return POSITION

    def make() -> Value:
        zero, one = b.constant(0), b.constant(1)
        index = b.op("Range", zero, squeeze(b, length(b), 0), one)
        return b.op("Add", index, POSITION)

    return b.once("positions", make)


def end_position(b: GraphBuilder) -> Value:
    """The number of tokens after this call, ``[1]``."""
    new = b.constant([1]) if b.step else length(b)
    return b.once("end", lambda: b.op("Add", POSITION, new))


def project(b: GraphBuilder, x: Value, *layers: nn.Module) -> Value:
    """``W x + b`` of linear layers, side by side: one product of matrices."""
    plain: list[Any] = [check_linear(b, layer) for layer in layers]
    y = b.op("MatMul", x, b.weight(*(layer.weight for layer in plain), transposed=True))
    if all(layer.bias is None for layer in plain):
        return y
    biases = [zeros(b, layer.out_features) if layer.bias is None else layer.bias for layer in plain]
    return b.op("Add", y, b.weight(*biases))


def zeros(b: GraphBuilder, dim: int) -> Tensor:
    return b.derive(f"zeros {dim}", lambda: torch.zeros(dim))


def check_linear(b: GraphBuilder, layer: nn.Module) -> nn.Module:
    """The layer, if it is a plain one with plain weights."""
    if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
        raise b.refuse(
            f"its weights have {layer.bits} bits; export the model that was quantised instead"
        )
    kinds = type(layer), type(getattr(layer, "weight", None))
    if kinds[0] not in (nn.Linear, nn.Embedding) or kinds[1] not in (nn.Parameter, Tensor):
        raise b.refuse(
            "expected a torch.nn.Linear or Embedding with an ordinary weight, got"
            f" {kinds[0].__name__} with {kinds[1].__name__}; merge adapters, and do not quantise"
        )
    return layer


def norm(b: GraphBuilder, x: Value, layer: nn.Module, dim: int) -> Value:
    """A norm over the last dimension, of size `dim`."""
    if type(layer) is ScaleNorm:
        size = b.op("ReduceL2", x, b.constant([-1]), keepdims=1)
        size = b.op("Max", scale(b, size, layer.dim**-0.5), b.constant(layer.eps, "float32"))
        return b.op("Mul", x, b.op("Div", b.weight(layer.weight), size))
    if type(layer) not in (RMSNorm, nn.RMSNorm, nn.LayerNorm):
        raise b.refuse(f"expected a norm of this package, got {type(layer).__name__}")
    plain: Any = layer
    weight = ones(b, dim) if plain.weight is None else b.weight(plain.weight)
    if isinstance(layer, nn.LayerNorm):
        bias = [] if plain.bias is None else [b.weight(plain.bias)]
        return b.op("LayerNormalization", x, weight, *bias, axis=-1, epsilon=layer.eps)
    eps = torch.finfo(torch.float32).eps if plain.eps is None else plain.eps
    return b.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)


def normalize_heads(b: GraphBuilder, x: Value, dim: int) -> Value:
    """LayerNorm without parameters over the last dimension."""
    return b.op("LayerNormalization", x, ones(b, dim), axis=-1, epsilon=NORM_EPSILON)


def ones(b: GraphBuilder, dim: int) -> Value:
    return b.weight(b.derive(f"ones {dim}", lambda: torch.ones(dim)))


def angles(b: GraphBuilder, dim: int, base: float) -> Value:
    """``position · base^(-2i/dim)`` for each i, ``[T, dim / 2]``, less whole turns, in fp32.

    It is computed in fp64, as in `cumulant.nn.RotaryEmbedding`.
    """

    def make() -> Value:
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / -dim
        turns = b.constant((base**exponent / (2 * math.pi)).tolist(), "float64")
        turns = b.op("Mul", unsqueeze(b, cast(b, positions(b), "float64"), -1), turns)
        part = b.op("Sub", turns, b.op("Floor", turns))
        return cast(b, b.op("Mul", part, b.constant(2 * math.pi, "float64")), "float32")

    return b.once(("angles", dim, base), make)


def rotate(b: GraphBuilder, x: Value, rotary: nn.Module, heads: int) -> Value:
    """Rotate the first dims of each head of ``x [B, T, H·K]`` by the tokens' positions."""
    if type(rotary) is not RotaryEmbedding:
        raise b.refuse(f"expected a RotaryEmbedding, got {type(rotary).__name__}")

    def table(kind: str) -> Value:
        return b.op(kind, angles(b, rotary.dim, rotary.base))

    def rows() -> Value:
        """The row of the tables for each token, ``[B, T]``."""
        first = b.op("Sub", positions(b), POSITION)
        return b.op("Expand", first, b.op("Shape", "input_ids"))

    key = (rotary.dim, rotary.base)
    cosine, sine = (b.once((kind, *key), partial(table, kind)) for kind in ("Cos", "Sin"))
    return b.op(
        "RotaryEmbedding",
        x,
        cosine,
        sine,
        b.once("rows", rows),
        interleaved=1,
        num_heads=heads,
        rotary_embedding_dim=rotary.dim,
    )


def token_shift(b: GraphBuilder, x: Value, dim: int, *, first_half: bool = False) -> Value:
    """`cumulant.nn.token_shift` with its state: half of ``x [B, T, D]`` from the token before."""
    kept = (dim + 1) // 2
    sizes = [kept, dim - kept]
    keep, shifted = split(b, x, *sizes)
    width = sizes[1]
    if first_half:
        keep, shifted, width = shifted, keep, sizes[0]
    past = b.past("shift", ("B", 1, width))
    if b.step:
        previous = past
        b.present(past, shifted)
    else:
        buffer = concat(b, past, shifted, axis=1)
        previous = cut(b, buffer, 0, -1, axis=1)
        b.present(past, cut(b, buffer, -1, axis=1))
    return concat(b, *((previous, keep) if first_half else (keep, previous)), axis=-1)


def convolve(b: GraphBuilder, x: Value, weight: Tensor) -> Value:
    """`cumulant.nn.ShortConvolution` with its state: ``weight [size, E]`` over ``x [B, T, E]``."""
    n, channels = weight.shape[0] - 1, weight.shape[1]
    if n == 0:
        return b.op("Mul", x, b.weight(weight))
    past = b.past("conv", ("B", n, channels))
    buffer = concat(b, past, x, axis=1)
    b.present(past, cut(b, buffer, -n, axis=1))
    if b.step:
        oldest_first = b.weight(b.derive(f"{b.part_name} taps", lambda: weight.detach().flip(0)))
        return b.op("ReduceSum", b.op("Mul", buffer, oldest_first), b.constant([1]), keepdims=1)
    taps, terms = b.weight(weight), []  # the newest token's tap first
    for j in range(n + 1):
        seen = cut(b, buffer, n - j, LAST if j == 0 else -j, axis=1)
        terms.append(b.op("Mul", seen, b.op("Gather", taps, b.constant([j]), axis=0)))
    return add(b, *terms)


def remember(b: GraphBuilder, name: str, shape: tuple[int | str, ...], new: Value) -> Value:
    """All keys or values: those of a state that grows, along its axis "S", and the new ones."""
    past = b.past(name, shape)
    seen = concat(b, past, new, axis=shape.index("S"))
    b.present(past, seen)
    return seen


def query_positions(b: GraphBuilder) -> Value:
    """The positions of this call's tokens, ``[T, 1]``."""
    return b.once("query positions", lambda: unsqueeze(b, positions(b), -1))


def key_positions(b: GraphBuilder) -> Value:
    """The positions of all tokens, ``[S + T]``."""

    def make() -> Value:
        return b.op("Range", b.constant(0), squeeze(b, end_position(b), 0), b.constant(1))

    return b.once("key positions", make)


def later_keys(b: GraphBuilder) -> Value:
    """Which of all keys come after which queries: ``[T, S + T]``."""

    def make() -> Value:
        return b.op("Greater", key_positions(b), query_positions(b))

    return b.once("later keys", make)


def heads_first(b: GraphBuilder, x: Value) -> Value:
    """``[B, T, H, K]`` -> ``[B, H, T, K]``, or back."""
    return b.op("Transpose", x, perm=[0, 2, 1, 3])


def matmul_transposed(b: GraphBuilder, x: Value, y: Value, dims: int) -> Value:
    """``x yᵀ`` over the last two of `dims` dimensions."""
    order: Sequence[int] = [*range(dims - 2), dims - 1, dims - 2]
    return b.op("MatMul", x, b.op("Transpose", y, perm=order))
