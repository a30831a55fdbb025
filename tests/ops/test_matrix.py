"""The matrix: what every operation holds on every implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cumulant as cm
from cumulant.kernels import reference
from cumulant.kernels.torch.features import Expansion

from .cases import (
    BY_TOKEN,
    CASES,
    CHUNK,
    CROSS,
    FIXED,
    GATED,
    IMPLEMENTATIONS,
    POSITIVE,
    TOLERANCE,
    Case,
    assert_close,
    error,
    inputs,
    oracle,
    sums_of,
    tensors_of,
)
from .walking import walk

by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
by_token = pytest.mark.parametrize("case", BY_TOKEN, ids=lambda c: c.name)
by_positive = pytest.mark.parametrize("case", POSITIVE, ids=lambda c: c.name)


def forms(cases: list[Case]) -> Any:
    """Each case, causal and, where it has that form, in both directions."""
    found = [
        (c, is_causal) for c in cases for is_causal in (True, False) if is_causal or c.bidirectional
    ]
    names = [f"{c.name}-{'causal' if is_causal else 'bidirectional'}" for c, is_causal in found]
    return pytest.mark.parametrize(("case", "is_causal"), found, ids=names)


by_form = forms(CASES)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    walk(monkeypatch, chunk=CHUNK, span=CHUNK, block=CHUNK)
    walk(monkeypatch, elita_span=1, elita_chunk=4)  # chunks of chunks as well


def gradients(out: Any, wrt: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of a fixed nonlinear function of outputs (and states)."""
    leaves = [out] if isinstance(out, Tensor) else [out[0], *sums_of(out[1])]
    leaves = [x.masked_fill(x.isinf(), 0) for x in leaves]  # logarithms of sums over nothing
    loss = sum(
        (x.double().sin() * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in leaves
    )
    found = torch.autograd.grad(loss, wrt, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wrt)]


# ---- what is computed ----


@by_impl
@by_form
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_equals_the_formula(case: Case, impl: str, is_causal: bool, masked: bool):
    q, k, v = case.inputs()
    mask = torch.rand(2, 37) > 0.4 if masked else None
    out = case(q, k, v, is_causal=is_causal, key_mask=mask, impl=impl)
    assert_close(out, oracle(case, q, k, v, is_causal=is_causal, key_mask=mask), 100)


@by_form
@pytest.mark.parametrize("length", [7, 37])
def test_gradients_equal_the_reference(case: Case, is_causal: bool, length: int):
    """The reference differentiates itself; its own gradients are held to finite differences
    below.
    """
    mask = torch.rand(2, length) > 0.3
    results = []
    for impl in case.implementations:
        q, k, v = case.inputs(T=length, requires_grad=True)
        out, state = case.run(q, k, v, is_causal, key_mask=mask, impl=impl)
        again = case.run(q * 0.9, k, v, is_causal, state=state, impl=impl)
        plain = case(q, k, v, is_causal=is_causal, impl=impl)
        results.append(
            [
                *gradients((out, state), (q, k, v)),
                *gradients(again, (q, k, v)),
                *gradients(plain, (q, k, v)),
            ]
        )
    for others in results[1:]:
        for actual, exact in zip(others, results[0]):
            assert_close(actual, exact, 1000)


@by_impl
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
    """135,751 features at order 4: output and gradients across chunks against the polynomial of the
    scores; in one chunk no feature is formed."""
    K, x = 40, inputs(1, 2, 40, 40, 2, G=1)
    q, k, v = (0.3 * x[0]).requires_grad_(), (0.3 * x[1]).requires_grad_(), x[2].requires_grad_()
    scores = (q @ k.mT) / K**0.5
    weights = sum(scores**p / math.factorial(p) for p in range(order + 1)).tril()
    exact = weights / weights.sum(-1, keepdim=True) @ v
    out = cm.taylor_attention(q, k, v, order, is_causal=True)
    assert_close(out, exact, 100)
    for actual, expected in zip(gradients(out, (q, k, v)), gradients(exact, (q, k, v))):
        assert_close(actual, expected, 1000)
    Expansion.get.cache_clear()
    short = cm.taylor_attention(
        q[:, :, :CHUNK], k[:, :, :CHUNK], v[:, :, :CHUNK], order, is_causal=True
    )
    assert_close(short, exact[:, :, :CHUNK], 100)
    assert "tables" not in vars(Expansion.get(K, order, True, torch.float64, q.device))


# ---- the law: whole = any split = one token at a time ----


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
    """Beams: rows of a state reordered and repeated continue as those sequences."""
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


# ---- masks and packing ----


@by_impl
@forms(BY_TOKEN)
@pytest.mark.parametrize("junk", [float("nan"), 1e4], ids=["nan", "large"])
@pytest.mark.parametrize("where", ["left", "right", "holes", "row"])
def test_padding_does_not_exist(case: Case, impl: str, is_causal: bool, junk: float, where: str):
    """Output, gradient and state equal those of each row by itself, whatever stands at masked
    keys.
    """
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
        """Of the outputs at tokens, and of what comes after them."""
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


