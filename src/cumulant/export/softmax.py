"""Softmax attention in ONNX, with and without a window."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..nn import SlidingWindowAttention, SoftmaxAttention
from .graph import POSITION, GraphBuilder, Value
from .layers import (
    add,
    concat,
    cut,
    end_position,
    heads_first,
    later_keys,
    length,
    matmul_transposed,
    project,
    remember,
    reshape,
    rotate,
    scale,
    split,
    squeeze,
    unsqueeze,
)


def emit_softmax(b: GraphBuilder, mixer: nn.Module, x: Value) -> Value:
    """Softmax attention, whose keys and values grow with every token."""
    assert isinstance(mixer, SoftmaxAttention)
    if not mixer.is_causal:
        raise b.refuse("only causal attention has steps")
    G, K = mixer.num_kv_heads, mixer.head_dim
    q, k, v = _project_heads(b, mixer, x)
    k, v = (remember(b, name, ("B", G, "S", K), new) for name, new in (("key", k), ("value", v)))
    hidden = None if b.step else later_keys(b)
    return _combine_heads(b, mixer, _attend(b, mixer, q, k, v, hidden))


def _project_heads(b: GraphBuilder, mixer: Any, x: Value) -> tuple[Value, Value, Value]:
    """q ``[B, H, T, K]`` over sqrt(K), k and v ``[B, G, T, K]``."""
    H, G, K = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    both, v = split(b, project(b, x, mixer.q_proj, mixer.k_proj, mixer.v_proj), (H + G) * K, G * K)
    if mixer.rotary is not None:
        both = rotate(b, both, mixer.rotary, H + G)
    q, k = split(b, heads_first(b, reshape(b, both, 0, 0, H + G, K)), H, G, axis=1)
    return scale(b, q, K**-0.5), k, heads_first(b, reshape(b, v, 0, 0, G, K))


def _combine_heads(b: GraphBuilder, mixer: Any, out: Value) -> Value:
    out = reshape(b, heads_first(b, out), 0, 0, mixer.num_heads * mixer.head_dim)
    return project(b, out, mixer.out_proj)


def _attend(
    b: GraphBuilder, mixer: Any, q: Value, k: Value, v: Value, hidden: Value | None
) -> Value:
    """``q [B, H, T, K]`` attends to the keys ``[B, G, S, K]`` that are not hidden."""
    H, G, K = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    grouped = q if H == G else reshape(b, q, 0, G, -1, K)  # [B, G, H / G * T, K]
    scores = matmul_transposed(b, grouped, k, 4)
    if hidden is not None:
        if H != G:
            sizes = (b.constant([0, H]), length(b), b.constant([-1]))
            scores = b.op("Reshape", scores, concat(b, *sizes, axis=0))
        scores = mask(b, scores, hidden)
        if H != G:
            back = (b.constant([0, G, -1]), end_position(b))
            scores = b.op("Reshape", scores, concat(b, *back, axis=0))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    return out if H == G else reshape(b, out, 0, H, -1, K)


def mask(b: GraphBuilder, scores: Value, hidden: Value) -> Value:
    return b.op("Where", hidden, b.constant(-math.inf, "float32"), scores)


def emit_sliding_window(b: GraphBuilder, mixer: nn.Module, x: Value) -> Value:
    """Softmax over a window w. The state has w - 1 keys and values, at first zeros that are hidden.

    A prompt is cut into blocks of w queries, each of which sees two blocks of keys.
    """
    assert isinstance(mixer, SlidingWindowAttention)
    H, G, K, w = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.window
    q, k, v = _project_heads(b, mixer, x)
    if w == 1:
        return _combine_heads(b, mixer, _repeat_heads(b, v, G, H, K))
    seen = []
    for name, new in (("key", k), ("value", v)):
        past = b.past(name, ("B", G, w - 1, K))
        seen.append(concat(b, past, new, axis=2))
        b.present(past, cut(b, seen[-1], 1 - w, axis=2))
    if b.step:
        hidden = b.once(("empty slots", w), lambda: _empty_slots(b, w))
        grouped = reshape(b, q, 0, G, H // G, K)
        scores = mask(b, matmul_transposed(b, grouped, seen[0], 4), hidden)
        out = b.op("MatMul", b.op("Softmax", scores, axis=-1), seen[1])
        return _combine_heads(b, mixer, reshape(b, out, 0, H, 1, K))
    return _combine_heads(b, mixer, _attend_blocks(b, mixer, q, *seen))


def _empty_slots(b: GraphBuilder, w: int) -> Value:
    """Which of the last w keys come before the first token, ``[w]``."""
    empty = b.op("Sub", b.constant([w - 1]), POSITION)
    return b.op("Less", b.constant(list(range(w))), empty)


def _repeat_heads(b: GraphBuilder, v: Value, G: int, H: int, V: int) -> Value:
    """``[B, G, T, V]`` -> ``[B, H, T, V]``."""
    index = [h // (H // G) for h in range(H)]
    return v if G == H else b.op("Gather", v, b.constant(index), axis=1)


def _attend_blocks(b: GraphBuilder, mixer: Any, q: Value, k: Value, v: Value) -> Value:
    """Queries ``[B, H, T, K]``, and keys ``[B, G, w - 1 + T, K]``."""
    H, G, K, w = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.window
    size = b.constant([w])

    def pad_by(before: int) -> Value:
        """Pads on the tokens' axis, which bring T + before to a multiple of w."""
        rest = b.op("Mod", b.op("Neg", b.op("Add", length(b), b.constant([before]))), size)
        return concat(b, b.constant([0] * 6), rest, b.constant([0]), axis=0)

    blocks_q = reshape(
        b, b.op("Pad", q, b.once(("pad", w), lambda: pad_by(0))), 0, G, H // G, -1, w * K
    )
    blocks_q = b.op("Transpose", blocks_q, perm=[0, 1, 3, 2, 4])  # [B, G, n, H / G, w K]
    blocks_q = reshape(b, blocks_q, 0, G, -1, H // G * w, K)
    windows = []
    for x in (k, v):
        # one more block than queries have: w - 1 + T + 1 keys, filled to a multiple of w
        whole = b.op("Pad", x, b.once(("pad", w, "keys"), lambda: _pad_keys(b, pad_by(0))))
        blocks = reshape(b, whole, 0, G, -1, w, K)
        windows.append(concat(b, cut(b, blocks, 0, -1, axis=2), cut(b, blocks, 1, axis=2), axis=3))
    scores = matmul_transposed(b, blocks_q, windows[0], 5)
    scores = mask(b, scores, b.once(("hidden", w, H // G), lambda: _hidden_keys(b, w, H // G)))
    out = b.op("MatMul", b.op("Softmax", scores, axis=-1), windows[1])
    out = reshape(b, out, 0, G, -1, H // G, w * K)
    out = reshape(b, b.op("Transpose", out, perm=[0, 1, 3, 2, 4]), 0, H, -1, K)
    return cut(b, out, 0, length(b), axis=2)


def _pad_keys(b: GraphBuilder, pads: Value) -> Value:
    """The pads of the queries, and one more key."""
    return b.op("Add", pads, b.constant([0] * 6 + [1, 0]))


def _hidden_keys(b: GraphBuilder, w: int, repeats: int) -> Value:
    """Which of two blocks of keys a block's queries do not see: ``[n, H / G · w, 2 w]``.

    Query i sees keys i to i + w - 1. Keys before the first token are hidden.
    """
    query, key = b.constant([[i] for i in range(w)] * repeats), b.constant(list(range(2 * w)))
    ahead = b.op("Sub", key, query)
    outside = (b.op("Less", ahead, b.constant(0)), b.op("GreaterOrEqual", ahead, b.constant(w)))
    # the position of each block's first key is its number times w, less w - 1 and the past
    count = b.op("Div", b.op("Add", length(b), b.constant([w - 1])), b.constant([w]))
    starts = b.op("Range", b.constant(0), squeeze(b, count, 0), b.constant(1))
    starts = b.op("Mul", starts, b.constant(w))
    starts = add(b, starts, POSITION, b.constant([1 - w]))
    place = b.op("Add", unsqueeze(b, starts, -1), key)  # [n, 2 w]
    missing = unsqueeze(b, b.op("Less", place, b.constant(0)), 1)
    return b.op("Or", missing, b.op("Or", *outside))
