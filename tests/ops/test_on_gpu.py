"""Operations on a GPU against fp64 on the CPU: `make test-gpu`, where there is one.

Without a GPU all tests are skipped. CUMULANT_TEST_DEVICE=cpu runs them on the CPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm

from .cases import CASES, TOLERANCE, TRITON, Case, error, sums_of

DEVICE = os.environ.get("CUMULANT_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
FORMS = ("causal", "both directions", "masked", "packed", "stateful")
# Tensor cores round the factors of products; what cancels is less exact (tests/ops/cases.py).
FACTOR = {torch.float32: 20, torch.bfloat16: 5, torch.float16: 10}


def implementation(case: Case) -> str:
    return "triton" if DEVICE == "cuda" and case.name in TRITON else "auto"


def results(
    case: Case, form: str, dtype: torch.dtype, T: int, device: str, impl: str
) -> list[Tensor]:
    """Output, state and gradients, on the CPU; from the same numbers on every device."""
    K = 16
    inputs = case.inputs(1 if form == "packed" else 2, 4, T, K, 24, G=2, dtype=dtype)
    exact = impl == "reference"
    leaves = [(x.double() if exact else x).to(device).requires_grad_() for x in inputs]
    options: dict[str, Any] = {"impl": impl}
    draw = torch.Generator().manual_seed(0)
    if form == "masked":
        options["key_mask"] = (torch.rand(2, T, generator=draw) > 0.3).to(device)
    if form == "packed":
        bounds = torch.tensor([0, T // 5, T // 5, T // 2, T - T // 7])
        options["cu_seqlens"] = bounds.to(device)
    if form == "stateful":
        state = case.run(*case.inputs(2, 4, 45, K, 24, G=2, seed=1, dtype=dtype), True)[1]
        assert state is not None
        options["state"] = state.map(
            lambda x: (x.double() if exact and x.is_floating_point() else x).to(device)
        )
    out, end = case.run(*leaves, form != "both directions", **options)
    found = [out, *(x.masked_fill(x == -torch.inf, 0) for x in sums_of(end))]
    weights = (torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in found)
    loss = sum((x.double() * w.to(device)).sum() for x, w in zip(found, weights))
    return [x.detach().cpu() for x in (*found, *torch.autograd.grad(loss, leaves))]


def skip_what_is_not(case: Case, form: str) -> None:
    if form == "both directions" and not case.bidirectional:
        pytest.skip("causal only")
    if form == "packed" and case.op is cm.gated_attention and case.biased:
        pytest.skip("a bias for each sequence's own length")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_fp64(case: Case, form: str, dtype: torch.dtype):
    """1,300 tokens: several chunks, spans and groups, none of them whole."""
    skip_what_is_not(case, form)
    T = 1300 if DEVICE == "cuda" else 100
    exact = results(case, form, dtype, T, "cpu", "reference")
    found = results(case, form, dtype, T, DEVICE, implementation(case))
    for actual, expected in zip(found, exact, strict=True):
        assert error(actual, expected) <= TOLERANCE[dtype] * FACTOR[dtype]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 511])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_any_length(case: Case, T: int):
    exact = results(case, "stateful", torch.float32, T, "cpu", "reference")
    found = results(case, "stateful", torch.float32, T, DEVICE, implementation(case))
    for actual, expected in zip(found, exact, strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32] * FACTOR[torch.float32]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in TRITON], ids=lambda c: c.name)
def test_results_repeat(case: Case):
    """Bit for bit, gradients too."""
    runs = [
        results(case, "stateful", torch.bfloat16, 700, DEVICE, implementation(case))
        for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))