# ---- shapes ----


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
    """More or fewer keys than queries; the context's state, computed once, serves any queries."""
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
    """A state whose memory is laid out otherwise; gradients that arrive with other strides, one at
    a time.
    """

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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@by_case
def test_any_shape_mask_and_split(case: Case, data: st.DataObject):
    """Drawn shapes, groups, masks and splits: torch in pieces equals the formula on the whole."""
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


# ---- numbers ----


def kept_in(state: cm.State, part: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Keys and values stay as they are, sums are kept in fp32 at least, ELiTA's means and
    logarithms in fp64.
    """
    if isinstance(state, cm.KeyValueState):
        return dtype
    if isinstance(state, cm.ElitaState):
        return torch.float64
    return torch.promote_types(dtype, torch.float32)


@by_impl
@forms([*POSITIVE, *GATED])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_dtypes(case: Case, impl: str, dtype: torch.dtype, is_causal: bool):
    """Output, state and gradients against float64 on the same rounded inputs."""
    low = case.inputs(T=100, K=16, V=16, dtype=dtype, requires_grad=True)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    out, state = case.run(*low, is_causal, impl=impl)
    expected, end = case.run(*exact, is_causal, impl="reference")
    assert out.dtype == dtype
    assert_close(out, expected)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for a, b in zip(sums_of(state), sums_of(end)):
        assert a.dtype == kept_in(state, a, dtype)
        assert_close(a.to(min(a.dtype, wide, key=lambda x: x.itemsize)), b, 10)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out.double() * weight).sum(), low)
    for a, b in zip(grads, torch.autograd.grad((expected * weight).sum(), exact)):
        assert a.dtype == dtype
        assert_close(a, b, 3)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_tolerances_are_tight(dtype: torch.dtype):
    """The table is not slack: the plain quadratic form in the same dtype comes within 20 times of
    it.
    """
    low = inputs(T=100, K=16, V=16, dtype=dtype)
    exact = [x.double() for x in low]
    worst = max(
        error(case(*low, is_causal=True, impl="reference"), oracle(case, *exact, is_causal=True))
        for case in POSITIVE
    )
    assert TOLERANCE[dtype] / 20 < worst < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*POSITIVE, *FIXED], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_decoding_keeps_its_accuracy(case: Case, dtype: torch.dtype):
    """8,200 single steps in low precision against float64 at the end: a 16-bit sum of keys would
    have frozen at 512.
    """
    T = 8200
    low = case.inputs(1, 2, T, 8, 8, G=1, dtype=dtype)
    exact = case(*(x.double() for x in low), is_causal=True, impl="torch")
    with torch.inference_mode():
        state, out = None, torch.empty(0)
        for t in range(T):
            out, state = case(
                *(x[:, :, t : t + 1] for x in low), is_causal=True, state=state, return_state=True
            )
    assert int(state.position) == T
    assert_close(out, exact[:, :, -1:], 3)


@pytest.mark.parametrize("case", [*POSITIVE, *GATED], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_impl
def test_autocast_does_not_lower_the_sums(case: Case, impl: str, dtype: torch.dtype):
    low = case.inputs(T=100, K=16, V=16, dtype=dtype, requires_grad=True)
    plain = case(*low, is_causal=True, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = case(*low, is_causal=True, return_state=True, impl=impl)
    assert out.dtype == dtype
    assert all(x.dtype == kept_in(state, x, dtype) for x in sums_of(state))
    assert_close(out, plain)
    for a, b in zip(gradients(out, low), gradients(plain, low)):
        assert_close(a, b, 10)


@by_impl
def test_queries_without_features_give_zeros(impl: str):
    q, k, v = inputs()
    for x in (q, k, v):
        x.requires_grad_()
    out = cm.linear_attention(-q.abs(), k, v, "relu", is_causal=True, impl=impl)
    assert not out.any()
    assert all(torch.isfinite(g).all() for g in gradients(out, (q, k, v)))


@by_impl
def test_small_weights_do_not_meet_an_epsilon(impl: str):
    """Weights near fp16's smallest numbers: an epsilon of 1e-6 in the denominator would halve these
    outputs.
    """
    q, k, v = inputs(dtype=torch.float16)
    tiny = (q.float() - 12).half(), (k.float() - 12).half()
    out = cm.linear_attention(*tiny, v, is_causal=True, impl=impl)
    exact = oracle(Case("elu", cm.linear_attention), *tiny, v, is_causal=True)
    assert_close(out, exact)


@by_case
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_every_row_is_written(case: Case, impl: str):
    """New memory is filled with NaN; none of it comes out."""
    torch.use_deterministic_algorithms(True)
    try:
        for length in (5, 37):
            q, k, v = case.inputs(T=length, requires_grad=True)
            packed = case.inputs(1, T=length, requires_grad=True)
            cu_seqlens = torch.tensor([0, 2, length - 1])
            for is_causal in (True, False)[: 1 + case.bidirectional]:
                out = case.run(q, k, v, is_causal, impl=impl)
                rows = case(*packed, is_causal=is_causal, cu_seqlens=cu_seqlens, impl=impl)
                found = [
                    out[0],
                    *tensors_of(out[1]),
                    *gradients(out, (q, k, v)),
                    rows,
                    *gradients(rows, packed),
                ]
                assert all(torch.isfinite(x).all() for x in found)
    finally:
        torch.use_deterministic_algorithms(False)


@by_case
def test_results_repeat_bit_for_bit(case: Case):
    """Twice the same call, and a row by itself or in a batch."""
    q, k, v = case.inputs(4, dtype=torch.float32)
    out = case(q, k, v, is_causal=True, impl="torch")
    assert torch.equal(out, case(q, k, v, is_causal=True, impl="torch"))
    assert_close(case(q[1:2], k[1:2], v[1:2], is_causal=True, impl="torch"), out[1:2])


@by_impl
def test_no_constant_keeps_small_weights(impl: str):
    """Scores near 1e-3, as in a fresh model: 1 + x + x²/2 - 1 in fp32 would keep three digits of
    them.
    """
    q, k, v = inputs(T=64, K=16, dtype=torch.float32)
    q, k = (q.abs() * 0.02, k.abs() * 0.02)
    case = Case("", cm.taylor_attention, {"constant_term": False})
    whole = case(q, k, v, is_causal=True, impl=impl)
    assert_close(whole, oracle(case, q, k, v, is_causal=True))


@by_impl
def test_shen_far_from_zero(impl: str):
    """The bidirectional form takes off the largest key, so exponentials neither vanish nor
    overflow.
    """
    q, k, v = inputs(dtype=torch.float32)
    case = Case("", cm.linear_attention, {"feature_map": "softmax"})
    for shift in (-200.0, 200.0):
        mask = torch.rand(2, 37) > 0.3
        assert_close(
            case(q, k + shift, v, key_mask=mask, impl=impl),
            oracle(case, q, k + shift, v, key_mask=mask),
            5,
        )


@by_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "shift"), [(1e4, 0.0), (1.0, 1e4), (1.0, -1e4), (30.0, 9e3)])
def test_elita_is_exact_for_logits_of_any_size(
    impl: str, dtype: torch.dtype, size: float, shift: float
):
    """Outputs, states and gradients against the oracle on the same rounded logits, whole and token
    by token, at the same tolerances as for small logits. In fp32 numbers near 1e4 stand 1e-3 apart:
    a running log-sum kept in fp32 would be wrong by as much."""
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
@pytest.mark.parametrize("first", [0.0, 12.0, 16.0, 18.0])
def test_elita_steps_do_not_stall(impl: str, first: float):
    """A token, two or a few at a time, fp32, where a first key outweighs thousands of others: each
    moves mean and log-sum by less than the last digit of an fp32 number, all of them together by a
    lot."""
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
    """Keys without weight, and a call onto what they left."""
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
    """bf16 values, as under autocast, with logits in fp32: as if the values were fp32."""
    q, k, v = inputs(dtype=torch.bfloat16)
    logits = [x.float() * 1.234 for x in (k[..., 0], q[..., 0], q[..., 1])]
    out, state = cm.elita_attention(*logits, v, return_state=True, impl=impl)
    expected, end = cm.elita_attention(*logits, v.float(), return_state=True, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(state.mean, end.mean)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cm.elita_attention(*logits, v, impl=impl), out)


def test_denominator_is_at_least_half_the_keys():
    """Order 2: every weight is ((x + 1)² + 1) / 2 >= ½, the worst case x = -1 included."""
    q, k, v = inputs()
    _, state = cm.taylor_attention(q, k, v, scale=1.0, is_causal=True, return_state=True)
    features = reference.taylor_features(2, True)
    queries = torch.cat(
        (features(q[:, :2] * 3), features(-k / k.square().sum(-1, keepdim=True))), 2
    )
    assert (queries @ state.denominator[..., None]).min() >= 37 / 2


@pytest.mark.slow
@by_positive
def test_long_sequences_keep_their_accuracy(case: Case, monkeypatch):
    """65,536 tokens in fp32 at the real chunk length, outputs and gradients, against float64."""
    monkeypatch.undo()
    low = case.inputs(1, 2, 65536, 16, 16, G=1, dtype=torch.float32, requires_grad=True)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    results = []
    for leaves in (low, exact):
        out = case(*leaves, is_causal=True)
        results.append([out, *torch.autograd.grad(out.double().sin().sum(), leaves)])
    for actual, expected in zip(*results):
        assert_close(actual, expected, 10)
