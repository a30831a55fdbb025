"""torch.compile and torch.export: one graph for any length, with results as in eager."""

import pytest
import torch

import cumulant as cm

from ..quick import slow_but
from .cases import CASES, IMPLEMENTATIONS, assert_close, by_fast_impl, sums_of

pytestmark = pytest.mark.usefixtures("short_chunks")
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
QUICK = [
    c for c in COMPILED if c.name in ("taylor-2", "linear-callable", "mixed-bias", "elita-own")
]
by_quick_case = pytest.mark.parametrize("case", slow_but(QUICK, COMPILED), ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def _no_older_graphs():
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", slow_but(("native",), IMPLEMENTATIONS[1:]))
@by_quick_case
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


@by_fast_impl
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


@by_fast_impl
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
