"""The matrix in every dtype: errors within the tolerances, also over long runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cumulant as cm
from cumulant.kernels import reference

from ..quick import slow_but
from .cases import (
    FIXED,
    GATED,
    POSITIVE,
    TOLERANCE,
    Case,
    assert_close,
    by_case,
    by_impl,
    by_positive,
    error,
    forms,
    gradients,
    inputs,
    sums_of,
    tensors_of,
)
from .oracle import oracle

pytestmark = pytest.mark.usefixtures("short_chunks")


def kept_in(state: cm.State, part: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a state keeps a tensor.

    Keys and values keep their own, sums are at least fp32, and ELiTA's means and logarithms are
    fp64.
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
        is_numerator = isinstance(state, cm.LinearState) and a is state.numerator
        if impl == "triton" and is_numerator and dtype.itemsize == 2:
            # tensor cores take the features and values of numerators in the inputs' dtype
            assert error(a, b) < TOLERANCE[dtype]
            continue
        assert_close(a.to(min(a.dtype, wide, key=lambda x: x.itemsize)), b, 10)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out.double() * weight).sum(), low)
    for a, b in zip(grads, torch.autograd.grad((expected * weight).sum(), exact)):
        assert a.dtype == dtype
        assert_close(a, b, 3)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_tolerances_are_tight(dtype: torch.dtype):
    """The plain quadratic form in the same dtype errs by a twentieth of the tolerance or more."""
    low = inputs(T=100, K=16, V=16, dtype=dtype)
    exact = [x.double() for x in low]
    worst = max(
        error(case(*low, is_causal=True, impl="reference"), oracle(case, *exact, is_causal=True))
        for case in POSITIVE
    )
    assert TOLERANCE[dtype] / 20 < worst < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*POSITIVE, *FIXED], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "dtype", slow_but((torch.float32,), (torch.bfloat16, torch.float32)), ids=str
)
def test_long_decoding_keeps_its_accuracy(case: Case, dtype: torch.dtype):
    """8,200 single steps stay near float64; a 16-bit sum of keys would freeze at 512."""
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
    """Weights are near fp16's smallest numbers; an epsilon of 1e-6 would halve these outputs."""
    q, k, v = inputs(dtype=torch.float16)
    tiny = (q.float() - 12).half(), (k.float() - 12).half()
    out = cm.linear_attention(*tiny, v, is_causal=True, impl=impl)
    exact = oracle(Case("elu", cm.linear_attention), *tiny, v, is_causal=True)
    assert_close(out, exact)


@by_case
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_every_row_is_written(case: Case, impl: str):
    """New memory is filled with NaN, and no result has any."""
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
    """At scores near 1e-3, 1 + x + x²/2 - 1 in fp32 would keep three digits."""
    q, k, v = inputs(T=64, K=16, dtype=torch.float32)
    q, k = (q.abs() * 0.02, k.abs() * 0.02)
    case = Case("", cm.taylor_attention, {"constant_term": False})
    whole = case(q, k, v, is_causal=True, impl=impl)
    assert_close(whole, oracle(case, q, k, v, is_causal=True))


@by_impl
def test_shen_far_from_zero(impl: str):
    """Both directions subtract the largest key, so exponentials neither vanish nor overflow."""
    q, k, v = inputs(dtype=torch.float32)
    case = Case("", cm.linear_attention, {"feature_map": "softmax"})
    for shift in (-200.0, 200.0):
        mask = torch.rand(2, 37) > 0.3
        assert_close(
            case(q, k + shift, v, key_mask=mask, impl=impl),
            oracle(case, q, k + shift, v, key_mask=mask),
            5,
        )


def test_denominator_is_at_least_half_the_keys():
    """At order 2 every weight is ((x + 1)² + 1) / 2 >= ½; x = -1 is the worst case."""
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
    """65,536 tokens in fp32, at the real chunk length, stay near float64."""
    monkeypatch.undo()
    low = case.inputs(1, 2, 65536, 16, 16, G=1, dtype=torch.float32, requires_grad=True)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    results = []
    for leaves in (low, exact):
        out = case(*leaves, is_causal=True)
        results.append([out, *torch.autograd.grad(out.double().sin().sum(), leaves)])
    for actual, expected in zip(*results):
        assert_close(actual, expected, 10)
