"""Large fp32 products on the CPU go through oneDNN, with the same numbers and gradients."""

import pytest
import torch
from torch.nn import functional as F

from cumulant.kernels import product
from cumulant.ops.project import project

from .cases import CASES, assert_close

needs_onednn = pytest.mark.skipif(
    product._onednn is None, reason="this build of torch has no oneDNN"
)


@pytest.fixture
def always(monkeypatch):
    """Small products too, and a count of them."""
    monkeypatch.setattr(product, "LARGE", 0)
    monkeypatch.setattr(product, "PREFERRED", True)
    calls, run = [], product._product

    def counted(*args):
        calls.append(1)
        return run(*args)

    monkeypatch.setattr(product, "_product", counted)
    return calls


@needs_onednn
@pytest.mark.parametrize("batch", [(), (1,), (3,), (1, 1), (2, 3)])
def test_matmul(always, batch):
    a, b = torch.randn(*batch, 9, 7), torch.randn(*batch, 7, 5)
    assert_close(product.matmul(a, b), a.double() @ b.double())
    for x, y in (
        (a.mT.contiguous().mT, b),
        (a, b.mT.contiguous().mT),
        (a[..., ::2], b[..., ::2, :]),
    ):
        assert_close(product.matmul(x, y), x.double() @ y.double())
    assert len(always) == 4 * max(1, torch.Size(batch).numel())


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(11, 6), (2, 5, 6), (2, 3, 4, 6)])
def test_linear_and_its_gradients(always, shape, bias):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    leaves = (x, w, torch.randn(8, requires_grad=True)) if bias else (x, w)
    results = []
    for run, inputs in (
        (project, leaves),
        (F.linear, tuple(t.detach().double().requires_grad_() for t in leaves)),
    ):
        y = run(*inputs)
        first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs[:2])
        results.append([y, *first, *second])
    for actual, exact in zip(*results):
        assert_close(actual, exact, 2)
    assert len(always) >= 3


@needs_onednn
def test_large_products_go_there_and_small_ones_do_not(monkeypatch):
    monkeypatch.setattr(product, "PREFERRED", True)
    calls, run = [], product._product
    monkeypatch.setattr(product, "_product", lambda *x: calls.append(1) or run(*x))
    project(torch.randn(3, 5), torch.randn(4, 5))
    project(torch.randn(1, 512), torch.randn(128, 512))
    assert not calls
    project(
        torch.randn(1, 512), torch.randn(1024, 512)
    )  # a step of a model: reading the matrix is the work
    project(torch.randn(256, 128), torch.randn(64, 128))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torchs(always, dtype):
    x, w = torch.randn(9, 6).to(dtype), torch.randn(8, 6).to(dtype)
    assert torch.equal(project(x, w), F.linear(x, w))
    assert not always


def test_autocast_is_torchs(always):
    x, w = torch.randn(9, 6), torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(x, w).dtype == torch.bfloat16
    assert not always


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_nothing_to_multiply(always, shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    y = project(x, w)
    assert y.shape == (*shape[:-1], 8)
    assert not torch.autograd.grad(y.sum(), w)[0].any()
    assert product.matmul(torch.randn(0, 1, 4, 5), torch.randn(0, 1, 5, 6)).shape == (0, 1, 4, 6)


@needs_onednn
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.startswith(("mixed", "gated"))], ids=lambda c: c.name
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_through_onednn(always, case, is_causal):
    """The gated operations, every product through it, in fp32 against the float64 reference."""
    low = case.inputs(T=41, dtype=torch.float32, requires_grad=True)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    out, expected = (
        case(*x, is_causal=is_causal, impl=i) for x, i in ((low, "torch"), (exact, "reference"))
    )
    assert_close(out, expected, 2)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out.double() * weight).sum(), low)
    for actual, wanted in zip(grads, torch.autograd.grad((expected * weight).sum(), exact)):
        assert_close(actual, wanted, 3)
    assert always


@needs_onednn
def test_only_what_gradients_need_is_kept(always):
    """A frozen weight keeps no input, a plain input no weight."""
    x, w = torch.randn(100, 6), torch.randn(8, 6)

    def kept(x, w):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.append(t.numel()) or t, lambda t: t
        ):
            project(x, w)
        return found

    assert kept(x.clone().requires_grad_(), w) == [48]
    assert kept(x, w.clone().requires_grad_()) == [600]
    assert always


@pytest.mark.parametrize(
    "change",
    [
        lambda f, x, w: torch.func.grad(lambda y: f(y, w).sum())(x),
        lambda f, x, w: torch.func.vmap(lambda y: f(y[None], w))(x),
        lambda f, x, w: torch.func.jvp(lambda y: f(y, w), (x,), (x,))[1],
        lambda f, x, w: torch.jit.trace(lambda y: f(y, w), (x,))(x),
    ],
    ids=["grad", "vmap", "jvp", "trace"],
)
@pytest.mark.filterwarnings("ignore")
def test_transforms_and_traces(always, change):
    x, w = torch.randn(9, 6), torch.randn(8, 6)
    assert torch.allclose(change(project, x, w), change(F.linear, x, w), atol=1e-5)


def test_mistakes_are_torchs(always):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        project(torch.randn(9, 5), torch.randn(8, 6))
    assert project(torch.zeros(3, 0), torch.zeros(4, 0)).shape == (3, 4)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        project(torch.randn(9, 6), torch.randn(8, 6))
    assert counter.get_total_flops() == 2 * 9 * 6 * 8


@needs_onednn
def test_intels_processors_keep_torchs_products(always, monkeypatch):
    """Where MKL is at its best."""
    monkeypatch.setattr(product, "PREFERRED", False)
    x, w = torch.randn(9, 6), torch.randn(8, 6)
    assert torch.equal(project(x, w), F.linear(x, w))
    assert torch.equal(product.matmul(x, w.T), x @ w.T)
    assert not always


@pytest.mark.parametrize(
    ("text", "intel"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", False),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", False),
    ],
)
@pytest.mark.parametrize("system", ["linux", "windows"])
def test_the_processors_maker(text, intel, system, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    if system == "linux":
        file.write_text(text)
    else:
        monkeypatch.setenv("PROCESSOR_IDENTIFIER", f"Intel64 Family 6, {text}")
    monkeypatch.setattr(product, "CPUINFO", file)
    assert product._is_intel() == intel
