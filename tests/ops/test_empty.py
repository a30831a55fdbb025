"""Calls without rows, tokens, keys or channels: forward pass, backward pass and states."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm

from .cases import CASES, IMPLEMENTATIONS, Case, sums_of
from .oracle import oracle

by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
SIZES: dict[str, dict[str, int]] = {
    "no rows": {"B": 0, "T": 7},
    "no tokens": {"T": 0},
    "no channels": {"V": 0, "T": 7},
    "no rows, no tokens": {"B": 0, "T": 0},
    "no rows, no channels": {"B": 0, "V": 0, "T": 7},
    "no tokens, no channels": {"T": 0, "V": 0},
    "nothing": {"B": 0, "T": 0, "V": 0},
    "no rows, one token": {"B": 0, "T": 1},
    "one token, no channels": {"T": 1, "V": 0},
}
NAMES = (
    "taylor-2",
    "linear-relu",
    "linear-softmax",
    "linear-callable",
    "gated-relu2",
    "gated-bias",
    "mixed-relu2",
)
FEW = [c for c in CASES if c.name in (*NAMES, "mixed-bias", "mixed-unreduced", "elita-own")]
FORMS = [(c, is_causal) for c in FEW for is_causal in (True, False) if is_causal or c.bidirectional]
by_form = pytest.mark.parametrize(
    ("case", "is_causal"),
    FORMS,
    ids=[f"{c.name}-{'causal' if causal else 'bidirectional'}" for c, causal in FORMS],
)


def backward(out: Tensor, state: Any, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of all outputs, with zeros for leaves that nothing depends on."""
    parts = [out, *sums_of(state)]
    loss = sum(x.masked_fill(x.isinf(), 0).sin().sum() for x in parts if x.requires_grad)
    if not isinstance(loss, Tensor):
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves)]


@by_impl
@by_form
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_empty(case: Case, impl: str, is_causal: bool, sizes: dict[str, int]):
    """Shapes are the formula's, outputs without keys are 0, and states are carried on."""
    impl = impl if impl in case.implementations else "torch"
    for masked, onto in product((False, True), repeat=2):
        check_empty(case, impl, is_causal, masked, onto, sizes)


def check_empty(
    case: Case, impl: str, is_causal: bool, masked: bool, onto: bool, sizes: dict[str, int]
) -> None:
    q, k, v = case.inputs(**sizes, requires_grad=True)
    B, T = q.shape[0], q.shape[2]
    extra: dict[str, Any] = {"key_mask": torch.arange(T).expand(B, T) % 3 > 0} if masked else {}
    carried = is_causal or case.op in (cm.linear_attention, cm.taylor_attention)
    past = 0
    if onto and carried:
        past = 5
        extra["state"] = case(
            *case.inputs(**sizes | {"T": past}, seed=3), is_causal=True, return_state=True
        )[1]
        assert extra["state"].position.tolist() == [past] * B
    out, state = case.run(q, k, v, is_causal, impl=impl, **extra)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert torch.isfinite(out).all()
    for grad, x in zip(backward(out, state, (q, k, v)), (q, k, v)):
        assert grad.shape == x.shape
        assert torch.isfinite(grad).all()
    if state is None:
        assert not carried
        return
    expected = past + (int(extra["key_mask"][0].sum()) if masked and B else T)
    assert state.position.tolist() == [expected] * B
    assert [x.shape for x in sums_of(state)] == [
        x.shape for x in sums_of(case.run(q, k, v, is_causal, **extra)[1])
    ]
    if past and T == 0 and not isinstance(state, cm.KeyValueState):
        for actual, before in zip(sums_of(state), sums_of(extra["state"])):
            assert torch.allclose(actual, before)
    after = case(*case.inputs(**sizes | {"T": 2}, seed=4), is_causal=True, state=state, impl=impl)
    assert after.shape == (B, q.shape[1], 2, v.shape[3])


