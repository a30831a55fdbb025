"""The matrix: every operation on every implementation gives its formula, whole or split."""

from __future__ import annotations

import math

import pytest
import torch

import cumulant as cm
from cumulant.kernels import reference
from cumulant.kernels.torch.features import Expansion

from ..quick import slow_but
from .cases import (
    CASES,
    CHUNK,
    IMPLEMENTATIONS,
    Case,
    assert_close,
    by_case,
    by_fast_impl,
    by_form,
    by_impl,
    forms,
    gradients,
    inputs,
    sums_of,
    tensors_of,
)
from .oracle import oracle
from .walking import walk

pytestmark = pytest.mark.usefixtures("short_chunks")


@by_impl
@by_form
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_equals_the_formula(case: Case, impl: str, is_causal: bool, masked: bool):
    q, k, v = case.inputs()
    mask = torch.rand(2, 37) > 0.4 if masked else None
    out = case(q, k, v, is_causal=is_causal, key_mask=mask, impl=impl)
    assert_close(out, oracle(case, q, k, v, is_causal=is_causal, key_mask=mask), 100)


@by_fast_impl
@by_form
@pytest.mark.parametrize("length", [7, 37])
def test_gradients_equal_the_reference(case: Case, impl: str, is_causal: bool, length: int):
    """The reference differentiates itself, and test_gradcheck compares it with differences."""
    mask = torch.rand(2, length) > 0.3
    results = []
    for name in ("reference", impl):
        q, k, v = case.inputs(T=length, requires_grad=True)
        out, state = case.run(q, k, v, is_causal, key_mask=mask, impl=name)
        again = case.run(q * 0.9, k, v, is_causal, state=state, impl=name)
        plain = case(q, k, v, is_causal=is_causal, impl=name)
        results.append(
            [
                *gradients((out, state), (q, k, v)),
                *gradients(again, (q, k, v)),
                *gradients(plain, (q, k, v)),
            ]
        )
    for actual, exact in zip(results[1], results[0]):
        assert_close(actual, exact, 1000)


