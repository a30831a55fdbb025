"""Native kernels beside attention: outputs and gradients against the formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cumulant.kernels.native import pointwise as native
from cumulant.ops import pointwise as ops

from .native_calls import by_instruction_set, run_tests_on

sizes, lengths, rows = st.integers(1, 70), st.integers(1, 40), st.integers(1, 4)


@pytest.fixture(autouse=True)
def _always_native(monkeypatch):
    monkeypatch.setattr(ops, "LEAST", 1)


@pytest.fixture
def calls(monkeypatch):
    """Names of the native operations that ran."""
    found, run = [], native._run_pointwise
    monkeypatch.setattr(
        native,
        "_run_pointwise",
        lambda operation, *a, **k: (found.append(operation), run(operation, *a, **k)),
    )
    return found


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def given_tensors(inputs):
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def check(operation, formula, *inputs, tolerance=2e-5):
    """Outputs and gradients, of all inputs that are given."""
    real = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs]
    narrow = [x.detach().requires_grad_() if r else x for x, r in zip(inputs, real, strict=True)]
    wide = [
        x.detach().double().requires_grad_() if r else x for x, r in zip(inputs, real, strict=True)
    ]
    y, expected = operation(*narrow), formula(*wide)
    assert y.dtype == torch.float32
    dout = torch.linspace(-1, 1.5, y.numel()).view(y.shape)
    found = torch.autograd.grad(y, given_tensors(narrow), dout)
    exact = torch.autograd.grad(
        expected, given_tensors(wide), dout.double(), materialize_grads=True, allow_unused=True
    )
    for a, b in zip((y, *found), (expected, *exact), strict=True):
        size = b.abs().amax().clamp(min=1) if b.numel() else 1
        torch.testing.assert_close(a.double() / size, b / size, rtol=0, atol=tolerance)


@settings(max_examples=50, deadline=None)
@given(rows, lengths, sizes, st.sampled_from([0.1, 1.0, 30.0]), st.booleans())
def test_swiglu(B, T, n, scale, turned):
    x, up = draw((B, n, T), (B, n, T)) if turned else draw((B, T, n), (B, T, n))
    x, up = (x.mT, up.mT) if turned else (x, up)
    check(ops.swiglu, lambda x, up: F.silu(x) * up, x * scale, up)


def test_swiglu_far_out():
    x = torch.tensor([[[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, torch.inf, -87.5]]])
    up = torch.ones_like(x)
    torch.testing.assert_close(ops.swiglu(x, up), F.silu(x.double()).float(), rtol=1e-6, atol=1e-30)
    assert ops.swiglu(torch.full((1, 3, 5), torch.nan), torch.ones(1, 3, 5)).isnan().all()


@settings(max_examples=50, deadline=None)
@given(rows, lengths, sizes, st.booleans(), st.sampled_from([1e-6, 0.5]))
def test_rms_norm(B, T, n, weighted, eps):
    x, w = draw((B, T, n), (n,))
    check(
        lambda x, w: ops.rms_norm(x, w, eps),
        lambda x, w: F.rms_norm(x, (n,), w, eps),
        x,
        w if weighted else None,
    )


@settings(max_examples=80, deadline=None)
@given(rows, lengths, sizes, st.integers(1, 6), st.booleans(), st.booleans())
def test_short_convolution(B, T, n, taps, before, packed):
    x, w, tail = draw((B, T, n), (taps, n), (B, taps - 1, n))
    places = torch.arange(T) - torch.arange(T) // 7 * 7 if packed else None  # sequences of 7
    check(ops.short_convolution, ops._convolution_formula, x, w, tail if before else None, places)


@settings(max_examples=50, deadline=None)
@given(
    rows,
    lengths,
    st.integers(1, 4),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_rotation(B, T, heads, half, own, inside, back):
    (x,) = draw((B, T, heads, 2 * half) if inside else (B, heads, T, 2 * half))
    x = x.transpose(1, 2) if inside else x
    (angle,) = draw((B, T, half) if own else (T, half), seed=1)
    cosine, sine = angle.cos(), angle.sin()
    check(
        lambda x: ops.rotate_pairs(x, cosine, sine, back),
        lambda x: ops._rotation_formula(x, cosine.double(), sine.double(), back),
        x,
    )
    turned = ops.rotate_pairs(x, cosine, sine, back)
    torch.testing.assert_close(ops.rotate_pairs(turned, cosine, sine, not back), x)
    if inside and T > 1 and heads > 1:
        assert turned.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_sums_and_threads(threads):
    """Weights' gradients are sums over all tokens."""
    T, n = 20_000, 9
    x, w, c = draw((1, T, n), (n,), (3, n))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = x + 3  # all of one sign: nothing cancels in the sums
        check(
            lambda x, w: ops.rms_norm(x, w, 1e-6),
            lambda x, w: F.rms_norm(x, (n,), w, 1e-6),
            x,
            w,
            tolerance=1e-6,
        )
        check(ops.short_convolution, ops._convolution_formula, x, c, None, None, tolerance=1e-6)
    finally:
        torch.set_num_threads(before)


