"""Mixed chunk attention (FLASH) in ONNX.

The state holds the sums over whole groups, and the tokens of the open group in their slots; see
`cumulant.MixedChunkState`. All rows of a batch have read equally many tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import MixedChunkAttention
from .gated import activate, gate_and_project, queries_and_keys, relative_bias
from .graph import POSITION, GraphBuilder, Value
from .layers import (
    concat,
    cut,
    length,
    matmul_transposed,
    norm,
    project,
    reshape,
    scale,
    silu,
    squeeze,
    token_shift,
    unsqueeze,
)

NAMES = ("quad_key", "lin_key", "value")  # what the state keeps of the open group's tokens


def emit_mixed_chunk(b: GraphBuilder, unit: nn.Module, x: Value) -> Value:
    """``[B, T, D]`` -> ``[B, T, D]``."""
    assert isinstance(unit, MixedChunkAttention)
    if not unit.is_causal:
        raise b.refuse("only causal attention has steps")
    h = x if unit.norm is None else norm(b, x, unit.norm, unit.dim)
    if unit.shift_tokens:
        h = token_shift(b, h, unit.dim, first_half=True)
    quad_query, lin_query, *keys = queries_and_keys(b, unit, h, 4)
    new = [*keys, silu(b, project(b, h, unit.value_proj))]
    K, E, g = unit.query_key_dim, unit.hidden_dim, unit.group_size
    numerator = b.past("numerator", ("B", K, E))
    tokens = [b.past(name, ("B", g, E if name == "value" else K)) for name in NAMES]
    attend = _attend_token if b.step else _attend_groups
    out, after = attend(b, unit, quad_query, lin_query, new, numerator, tokens)
    for past, value in zip((numerator, *tokens), after, strict=True):
        b.present(past, value)
    return gate_and_project(b, unit, out, h, x)


def _filled(b: GraphBuilder, g: int) -> Value:
    """The number of tokens in the open group, ``[1]``."""
    return b.once(("filled", g), lambda: b.op("Mod", POSITION, b.constant([g])))


def _attend_token(
    b: GraphBuilder,
    unit: Any,
    quad_query: Value,
    lin_query: Value,
    new: list[Value],
    numerator: Value,
    tokens: list[Value],
) -> tuple[Value, list[Value]]:
    """One token, which joins the open group. Slots behind it are zero, values too."""
    g = unit.group_size
    filled = _filled(b, g)
    slots = b.constant(list(range(g)))
    own = b.once(("own slot", g), lambda: unsqueeze(b, b.op("Equal", slots, filled), -1))
    joined = [b.op("Where", own, x, kept) for x, kept in zip(new, tokens, strict=True)]
    scores = scale(b, matmul_transposed(b, quad_query, joined[0], 3), 1 / g)
    bias = relative_bias(b, unit, filled, slots)
    if bias is not None:
        scores = b.op("Add", scores, bias)
    quadratic = b.op("MatMul", activate(b, scores, unit.activation), joined[2])
    linear = scale(b, b.op("MatMul", lin_query, numerator), 1 / g)

    def close() -> list[Value]:
        """The whole group joins the sums, and an empty one opens."""
        transposed = b.op("Transpose", joined[1], perm=[0, 2, 1])
        sums = b.op("Add", numerator, b.op("MatMul", transposed, joined[2]))
        zero = b.constant(0.0, "float32")
        return [sums, *(b.op("Expand", zero, b.op("Shape", x)) for x in joined)]

    def keep() -> list[Value]:
        return [b.op("Identity", x) for x in (numerator, *joined)]

    floats = ["float32"] * 4
    full = b.once(("full", g), lambda: b.op("Equal", filled, b.constant([g - 1])))
    after = b.ops(
        "If",
        4,
        full,
        then_branch=b.body([], floats, close),
        else_branch=b.body([], floats, keep),
    )
    return b.op("Add", quadratic, linear), after


def _attend_groups(
    b: GraphBuilder,
    unit: Any,
    quad_query: Value,
    lin_query: Value,
    new: list[Value],
    numerator: Value,
    tokens: list[Value],
) -> tuple[Value, list[Value]]:
    """Many tokens behind those of the open group, in groups of g, the last of them not whole."""
    g, K, E = unit.group_size, unit.query_key_dim, unit.hidden_dim
    filled = _filled(b, g)
    behind = b.once(("behind", g), lambda: _tokens_missing(b, g))
    zero = b.constant([0])

    def groups(x: Value, size: int, before: Value) -> Value:
        pads = concat(b, zero, before, zero, zero, behind, zero, axis=0)
        return reshape(b, b.op("Pad", x, pads), 0, -1, g, size)

    q, r = groups(quad_query, K, filled), groups(lin_query, K, filled)
    k, s, v = (
        groups(concat(b, cut(b, kept, 0, filled, axis=1), x, axis=1), size, zero)
        for x, kept, size in zip(new, tokens, (K, K, E), strict=True)
    )
    scores = scale(b, matmul_transposed(b, q, k, 4), 1 / g)
    query, key = b.constant([[i] for i in range(g)]), b.constant(list(range(g)))
    bias = relative_bias(b, unit, query, key)
    if bias is not None:
        scores = b.op("Add", scores, bias)
    later = b.once(("later", g), lambda: b.op("Greater", key, query))
    weights = activate(b, scores, unit.activation)
    weights = b.op("Where", later, b.constant(0.0, "float32"), weights)
    sums = b.op("MatMul", b.op("Transpose", s, perm=[0, 1, 3, 2]), v)  # [B, groups, K, E]
    sums = b.op("CumSum", sums, b.constant(1), exclusive=1)
    sums = b.op("Add", sums, unsqueeze(b, numerator, 1))
    linear = scale(b, b.op("MatMul", r, sums), 1 / g)
    out = b.op("Add", b.op("MatMul", weights, v), linear)
    end = b.once(("end", g), lambda: b.op("Add", filled, length(b)))
    out = cut(b, reshape(b, out, 0, -1, E), filled, end, axis=1)
    after = [squeeze(b, cut(b, x, -1, axis=1), 1) for x in (sums, k, s, v)]
    return out, after


def _tokens_missing(b: GraphBuilder, g: int) -> Value:
    """How many tokens the last group lacks, from 1 to g, ``[1]``."""
    size = b.constant([g])
    used = b.op("Mod", b.op("Add", _filled(b, g), length(b)), size)
    return b.op("Sub", size, used)
