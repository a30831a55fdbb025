"""Mixed chunk attention on the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    MixedChunkInputs,
    MixedChunkOutputs,
    MixedChunkSpec,
    mixed_chunk_gradients,
    new_heads,
    sequence_count,
)
from . import library
from .library import (
    TYPES,
    Arguments,
    MixedChunk,
    array_of,
    call_library,
    check_inputs,
    instruction_set_number,
    pointer_to,
    require,
    thread_count,
)

SPAN = 512
ACTIVATIONS = ("relu2", "laplace")


def obstacle(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    return library.obstacle(inputs.value) or (
        "its kernels have no dropout" if spec.dropout_p else ""
    )


def prepared(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkSpec:
    """The options with span."""
    return spec._replace(span=SPAN)


def describe(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    if inputs.value.shape[2] == 1 and inputs.position is not None and spec.returns_state:
        return f"one token onto a state, {spec.group_size} slots of the open group"
    return f"groups of {spec.group_size} tokens, one after another"


def _token_slots(
    rows: int,
    tokens: int,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    fill: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """The token in each slot of all sequences, one after another, and their offsets ``[N + 1]``.

    A token has its number in the flattened batch. A token of the state's open group has -1 - slot.
    """
    fills = [0] * rows if fill is None else fill.tolist()
    if key_mask is None and cu_seqlens is None and len(set(fills)) == 1:
        place, old = torch.arange(rows * tokens, device="cpu"), fills[0]
        if old:
            slots = torch.arange(-1, -1 - old, -1, device="cpu").expand(rows, old)
            place = torch.cat((slots, place.view(rows, tokens)), 1).flatten()
        return place, torch.arange(rows + 1, device="cpu") * (old + tokens)
    place = torch.arange(rows * tokens, device="cpu")
    if cu_seqlens is None:
        N, owner = rows, place // max(tokens, 1)
        seen = torch.ones_like(place, dtype=torch.bool)
    else:
        N, owner = (
            cu_seqlens.shape[0] - 1,
            torch.searchsorted(cu_seqlens.long(), place, right=True) - 1,
        )
        seen = owner < cu_seqlens.shape[0] - 1
    if key_mask is not None:
        seen &= key_mask.flatten()
    place, owner = place[seen], owner[seen]
    if fill is not None:
        slots = (torch.arange(group_size, device="cpu") < fill[:, None]).nonzero()
        owner, order = torch.cat((slots[:, 0], owner)).sort(stable=True)
        place = torch.cat((-1 - slots[:, 1], place))[order]
    bounds = torch.nn.functional.pad(torch.bincount(owner, minlength=N).cumsum(0), (1, 0))
    return place, bounds


class _Call(Arguments):
    """The arguments of one forward or backward call."""

    def __init__(self, x: MixedChunkInputs, spec: MixedChunkSpec):
        self.state_shapes = spec.state_shapes(x)
        _check_call(x, spec)
        super().__init__(x.value.dtype)
        (B, H, T, K), (_, G, _, V), L = x.quad_query.shape, x.value.shape, x.lin_query.shape[3]
        g, biases = spec.group_size, 0 if x.bias is None else x.bias.shape[0]
        m = self.mixed_chunk = MixedChunk(
            B=B, N=sequence_count(B, x.cu_seqlens), H=H, G=G, T=T, K=K, L=L, V=V, size=g,
            span=spec.span, type=TYPES[x.value.dtype],
            activation=ACTIVATIONS.index(spec.activation), is_causal=spec.is_causal,
            summed=spec.is_causal or spec.reduce_groups, biases=biases,
            threads=thread_count(B * H * T * (2 * L * V + g * (K + V))),
            isa=instruction_set_number(),
        )  # fmt: skip
        m.quad_query, m.quad_key, m.lin_query, m.lin_key, m.value = (
            self.array_of(t) for t in x.tokens
        )
        fill = None if x.position is None else x.position.long() % g
        index, bounds = _token_slots(B, T, x.key_mask, x.cu_seqlens, fill, g)
        m.index = self.pointer_to(index, torch.int64)
        m.bounds = self.pointer_to(bounds, torch.int64)
        m.numerator, m.open_quad_key, m.open_lin_key, m.open_value = (
            self.pointer_to(s, self.sums_dtype) for s in x.sums
        )
        if x.bias is not None:
            m.bias = self.pointer_to(x.bias, self.sums_dtype)
            if T > 1:  # for a single token a transposed copy would cost more than it saves
                m.bias_transposed = self.pointer_to(x.bias.mT, self.sums_dtype)


def _check_call(x: MixedChunkInputs, spec: MixedChunkSpec) -> None:
    """Check everything that the C++ relies on."""
    (B, H, T, K), (_, G, _, V), L, g = (
        x.quad_query.shape,
        x.value.shape,
        x.lin_query.shape[3],
        spec.group_size,
    )
    check_inputs(
        quad_query=(x.quad_query, (B, H, T, K)),
        quad_key=(x.quad_key, (B, G, T, K)),
        lin_query=(x.lin_query, (B, H, T, L)),
        lin_key=(x.lin_key, (B, G, T, L)),
        value=(x.value, (B, G, T, V)),
    )
    require(G > 0 and H % G == 0, "quad_key", f"heads that divide quad_query's {H}", G)
    require(0 < g < 2**31, "group_size", "at least 1, below 2**31", g)
    require(spec.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", spec.activation)
    require(spec.span >= 1, "span", "at least 1", spec.span)
    require(
        spec.is_causal or not spec.returns_state,
        "returns_state",
        "False, if not causal",
        spec.returns_state,
    )
    if x.key_mask is not None:
        require(x.key_mask.shape == (B, T), "key_mask", [B, T], list(x.key_mask.shape))
    if x.bias is not None:
        require(x.bias.shape in ((1, g, g), (H, g, g)), "bias", "[1 or H, g, g]", x.bias.shape)
    if x.cu_seqlens is not None:
        bounds = x.cu_seqlens.tolist()
        rising = bounds == sorted(bounds) and len(bounds) > 0 and bounds[0] == 0 and bounds[-1] <= T
        require(
            rising and B == 1,
            "cu_seqlens",
            f"offsets that rise from 0 to at most {T}, and B = 1",
            bounds,
        )
    names = ("numerator", "open_quad_key", "open_lin_key", "open_value")
    for name, s, shape in zip(names, x.sums, spec.state_shapes(x), strict=True):
        require((s is None) == (x.position is None), name, "all parts of the state or none", s)
        if s is not None:
            check_inputs(**{name: (s, shape)})
    rows = (sequence_count(B, x.cu_seqlens),)
    require(x.position is None or x.position.shape == rows, "position", list(rows), x.position)


def forward(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkOutputs:
    """The outputs by the C++ kernels."""
    c, outputs = _Call(inputs, spec), spec.new_outputs(inputs)
    m = c.mixed_chunk
    if not inputs.covers_tokens:
        outputs.out.zero_()
    m.out = array_of(outputs.out)
    if spec.returns_state:
        m.final_numerator, m.final_quad_key, m.final_lin_key, m.final_value = (
            pointer_to(s) for s in outputs.state
        )
    call_library("cumulant_mixed_chunk_forward", m)
    return outputs


def backward(
    upstream: MixedChunkOutputs,
    inputs: MixedChunkInputs,
    outputs: MixedChunkOutputs,
    spec: MixedChunkSpec,
) -> MixedChunkInputs:
    """The inputs' gradients by the C++ kernels."""
    c = _Call(inputs, spec)
    m, dstate = c.mixed_chunk, upstream.state
    check_inputs(dout=(upstream.out, (*inputs.quad_query.shape[:3], inputs.value.shape[3])))
    names = ("dnumerator", "dopen_quad_key", "dopen_lin_key", "dopen_value")
    for name, s, shape in zip(names, dstate, c.state_shapes, strict=True):
        if s is not None:
            check_inputs(**{name: (s, shape)})
    m.dout = c.array_of(upstream.out)
    m.dfinal_numerator, m.dfinal_quad_key, m.dfinal_lin_key, m.dfinal_value = (
        c.pointer_to(s, c.sums_dtype) for s in dstate
    )
    # The C++ writes all five gradients in value's dtype.
    tokens = [new_heads(x, x.shape[1], x.shape[3], c.dtype) for x in inputs.tokens]
    if not inputs.covers_tokens:
        tokens = [x.zero_() for x in tokens]
    state = [None if s is None else s.new_zeros(s.shape, dtype=c.sums_dtype) for s in inputs.sums]
    m.dquad_query, m.dquad_key, m.dlin_query, m.dlin_key, m.dvalue = (array_of(x) for x in tokens)
    m.dnumerator, m.dopen_quad_key, m.dopen_lin_key, m.dopen_value = (pointer_to(s) for s in state)
    bias, dbias = inputs.bias, None
    if bias is not None:  # the C++ writes its gradient transposed, by key and query
        dbias = bias.new_zeros(bias.shape, dtype=c.sums_dtype)
    call_library("cumulant_mixed_chunk_backward", m, pointer_to(dbias))
    if bias is not None and dbias is not None:
        dbias = dbias.mT.to(bias.dtype).contiguous()
    return mixed_chunk_gradients(tokens, dbias, state)