def test_slices_of_wider_tensors(calls):
    """Rows that are not contiguous are read without a copy."""
    (wide,) = draw((2, 30, 50))
    x, w = wide[:, 3:20, 7:27], draw((4, 20))[0]
    check(ops.short_convolution, ops._convolution_formula, x, w, None, None)
    check(lambda x: ops.rms_norm(x, None, 1e-6), lambda x: F.rms_norm(x, (20,), None, 1e-6), x)
    assert calls == ["convolve_forward", "convolve_backward", "rmsnorm_forward", "rmsnorm_backward"]


ANGLES = draw((4, 3), (4, 3), seed=3)
CASES = {
    "swiglu": (ops.swiglu, [(1, 4, 6), (1, 4, 6)]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-3), [(1, 4, 6), (6,)]),
    "short_convolution": (ops.short_convolution, [(1, 5, 6), (3, 6), (1, 2, 6)]),
    "turn": (lambda x: ops.rotate_pairs(x, *ANGLES), [(1, 2, 4, 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name, calls, monkeypatch):
    operation, shapes = CASES[name]

    def penalty(inputs):
        grads = torch.autograd.grad(operation(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), inputs)

    inputs = [x.requires_grad_() for x in draw(*shapes)]
    found = penalty(inputs)
    assert calls
    monkeypatch.setattr(ops, "LEAST", 1 << 60)
    for a, b in zip(found, penalty(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_formulas_where_something_watches(name, calls):
    """torch.compile, transforms and fp64 take PyTorch's own operators."""
    operation, shapes = CASES[name]
    inputs = draw(*shapes)
    expected = operation(*inputs)
    assert len(calls) == 1
    torch.testing.assert_close(
        torch.compile(operation, fullgraph=True, backend="eager")(*inputs), expected
    )
    torch.testing.assert_close(torch.func.vmap(operation)(*(x[None] for x in inputs))[0], expected)
    assert operation(*(x.double() for x in inputs)).dtype == torch.float64
    assert len(calls) == 1


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name, calls):
    """Autocast knows none of these operations: in fp32 they stay in fp32, and run natively."""
    operation, shapes = CASES[name]
    inputs = [x.requires_grad_() for x in draw(*shapes)]
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = operation(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert len(calls) >= 2
    for plain, cast in zip(*results):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name, dtype, calls):
    """As exact as the inputs: convolutions and rotations are widened, and rounded once."""
    operation, shapes = CASES[name]
    inputs = [x.to(dtype).requires_grad_() for x in draw(*shapes)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = operation(*inputs), operation(*wide)
    assert out.dtype == dtype
    limit = 4 * torch.finfo(dtype).eps
    assert (out.double() - exact).norm() < limit * exact.norm()
    weight = torch.randn_like(exact)
    found = torch.autograd.grad((out.double() * weight).sum(), inputs)
    for actual, expected in zip(found, torch.autograd.grad((exact * weight).sum(), wide)):
        assert (actual.double() - expected).norm() < limit * expected.norm()
    once = operation(*(x.float() for x in inputs)).to(dtype)
    assert not name.startswith(("convolution", "rotation")) or torch.equal(out, once)


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_asked_for(name):
    """Gradients of one input, whichever it is."""
    operation, shapes = CASES[name]
    for i in range(len(shapes)):
        inputs = draw(*shapes)
        inputs[i].requires_grad_()
        operation(*inputs).sum().backward()
        assert [x.grad is not None for x in inputs] == [j == i for j in range(len(shapes))]


def test_nothing_at_all():
    empty = torch.zeros(2, 0, 6)
    assert native.swiglu(empty, empty).shape == empty.shape
    assert native.rms_norm(empty, torch.ones(6), 1e-6)[0].shape == empty.shape
    assert not native.rms_norm_backward(empty, torch.ones(6), torch.zeros(2, 0), empty)[1].any()
    assert native.convolve(empty, torch.ones(3, 6), None, None).shape == empty.shape
    gradients = native.convolve_backward(empty, torch.ones(3, 6), torch.zeros(2, 2, 6), None, empty)
    assert not gradients[1].any()
    assert native.rotate_pairs(
        torch.zeros(2, 3, 0, 6), torch.zeros(0, 3), torch.zeros(0, 3), False
    ).shape == (2, 3, 0, 6)


DEPENDENT = {
    "swiglu": (lambda x: ops.swiglu(x, 2 * x), lambda x: ops._swiglu_formula(x, 2 * x)),
    "the same twice": (lambda x: ops.swiglu(x, x), lambda x: ops._swiglu_formula(x, x)),
    "rms_norm": (
        lambda x: ops.rms_norm(x, x.mean((0, 1)), 1e-3),
        lambda x: F.rms_norm(x, x.shape[-1:], x.mean((0, 1)), 1e-3),
    ),
    "short_convolution": (
        lambda x: ops.short_convolution(x, x[0, :3], x[:, -2:].tanh()),
        lambda x: ops._convolution_formula(x, x[0, :3], x[:, -2:].tanh(), None),
    ),
    "turn": (
        lambda x: ops.rotate_pairs(x[None], *ANGLES),
        lambda x: ops._rotation_formula(x[None], *(a.to(x.dtype) for a in ANGLES), False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPENDENT)
def test_inputs_that_depend_on_each_other(name):
    """Gradients, and gradients of gradients, of one input that enters in several places."""
    operation, formula = DEPENDENT[name]

    def both(operation, x):
        first = torch.autograd.grad(operation(x).sin().sum(), x, create_graph=True)[0]
        return first, torch.autograd.grad((first**2).sum(), x)[0]

    (x,) = draw((2, 4, 6))
    found, exact = (
        both(operation, x.requires_grad_()),
        both(formula, x.detach().double().requires_grad_()),
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_many_gradients_at_once(name):
    operation, shapes = CASES[name]
    inputs = [x.requires_grad_() for x in draw(*shapes)]
    y = operation(*inputs)
    directions = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for a, b in zip(
            together, torch.autograd.grad(y, inputs, direction, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)
            assert not a.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_tangents(name):
    operation, shapes = CASES[name]
    inputs = draw(*shapes)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        assert (
            torch.autograd.forward_ad.unpack_dual(operation(dual, *inputs[1:])).tangent is not None
        )


def test_numbers_that_memory_does_not_hold():
    """Lazy negatives and zeros."""
    (x,) = draw((1, 4, 6))
    negative, nothing = torch._neg_view(x), torch._efficientzerotensor(x.shape)
    torch.testing.assert_close(ops.swiglu(negative, x), ops.swiglu(-x, x))
    torch.testing.assert_close(native.swiglu(negative, x), ops.swiglu(-x, x))
    assert not native.swiglu(nothing, x).any()
    torch.testing.assert_close(ops.rms_norm(negative, None, 1e-6), ops.rms_norm(-x, None, 1e-6))


def test_shapes_that_only_broadcast():
    x, tail, w = draw((2, 4, 6), (1, 2, 6), (3, 6))
    with pytest.raises(RuntimeError, match="[Ss]izes"):
        ops.short_convolution(x, w, tail)
    (heads,) = draw((2, 3, 4, 6))
    cosine, sine = (a[None] for a in ANGLES)
    torch.testing.assert_close(
        ops.rotate_pairs(heads, cosine, sine), ops.rotate_pairs(heads, *ANGLES)
    )


def test_bad_input_does_not_reach_the_kernels():
    x = torch.zeros(1, 4, 6)
    for call in (
        lambda: native.swiglu(x, x[:, :3]),
        lambda: native.swiglu(x.double(), x),
        lambda: native.rms_norm(x, torch.zeros(5), 1e-6),
        lambda: native.convolve(x, torch.zeros(3, 5), None, None),
        lambda: native.convolve(x, torch.zeros(3, 6), torch.zeros(1, 3, 6), None),
        lambda: native.convolve(x, torch.zeros(3, 6), None, torch.zeros(3, dtype=torch.int64)),
        lambda: native.rotate_pairs(x[None], torch.zeros(4, 2), torch.zeros(4, 2), False),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


@by_instruction_set
def test_every_instruction_set(isa):
    run_tests_on(
        isa, __file__, "test_swiglu", "test_rms_norm", "test_short_convolution", "test_rotation"
    )
