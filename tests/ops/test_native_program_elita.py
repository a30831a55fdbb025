"""ELiTA's instructions in programs, against torch in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cumulant as cm
from cumulant.kernels.native.program import Program, Unsuitable
from cumulant.nn import SinusoidalLogits

from .native_calls import by_instruction_set, run_tests_on
from .test_native_program import close, rows, run, tensors


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), rows, st.sampled_from([0.1, 3.0, 300.0]))
def test_attention(heads, V, B, scale):
    """Rows at their own places; large logits too."""
    c, r, s = (scale * x for x in tensors(6, *[(B, heads, 30)] * 3))
    (value,) = tensors(7, (B, heads, 30, V))
    wide = [x.double() for x in (c, r, s, value)]
    before = [x[:, :, :29] for x in wide]
    state = cm.elita_attention(*before, return_state=True)[1]
    exact, after = cm.elita_attention(*wide, return_state=True)
    p = Program(heads * (3 + V))
    parts = p.input.split(*[heads] * 3, heads * V)
    token = torch.cat([x[:, :, 29].flatten(1) for x in (c, r, s, value)], -1)
    y, (log_weight, mean) = run(p, p.attend_elita(*parts), token, [state.log_weight, state.mean])
    close(y, exact[:, :, 29].flatten(1))
    torch.testing.assert_close(log_weight, after.log_weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, after.mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logit", [-math.inf, -1e4, 0.0])
def test_the_first_token_sees_itself(logit):
    p = Program(8)
    c, r, s, value = p.input.split(1, 1, 1, 5)
    x = torch.tensor([[logit, 2.0, -3.0, 1.0, -2.0, 3.0, 4.0, 5.0]])
    state = [torch.full((1, 1), -math.inf, dtype=torch.float64), torch.zeros(1, 1, 5).double()]
    y, (log_weight, mean) = run(p, p.attend_elita(c, r, s, value), x, state)
    assert torch.equal(y, x[:, 3:])
    assert float(log_weight) == logit
    seen = x[:, None, 3:].double()
    assert torch.equal(mean, seen if logit > -math.inf else torch.zeros_like(seen))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), rows, st.sampled_from([0, 7, 10**6]), st.booleans())
def test_position_logits(heads, features, B, place, added):
    torch.manual_seed(0)
    module = SinusoidalLogits(heads, features, horizon=100, time=3.0)
    (x,) = tensors(8, (B, heads))
    position = torch.arange(B) * 3 + place
    p = Program(heads)
    y = p.add_position_logits(
        p.input if added else None, module.a2, module.b2, module.c, module.time / module.horizon
    )
    y = run(p, y, x, position=position)[0]
    exact = module.double()(position)[1].detach()
    # fp32 rounds the angles, which are up to 0.05 * 3 * position / 100
    bound = 1e-6 + 2**-22 * 0.05 * features * 0.05 * 3 * (place + 15) / 100
    assert float((y.double() - exact - (x.double() if added else 0)).abs().max()) <= bound


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), rows)
def test_outer_product_and_clamp(n, k, B):
    (x,) = tensors(9, (B, n + k))
    p = Program(n + k)
    first, second = p.input.split(n, k)
    y = run(p, p.clamp(p.outer(first, second), 0.75), x)[0]
    exact = x[:, :n, None].double() * x[:, None, n:].double()
    close(y, exact.clamp(-0.75, 0.75).flatten(1))


def test_shapes_that_do_not_fit():
    p = Program(12)
    c, r, s, value = p.input.split(2, 2, 2, 6)
    with pytest.raises(Unsuitable):
        p.attend_elita(c, r, p.input, value)
    with pytest.raises(Unsuitable):
        p.attend_elita(c, r, s, p.input.split(5, 7)[0])
    with pytest.raises(Unsuitable):
        p.add_position_logits(c, torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4), 1.0)


@by_instruction_set
def test_every_instruction_set(isa):
    names = ("test_attention", "test_position_logits", "test_outer_product_and_clamp")
    run_tests_on(isa, __file__, *names)
