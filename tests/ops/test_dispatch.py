"""CUMULANT_IMPL sets the implementation that "auto" takes in a process."""

import pytest
import torch

import cumulant as cm
from cumulant.kernels.native import pointwise as kernels
from cumulant.nn import TaylorAttention
from cumulant.ops.pointwise import swiglu
from cumulant.ops.step import may_step

from .cases import CASES, inputs

ONE = [
    next(c for c in CASES if c.op is op)
    for op in (cm.taylor_attention, cm.linear_attention, cm.elita_attention)
]
MIXED = next(c for c in CASES if c.op is cm.mixed_chunk_attention)


def called(case, **options):
    """Which implementation's operators a call runs."""
    seen = []

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend([f"{func} {args[-1]}"] if str(func).startswith("cumulant.") else [])
            return func(*args, **(kwargs or {}))

    with Note():
        case(*case.inputs(T=5), is_causal=True, **options)
    return "reference" if not seen else "native" if any("native" in x for x in seen) else "torch"


@pytest.mark.parametrize("name", ["torch", "native", "reference", "auto", ""])
@pytest.mark.parametrize("case", [*ONE, MIXED], ids=lambda c: c.name)
def test_variable_decides_what_auto_means(case, name, monkeypatch):
    monkeypatch.setenv("CUMULANT_IMPL", name)
    assert called(case) == ("native" if name in ("auto", "") else name)
    for impl in ("torch", "native", "reference"):  # an explicit request always wins
        assert called(case, impl=impl) == impl


def test_native_for_every_call_means_every_call(monkeypatch):
    """Calls that "auto" would leave to PyTorch run natively too, or are refused by name."""
    q, k, v = inputs(1, 2, 50, 16, 4)
    assert cm.explain(cm.taylor_attention, q, k, v, 4).impl == "torch"
    monkeypatch.setenv("CUMULANT_IMPL", "native")
    assert cm.explain(cm.taylor_attention, q, k, v, 4).impl == "native"
    with pytest.raises(
        ValueError,
        match="CUMULANT_IMPL: 'native' cannot run this call: this operation has no native",
    ):
        cm.gated_attention(q, k, v)
    assert cm.gated_attention(q, k, v, impl="torch").shape == (1, 2, 50, 4)


def test_explain_says_so(monkeypatch):
    q, k, v = inputs()
    monkeypatch.setenv("CUMULANT_IMPL", "reference")
    assert cm.explain(cm.linear_attention, q, k, v).reason.startswith(
        "asked for by CUMULANT_IMPL: the quadratic form, T x S weights"
    )
    assert cm.explain(cm.linear_attention, q, k, v, impl="torch").reason.startswith("asked for: ")
    monkeypatch.setenv("CUMULANT_IMPL", "auto")
    assert cm.explain(cm.linear_attention, q, k, v).reason.startswith(
        "the fastest available here: "
    )


@pytest.mark.parametrize("case", [*ONE, MIXED], ids=lambda c: c.name)
def test_unknown_names_are_refused(case, monkeypatch):
    monkeypatch.setenv("CUMULANT_IMPL", "cuda")
    message = (
        "CUMULANT_IMPL: expected 'auto', 'triton', 'native', 'torch' or 'reference', got 'cuda'"
    )
    with pytest.raises(ValueError, match=message):
        case(*case.inputs(T=5), is_causal=True)
    case(*case.inputs(T=5), is_causal=True, impl="torch")


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_nothing_native_runs_beside_attention(name, monkeypatch):
    """Neither single operations of a layer nor whole layers run natively."""
    monkeypatch.setenv("CUMULANT_IMPL", name)
    monkeypatch.setattr(kernels, "call_library", None)
    monkeypatch.setattr("cumulant.kernels.native.library.call_library", None)
    x = torch.randn(1, 128, 256)
    torch.testing.assert_close(swiglu(x, x), torch.nn.functional.silu(x) * x)
    layer = TaylorAttention(64, num_heads=4, conv_size=4).eval()
    with torch.no_grad():
        assert not may_step(torch.randn(1, 1, 64))
        whole = layer(x[..., :64], return_state=True)
        layer(x[:, :1, :64], state=whole[1], return_state=True)


@pytest.mark.filterwarnings("ignore")
def test_compiled_graphs_take_it(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("CUMULANT_IMPL", "torch")
    found = []

    def note(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    q, k, v = inputs(T=9)
    run = torch.compile(
        lambda *x: cm.taylor_attention(*x, is_causal=True), fullgraph=True, backend=note
    )
    torch.testing.assert_close(run(q, k, v), cm.taylor_attention(q, k, v, is_causal=True))
    assert [x for x in found if "cumulant" in x] == ["cumulant.attention.default"]
