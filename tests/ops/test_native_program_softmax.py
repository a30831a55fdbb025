"""Programs with softmax attention, and programs of weights in half precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cumulant.kernels.native import bound_program
from cumulant.kernels.native.bound_program import BoundProgram
from cumulant.kernels.native.program import Program, Unsuitable

from .native_calls import by_instruction_set, run_tests_on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rounding of a stored number, and of sums in fp32
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def attention_program(heads, groups, dim, window, dtype=torch.float32):
    p = Program((heads + 2 * groups) * dim, dtype)
    q, k, v = p.input.split(heads * dim, groups * dim, groups * dim)
    p.set_output(p.attend_softmax(q, k, v, groups, dim, window))
    return p


def dense(x, heads, groups, dim, window, firsts):
    """Every token's output ``[B, T, H K]`` for tokens ``x [B, T, (H + 2 G) K]``."""
    x = x.double()
    sizes = [heads * dim, groups * dim, groups * dim]
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in x.split(sizes, -1))
    T = x.shape[1]
    ahead = torch.arange(T)[:, None] - torch.arange(T)
    seen = (ahead >= 0) & (ahead < (window or T))
    seen = seen & ((torch.arange(T) >= firsts[:, None])[:, None, None] | (ahead == 0))
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2).flatten(2)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    st.sampled_from([None, 2, 3, 7, 80]),
    st.integers(1, 3),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_softmax_attention(sizes, window, B, T, dtype, threads):
    """Steps with values of their own and steps in place, from any length on."""
    (groups, share, dim), steps = sizes, 9
    heads = groups * share
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(B, T + steps, (heads + 2 * groups) * dim, generator=generator).to(dtype).float()
    firsts = torch.arange(B) % (T + 1)
    p = attention_program(heads, groups, dim, window, dtype)
    kept = x[:, :T, heads * dim :].to(dtype).unflatten(-1, (2 * groups, dim)).transpose(1, 2)
    begin = 0 if window is None else max(0, T - window + 1)
    states = [s[:, :, begin:] for s in kept.split(groups, 1)]
    for masked in (False, True):
        expected = dense(x, heads, groups, dim, window, firsts * masked)[:, T:]
        mask = torch.arange(begin, T) >= firsts[:, None] if masked else None
        bound = BoundProgram(p, states, None, [mask])
        now = states
        for t in range(steps):
            new = x[:, T + t].contiguous()
            y = bound.step(new)
            torch.testing.assert_close(y.double(), expected[:, t], rtol=1e-5, atol=1e-5)
            if not masked:
                assert p.accepts_states(new, now)
                own, now = p.run(new, now, None)
                assert torch.equal(own, y)
        if not masked:
            assert all(map(torch.equal, now, bound.states()))


def test_memory_grows_and_windows_move(monkeypatch):
    monkeypatch.setattr(bound_program, "ROOM", 2)
    for window in (None, 4):
        p = attention_program(2, 1, 8, window)
        x = torch.randn(2, 50, 32)
        empty = torch.empty(2, 1, 0, 8)
        bound = BoundProgram(p, [empty, empty], None, [None])
        expected = dense(x, 2, 1, 8, window, torch.zeros(2))
        for t in range(50):
            y = bound.step(x[:, t].contiguous())
            torch.testing.assert_close(y.double(), expected[:, t], rtol=1e-5, atol=1e-5)
        assert bound.states()[0].shape == (2, 1, 50 if window is None else 3, 8)
        assert bound._states[0].shape[2] <= (70 if window is None else 5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_heads_share_the_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        p = attention_program(4, 2, 32, None)
        x = torch.randn(2, 901, 256)
        k, v = x[:, :900, 128:].unflatten(-1, (4, 32)).transpose(1, 2).split(2, 1)
        y = p.run(x[:, 900].contiguous(), [k, v], None)[0]
    finally:
        torch.set_num_threads(before)
    expected = dense(x, 4, 2, 32, None, torch.zeros(2))[:, 900]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_large_and_wrong_scores():
    p = attention_program(1, 1, 4, None)
    x = torch.randn(1, 81, 12)
    x[:, :, :8] *= 1e4  # one token has all the weight
    k, v = x[:, :80, 4:].unflatten(-1, (2, 4)).transpose(1, 2).split(1, 1)
    y = p.run(x[:, 80].contiguous(), [k, v], None)[0]
    torch.testing.assert_close(y.double(), dense(x, 1, 1, 4, None, torch.zeros(1))[:, 80])
    for wrong in (float("nan"), float("inf")):
        bad = k.clone()
        bad[0, 0, 7] = wrong
        assert p.run(x[:, 80].contiguous(), [bad, v], None)[0].isnan().all()


def test_states_of_wrong_shapes_are_refused():
    p, x = attention_program(2, 1, 8, 5), torch.randn(2, 32)
    good = torch.zeros(2, 1, 4, 8)
    assert p.accepts_states(x, [good, good])
    for bad in (
        [good],
        [good, good[:, :, :3]],
        [good, good.double()],
        [torch.zeros(2, 1, 5, 8)] * 2,
        [torch.zeros(1, 1, 4, 8)] * 2,
        [torch.zeros(2, 2, 4, 8)] * 2,
        [good[0], good[0]],
    ):
        assert not p.accepts_states(x, bad)
    with pytest.raises(Unsuitable):
        attention_program(2, 1, 8, 1)
    with pytest.raises(Unsuitable):
        BoundProgram(p, [good, good], None, [torch.tensor([[True, False, True, True]] * 2)])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.sampled_from(DTYPES),
    st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_weights_in_half_precision(n, k, B, dtype, state_dtype, biased):
    """Their values are taken as they are: only states are rounded."""
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, k), (n,), (n,), (n,), (3, n))
    W, b, norm, shift, conv = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    x, state = torch.randn(B, k), torch.randn(B, 2, n).to(state_dtype)
    p = Program(k, state_dtype)
    y = p.matrix(p.input, W, b if biased else None)
    y = p.norm(y, "layernorm", 0.5, norm, shift if biased else None)
    y = p.convolve(y, conv)
    p.set_output(y)
    assert p.accepts_states(x, [state])
    found, after = p.run(x, [state], None)
    z = x.double() @ W.double().T + (b.double() if biased else 0)
    z = F.layer_norm(z, (n,), norm.double(), shift.double() if biased else None, 0.5)
    taps, old = conv.double(), state.double()
    expected = z * taps[0] + old[:, 1] * taps[1] + old[:, 0] * taps[2]
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5 * k**0.5)
    assert torch.equal(after[0][:, 0], state[:, 1])
    rounded = ROUNDING[state_dtype]
    torch.testing.assert_close(
        after[0][:, 1].double(), z, rtol=2 * rounded, atol=2e-5 * k**0.5 + rounded * 1e-3
    )


def test_a_weight_and_a_bias_of_two_types_are_refused():
    p = Program(4)
    with pytest.raises(Unsuitable):
        p.matrix(p.input, torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3))


@by_instruction_set
def test_every_instruction_set(isa):
    run_tests_on(isa, __file__, "test_softmax_attention", "test_weights_in_half_precision")
