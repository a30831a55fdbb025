"""Linear and Taylor attention by Triton kernels.

The tokens of each sequence are split into spans, if there are fewer sequences and heads than a GPU
has room for. Sums over each span, and then those before each span, come first. With one span a
sequence, one kernel reads and writes everything once. See docs/gpu.md.
"""

from __future__ import annotations

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec, feature_count
from . import device
from .backward import Gradients
from .call import MOST_COLUMNS, Call

CHUNK = 64
# With elementwise features, where products are by mma.sync: longer chunks spill registers
# (docs/reports/gpu-offline). Those of Taylor features are no better with it.
SHORT_CHUNK = 32
SPAN = 512  # the fewest tokens in a span
MOST_TAYLOR = 32  # numbers in a vector whose Taylor features fit the registers


def obstacle(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    K, V = inputs.query.shape[-1], inputs.value.shape[-1]
    if elsewhere := device.obstacle(inputs.query):
        return elsewhere
    if spec.order > 2:
        return f"its kernels go up to order 2, and this is order {spec.order}"
    most = MOST_TAYLOR if spec.order else MOST_COLUMNS
    if not (0 < K <= most and V <= MOST_COLUMNS):
        return f"its kernels take K up to {most} and V up to {MOST_COLUMNS}, not K = {K}, V = {V}"
    return ""


def slower(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """Why another implementation is faster for the call; empty if none is."""
    return device.slower(inputs.query)


def prepared(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionSpec:
    """The options with chunk and span; calls that are not causal return sums for the gradients."""
    chunk = chunk_on(device.generation(inputs.query), spec.order)
    returns_state = spec.returns_state or not spec.is_causal
    return spec._replace(chunk=chunk, span=SPAN, returns_state=returns_state)


def chunk_on(generation: int, order: int) -> int:
    """Tokens in a chunk, on NVIDIA's GPUs of a generation; 0 stands for others."""
    return SHORT_CHUNK if generation in (8, 12) and order == 0 else CHUNK


def describe(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    features = feature_count(inputs.query.shape[-1], spec.order, spec.constant_term)
    return f"chunks of {spec.chunk} tokens, {features} features"


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    """The outputs by the Triton kernels."""
    call, y = Call(inputs, spec), spec.new_outputs(inputs)
    if inputs.cu_seqlens is not None:  # tokens after the last sequence
        y.out.zero_()
        y.denominators.zero_()
    final = (y.final_numerator, y.final_denominator) if spec.returns_state else (None, None)
    if call.direct and call.T == 1 and spec.returns_state and inputs.numerator is not None:
        call.step(y)
    elif call.direct:
        source = "none" if inputs.numerator is None else "state"
        call.read((source, call.x.numerator, call.x.denominator), y, final)
    else:
        before = call.key_sums(final)
        if spec.is_causal:
            call.read(("spans", before.sums, before.weights), y, (None, None))
        else:
            call.read(("state", *final), y, (None, None))
    return y


def backward(
    upstream: AttentionOutputs,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    spec: AttentionSpec,
) -> AttentionInputs:
    """The inputs' gradients by the Triton kernels."""
    return Gradients(upstream, inputs, outputs, spec).run()
