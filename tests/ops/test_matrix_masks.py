"""The matrix under masks and packing: padding does not exist, and packed sequences are separate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cumulant as cm

from .cases import (
    BY_TOKEN,
    Case,
    assert_close,
    by_case,
    by_form,
    by_impl,
    by_token,
    forms,
    gradients,
    sums_of,
    tensors_of,
)
from .oracle import oracle

pytestmark = pytest.mark.usefixtures("short_chunks")


@by_impl
@forms(BY_TOKEN)
@pytest.mark.parametrize("junk", [float("nan"), 1e4], ids=["nan", "large"])
@pytest.mark.parametrize("where", ["left", "right", "holes", "row"])
def test_padding_does_not_exist(case: Case, impl: str, is_causal: bool, junk: float, where: str):
    """Output, gradient and state equal those of each row alone, whatever masked keys hold."""
    q, k, v = case.inputs(T=40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    if where == "left":
        mask[0, :21] = False
    elif where == "right":
        mask[0, 21:] = False
    elif where == "holes":
        mask = torch.rand(2, 40) > 0.5
    else:
        mask[0] = False
    padded = (
        k.masked_fill(~mask[:, None, :, None], junk),
        v.masked_fill(~mask[:, None, :, None], junk),
    )
    leaves = tuple(x.clone().requires_grad_() for x in (q, *padded))
    out, state = case.run(*leaves, is_causal, key_mask=mask, impl=impl)
    alone = is_causal or not case.masked_queries  # only the queries at tokens are compared
    visible = (
        mask[:, None, :, None].expand_as(out) if alone else torch.ones_like(out, dtype=torch.bool)
    )
    if not case.masked_queries:
        assert not out[~visible].any()
    grads = gradients((out.where(visible, 0), state), leaves)
    for b in range(2):
        rows = mask[b] if alone else torch.ones(40, dtype=torch.bool)
        own = q[b : b + 1, :, rows], k[b : b + 1, :, mask[b]], v[b : b + 1, :, mask[b]]
        expected, end = case.run(*own, is_causal, impl=impl)
        assert_close(out[b : b + 1, :, rows], expected, 1000)
        if state is None or end is None:
            continue
        assert int(state.position[b]) == int(mask[b].sum()) == int(end.position)
        if not isinstance(state, cm.KeyValueState):
            for actual, exact in zip(sums_of(state), sums_of(end)):
                assert_close(actual[b : b + 1], exact, 1000)
        more = case.inputs(2, T=3, seed=5)
        after = case(*more, is_causal=True, state=state, impl=impl)[b : b + 1]
        assert_close(
            after, case(*(x[b : b + 1] for x in more), is_causal=True, state=end, impl=impl), 1000
        )
    for grad, kept in zip(grads, (None, mask, mask)):
        assert torch.isfinite(grad).all()
        if kept is not None:
            assert not grad.masked_select(~kept[:, None, :, None]).any()


@by_impl
@by_token
def test_gradients_of_padded_rows_are_those_of_the_row_alone(case: Case, impl: str):
    q, k, v = case.inputs(T=40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :21], mask[1, 9:] = False, False
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    more = case.inputs(2, T=9, seed=5)

    def loss(x, m, weight, rows):
        """A sum over the outputs at tokens, and over later outputs."""
        out, state = case(*x, is_causal=True, key_mask=m, return_state=True, impl=impl)
        after = case(*(y[rows] for y in more), is_causal=True, state=state, impl=impl)
        return (out * weight).sum() + after.sin().sum()

    weight = torch.randn(2, 4, 40, 3, dtype=torch.float64) * mask[:, None, :, None]
    grads = torch.autograd.grad(loss(leaves, mask, weight, slice(None)), leaves)
    for b in range(2):
        m, row = mask[b], slice(b, b + 1)
        alone = tuple(x[row, :, m].clone().requires_grad_() for x in (q, k, v))
        for actual, exact in zip(
            grads, torch.autograd.grad(loss(alone, None, weight[row, :, m], row), alone)
        ):
            assert_close(actual[row, :, m], exact, 1000)


@by_impl
@by_form
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_packed_is_separate(case: Case, impl: str, is_causal: bool, masked: bool):
    """Also with states in and out, an empty sequence, and NaN in the slack after the last one."""
    T = 60
    bounds = [0, 7, 7, 41, 52]
    q, k, v = case.inputs(1, T=T)
    for x in (q, k, v):
        x[:, :, bounds[-1] :] = float("nan")
    mask = (torch.rand(1, T) > 0.4) if masked else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    starts = case.inputs(4, T=6, seed=1)
    start = case(*starts, is_causal=True, return_state=True, impl=impl)[1]
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    out, state = case.run(
        *leaves, is_causal, cu_seqlens=cu_seqlens, key_mask=mask, state=start, impl=impl
    )
    plain = case(*leaves, is_causal=is_causal, cu_seqlens=cu_seqlens, key_mask=mask, impl=impl)
    assert not out[:, :, bounds[-1] :].any()
    grads = torch.autograd.grad(sum(x.sin().sum() for x in (out, *sums_of(state))), leaves)
    for grad in grads:
        assert not grad[:, :, bounds[-1] :].any()
    for i, (a, b) in enumerate(zip(bounds, bounds[1:])):
        alone = tuple(x[:, :, a:b].clone().requires_grad_() for x in (q, k, v))
        m = None if mask is None else mask[:, a:b]
        row = start.select(torch.tensor([i])) if case.packed_states else None
        expected, end = case.run(*alone, is_causal, key_mask=m, state=row, impl=impl)
        assert_close(out[:, :, a:b], expected, 1000)
        assert_close(
            plain[:, :, a:b], case(*alone, is_causal=is_causal, key_mask=m, impl=impl), 1000
        )
        loss = expected.sin().sum()
        if state is not None:
            for actual, exact in zip(tensors_of(state), tensors_of(end)):
                assert torch.allclose(actual[i : i + 1], exact)
            loss = loss + sum(x.sin().sum() for x in sums_of(end))
        for actual, exact in zip(grads, torch.autograd.grad(loss, alone)):
            assert_close(actual[:, :, a:b], exact, 1000)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@by_case
def test_any_shape_mask_and_split(case: Case, data: st.DataObject):
    """Drawn shapes, groups, masks and splits give the formula on the whole."""
    B, G, R, K, V = (data.draw(st.integers(1, 3)) for _ in range(5))
    T = data.draw(st.integers(0, 40))
    q, k, v = case.inputs(B, G * R, T, K, V, G=G, seed=data.draw(st.integers(0, 9)))
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T)), dtype=torch.bool
    )
    mask = mask.view(B, T)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=3)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, T])]
    state, outs = None, []
    for qs, ks, vs, ms in zip(*(x.split(lengths, 2) for x in (q, k, v)), mask.split(lengths, 1)):
        out, state = case(
            qs, ks, vs, is_causal=True, key_mask=ms, state=state, return_state=True, impl="torch"
        )
        outs.append(out)
    assert_close(torch.cat(outs, 2), oracle(case, q, k, v, is_causal=True, key_mask=mask), 1000)
