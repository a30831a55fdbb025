"""The matrix at other shapes: lengths, cross attention, grouped heads, strides, no rows."""

from __future__ import annotations

import pytest
import torch

from .cases import (
    CROSS,
    Case,
    assert_close,
    by_case,
    by_form,
    by_impl,
    gradients,
    sums_of,
)
from .oracle import oracle

pytestmark = pytest.mark.usefixtures("short_chunks")


@by_impl
@by_form
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 33])
def test_ragged_lengths(case: Case, impl: str, is_causal: bool, length: int):
    q, k, v = case.inputs(T=length)
    out, state = case.run(q, k, v, is_causal, impl=impl)
    assert_close(out, oracle(case, q, k, v, is_causal=is_causal), 1000)
    assert_close(case(q, k, v, is_causal=is_causal, impl=impl), out, 100)
    assert state is None or state.position.tolist() == [length] * 2


@by_impl
@pytest.mark.parametrize("case", CROSS, ids=lambda c: c.name)
@pytest.mark.parametrize(("T", "S"), [(3, 50), (50, 3), (5, 0), (0, 5), (1, 1)])
def test_cross_attention(case: Case, impl: str, T: int, S: int):
    """Keys may be more or fewer than queries, and one state of the context serves any queries."""
    q, k, v = case.inputs(T=T, S=S)
    mask = torch.rand(2, S) > 0.3
    out, state = case.run(q, k, v, False, key_mask=mask, impl=impl)
    assert_close(out, oracle(case, q, k, v, key_mask=mask), 1000)
    if state is not None:
        nothing = k[:, :, :0], v[:, :, :0]
        assert_close(case(q, *nothing, state=state, impl=impl), out, 1000)


@by_impl
@by_form
@pytest.mark.parametrize(("H", "G"), [(1, 1), (6, 6), (6, 2), (6, 1)])
def test_grouped_heads(case: Case, impl: str, H: int, G: int, is_causal: bool):
    q, k, v = case.inputs(H=H, G=G, requires_grad=True)
    out = case(q, k, v, is_causal=is_causal, impl=impl)
    repeated = case(
        q, *(x.repeat_interleave(H // G, 1) for x in (k, v)), is_causal=is_causal, impl=impl
    )
    assert_close(out, repeated, 1000)
    for actual, exact in zip(gradients(out, (q, k, v)), gradients(repeated, (q, k, v))):
        assert_close(actual, exact, 1000)


@by_impl
@by_case
@pytest.mark.parametrize(("K", "V"), [(1, 1), (1, 9), (8, 1), (3, 20)])
def test_head_dims(case: Case, impl: str, K: int, V: int):
    q, k, v = case.inputs(K=K, V=V)
    assert_close(
        case(q, k, v, is_causal=True, impl=impl), oracle(case, q, k, v, is_causal=True), 3000
    )


@by_impl
@by_case
@pytest.mark.parametrize("length", [8, 37])
def test_strides_of_states_and_their_gradients_do_not_matter(case: Case, impl: str, length: int):
    """States, and the gradients that arrive for them, may have any strides."""

    def relaid(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x

    q, k, v = case.inputs(T=length, requires_grad=True)
    _, state = case(q, k, v, is_causal=True, return_state=True, impl=impl)
    assert any(not relaid(x).is_contiguous() for x in sums_of(state))
    out, end = case(q, k, v, is_causal=True, state=state.map(relaid), return_state=True, impl=impl)
    expected, exact = case(
        q, k, v, is_causal=True, state=state, return_state=True, impl="reference"
    )
    assert_close(out, expected, 1000)
    for actual, part in zip(sums_of(end), sums_of(exact)):
        assert_close(actual, part, 100)
    for at in range(len(sums_of(state))):
        found = []
        for name in (impl, "reference"):
            _, state = case(q, k, v, is_causal=True, return_state=True, impl=name)
            x = sums_of(state)[at]
            weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.transpose(0, 1).shape)
            loss = (x.transpose(0, 1) * weight).sum()
            found.append(torch.autograd.grad(loss, (q, k, v), allow_unused=True))
        for actual, exact in zip(*found):
            if exact is None or not exact.any():
                assert actual is None or not actual.any()
            else:
                assert_close(actual, exact, 1000)


@by_impl
@by_case
def test_empty_batch(case: Case, impl: str):
    q, k, v = case.inputs(0, requires_grad=True)
    out, state = case(q, k, v, is_causal=True, return_state=True, impl=impl)
    assert out.shape == (0, 4, 37, 3)
    assert len(state.position) == 0
    assert all(g.shape == x.shape for g, x in zip(gradients(out, (q, k, v)), (q, k, v)))


@by_impl
@by_form
def test_strides_do_not_matter(case: Case, impl: str, is_causal: bool):
    q, k, v = case.inputs()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    sliced = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    expanded = [x[:, :, :1].expand(-1, -1, 37, -1) for x in (q, k, v)]
    out = case(q, k, v, is_causal=is_causal, impl=impl)
    for variant in (strided, sliced):
        assert not variant[0].is_contiguous()
        assert_close(case(*variant, is_causal=is_causal, impl=impl), out, 10)
    plain = case(*(x.contiguous() for x in expanded), is_causal=is_causal, impl=impl)
    assert_close(case(*expanded, is_causal=is_causal, impl=impl), plain, 10)
