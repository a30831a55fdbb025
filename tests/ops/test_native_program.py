"""Programs of native instructions: each instruction against torch in fp64, at any size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import cumulant as cm
from cumulant.kernels.native.program import Program, Unsuitable
from cumulant.nn import RotaryEmbedding

from .native_calls import by_instruction_set, run_tests_on

sizes, rows = st.integers(1, 70), st.integers(1, 5)


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(program, output, x, states=(), position=None):
    program.set_output(output)
    y, after = program.run(x, states, position)
    assert all(
        new.data_ptr() != old.data_ptr() or old.numel() == 0 for new, old in zip(after, states)
    )
    return y, after


def close(y, expected):
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, rows, st.booleans(), st.integers(0, 9))
def test_matrix(n, k, B, biased, seed):
    x, W, V, b = tensors(seed, (B, k), (n, k), (k, n), (n,))
    p = Program(k)
    y = p.matrix(p.input, W, b if biased else None)
    p.matrix(y, V, to=p.input, add=True)
    expected = x.double() + F.linear(
        F.linear(x.double(), W.double(), b.double() if biased else None), V.double()
    )
    close(run(p, p.input, x)[0] / n**0.5, expected / n**0.5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matrices_of_one_vector_share_the_threads(threads):
    x, *weights = tensors(0, (2, 300), (500, 300), (7, 300), (901, 300))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        p = Program(300)
        whole = p.vector(1408)
        for W, part in zip(weights, whole.split(500, 7, 901)):
            p.matrix(p.input, W, to=part)
        y = run(p, whole, x)[0]
    finally:
        torch.set_num_threads(before)
    close(y / 300**0.5, torch.cat([x.double() @ W.double().T for W in weights], -1) / 300**0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["rmsnorm", "layernorm", "scalenorm"]),
    st.integers(2, 70),
    st.integers(1, 4),
    rows,
    st.booleans(),
)
def test_norm(kind, size, heads, B, learned):
    x, w, b = tensors(1, (B, heads * size), (1 if kind == "scalenorm" else size,), (size,))
    learned = learned or kind == "scalenorm"
    p = Program(heads * size)
    y = run(
        p,
        p.norm(
            p.input,
            kind,
            1e-3,
            w if learned else None,
            b if learned and kind == "layernorm" else None,
            heads,
        ),
        x,
    )[0]
    each, w, b = (
        x.double().view(B, heads, size),
        w.double() if learned else None,
        b.double() if learned else None,
    )
    if kind == "scalenorm":
        expected = each * w / (each.norm(dim=-1, keepdim=True) * size**-0.5).clamp(min=1e-3)
    elif kind == "rmsnorm":
        expected = F.rms_norm(each, (size,), w, 1e-3)
    else:
        expected = F.layer_norm(each, (size,), w, b, 1e-3)
    close(y, expected.flatten(1))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 6), rows)
def test_convolution(size, taps, B):
    x, w, past = tensors(2, (B, size), (taps, size), (B, taps - 1, size))
    p = Program(size)
    y, (after,) = run(p, p.convolve(p.input, w), x, [past])
    seen = torch.cat((past, x[:, None]), 1)
    close(y, (seen.double() * w.double().flip(0)).sum(1))
    assert torch.equal(after, seen[:, 1:])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 70), rows)
def test_shift(size, B):
    x, past = tensors(3, (B, size), (B, 1, size // 2))
    p = Program(size)
    y, (after,) = run(p, p.shift(p.input), x, [past])
    kept = size - size // 2
    assert torch.equal(y, torch.cat((x[:, :kept], past[:, 0]), -1))
    assert torch.equal(after[:, 0], x[:, kept:])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), rows, st.sampled_from([0, 1, 1000, 10**6, 10**9]))
def test_rotation(half, heads, B, place):
    (x,) = tensors(4, (B, heads * 2 * half))
    position = torch.arange(B) * 3 + place
    p = Program(x.shape[1])
    p.rotate(p.input, 2 * half, 500.0)
    y = run(p, p.input, x, position=position)[0]
    split = x.double().view(B, heads, 1, 2 * half)
    close(y, RotaryEmbedding(2 * half, 500.0)(split, position[:, None]).flatten(1))


@settings(max_examples=60, deadline=None)
@given(
    sizes, rows, st.sampled_from(["swiglu", "gelu", "product"]), st.sampled_from([1.0, 30.0, 1e4])
)
def test_activations(size, B, kind, scale):
    x, up = tensors(5, (B, size), (size, size))
    x = x * scale
    p = Program(size)
    other = p.matrix(p.input, up)
    y = run(p, p.activate(kind, p.input, None if kind == "gelu" else other), x)[0]
    wide = x.double()
    first = {"swiglu": F.silu, "gelu": F.gelu, "product": lambda x: x}[kind](wide)
    expected = first if kind == "gelu" else first * (wide @ up.double().T)
    magnitude = expected.abs().max().clamp(min=1)
    close(y / magnitude, expected / magnitude)


def test_not_a_number_stays_one():
    p = Program(40)
    y = run(p, p.activate("swiglu", p.input, p.input), torch.full((1, 40), torch.nan))[0]
    assert y.isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 2),
    rows,
    st.booleans(),
    st.booleans(),
)
def test_attention(order, K, V, groups, ratio, B, flag, decays):
    heads, normalize, constant = groups * ratio, flag or order > 0, flag or order == 0
    q, k, v = tensors(6, (B, heads, 5, K), (B, groups, 5, K), (B, groups, 5, V))
    q, k = q.abs(), k.abs()  # no denominator vanishes
    logs = -tensors(5, (B, groups, 5))[0].abs() if decays else None

    def run_op(impl, q, k, v, state=None):
        options = {"is_causal": True, "state": state, "return_state": True, "impl": impl}
        if decays:
            options["log_decay"] = logs[..., : q.shape[2]].to(q.dtype)
        if order:
            return cm.taylor_attention(q, k, v, order, scale=0.3, constant_term=constant, **options)
        return cm.linear_attention(q, k, v, "elu", scale=0.3, normalize=normalize, **options)

    past = run_op("torch", q[:, :, :4], k[:, :, :4], v[:, :, :4])[1]
    expected, state = run_op("reference", *(x.double() for x in (q, k, v)))
    given = [q, k, v] if logs is None else [q, k, v, logs]
    x = torch.cat([x[:, :, 4].flatten(1) for x in given], -1)
    p = Program(x.shape[1])
    parts = p.input.split(heads * K, groups * K, groups * V, groups if decays else 0)
    y = p.attend(
        *parts[:3], heads, groups, order=order, constant_term=constant,
        activation="identity" if order else "elu",
        scale=0.3, normalize=normalize, log_decay=parts[3] if decays else None,
    )  # fmt: skip
    before = [past.numerator, past.denominator] if normalize else [past.numerator]
    assert p.states == [tuple(s.shape[1:]) for s in before]
    out, after = run(p, y, x, before)
    close(out, expected[:, :, 4].flatten(1))
    close(after[0], state.numerator)
    if normalize:
        close(after[1], state.denominator)


def test_gates():
    x, W = tensors(7, (3, 24), (4, 24))
    p = Program(24)
    p.gate(p.input, p.matrix(p.input, W))
    expected = x.double().view(3, 4, 6) * (x.double() @ W.double().T).sigmoid()[..., None]
    close(run(p, p.input, x)[0], expected.flatten(1))


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_decays(scale):
    x, rates = tensors(8, (3, 5), (5,))
    x *= scale
    kinds = {
        "fixed": (rates, 1.0, rates.expand(3, 5)),
        "gated": (None, 0.25, F.logsigmoid(x.double()) * 0.25),
        "mamba2": (rates, 1.0, F.softplus(x.double()) * -rates.double().exp()),
    }
    for kind, (weight, factor, expected) in kinds.items():
        p = Program(5)
        source = None if kind == "fixed" else p.input
        y = run(p, p.decay(kind, source, weight, factor), x)[0]
        torch.testing.assert_close(y.double(), expected.double(), rtol=1e-6, atol=1e-37)
    x = torch.tensor([[30.0, -30.0, math.nan, math.inf, -math.inf]])
    p = Program(5)
    y = run(p, p.decay("gated", p.input), x)[0][0]
    assert -1e-12 < y[0] < 0  # a gate that is nearly open keeps its digits
    assert y[2].isnan()
    assert y[3] == 0
    assert y[4] == -math.inf


def test_what_cannot_be_is_refused():
    W = torch.randn(6, 8)
    for weight in (
        W.double(),
        W.to(torch.int8),
        W.T,
        W.repeat(1, 2)[:, ::2],
        W.to("meta"),
        torch.nn.Buffer(W)[:, :7],
    ):
        p = Program(8)
        with pytest.raises(Unsuitable):
            p.matrix(p.input, weight)
    p = Program(8)
    with pytest.raises(Unsuitable):
        p.norm(p.input, "rmsnorm", 1e-6, torch.ones(7))
    a, b, c = p.input.split(4, 2, 2)
    options = {"constant_term": True, "scale": 1.0, "normalize": True}
    with pytest.raises(Unsuitable):
        p.attend(a, b, c, 2, 1, order=9, activation="identity", **options)
    with pytest.raises(Unsuitable):
        p.attend(a, b, c, 2, 1, order=0, activation="softmax", **options)
    with pytest.raises(Unsuitable):
        p.attend(a, b, c, 2, 1, order=1, activation="identity", log_decay=a, **options)
    for kind, weight in (
        ("fixed", torch.ones(8)),
        ("gated", torch.ones(8)),
        ("mamba2", torch.ones(7)),
    ):
        with pytest.raises(Unsuitable):
            p.decay(kind, p.input, weight)
    p.rotate(p.input, 4, 100.0)
    p.set_output(p.input)
    with pytest.raises(ValueError, match="position"):
        p.run(torch.zeros(1, 8), [], None)


def test_states_must_fit():
    p = Program(6)
    p.set_output(p.convolve(p.input, torch.randn(3, 6)))
    x, state = torch.zeros(2, 6), torch.zeros(2, 2, 6)
    assert p.accepts_states(x, [state])
    for wrong in (
        [],
        [state, state],
        [None],
        [state[:1]],
        [state.double()],
        [state.mT.contiguous().mT],
        [state.to("meta")],
    ):
        assert not p.accepts_states(x, wrong)


@by_instruction_set
def test_every_instruction_set(isa):
    run_tests_on(isa, __file__, "test_matrix", "test_norm", "test_activations", "test_attention")
