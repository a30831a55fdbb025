"""Autocast changes nothing inside an operation, on any implementation, nor in its gradients."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, IMPLEMENTATIONS, Case, error, sums_of

NAMES = (
    "taylor-2",
    "linear-elu",
    "linear-softmax",
    "gated-laplace",
    "gated-bias",
    "mixed-bias",
    "elita-own",
)
SOME = [c for c in CASES if c.name in NAMES]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
@pytest.mark.parametrize("form", ["causal", "masked", "packed"])
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_autocast_changes_nothing(case: Case, impl: str, form: str, backward: str):
    """The backward pass may run inside or outside it; the reference's double backward too."""
    results = []
    for autocast in (False, True):
        q, k, v = case.inputs(1, dtype=torch.float32, requires_grad=True)
        options = {
            "key_mask": torch.arange(37)[None] % 3 > 0 if form == "masked" else None,
            "cu_seqlens": torch.tensor([0, 5, 30]) if form == "packed" else None,
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, end = case.run(q, k, v, True, impl=impl, **options)
            if backward == "inside":
                grads = torch.autograd.grad(
                    out.square().sum(), (q, k, v), create_graph=impl == "reference"
                )
        if backward == "outside":
            grads = torch.autograd.grad(
                out.square().sum(), (q, k, v), create_graph=impl == "reference"
            )
        second = torch.autograd.grad(grads[0].square().sum(), (q, v)) if impl == "reference" else ()
        results.append([out, *sums_of(end), *grads, *second])
    for actual, exact in zip(*results[::-1]):
        assert actual.dtype == exact.dtype
        assert error(actual, exact) < 1e-6
