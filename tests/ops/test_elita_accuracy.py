"""ELiTA is exact for logits of any size, in outputs, states and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cumulant as cm

from ..quick import slow_but
from .cases import (
    TOLERANCE,
    by_impl,
    error,
    inputs,
)

pytestmark = pytest.mark.usefixtures("short_chunks")


@by_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "shift"), [(1e4, 0.0), (1.0, 1e4), (1.0, -1e4), (30.0, 9e3)])
def test_elita_is_exact_for_logits_of_any_size(
    impl: str, dtype: torch.dtype, size: float, shift: float
):
    """Whole and token by token, results meet the tolerances of small logits.

    The oracle takes the same rounded logits. In fp32, numbers near 1e4 are 1e-3 apart: a
    running log-sum in fp32 would be wrong by as much.
    """
    q, k, v = inputs(T=60, dtype=torch.float64)
    raw = k[..., 0] * size + shift, q[..., 0] * size - shift / 2, q[..., 1] * size + shift / 2
    leaves = tuple(x.to(dtype).requires_grad_() for x in (*raw, v))
    exact = tuple(x.detach().double().requires_grad_() for x in leaves)

    def run(x: tuple[Tensor, ...], impl: str, lengths: list[int]) -> list[Tensor]:
        state, outs = None, []
        for part in zip(*(y.split(lengths, 2) for y in x)):
            out, state = cm.elita_attention(*part, state=state, return_state=True, impl=impl)
            outs.append(out)
        out = torch.cat(outs, 2)
        grads = torch.autograd.grad(
            (out.double() * weight).sum() + state.mean.double().sin().sum(), x
        )
        return [out, state.log_weight, state.mean, *grads]

    weight = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    c, r, s = (x.detach() for x in exact[:3])
    rows = torch.cat(
        ((c.repeat_interleave(2, 1)[:, :, None] + r[..., None]).tril(), s[..., None]), -1
    )
    rows = rows.masked_fill(
        torch.ones(60, 61, dtype=torch.bool).triu(1) & (torch.arange(61) < 60), -math.inf
    )
    values = exact[3].detach().repeat_interleave(2, 1)
    weights = rows.softmax(-1)
    formula = weights[..., :60] @ values + weights[..., 60:] * values
    expected = run(exact, "reference", [60])
    rounding = (
        60 * 1e4 * torch.finfo(torch.float64).eps
    )  # of sums of logits in fp64, token after token
    assert error(expected[0], formula) < rounding
    # The gradient of a saturated logit is a difference of nearly equal sums over all rows: held to
    # the size of those.
    summed = float((weight.abs() * values.abs().sum(-1, keepdim=True)).sum(2).max())
    sizes = [float(x.detach().abs().max()) for x in expected[:3]] + [summed] * 4
    for lengths in ([60], [1] * 60, [25, 35]):
        for actual, wanted, size in zip(run(leaves, impl, lengths), expected, sizes):
            assert actual.isfinite().all()
            difference = float((actual.detach().double() - wanted.detach()).abs().max())
            assert difference <= max(TOLERANCE[dtype], rounding) * size


@by_impl
@pytest.mark.parametrize("first", slow_but((0.0, 18.0), (0.0, 12.0, 16.0, 18.0)))
def test_elita_steps_do_not_stall(impl: str, first: float):
    """A first key outweighs thousands of others, which arrive a few at a time in fp32.

    Each moves mean and log-sum by less than the last digit of an fp32 number, and all together
    by a lot.
    """
    T = 5000 if impl == "torch" else 200
    c = torch.zeros(1, 1, T)
    c[..., 0] = first
    r, s = torch.zeros_like(c), torch.full_like(c, -math.inf)
    v = torch.full((1, 1, T, 1), 10.0)
    v[:, :, 0] = 5.0
    weights = torch.tensor([first, math.log(T - 1)], dtype=torch.float64).softmax(0)
    exact = float(weights @ torch.tensor([5.0, 10.0], dtype=torch.float64))
    total = math.log(math.exp(first) + T - 1)
    for size in (T, 1, 2, 10, 100):
        lengths = [size] * (T // size)
        state, out = None, torch.empty(0)
        with torch.inference_mode():
            for part in zip(*(x.split(lengths, 2) for x in (c, r, s, v))):
                out, state = cm.elita_attention(*part, state=state, return_state=True, impl=impl)
        assert abs(float(out[0, 0, -1]) - exact) < 1e-6 * exact
        assert abs(float(state.mean) - exact) < 1e-6 * exact
        assert abs(float(state.log_weight) - total) < 1e-9


@by_impl
def test_an_elita_state_of_nothing_has_gradients_of_zero(impl: str):
    """Keys without weight leave a state that a later call goes on from."""
    c, r, s = (
        torch.full((1, 1, 3), x, dtype=torch.float64, requires_grad=True)
        for x in (-math.inf, 0.0, 0.0)
    )
    v = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    _, state = cm.elita_attention(c, r, s, v, return_state=True, impl=impl)
    later = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    out, end = cm.elita_attention(later, r, s, v, state=state, return_state=True, impl=impl)
    grads = torch.autograd.grad(out.sum() + end.mean.sum() + end.log_weight.sum(), (c, later, v))
    assert not grads[0].any()
    assert all(g.isfinite().all() for g in grads)


@by_impl
def test_elita_reads_values_of_a_lower_dtype_than_its_logits(impl: str):
    """bf16 values with fp32 logits, as under autocast, give the results of fp32 values."""
    q, k, v = inputs(dtype=torch.bfloat16)
    logits = [x.float() * 1.234 for x in (k[..., 0], q[..., 0], q[..., 1])]
    out, state = cm.elita_attention(*logits, v, return_state=True, impl=impl)
    expected, end = cm.elita_attention(*logits, v.float(), return_state=True, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(state.mean, end.mean)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cm.elita_attention(*logits, v, impl=impl), out)
