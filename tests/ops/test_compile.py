"""torch.compile, torch.export, the operators' registration, and what is kept for the backward
pass.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import cumulant as cm
from cumulant.kernels.operators import attention, elita, gated, mixed_chunk
from cumulant.kernels.spec import (
    AttentionInputs,
    AttentionSpec,
    ElitaInputs,
    ElitaSpec,
    GatedInputs,
    GatedSpec,
    MixedChunkInputs,
    MixedChunkSpec,
)

from .cases import CASES, CHUNK, assert_close, elita_logits, linear_part, sums_of
from .walking import walk

NAMES = (
    "taylor-2",
    "linear-elu",
    "linear-softmax",
    "linear-callable",
    "gated-laplace",
    "mixed-relu2",
    "mixed-bias",
    "elita-own",
)
COMPILED = [c for c in CASES if c.name in NAMES]
by_case = pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.name)
by_impl = pytest.mark.parametrize("impl", ["torch", "native"])


def opcheck(operator, *call):
    torch.library.opcheck(operator.forward, operator.arguments(*call))


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    walk(monkeypatch, chunk=CHUNK, span=CHUNK, block=CHUNK)
    walk(monkeypatch, elita_chunk=4)
    torch._dynamo.reset()


@by_impl
@by_case
@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph(case, impl):
    """One graph, outputs, states and gradients as in eager, for several lengths."""

    def run(q, k, v, mask):
        out, state = case(q, k, v, is_causal=True, key_mask=mask, return_state=True, impl=impl)
        again, _ = case(q, k, v, is_causal=True, state=state, return_state=True, impl=impl)
        return out, again, *sums_of(state)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 37, 50):
        mask = torch.rand(2, length) > 0.3
        results = []
        for f in (run, compiled):
            q, k, v = case.inputs(T=length, requires_grad=True)
            outs = f(q, k, v, mask)
            results.append(
                [*outs, *torch.autograd.grad(sum(x.sin().sum() for x in outs), (q, k, v))]
            )
        for actual, exact in zip(*results[::-1]):
            assert_close(actual, exact, 100)


@by_impl
def test_lengths_do_not_recompile(impl):
    """The operators are one node for any length."""
    compiled = torch.compile(
        lambda q, k, v: cm.taylor_attention(q, k, v, is_causal=True, impl=impl),
        fullgraph=True,
        dynamic=True,
        backend="eager",
    )
    case = CASES[1]
    compiled(*case.inputs(T=30))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (31, 40, 64):
            q, k, v = case.inputs(T=length)
            assert_close(
                compiled(q, k, v), cm.taylor_attention(q, k, v, is_causal=True, impl=impl), 10
            )


@by_impl
@by_case
def test_export(case, impl):
    class Mixer(torch.nn.Module):
        def forward(self, q, k, v):
            out, state = case(q, k, v, is_causal=True, return_state=True, impl=impl)
            return out, state

    q, k, v = case.inputs(T=37)
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(Mixer(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    longer = case.inputs(T=53)
    out, state = program.module()(*longer)
    expected, end = case(*longer, is_causal=True, return_state=True)
    assert_close(out, expected, 10)
    for actual, exact in zip(sums_of(state), sums_of(end)):
        assert_close(actual, exact, 10)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [7, 20], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("states", ["in and out", "out", "none", "packed"])
@by_impl
def test_opcheck(is_causal, normalize, length, states, impl):
    """Schema, fake kernels, autograd registration and AOT dispatch agree with the implementation,
    also in which states are empty."""
    q, k, v = CASES[1].inputs(1, T=length, requires_grad=True)
    S = (
        torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
        if states == "in and out"
        else None
    )
    Z = (
        torch.rand(1, 2, 5, dtype=torch.float64, requires_grad=True)
        if S is not None and normalize
        else None
    )
    mask = torch.rand(1, length) > 0.3
    bounds = torch.tensor([0, 3, length]) if states == "packed" else None
    wanted = states in ("in and out", "out")
    inputs = AttentionInputs(q, k, v, mask, bounds, S, Z)
    spec = AttentionSpec(
        0, True, "elu", 0.5, normalize, is_causal, wanted or (impl == "native" and not is_causal)
    )
    opcheck(attention.OPERATOR, impl, inputs, replace(spec, chunk=CHUNK, span=CHUNK))


@pytest.mark.parametrize("order", [0, 2])
def test_heads_lie_inside_tokens(order):
    """Splitting a projection into heads and joining the outputs again copies nothing, forwards or
    backwards.
    """
    x = [torch.randn(2, 70, heads * 6) for heads in (4, 2, 2)]
    q, k, v = (part.unflatten(-1, (-1, 6)).transpose(1, 2).requires_grad_() for part in x)
    spec = AttentionSpec(order, True, "elu", 0.5, True, True, False, chunk=32, span=32)
    opcheck(attention.OPERATOR, "native", AttentionInputs(q, k, v), spec)
    out = (
        cm.taylor_attention(q, k, v, is_causal=True)
        if order
        else cm.linear_attention(q, k, v, is_causal=True)
    )
    assert out.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 20], ids=["a token", "one group", "several groups"])
@pytest.mark.parametrize("states", ["in and out", "out", "none", "packed"])
@by_impl
def test_opcheck_mixed_chunks(is_causal, length, states, impl):
    if states in ("in and out", "out") and not is_causal:
        pytest.skip("no state")
    q, k, v = CASES[1].inputs(1, T=length, requires_grad=True)
    lin_q, lin_k = (x.detach().requires_grad_() for x in linear_part(q, k))
    bias = torch.randn(4, 8, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, length) > 0.3 if states == "out" else None
    bounds = torch.tensor([0, length // 2, length]) if states == "packed" else None
    past = [None] * 5
    if states == "in and out":
        _, start = cm.mixed_chunk_attention(
            *(x.detach()[:, :, :1].repeat(1, 1, 11, 1) for x in (q, k, lin_q, lin_k, v)),
            group_size=8,
            is_causal=True,
            return_state=True,
        )
        past = [
            x.requires_grad_() if x.is_floating_point() else x for x in start.tensors().values()
        ]
    spec = MixedChunkSpec(
        8, "laplace", is_causal, True, 0.0, states in ("in and out", "out"), span=8
    )
    opcheck(
        mixed_chunk.OPERATOR,
        impl,
        MixedChunkInputs(q, k, lin_q, lin_k, v, bias, mask, bounds, *past),
        spec,
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck_gated(is_causal, packed):
    q, k, v = CASES[1].inputs(1, T=20, requires_grad=True)
    bias = torch.randn(1, 4, 20, 20, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 3, 20]) if packed else None
    scale = torch.rand(1, 20, dtype=torch.float64)
    inputs = GatedInputs(q, k, v, scale, bias, bounds)
    opcheck(gated.OPERATOR, "torch", inputs, GatedSpec("laplace", is_causal, 0.0, block=8))


@pytest.mark.parametrize("length", [0, 1, 7, 37])
@pytest.mark.parametrize("states", ["in", "none", "packed"])
@by_impl
def test_opcheck_elita(length, states, impl):
    case = next(c for c in CASES if c.name == "elita-own")
    q, k, v = case.inputs(1, T=length, requires_grad=True)
    logits = [x.detach().requires_grad_() for x in elita_logits(case, q, k)]
    first = torch.rand(length) > 0.7 if states == "packed" else None
    m = torch.randn(1, 2, dtype=torch.float64, requires_grad=True) if states == "in" else None
    u = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) if states == "in" else None
    spec = ElitaSpec(chunk=4, span=4, block=16 if impl == "native" else 0)
    opcheck(elita.OPERATOR, impl, ElitaInputs(*logits, v, first, m, u), spec)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [10, 1000])
@by_impl
def test_nothing_but_inputs_outputs_and_denominators_is_kept(is_causal, length, impl):
    """No features [T, F], no weights [T, S]: only what came in, what went out, one number a row,
    and the sums [F, V] of a long context."""
    q, k, v = CASES[1].inputs(1, 2, length, 16, 16, G=2, dtype=torch.float32, requires_grad=True)
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = cm.taylor_attention(q, k, v, is_causal=is_causal, impl=impl)
    sums = 0 if is_causal or (length <= CHUNK and impl == "torch") else 2 * 153 * 17 * 4
    allowed = sum(x.numel() for x in (q, k, v, out)) * 4 + 2 * length * 4 + sums
    assert sum(kept.values()) <= allowed + 64


def kept(run, *inputs):
    """Bytes kept for the backward pass."""
    found = {}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = run(*inputs)
    del out
    return sum(found.values())


@pytest.mark.parametrize("is_causal", [True, False])
def test_gated_attention_keeps_only_its_inputs(is_causal):
    """No weights [T, g] or [T, S], no sums [T / g, K, V]."""
    q, k, v = CASES[1].inputs(1, 2, 1000, 16, 16, G=2, dtype=torch.float32, requires_grad=True)
    lin_q, lin_k = (x.detach().requires_grad_() for x in linear_part(q, k))
    five = (q, k, lin_q, lin_k, v)
    used = kept(lambda *x: cm.mixed_chunk_attention(*x, group_size=32, is_causal=is_causal), *five)
    assert used <= sum(x.numel() for x in five) * 4 + 64
    used = kept(lambda *x: cm.gated_attention(*x, is_causal=is_causal), q, k, v)
    assert used <= sum(x.numel() for x in (q, k, v)) * 4 + 1000 * 4 + 64


MEMORY = """
import resource, torch, cumulant as cm
def run(T):
    x = [torch.randn(1, 4, T, d, requires_grad=True) for d in DIMS]
    CALL.sum().backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(LENGTH)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_mib(dims, call, length):
    """Most memory of forward and backward on `length` tokens, in a process of its own."""
    script = MEMORY.replace("DIMS", str(dims)).replace("CALL", call).replace("LENGTH", str(length))
    return float(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
    )


