"""torch.compile, torch.export, the operators' registration, and what is kept for the backward pass."""

import subprocess
import sys

import pytest
import torch

import cumulant as cm
from cumulant.kernels import chunked
from cumulant.ops import cumulative

from .cases import CASES, CHUNK, assert_close

COMPILED = [c for c in CASES if c.name in ("taylor-2", "linear-elu", "linear-softmax", "linear-callable")]
by_case = pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(cumulative, "CHUNK", CHUNK)
    torch._dynamo.reset()


@by_case
@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph(case):
    """One graph, outputs, states and gradients as in eager, for several lengths."""

    def run(q, k, v, mask):
        out, state = case(q, k, v, is_causal=True, key_mask=mask, return_state=True)
        again, _ = case(q, k, v, is_causal=True, state=state, return_state=True)
        return out, again, state.numerator

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 37, 50):
        mask = torch.rand(2, length) > 0.3
        results = []
        for f in (run, compiled):
            q, k, v = case.inputs(T=length, requires_grad=True)
            outs = f(q, k, v, mask)
            results.append([*outs, *torch.autograd.grad(sum(x.sin().sum() for x in outs), (q, k, v))])
        for actual, exact in zip(*results[::-1]):
            assert_close(actual, exact, 100)


def test_lengths_do_not_recompile():
    """The operators are one node for any length."""
    compiled = torch.compile(
        lambda q, k, v: cm.taylor_attention(q, k, v, is_causal=True), fullgraph=True, dynamic=True, backend="eager"
    )
    case = CASES[1]
    compiled(*case.inputs(T=30))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (31, 40, 64):
            q, k, v = case.inputs(T=length)
            assert_close(compiled(q, k, v), cm.taylor_attention(q, k, v, is_causal=True), 10)


@by_case
def test_export(case):
    class Mixer(torch.nn.Module):
        def forward(self, q, k, v):
            out, state = case(q, k, v, is_causal=True, return_state=True)
            return out, state

    q, k, v = case.inputs(T=37)
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(Mixer(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    longer = case.inputs(T=53)
    out, state = program.module()(*longer)
    expected, end = case(*longer, is_causal=True, return_state=True)
    assert_close(out, expected, 10)
    assert_close(state.numerator, end.numerator, 10)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [7, 20], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("states", ["in and out", "out", "none", "packed"])
def test_opcheck(is_causal, normalize, length, states):
    """Schema, fake kernels, autograd registration and AOT dispatch agree with the implementation, also in which states
    are empty."""
    q, k, v = CASES[1].inputs(1, T=length, requires_grad=True)
    S = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) if states == "in and out" else None
    Z = torch.rand(1, 2, 5, dtype=torch.float64, requires_grad=True) if S is not None and normalize else None
    mask = torch.rand(1, length) > 0.3
    bounds = torch.tensor([0, 3, length]) if states == "packed" else None
    wanted = states in ("in and out", "out")
    arguments = (q, k, v, mask, bounds, S, Z, wanted, 0, True, "elu", 0.5, normalize, is_causal, CHUNK)
    torch.library.opcheck(chunked.chunked_attention, arguments)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [10, 1000])
def test_nothing_but_inputs_outputs_and_denominators_is_kept(is_causal, length):
    """No features [T, F], no weights [T, S]: only what came in, what went out, one number a row, and the sums [F, V] of
    a long context."""
    q, k, v = CASES[1].inputs(1, 2, length, 16, 16, G=2, dtype=torch.float32, requires_grad=True)
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = cm.taylor_attention(q, k, v, is_causal=is_causal)
    sums = 0 if is_causal or length <= CHUNK else 2 * 153 * 17 * 4
    allowed = sum(x.numel() for x in (q, k, v, out)) * 4 + 2 * length * 4 + sums
    assert sum(kept.values()) <= allowed + 64


def test_memory_is_linear_in_the_length():
    """A process that runs 65,536 tokens forward and backward stays far below the features' or the weights' size."""
    script = """
import resource, torch, cumulant as cm
def run(T):
    x = [torch.randn(1, 4, T, d, requires_grad=True) for d in (16, 16, 64)]
    cm.taylor_attention(*x, is_causal=True).sum().backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(65536)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    used = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    inputs_and_gradients = 2 * 4 * 65536 * (16 + 16 + 64) * 4 / 2**20
    outputs = 2 * 4 * 65536 * 65 * 4 / 2**20
    assert used < 1.5 * (inputs_and_gradients + outputs)  # the features of q and k would be 1.7 times as much again
