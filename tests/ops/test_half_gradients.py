"""Gradients where outputs cancel, or products of inputs leave fp32's range, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cumulant as cm

from .cases import IMPLEMENTATIONS, error

by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of one rounding


def gradients(op, inputs: list[Tensor], weight: Tensor, **options) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad((op(*leaves, **options).double() * weight).sum(), leaves))


def uncancelled_gradients(inputs: list[Tensor], weight: Tensor, is_causal: bool) -> list[Tensor]:
    """The gradients without the part of the denominators, which cancels most of them."""
    q, k, v = leaves = [x.detach().clone().requires_grad_() for x in inputs]
    weights = q.relu() @ k.relu().mT
    weights = weights.tril() if is_causal else weights
    size = weights.sum(-1, keepdim=True).detach()
    out = weights @ v / size.masked_fill(size == 0, 1)
    return list(torch.autograd.grad((out * weight).sum(), leaves))


@by_impl
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_gradients_of_outputs_that_hardly_depend_on_the_query(
    impl: str, dtype: torch.dtype, is_causal: bool
):
    """Most queries have one relu feature above 0, or none, so outputs do not depend on its size."""
    options = {"feature_map": "relu", "is_causal": is_causal}
    found, own, size = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for seed in range(8):  # of one draw, where most of a gradient cancels, an error says little
        torch.manual_seed(seed)
        inputs = [torch.randn(1, 2, 129, K).to(dtype) for K in (2, 2, 8)]
        weight = torch.randn(1, 2, 129, 8, dtype=torch.float64)
        wide = [x.double() for x in inputs]
        exact = gradients(cm.linear_attention, wide, weight, impl="reference", **options)
        large = uncancelled_gradients(wide, weight, is_causal)
        for total, name in ((found, impl), (own, "reference")):
            grads = gradients(cm.linear_attention, inputs, weight, impl=name, **options)
            total.add_(torch.tensor([error(a, b) ** 2 / 8 for a, b in zip(grads, exact)]))
        size.add_(torch.tensor([error(a, b) ** 2 / 8 for a, b in zip(large, exact)]))
    bound = own.sqrt().clamp(min=ROUNDING[dtype])
    if impl == "triton" and dtype != torch.float32:
        # its factors of products are rounded before they cancel, as tensor cores take them
        bound = torch.maximum(bound, ROUNDING[dtype] * size.sqrt())
    assert (found.sqrt() <= 2 * bound).all()


@by_impl
@pytest.mark.parametrize("feature_map", ["relu", "elu", "identity"])
@pytest.mark.parametrize(
    ("query", "key"), [(1e-20, 1e-20), (1e-30, 1e-5), (1e-37, 1.0), (1e-3, 1e-30)]
)
def test_features_whose_products_leave_fp32(impl: str, feature_map: str, query: float, key: float):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 70, 4), torch.randn(1, 2, 70, 4), torch.randn(1, 2, 70, 8)
    if feature_map == "elu":
        q, k = q + torch.tensor(query).log(), k + torch.tensor(key).log()
    elif feature_map == "identity":
        q, k = (q.abs() + 0.1) * query, (k.abs() + 0.1) * key
    else:
        q, k = q * query, k * key
    weight = torch.randn(1, 2, 70, 8, dtype=torch.float64)
    wide = [x.double() for x in (q, k, v)]
    exact = gradients(cm.linear_attention, wide, weight, feature_map=feature_map, impl="reference")
    found = gradients(cm.linear_attention, [q, k, v], weight, feature_map=feature_map, impl=impl)
    out = cm.linear_attention(q, k, v, feature_map, impl=impl)
    assert error(out, cm.linear_attention(*wide, feature_map, impl="reference")) < 3e-6
    for actual, wanted in zip(found, exact):
        assert error(actual, wanted) < 1e-5


@by_impl
def test_the_slope_of_elu_at_zero(impl: str):
    """It is 1 from either side: inputs of exactly 0 are common, as in padded rows."""
    q, k, v = (
        torch.zeros(1, 1, 3, 2),
        torch.zeros(1, 1, 3, 2),
        torch.tensor([[[[1.0], [2.0], [4.0]]]]),
    )
    exact = gradients(
        cm.linear_attention,
        [q.double(), k.double() + 1e-9, v.double()],
        torch.ones(1, 1, 3, 1).double(),
    )
    for shift in (0.0, 1e-6, -1e-6):
        found = gradients(
            cm.linear_attention, [q, k + shift, v], torch.ones(1, 1, 3, 1).double(), impl=impl
        )
        for actual, wanted in zip(found, exact):
            assert (actual.double() - wanted).abs().max() < 1e-5
    assert exact[1].abs().max() > 0.1