def test_memory_is_linear_in_the_length():
    """A process that runs 65,536 tokens forward and backward stays far below the features' or the
    weights' size.
    """
    used = peak_mib([16, 16, 64], "cm.taylor_attention(*x, is_causal=True)", 65536)
    inputs_and_gradients = 2 * 4 * 65536 * (16 + 16 + 64) * 4 / 2**20
    outputs = 2 * 4 * 65536 * 65 * 4 / 2**20
    assert used < 1.5 * (
        inputs_and_gradients + outputs
    )  # the features of q and k would be 1.7 times as much again


@pytest.mark.parametrize(
    "options", ["is_causal=True", "is_causal=False", "reduce_group_non_causal_attn=False"]
)
def test_memory_of_mixed_chunks_is_linear_in_the_length(options):
    """The weights of all groups would be 256 MiB, the sums of all groups 128 MiB, kept or not."""
    dims = [32] * 4 + [64]
    used = peak_mib(dims, f"cm.mixed_chunk_attention(*x, group_size=256, {options})", 65536)
    tensors = 4 * 65536 * (2 * sum(dims) + 2 * 64) * 4 / 2**20
    assert used < 1.2 * tensors


def test_memory_of_gated_attention_is_linear_in_the_length():
    """Weights of all queries would be 1 GiB, in each of the four tensors that the passes hold of a
    block.
    """
    used = peak_mib([16, 16, 16], "cm.gated_attention(*x, is_causal=True)", 8192)
    assert used < 256


@by_impl
def test_elita_keeps_two_numbers_a_token(impl):
    """Beside inputs, for the backward pass; the native kernels also a mean in fp64 of every 16
    tokens.
    """
    logits = [torch.randn(1, 2, 1000, requires_grad=True) for _ in range(3)]
    value = torch.randn(1, 2, 1000, 16, requires_grad=True)
    used = kept(lambda *x: cm.elita_attention(*x, impl=impl), *logits, value)
    means = 8 * 2 * (1000 // 16 + 2) * 16 if impl == "native" else 0
    assert used <= sum(x.numel() for x in (*logits, value)) * 4 + 2 * 2 * 1000 * 4 + means + 64


def test_memory_of_elita_is_linear_in_the_length():
    """Values, outputs and their gradients; a 65,536th of the softmax weights."""
    call = "cm.elita_attention(*(y[..., 0] for y in x[:3]), x[3])"
    used = peak_mib([1, 1, 1, 64], call, 65536)
    assert used < 1.6 * 4 * 65536 * 4 * 64 * 4 / 2**20
