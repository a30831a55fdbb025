"""Linear and Taylor attention on the native kernels.

The C++ goes through each sequence chunk by chunk. Blocks of the tokens' features are formed in the
first-level cache, and multiplied by the sums while they are there. So memory is read and written
once. See docs/kernels.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import (
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    feature_count,
    new_heads,
    sequence_count,
)
from ..transforms import longest_sequence
from . import library
from .library import (
    MAX_ORDER,
    TYPES,
    Arguments,
    Attention,
    array_of,
    call_library,
    check_inputs,
    instruction_set_number,
    pointer_to,
    require,
    thread_count,
)

ACTIVATIONS = ("identity", "elu", "relu")
DECAY_TYPES = (torch.float32, torch.float64)
CHUNK = 64
# Causal calls without Taylor features have small sums, so most of their work is inside chunks.
# Shorter chunks make it less, unless one chunk is all.
SHORT_CHUNK = 48
SPAN = 512
# With more features than MANY and at most FEW_TOKENS tokens, PyTorch's quadratic form is faster.
MANY, FEW_TOKENS = 600, 128


def obstacle(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    K = inputs.query.shape[-1]
    if elsewhere := library.obstacle(inputs.query):
        return elsewhere
    if spec.order > MAX_ORDER:
        return f"its kernels go up to order {MAX_ORDER}, and this is order {spec.order}"
    if spec.order > 3 and math.comb(K + spec.order, spec.order) >= 2**31:
        return (
            f"its kernels go up to 2**31 features, and these are more: K = {K}, order {spec.order}"
        )
    return ""


def slower(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """Why PyTorch's quadratic form is faster for the call; empty if it is not."""
    stateful = inputs.numerator is not None or spec.returns_state or inputs.cu_seqlens is not None
    if spec.order <= 1 or stateful or torch.compiler.is_compiling():
        return ""
    (T, K), S = inputs.query.shape[2:], inputs.key.shape[2]
    features = math.comb(K + spec.order, spec.order)
    if features > MANY and T == S <= FEW_TOKENS and (not spec.is_causal or T > CHUNK):
        return f"it would form {features} features, which take longer than all {T} x {S} weights"
    return ""


