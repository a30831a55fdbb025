"""Linear and Taylor attention, a chunk of tokens at a time."""

from __future__ import annotations

import torch

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec, feature_count
from ..transforms import longest_sequence, without_autocast
from . import gradients, passes
from .layout import Dense, Packed

CHUNK = 128


def obstacle(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    return ""


def prepared(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionSpec:
    """The options with chunk length, and whether the forward pass returns its sums.

    Attention in both directions keeps the sums over many keys, so that the backward pass need not
    form them again. Compiled graphs serve any length, so their backward pass forms the sums again.
    """
    kept = spec.returns_state
    if not spec.is_causal and inputs.cu_seqlens is None and not torch.compiler.is_compiling():
        kept |= max(inputs.query.shape[2], inputs.key.shape[2]) > CHUNK
    return spec._replace(chunk=CHUNK, returns_state=kept)


def describe(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    (T, K), S = inputs.query.shape[2:], inputs.key.shape[2]
    length = longest_sequence(inputs.cu_seqlens, T)
    stateful = inputs.numerator is not None or spec.returns_state
    if length <= spec.chunk and T == S and (spec.is_causal or not stateful):
        return f"one block of {length} tokens, the quadratic form"
    features = feature_count(K, spec.order, spec.constant_term)
    return f"chunks of {spec.chunk} tokens, {features} features"


def _chunked_tokens(inputs: AttentionInputs, spec: AttentionSpec) -> passes.Tokens:
    T, S = inputs.query.shape[2], inputs.key.shape[2]
    queries: Dense | Packed
    if inputs.cu_seqlens is None:
        queries = Dense(inputs.query.shape[0], T, spec.chunk)
    else:
        queries = Packed.from_offsets(inputs.cu_seqlens, T, spec.chunk)
    keys = queries if S == T else Dense(inputs.key.shape[0], S, spec.chunk)
    return passes.Tokens(inputs, queries, keys, spec, inputs.dtype)


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    with without_autocast(inputs.query):
        return passes.forward_chunks(_chunked_tokens(inputs, spec))


def backward(
    upstream: AttentionOutputs,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    spec: AttentionSpec,
) -> AttentionInputs:
    with without_autocast(inputs.query):
        return gradients.backward_chunks(_chunked_tokens(inputs, spec), upstream, outputs)
