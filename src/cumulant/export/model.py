"""The whole language model as an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models import CumulantForCausalLM
from ..models.block import CumulantBlock
from ..models.feed_forward import FeedForward
from ..nn import (
    ElitaAttention,
    ElitaFeedForward,
    GatedAttentionUnit,
    GatedShortConvolution,
    LinearAttention,
    MixedChunkAttention,
    SlidingWindowAttention,
    SoftmaxAttention,
    TaylorAttention,
)
from ..nn.step import has_hooks
from .elita import emit_elita
from .flash import emit_mixed_chunk
from .gated import emit_gated_attention
from .graph import POSITION, GraphBuilder, Value, Weights
from .kernel_attention import emit_kernel_attention
from .layers import (
    angles,
    check_linear,
    concat,
    convolve,
    cut,
    end_position,
    norm,
    project,
    reshape,
    silu,
    split,
    unsqueeze,
)
from .softmax import emit_sliding_window, emit_softmax

Emit = Callable[[GraphBuilder, nn.Module, Value], Value]


def emit_short_convolution(b: GraphBuilder, mixer: nn.Module, x: Value) -> Value:
    """``W_out (conv(W_in x) ⊙ W_gate x)``."""
    assert isinstance(mixer, GatedShortConvolution)
    content, gate = split(b, project(b, x, mixer.in_proj), mixer.dim, mixer.dim)
    content = convolve(b, content, mixer.conv.weight)
    return project(b, b.op("Mul", content, gate), mixer.out_proj)


def emit_feed_forward(b: GraphBuilder, layer: nn.Module, x: Value) -> Value:
    """SwiGLU or GELU."""
    assert isinstance(layer, FeedForward)
    if layer.gate_proj is None:
        hidden = b.op("Gelu", project(b, x, layer.up_proj), approximate="none")
    else:
        gate = silu(b, project(b, x, layer.gate_proj))
        hidden = b.op("Mul", gate, project(b, x, layer.up_proj))
    return project(b, hidden, layer.out_proj)


def emit_elita_feed_forward(b: GraphBuilder, layer: nn.Module, x: Value) -> Value:
    """All products of two projections, projected."""
    assert isinstance(layer, ElitaFeedForward)
    hidden = unsqueeze(b, silu(b, project(b, x, layer.hidden_proj)), -2)
    factor = unsqueeze(b, silu(b, project(b, x, layer.factor_proj)), -1)
    products = b.op("Mul", factor, hidden)  # column j * hidden + i
    return project(b, reshape(b, products, 0, 0, layer.hidden * layer.factor), layer.out_proj)


MIXERS: dict[type[nn.Module], Emit] = {
    LinearAttention: emit_kernel_attention,
    TaylorAttention: emit_kernel_attention,
    SoftmaxAttention: emit_softmax,
    SlidingWindowAttention: emit_sliding_window,
    GatedShortConvolution: emit_short_convolution,
    GatedAttentionUnit: emit_gated_attention,
    MixedChunkAttention: emit_mixed_chunk,
    ElitaAttention: emit_elita,
}
FEED_FORWARDS: dict[type[nn.Module], Emit] = {
    FeedForward: emit_feed_forward,
    ElitaFeedForward: emit_elita_feed_forward,
}


def emit_module(b: GraphBuilder, table: dict[type[nn.Module], Emit], layer: Any, x: Value) -> Value:
    emit = table.get(type(layer))
    if emit is None:
        raise b.refuse(f"{type(layer).__name__} has no form in ONNX here")
    return emit(b, layer, x)


def emit_block(b: GraphBuilder, block: nn.Module, x: Value, dim: int) -> Value:
    if type(block) is not CumulantBlock:
        raise b.refuse(f"expected a CumulantBlock, got {type(block).__name__}")
    with b.part("mixer"):
        x = b.op("Add", x, emit_module(b, MIXERS, block.mixer, norm(b, x, block.mixer_norm, dim)))
    if block.feed_forward is None:
        return x
    with b.part("feed_forward"):
        h = norm(b, x, block.feed_forward_norm, dim)
        return b.op("Add", x, emit_module(b, FEED_FORWARDS, block.feed_forward, h))


def build_graph(
    model: CumulantForCausalLM, weights: Weights, *, step: bool, operators: str
) -> tuple[Any, GraphBuilder]:
    """The model's ONNX graph that reads a prompt, or one token a call, and its builder.

    Raises:
        ValueError: a part of the model has no form in ONNX.
    """
    if type(model) is not CumulantForCausalLM:
        raise ValueError(f"model: expected a CumulantForCausalLM, got {type(model).__name__}")
    for name, module in model.named_modules():
        if has_hooks(module):
            where = name or "the whole"
            raise ValueError(f"model: {where} has a hook, which a graph would leave out; remove it")
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise ValueError(f"model: {empty} is on the meta device, without numbers; load it first")
    b = GraphBuilder(weights, step=step, operators=operators)
    ids = b.input("input_ids", "int64", ("B", 1 if step else "T"))
    kept = None if step else b.input("logits_to_keep", "int64", (1,))
    b.past("position", (1,), "int64")
    stack, config = model.model, model.config
    with b.part("model"):
        x = _embed(b, stack, ids)
        for wrap in range(config.wraps):
            if stack.wrap_bias is not None:
                bias = b.derive(f"wrap {wrap}", partial(stack.wrap_bias.detach().select, 0, wrap))
                x = b.op("Add", x, b.weight(bias))
            for i, block in enumerate(stack.layers):
                b.layer = wrap * len(stack.layers) + i
                with b.part(f"layers.{i}"):
                    x = emit_block(b, block, x, config.hidden_size)
        b.layer = None
        if kept is not None:  # before the last norm and the logits, which may be many
            x = cut(b, x, b.op("Neg", kept), axis=1)
        with b.part("norm"):
            x = norm(b, x, stack.norm, config.hidden_size)
    logits = _logits(b, model, x)
    b.output("logits", logits, "float32", ("B", 1 if step else "N", config.vocab_size))
    b.present(POSITION, end_position(b))
    b.return_states()
    return b.model("step" if step else "prompt"), b


def _embed(b: GraphBuilder, stack: Any, ids: Value) -> Value:
    """The embedded tokens ``[B, T, D]``, with their absolute positions if the model has such."""
    with b.part("embed_tokens"):
        table: Any = check_linear(b, stack.embed_tokens)
        x = b.op("Gather", b.weight(table.weight), ids, axis=0)
    if stack.position is None:
        return x
    with b.part("position"):
        own = stack.position.angles
        turns = angles(b, own.dim, own.base)
        waves = concat(b, b.op("Sin", turns), b.op("Cos", turns), axis=-1)
        return b.op("Add", x, b.op("Mul", waves, b.weight(stack.position.scale)))


def _logits(b: GraphBuilder, model: Any, x: Value) -> Value:
    """``[B, N, D]`` -> ``[B, N, vocab_size]``; a tied matrix is read as the embedding stores it."""
    with b.part("lm_head"):
        head: Any = check_linear(b, model.lm_head)
        embedding: torch.Tensor = model.model.embed_tokens.weight
        if head.weight.data_ptr() != embedding.data_ptr():
            logits = project(b, x, head)
        else:
            rows = b.op("Reshape", x, b.constant([-1, head.in_features]))
            bias = [] if head.bias is None else [b.weight(head.bias)]
            product = b.op("Gemm", rows, b.weight(embedding), *bias, transB=1)
            sizes = (b.op("Shape", x, start=0, end=2), b.constant([head.out_features]))
            logits = b.op("Reshape", product, concat(b, *sizes, axis=0))
    if model.logit_ffn is None:
        return logits
    with b.part("logit_ffn"):
        hidden = silu(b, project(b, logits, model.logit_ffn.up_proj))
        return b.op("Add", logits, project(b, hidden, model.logit_ffn.out_proj))