def prepared(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionSpec:
    """The options with chunk and span; calls that are not causal return sums for the gradients."""
    chunk = min(CHUNK, SHORT_CHUNK) if spec.is_causal and spec.order == 0 else CHUNK
    return spec._replace(
        chunk=chunk, span=SPAN, returns_state=spec.returns_state or not spec.is_causal
    )


def _chunk(T: int, spec: AttentionSpec) -> int:
    """The tokens of a chunk for T queries. `prepared` must not compare lengths, because exported
    programs leave them open.
    """
    return CHUNK if T <= CHUNK else spec.chunk


def describe(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    T, K = inputs.query.shape[2:]
    length, chunk = longest_sequence(inputs.cu_seqlens, T), _chunk(T, spec)
    if length <= chunk and spec.is_causal:
        return f"one block of {length} tokens, the quadratic form"
    return f"chunks of {chunk} tokens, {feature_count(K, spec.order, spec.constant_term)} features"


def _check_call(x: AttentionInputs, spec: AttentionSpec) -> None:
    """Check everything that the C++ relies on."""
    (B, H, T, K), (G, S), V = x.query.shape, x.key.shape[1:3], x.value.shape[-1]
    check_inputs(
        query=(x.query, (B, H, T, K)), key=(x.key, (B, G, S, K)), value=(x.value, (B, G, S, V))
    )
    require(G > 0 and H % G == 0, "key", f"heads that divide query's {H}", G)
    require(
        max(H * K, G * V, 1) < 2**31, "value", "fewer than 2**31 numbers a token", max(H * K, G * V)
    )
    require(not spec.is_causal or T == S, "key", f"{T} tokens, as many as queries", S)
    if x.key_mask is not None:
        require(x.key_mask.shape == (B, S), "key_mask", str([B, S]), list(x.key_mask.shape))
    require(0 <= spec.order <= MAX_ORDER, "order", f"at most {MAX_ORDER}", spec.order)
    features = feature_count(K, spec.order, spec.constant_term)
    require(features < 2**31, "order", "fewer than 2**31 features", spec.order)
    require(spec.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", spec.activation)
    require(1 <= spec.chunk <= library.CHUNK, "chunk", f"1 to {library.CHUNK}", spec.chunk)
    require(spec.span >= 1, "span", "at least 1", spec.span)
    if x.log_decay is not None:
        check_inputs(log_decay=(x.log_decay, (B, G, S)))
        require(spec.is_causal, "log_decay", "causal attention", "both directions")
        wanted = "torch.float32 or torch.float64"
        require(x.log_decay.dtype in DECAY_TYPES, "log_decay", wanted, x.log_decay.dtype)
    if x.cu_seqlens is not None:
        bounds = x.cu_seqlens.tolist()
        rising = bounds == sorted(bounds) and len(bounds) > 0 and bounds[0] == 0 and bounds[-1] <= T
        wanted = f"offsets that rise from 0 to at most {T}, and B = 1"
        require(rising and B == 1 and T == S, "cu_seqlens", wanted, bounds)


class Call(Arguments):
    """The arguments of one forward or backward call."""

    def __init__(self, x: AttentionInputs, spec: AttentionSpec):
        _check_call(x, spec)
        (B, H, T, K), (_, G, S, _), V = x.query.shape, x.key.shape, x.value.shape[3]
        super().__init__(
            torch.promote_types(torch.promote_types(x.query.dtype, x.key.dtype), x.value.dtype)
        )
        F, chunk = feature_count(K, spec.order, spec.constant_term), _chunk(T, spec)
        self.sums = sequence_count(B, x.cu_seqlens), G, F
        if x.numerator is not None or x.denominator is not None:
            self.check_sums(V, numerator=x.numerator, denominator=x.denominator)
            both = (x.numerator is None) == (x.denominator is None)
            require(not spec.normalize or both, "denominator", "with the numerator", x.denominator)
        a = self.attention = Attention(
            B=B, N=self.sums[0], H=H, G=G, T=T, S=S, K=K, V=V, F=F,
            chunk=chunk, span=spec.span, type=TYPES[self.dtype],
            order=spec.order, constant_term=spec.constant_term,
            activation=ACTIVATIONS.index(spec.activation), scale=spec.scale,
            normalize=spec.normalize, is_causal=spec.is_causal, isa=instruction_set_number(),
            threads=thread_count(max(T, S) * B * H * (F * V + chunk * (K + V))),
        )  # fmt: skip
        a.query, a.key, a.value = (self.array_of(t) for t in (x.query, x.key, x.value))
        if x.key_mask is not None:
            a.key_mask = self.pointer_to(x.key_mask, torch.bool)
        if x.log_decay is not None:
            logs = x.log_decay[..., None]
            a.log_decay, a.decay_type = self.array_of(logs, logs.dtype), TYPES[logs.dtype]
        if x.cu_seqlens is not None:
            a.offsets = self.pointer_to(x.cu_seqlens.to("cpu"), torch.int64)
        if x.numerator is not None:
            a.numerator = self.pointer_to(x.numerator, self.sums_dtype)
            a.denominator = self.pointer_to(x.denominator, self.sums_dtype)

    def check_sums(self, V: int, **sums: Tensor | None) -> None:
        """Check numerators ``[N, G, F, V]`` and denominators ``[N, G, F]``.

        The end of a name tells which of the two it is.
        """
        for name, x in sums.items():
            if x is not None:
                check_inputs(
                    **{name: (x, (*self.sums, V) if name.endswith("numerator") else self.sums)}
                )


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    """The outputs by the C++ kernels."""
    c, outputs = Call(inputs, spec), spec.new_outputs(inputs)
    a = c.attention
    a.out, a.denominators = array_of(outputs.out), pointer_to(outputs.denominators)
    if spec.returns_state:
        a.final_numerator = pointer_to(outputs.final_numerator)
        a.final_denominator = pointer_to(outputs.final_denominator) if spec.normalize else None
    call_library("cumulant_attention_forward", a)
    return outputs


def backward(
    upstream: AttentionOutputs,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    spec: AttentionSpec,
) -> AttentionInputs:
    """The inputs' gradients by the C++ kernels."""
    c, shape, V = Call(inputs, spec), inputs.query.shape[:3], inputs.value.shape[3]
    a = c.attention
    dout, dS = upstream.out, upstream.final_numerator
    dz = upstream.final_denominator if spec.normalize else None
    check_inputs(dout=(dout, (*shape, V)), out=(outputs.out, (*shape, V)))
    found = list(outputs.denominators.shape)
    require(not spec.normalize or found == list(shape), "denominators", list(shape), found)
    c.check_sums(V, dnumerator=dS, ddenominator=dz)
    a.out, a.dout = c.array_of(outputs.out, c.sums_dtype), c.array_of(dout, c.sums_dtype)
    a.denominators = c.pointer_to(outputs.denominators, c.sums_dtype)
    a.dfinal_numerator = c.pointer_to(dS, c.sums_dtype)
    a.dfinal_denominator = c.pointer_to(dz, c.sums_dtype)
    if not spec.is_causal:
        S, z = outputs.final_numerator, outputs.final_denominator if spec.normalize else None
        c.check_sums(V, final_numerator=S, final_denominator=z)
        a.final_numerator = c.pointer_to(S, c.sums_dtype)
        a.final_denominator = c.pointer_to(z, c.sums_dtype)
    dq, dk, dv = (
        new_heads(t, t.shape[1], t.shape[3], c.dtype)
        for t in (inputs.query, inputs.key, inputs.value)
    )
    new = torch.empty_like if spec.normalize else torch.zeros_like
    past = inputs.numerator, inputs.denominator
    dS0, dz0 = (None if s is None else new(s, memory_format=torch.contiguous_format) for s in past)
    a.dquery, a.dkey, a.dvalue = array_of(dq), array_of(dk), array_of(dv)
    a.dnumerator, a.ddenominator = pointer_to(dS0), pointer_to(dz0) if spec.normalize else None
    logs, dlogs = inputs.log_decay, None
    if logs is not None:
        dlogs = torch.empty(logs.shape, dtype=torch.float64, device="cpu")
        a.dlog_decay = pointer_to(dlogs)
    call_library("cumulant_attention_backward", a)
    dq, dk, dv = dq.to(inputs.query.dtype), dk.to(inputs.key.dtype), dv.to(inputs.value.dtype)
    if logs is not None and dlogs is not None:
        dlogs = dlogs.to(logs.dtype)
    return AttentionInputs(dq, dk, dv, numerator=dS0, denominator=dz0, log_decay=dlogs)