@by_impl
@pytest.mark.parametrize("case", [c for c in FEW if c.cross], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("B", "T", "S", "V"), [(2, 3, 0, 3), (2, 0, 3, 3), (0, 3, 0, 3), (2, 3, 0, 0), (0, 3, 5, 3)]
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_cross_attention_to_nothing(
    case: Case, impl: str, B: int, T: int, S: int, V: int, masked: bool
):
    impl = impl if impl in case.implementations else "torch"
    q, k, v = case.inputs(B, T=T, S=S, V=V, requires_grad=True)
    extra = {"key_mask": torch.zeros(B, S, dtype=torch.bool)} if masked else {}
    out, state = case.run(q, k, v, False, impl=impl, **extra)
    assert out.shape == (B, 4, T, V)
    assert torch.isfinite(out).all()
    if masked or S == 0:
        assert not out.any()
    for grad, x in zip(backward(out, state, (q, k, v)), (q, k, v)):
        assert grad.shape == x.shape
        assert torch.isfinite(grad).all()


@by_impl
@by_form
@pytest.mark.parametrize(
    "bounds", [[0, 0], [0, 0, 0], [0, 0, 5, 5], [0, 3, 3, 3, 5], [0, 4, 4]], ids=str
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_empty_sequences(case: Case, impl: str, is_causal: bool, bounds: list[int], masked: bool):
    """They come alone, first, last and between others, with and without slack behind them."""
    impl = impl if impl in case.implementations else "torch"
    for T, V in ((5, 3), (bounds[-1], 3), (5, 0)):
        q, k, v = case.inputs(1, T=T, V=V, requires_grad=True)
        mask = torch.arange(T)[None] % 3 > 0 if masked else None
        cu_seqlens = torch.tensor(bounds)
        out, state = case.run(q, k, v, is_causal, key_mask=mask, cu_seqlens=cu_seqlens, impl=impl)
        assert out.shape == (1, 4, T, V)
        assert not out[:, :, bounds[-1] :].any()
        for grad, x in zip(backward(out, state, (q, k, v)), (q, k, v)):
            assert grad.shape == x.shape
            assert torch.isfinite(grad).all()
            assert not grad[:, :, bounds[-1] :].any()
        for a, b in zip(bounds[:-1], bounds[1:]):
            kept = None if mask is None else mask[:, a:b]
            row = oracle(
                case, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=is_causal, key_mask=kept
            )
            assert torch.allclose(out[:, :, a:b], row, rtol=1e-9, atol=1e-11)
        if state is None:
            continue
        lengths = [
            b - a if mask is None else int(mask[0, a:b].sum())
            for a, b in zip(bounds[:-1], bounds[1:])
        ]
        assert state.position.tolist() == lengths
        more = case.run(q, k, v, is_causal, cu_seqlens=cu_seqlens, state=state, impl=impl)[1]
        assert [x.shape for x in sums_of(more)] == [x.shape for x in sums_of(state)]


NO_COLUMNS = """
import torch
from cumulant.kernels.operators.attention import call_attention
from cumulant.kernels.spec import AttentionInputs, AttentionSpec
for is_causal in (True, False):
    q, k, v = (torch.randn(1, 2, 20, d, requires_grad=True) for d in (3, 3, 0))
    spec = AttentionSpec(0, True, "elu", 1.0, True, is_causal, True, chunk=16, span=16)
    out, *_, denominator = call_attention("native", AttentionInputs(q, k, v), spec)
    (out.sum() + denominator.sum()).backward()
    print(*out.shape, float(denominator.isfinite().all()), float(q.grad.isfinite().all()))
"""


def test_the_native_operator_ends_without_columns_of_values():
    """It runs in a process of its own, because an endless loop could not be stopped here."""
    made = subprocess.run(
        [sys.executable, "-c", NO_COLUMNS], capture_output=True, text=True, check=True, timeout=120
    )
    assert made.stdout.splitlines() == ["1 2 20 0 1.0 1.0"] * 2
