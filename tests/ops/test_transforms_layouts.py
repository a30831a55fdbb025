"""Mapped calls of one row: tensors for the backward pass are expanded, and read by strides."""

import pytest
import torch
from torch.func import jacrev, vjp, vmap

from .cases import CASES, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_jacobians_of_one_row(case, is_causal, impl):
    if not is_causal and not case.bidirectional:
        pytest.skip("causal only")
    x = case.inputs(1, 2, 9, 3, 2, G=1)
    places = tuple(range(len(x)))
    found, exact = (
        jacrev(lambda *y, impl=impl: case.run(*y, is_causal, impl=impl)[0], places)(*x)
        for impl in (impl, "reference")
    )
    for a, b in zip(found, exact, strict=True):
        assert_close(a, b, 1000)


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mapped_cotangents_of_a_state(case, impl):
    """Of outputs and final state at once."""
    x = case.inputs(1, 2, 9, 3, 2, G=1)

    def run(*y, impl):
        out, state = case.run(*y, True, impl=impl)
        sums = state.tensors().values()
        return out, *(s.masked_fill(s == -torch.inf, 0) for s in sums if s.is_floating_point())

    results = []
    for name in (impl, "reference"):
        outs, pull = vjp(lambda *y, name=name: run(*y, impl=name), *x)
        generator = torch.Generator().manual_seed(0)
        cotangents = tuple(
            torch.randn(3, *o.shape, generator=generator, dtype=o.dtype) for o in outs
        )
        results.append(vmap(pull)(cotangents))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1000)
