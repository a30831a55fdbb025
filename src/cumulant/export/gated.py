"""The gated attention unit in ONNX, and what FLASH shares with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..nn import GatedAttentionUnit
from .graph import GraphBuilder, Value
from .layers import (
    cast,
    key_positions,
    later_keys,
    matmul_transposed,
    norm,
    project,
    query_positions,
    remember,
    reshape,
    rotate,
    scale,
    silu,
    split,
    unsqueeze,
)


def emit_gated_attention(b: GraphBuilder, unit: nn.Module, x: Value) -> Value:
    """The gated attention unit, whose keys and values grow with every token."""
    assert isinstance(unit, GatedAttentionUnit)
    if not unit.is_causal:
        raise b.refuse("only causal attention has steps")
    if unit.length_scale == "total":
        raise b.refuse("length_scale='total' depends on tokens that follow, so there are no steps")
    h = x if unit.norm is None else norm(b, x, unit.norm, unit.dim)
    q, k = queries_and_keys(b, unit, h, 2)
    k = remember(b, "key", ("B", "S", unit.query_key_dim), k)
    v = silu(b, project(b, h, unit.value_proj))
    v = remember(b, "value", ("B", "S", unit.hidden_dim), v)
    scores = matmul_transposed(b, q, k, 3)
    bias = relative_bias(b, unit, query_positions(b), key_positions(b))
    if bias is not None and unit.scale_bias:
        scores = b.op("Add", scores, bias)
    if unit.length_scale is None:
        scores = b.op("Div", scores, b.once("counts", lambda: _seen_keys(b)))
    else:
        scores = scale(b, scores, 1 / float(unit.length_scale))
    if bias is not None and not unit.scale_bias:
        scores = b.op("Add", scores, bias)
    weights = activate(b, scores, unit.activation)
    if not b.step:
        weights = b.op("Where", later_keys(b), b.constant(0.0, "float32"), weights)
    return gate_and_project(b, unit, b.op("MatMul", weights, v), h, x)


def _seen_keys(b: GraphBuilder) -> Value:
    """How many keys each query sees, ``[T, 1]``."""
    return cast(b, b.op("Add", query_positions(b), b.constant(1)), "float32")


def relative_bias(b: GraphBuilder, unit: Any, query: Value, key: Value) -> Value | None:
    """The unit's bias at positions of queries ``[T, 1]`` and keys ``[S]``, ``[T, S]``.

    It is right for keys that are not later.
    """
    if unit.relative_bias is None:
        return None
    table = b.derive(f"{b.part_name} bias", lambda: distance_table(unit.relative_bias))
    farthest = unit.relative_bias.max_distance

    def distances() -> Value:
        behind = b.op("Max", b.op("Sub", query, key), b.constant(0))
        return b.op("Min", behind, b.constant(farthest))

    return b.op("Gather", b.weight(table), b.once(("distances", query, key, farthest), distances))


def distance_table(bias: Any) -> torch.Tensor:
    """The bias of each distance up to the farthest one, which all larger ones share."""
    buckets = bias.buckets(-torch.arange(bias.max_distance + 1))
    table: torch.Tensor = bias.embedding.weight.detach().cpu().float()[:, 0] * bias.scale
    return table[buckets]


def queries_and_keys(b: GraphBuilder, unit: Any, h: Value, uses: int) -> list[Value]:
    """The scaled and offset copies of a gated unit, each ``[B, T, K]``."""
    K = unit.query_key_dim
    z = unsqueeze(b, silu(b, project(b, h, unit.qk_proj)), 2)
    z = b.op("Mul", z, b.weight(unit.offset_scale.gamma))
    z = reshape(b, b.op("Add", z, b.weight(unit.offset_scale.beta)), 0, 0, uses * K)
    if unit.rotary is not None:
        z = rotate(b, z, unit.rotary, uses)
    return split(b, z, *[K] * uses)


def activate(b: GraphBuilder, scores: Value, name: str) -> Value:
    """relu², or the Laplace function."""
    if name == "relu2":
        positive = b.op("Relu", scores)
        return b.op("Mul", positive, positive)
    if name != "laplace":
        raise b.refuse(f"activation {name!r} is not known")
    sigma = math.sqrt(1 / (4 * math.pi))
    centred = b.op("Sub", scores, b.constant(math.sqrt(0.5), "float32"))
    half = b.op("Erf", scale(b, centred, 1 / (sigma * math.sqrt(2))))
    return scale(b, b.op("Add", half, b.constant(1.0, "float32")), 0.5)


def gate_and_project(b: GraphBuilder, unit: Any, attended: Value, h: Value, x: Value) -> Value:
    """The output of a gated unit, ``[B, T, D]``."""
    gate = silu(b, project(b, h, unit.gate_proj))
    y = project(b, b.op("Mul", gate, attended), unit.out_proj)
    return b.op("Add", y, x) if unit.residual else y