@pytest.mark.parametrize("impl", slow_but(IMPLEMENTATIONS[1:], IMPLEMENTATIONS))
@forms([c for c in CASES if c.name != "linear-relu"])
def test_gradcheck(case: Case, impl: str, is_causal: bool, monkeypatch):
    """Finite differences, through inputs, states in and states out."""
    walk(monkeypatch, chunk=3)
    q, k, v = case.inputs(1, 2, 5, 2, 2, G=1, requires_grad=True)
    start = case.run(q.detach(), k.detach(), v.detach(), is_causal, impl=impl)[1]
    parts = [] if start is None else [x.clone().requires_grad_() for x in sums_of(start)]

    def run(q, k, v, *parts):
        given = iter(parts)
        state = (
            None
            if start is None
            else start.map(lambda x: next(given) if x.is_floating_point() else x)
        )
        out, end = case.run(q, k, v, is_causal, state=state, impl=impl)
        return (out, *sums_of(end))

    assert torch.autograd.gradcheck(run, (q, k, v, *parts), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("impl", [x for x in IMPLEMENTATIONS if x != "reference"])
@by_case
def test_double_backward_is_refused_in_one_piece(case: Case, impl: str):
    q, k, v = case.inputs(T=5, requires_grad=True)
    out = case(q, k, v, is_causal=True, impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_backward.default but no autograd formula"):
        torch.autograd.grad(grad.square().sum(), q)


@pytest.mark.parametrize("order", [3, 4])
def test_wide_heads_at_high_orders(order: int):
    """The polynomial of the scores gives the same at order 4, with 135,751 features.

    A single chunk forms no feature.
    """
    K, x = 40, inputs(1, 2, 40, 40, 2, G=1)
    q, k, v = (0.3 * x[0]).requires_grad_(), (0.3 * x[1]).requires_grad_(), x[2].requires_grad_()
    scores = (q @ k.mT) / K**0.5
    weights = sum(scores**p / math.factorial(p) for p in range(order + 1)).tril()
    exact = weights / weights.sum(-1, keepdim=True) @ v
    out = cm.taylor_attention(q, k, v, order, is_causal=True)
    assert_close(out, exact, 100)
    for actual, expected in zip(gradients(out, (q, k, v)), gradients(exact, (q, k, v))):
        assert_close(actual, expected, 1000)
    Expansion.cached.cache_clear()
    short = cm.taylor_attention(
        q[:, :, :CHUNK], k[:, :, :CHUNK], v[:, :, :CHUNK], order, is_causal=True
    )
    assert_close(short, exact[:, :, :CHUNK], 100)
    assert "monomial_tables" not in vars(Expansion.cached(K, order, True, torch.float64, q.device))


@by_impl
@by_case
@pytest.mark.parametrize(
    "cuts",
    [[1] * 37, [5, 1, 30, 1], [16, 21], [0, 20, 0, 17]],
    ids=["steps", "mixed", "chunk", "empty"],
)
def test_any_split_is_the_whole(case: Case, impl: str, cuts: list[int]):
    results = []
    for lengths in ([37], cuts):
        q, k, v = case.inputs(requires_grad=True)
        state, outs = None, []
        for parts in zip(*(x.split(lengths, 2) for x in (q, k, v))):
            out, state = case(*parts, is_causal=True, state=state, return_state=True, impl=impl)
            outs.append(out)
        out = torch.cat(outs, 2)
        assert state.position.tolist() == [37, 37]
        results.append([out, *sums_of(state), *gradients((out, state), (q, k, v))])
    for actual, exact in zip(*results[::-1]):
        assert_close(actual, exact, 1000)


@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: c.name)
def test_recurrence_is_the_quadratic_form(case: Case):
    """The reference's two forms agree with each other."""
    q, k, v = case.inputs()
    if case.op is cm.taylor_attention:
        order, constant = case.options.get("order", 2), case.options.get("constant_term", True)
        features, scale = (
            reference.taylor_features(order, constant),
            case.options.get("scale", 5**-0.5),
        )
    else:
        features, scale = (lambda x: torch.nn.functional.elu(x) + 1), case.options["scale"]
        k, features = features(k), lambda x: x
        q = torch.nn.functional.elu(q * scale) + 1
        scale = 1.0
    out, (S, z) = reference.recurrent_attention(q * scale, k, v, features=features, normalize=True)
    q0, k0, v0 = case.inputs()
    whole, state = case(q0, k0, v0, is_causal=True, return_state=True, impl="reference")
    assert_close(out, whole, 1000)
    assert_close(S, state.numerator, 100)
    assert_close(z, state.denominator, 100)


@by_impl
@by_case
def test_outputs_do_not_depend_on_later_tokens(case: Case, impl: str):
    q, k, v = case.inputs()
    out = case(q, k, v, is_causal=True, impl=impl)
    for t in (1, 15, 16, 30):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] = 7.0
        assert torch.equal(case(*changed, is_causal=True, impl=impl)[:, :, :t], out[:, :, :t])


@by_impl
@by_case
def test_states_are_values(case: Case, impl: str):
    q, k, v = case.inputs()
    _, state = case(q, k, v, is_causal=True, return_state=True, impl=impl)
    before = state.clone()
    for length in (1, 20):
        parts = [x[:, :, :length] for x in (q, k, v)]
        first, after = case(*parts, is_causal=True, state=state, return_state=True, impl=impl)
        again, _ = case(*parts, is_causal=True, state=state, return_state=True, impl=impl)
        assert torch.equal(first, again)
        for a, b in zip(tensors_of(state), tensors_of(before)):
            assert torch.equal(a, b)
        for a in tensors_of(after):
            assert all(a.data_ptr() != b.data_ptr() for b in tensors_of(state))
    mask = torch.rand(2, 37) > 0.4
    _, masked = case(q, k, v, is_causal=True, key_mask=mask, return_state=True, impl=impl)
    for x in (q, k, v, mask):
        assert all(a.data_ptr() != x.data_ptr() for a in (*tensors_of(masked), *tensors_of(state)))


@by_impl
@by_case
def test_states_can_be_selected(case: Case, impl: str):
    """Rows of a state, reordered and repeated as in beam search, continue their sequences."""
    q, k, v = case.inputs(3)
    _, state = case(q, k, v, is_causal=True, return_state=True, impl=impl)
    index = torch.tensor([2, 0, 2])
    nxt = case.inputs(3, T=4, seed=1)
    out, end = case(
        *(x[index] for x in nxt),
        is_causal=True,
        state=state.select(index),
        return_state=True,
        impl=impl,
    )
    expected, whole = case(*nxt, is_causal=True, state=state, return_state=True, impl=impl)
    picked = whole.select(index)
    assert_close(out, expected[index], 100)
    for a, b in zip(tensors_of(end), tensors_of(picked)):
        assert torch.allclose(a, b)
