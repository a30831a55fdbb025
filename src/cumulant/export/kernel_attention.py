"""`LinearAttention` and `TaylorAttention` in ONNX, by the operator `LinearAttention`.

The operator has neither feature maps nor a denominator. So features come from plain operators. A
column of ones behind the values makes the last column of its output the denominator, and the last
column of its state the sum of the keys' features.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LinearAttention, TaylorAttention
from ..nn.decay import FixedDecay, GatedDecay, Mamba2Decay
from ..nn.feature_maps import HedgehogFeatureMap, RebasedFeatureMap
from ..ops.taylor import feature_count
from .graph import GraphBuilder, Value
from .layers import (
    concat,
    convolve,
    norm,
    normalize_heads,
    project,
    reshape,
    rotate,
    scale,
    split,
    token_shift,
    unsqueeze,
)

TINY = torch.finfo(torch.float32).tiny
Tokens = tuple[Value, Value, Value]  # features [B, T, H, F] and [B, T, G, F], values [B, T, G, V]


def emit_kernel_attention(b: GraphBuilder, mixer: nn.Module, x: Value) -> Value:
    """``[B, T, D]`` -> ``[B, T, D]``."""
    assert isinstance(mixer, LinearAttention | TaylorAttention)
    if not mixer.is_causal or mixer.out_proj is None:
        raise b.refuse("only causal attention with combined heads has steps")
    if mixer.shift_tokens:
        x = token_shift(b, x, mixer.dim)
    h = x if mixer.norm is None else norm(b, x, mixer.norm, mixer.dim)
    q, k, v = _project_heads(b, mixer, h)
    decay = None
    if mixer.decay is not None:
        with b.part("decay"):
            decay = _log_decays(b, mixer.decay, h)
    out = _attend(b, mixer, q, k, v, decay)
    if mixer.gate_proj is not None:
        gate = b.op("Sigmoid", project(b, x, mixer.gate_proj))
        out = b.op("Mul", out, unsqueeze(b, gate, -1))
    out = reshape(b, out, 0, 0, mixer.num_heads * mixer.value_dim)
    return project(b, out, mixer.out_proj)


def _project_heads(b: GraphBuilder, mixer: Any, h: Value) -> tuple[Value, Value, Value]:
    """q ``[B, T, H, K]``, k ``[B, T, G, K]`` and v ``[B, T, G, V]``."""
    H, G, K, V = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.value_dim
    mixed = project(b, h, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    if mixer.conv is not None:
        mixed = convolve(b, mixed, mixer.conv.weight)
    both, v = split(b, mixed, (H + G) * K, G * V)
    if mixer.qk_norm:
        both = normalize_heads(b, reshape(b, both, 0, 0, H + G, K), K)
        both = reshape(b, both, 0, 0, (H + G) * K)
    if mixer.rotary is not None:
        both = rotate(b, both, mixer.rotary, H + G)
    q, k = split(b, reshape(b, both, 0, 0, H + G, K), H, G, axis=2)
    return q, k, reshape(b, v, 0, 0, G, V)


def _log_decays(b: GraphBuilder, decay: nn.Module, h: Value) -> Value:
    """Those of each token and key/value head, ``[B, T, G]``."""
    if type(decay) is FixedDecay:
        constants = b.constant([[decay.log_decays()]], "float32")
        shape = concat(b, b.op("Shape", "input_ids"), b.constant([decay.num_kv_heads]), axis=0)
        return b.op("Expand", constants, shape)
    if type(decay) is GatedDecay:
        logit = b.op("MatMul", h, b.weight(decay.weight, transposed=True))
        logit = b.op("Add", logit, b.weight(decay.bias))
        negative = b.op("Softplus", b.op("Neg", logit))  # the logarithm of sigmoid, negated
        return scale(b, negative, -1 / decay.divisor)
    if type(decay) is Mamba2Decay:
        logit = b.op("MatMul", h, b.weight(decay.weight, transposed=True))
        step = b.op("Softplus", b.op("Add", logit, b.weight(decay.dt_bias)))
        rates = b.derive(f"{b.part_name} rates", lambda: -decay.A_log.detach().float().exp())
        return b.op("Mul", step, b.weight(rates))
    raise b.refuse(f"{type(decay).__name__} is no decay of this package")


def _attend(
    b: GraphBuilder, mixer: Any, q: Value, k: Value, v: Value, decay: Value | None
) -> Value:
    """The heads' outputs ``[B, T, H, V]``."""
    G, V = mixer.num_kv_heads, mixer.value_dim
    if isinstance(mixer, TaylorAttention):
        K, order, constant = mixer.head_dim, mixer.order, mixer.constant_term
        F, divides = feature_count(K, order, constant_term=constant), True
        phi_q = taylor_features(b, scale(b, q, mixer.scale), K, order, constant)
        phi_k = taylor_features(b, k, K, order, constant)
    else:
        assert isinstance(mixer, LinearAttention)
        with b.part("feature_map"):
            phi_q, phi_k, F, divides = _apply_feature_map(b, mixer, q, k)
    width = V + 1 if divides else V
    if divides:  # a column of ones behind the values
        ends = b.constant([0] * 7 + [1])
        v = b.op("Pad", v, ends, b.constant(1.0, "float32"))
    walk = _read_token if b.step and b.operators == "standard" else _read_tokens
    out = walk(b, mixer, (phi_q, phi_k, v), b.past("sums", ("B", G, F, width)), decay, (F, width))
    if not divides:
        return out
    numerator, denominator = split(b, out, V, 1)
    if not (isinstance(mixer, TaylorAttention) and mixer.order % 2 == 0 and mixer.constant_term):
        # a denominator of zero gives zero; those of even orders with the constant are never zero
        size = b.op("Abs", denominator)
        empty = b.op("Less", size, b.constant(TINY, "float32"))
        denominator = b.op("Where", empty, b.constant(1.0, "float32"), denominator)
    return b.op("Div", numerator, denominator)


def _read_tokens(
    b: GraphBuilder,
    mixer: Any,
    tokens: Tokens,
    past: Value,
    decay: Value | None,
    sizes: tuple[int, int],
) -> Value:
    """``[B, T, H, V]`` by the operator, and the sums after the last token."""
    H, G, (F, width) = mixer.num_heads, mixer.num_kv_heads, sizes
    packed = zip(tokens, (H * F, G * F, G * width), strict=True)
    out, present = b.ops(
        "LinearAttention",
        2,
        *(reshape(b, x, 0, 0, size) for x, size in packed),
        past,
        *(() if decay is None else (decay,)),
        domain="com.microsoft" if b.operators == "onnxruntime" else "",
        q_num_heads=H,
        kv_num_heads=G,
        update_rule="linear" if decay is None else "gated",
        scale=1.0,
    )
    b.present(past, present)
    return reshape(b, out, 0, 0, H, width)


def _read_token(
    b: GraphBuilder,
    mixer: Any,
    tokens: Tokens,
    past: Value,
    decay: Value | None,
    sizes: tuple[int, int],
) -> Value:
    """The same for one token, by three plain operators.

    They are faster than a loop over one token, which is what the operator becomes in a runtime that
    has no kernel for it.
    """
    H, G, (F, width) = mixer.num_heads, mixer.num_kv_heads, sizes
    q, k, v = tokens
    outer = b.op("MatMul", reshape(b, k, 0, G, F, 1), reshape(b, v, 0, G, 1, width))
    kept = past
    if decay is not None:
        kept = b.op("Mul", past, reshape(b, b.op("Exp", decay), 0, G, 1, 1))
    sums = b.op("Add", kept, outer)
    b.present(past, sums)
    out = b.op("MatMul", reshape(b, q, 0, G, H // G, F), sums)
    return reshape(b, out, 0, 1, H, width)


def taylor_features(b: GraphBuilder, x: Value, K: int, order: int, constant_term: bool) -> Value:
    """``[..., K]`` -> ``[..., F]`` in the canonical order; see `cumulant.LinearState`.

    The monomials of degree p are a product of p selections of x. Each selection is a product with
    a 0/1 matrix, which onnxruntime computes faster than it gathers.
    """
    parts = []
    if constant_term:
        parts.append(b.constant(1.0, "float32"))
    for degree in range(1, order + 1):
        selected = [
            x if degree == 1 else b.op("MatMul", x, b.weight(matrix))
            for matrix in _selections(b, K, degree)
        ]
        product = selected[0]
        for factor in selected[1:]:
            product = b.op("Mul", product, factor)
        parts.append(product)
    if constant_term:  # in front of the features of degree 1
        begins = b.constant([0, 0, 0, 1, 0, 0, 0, 0])
        parts = [b.op("Pad", parts[1], begins, parts[0]), *parts[2:]]
    return concat(b, *parts, axis=-1)


def _selections(b: GraphBuilder, K: int, degree: int) -> list[Tensor]:
    """Matrices ``[K, monomials]``, one for each factor; the first one has the weights."""
    monomials = list(combinations_with_replacement(range(K), degree))

    def make(factor: int) -> Tensor:
        matrix = torch.zeros(K, len(monomials))
        for column, monomial in enumerate(monomials):
            repeats = math.prod(math.factorial(monomial.count(i)) for i in set(monomial))
            matrix[monomial[factor], column] = 1 if factor else 1 / math.sqrt(repeats)
        return matrix

    names = [f"monomials {K} {degree} {factor}" for factor in range(degree)]
    return [b.derive(name, partial(make, factor)) for factor, name in enumerate(names)]


def _apply_feature_map(
    b: GraphBuilder, mixer: LinearAttention, q: Value, k: Value
) -> tuple[Value, Value, int, bool]:
    """Features of queries and keys, their number, and whether to divide by their sums."""
    name, K = mixer.feature_map, mixer.head_dim
    q = scale(b, q, 1.0 if mixer.scale is None else mixer.scale)
    if name is None:
        maps: list[Any] = [mixer.query_map, mixer.key_map]
        kinds = {type(m) for m in maps}
        if kinds == {HedgehogFeatureMap}:
            return _hedgehog(b, maps[0], q), _hedgehog(b, maps[1], k), 2 * K, mixer.normalize
        if kinds == {RebasedFeatureMap}:
            F = K * (K + 1) // 2
            return _rebased(b, maps[0], q, "q"), _rebased(b, maps[1], k, "k"), F, mixer.normalize
        raise b.refuse(f"{type(maps[0]).__name__} is no feature map of this package")
    if name == "elu":
        if mixer.normalize:
            # a query's largest feature is at least 1: quotients are the same, and none is 0 / 0
            top = b.op("ReduceMax", q, b.constant([-1]), keepdims=1)
            q = b.op("Sub", q, b.op("Min", top, b.constant(0.0, "float32")))
        return _elu(b, q), _elu(b, k), K, mixer.normalize
    if name == "relu":
        return b.op("Relu", q), b.op("Relu", k), K, mixer.normalize
    if name == "identity":
        return q, k, K, mixer.normalize
    if name == "softmax":
        return *_softmax_features(b, mixer, q, k), K, False
    raise b.refuse("a callable is no part of a graph; use a feature map by its name")


def _elu(b: GraphBuilder, x: Value) -> Value:
    """elu + 1, as exp below zero and x + 1 above."""
    below = b.op("Exp", b.op("Min", x, b.constant(0.0, "float32")))
    return b.op("Add", below, b.op("Relu", x))


def _softmax_features(
    b: GraphBuilder, mixer: LinearAttention, q: Value, k: Value
) -> tuple[Value, Value]:
    """See `cumulant.ops.feature_maps.softmax_features`."""
    H, G, K = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    phi_q, phi_k = b.op("Softmax", q, axis=-1), b.op("Exp", k)
    if not mixer.normalize:
        return phi_q, phi_k
    past = b.past("denominator", ("B", G, K))
    sums = phi_k if b.step else b.op("CumSum", phi_k, b.constant(1))
    sums = b.op("Add", sums, unsqueeze(b, past, 1))  # [B, T, G, K]
    last = b.op("Gather", sums, b.constant(-1), axis=1)
    b.present(past, last)
    grouped = reshape(b, phi_q, 0, 0, G, H // G, K)
    empty = b.op("Equal", sums, b.constant(0.0, "float32"))
    sums = b.op("Where", empty, b.constant(1.0, "float32"), sums)
    divided = b.op("Div", grouped, unsqueeze(b, sums, 3))
    return reshape(b, divided, 0, 0, H, K), phi_k


def _hedgehog(b: GraphBuilder, feature_map: HedgehogFeatureMap, x: Value) -> Value:
    """``[B, T, H, K]`` -> ``[B, T, H, 2K]``, with a matrix for each head."""
    y = b.op("MatMul", unsqueeze(b, x, 3), b.weight(feature_map.weight))
    y = reshape(b, y, 0, 0, feature_map.num_heads, feature_map.head_dim)
    both = (b.op("Softmax", part, axis=-1) for part in (y, b.op("Neg", y)))
    return concat(b, *both, axis=-1)


def _rebased(b: GraphBuilder, feature_map: RebasedFeatureMap, x: Value, name: str) -> Value:
    """``[B, T, H, K]`` -> ``[B, T, H, K (K + 1) / 2]``."""
    K, part = feature_map.head_dim, f"{b.part_name} {name}"
    gamma = b.derive(f"{part} gamma", lambda: feature_map.gamma.detach()[:, 0])
    beta = b.derive(f"{part} beta", lambda: feature_map.beta.detach()[:, 0])
    y = b.op("Mul", normalize_heads(b, x, K), b.weight(gamma))
    y = b.op("Add", y, b.weight(beta))
    # the Taylor monomials of degree 2 have the weights sqrt(1/2) and 1, these sqrt(1/K), sqrt(2/K)
    first, second = (b.op("MatMul", y, b.weight(m)) for m in _selections(b, K, 2))
    return scale(b, b.op("Mul", first, second), math.sqrt(2 / K))
