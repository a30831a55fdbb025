"""How large numbers may be: the range that docstrings state, and numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cumulant as cm
from cumulant.kernels.torch.attention import CHUNK

from .cases import IMPLEMENTATIONS, error

by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
LARGEST = torch.finfo(torch.float32).max


def tied_scores(score: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eight keys that score about as `score`, and values of at most 1."""
    generator = torch.Generator().manual_seed(0)
    q = torch.full((1, 1, 8, 1), math.sqrt(score))
    return (
        q,
        q * (1 - torch.rand(1, 1, 8, 1, generator=generator) / 4),
        torch.rand(1, 1, 8, 2, generator=generator),
    )


@by_impl
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_taylor_is_exact_while_its_sums_are_finite(impl: str, order: int, is_causal: bool):
    q, k, v = tied_scores(
        0.9 * (LARGEST / 8) ** (1 / order)
    )  # eight keys: S x^order is nearly the largest number
    out, state = cm.taylor_attention(
        q, k, v, order, scale=1.0, is_causal=is_causal, return_state=True, impl=impl
    )
    wide = [x.double() for x in (q, k, v)]
    exact = cm.taylor_attention(*wide, order, scale=1.0, is_causal=is_causal, impl="reference")
    assert error(out, exact) < 1e-6
    assert all(x.isfinite().all() for x in state.tensors().values())
    q, k, v = tied_scores(
        1.5 * (LARGEST / 8 * math.factorial(order)) ** (1 / order)
    )  # the sum of weights is larger
    out = cm.taylor_attention(q, k, v, order, scale=1.0, is_causal=is_causal, impl=impl)[:, :, -1]
    assert (out.isnan() | (out == 0)).all()


@by_impl
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_number_of_fp16_fits_taylor_up_to_order_3(impl: str, order: int):
    """Queries and keys have 64 numbers of 65,504; values go up to 1."""
    generator = torch.Generator().manual_seed(0)
    q = torch.full((1, 1, 300, 64), 65504.0, dtype=torch.float16)
    k = q * torch.rand(q.shape, generator=generator).half()
    v = torch.rand(1, 1, 300, 4, generator=generator).half()
    out = cm.taylor_attention(q, k, v, order, is_causal=True, impl=impl)
    exact = cm.taylor_attention(
        *(x.double() for x in (q, k, v)), order, is_causal=True, impl="reference"
    )
    assert error(out, exact) < 5e-4


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_a_value_that_is_not_finite_reaches_its_chunk(impl: str, junk: float):
    """Earlier outputs of its chunk see 0 times NaN; those of earlier chunks do not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 2, 300, 4, generator=generator) for _ in range(3))
    bad = v.clone()
    bad[:, :, 256:] = junk
    for op in (cm.linear_attention, cm.taylor_attention, mixed_chunk):
        out, plain = (op(q, k, x, is_causal=True, impl=impl) for x in (bad, v))
        assert torch.equal(out[:, :, : 256 - CHUNK], plain[:, :, : 256 - CHUNK])
        assert not out[:, :, -1].isfinite().any()


def mixed_chunk(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return cm.mixed_chunk_attention(q, k, q, k, v, group_size=64, **options)


@by_impl
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("op", [cm.linear_attention, cm.taylor_attention, mixed_chunk])
def test_masked_keys_and_values_may_be_anything(op, impl: str, is_causal: bool, junk: float):
    """They reach no output, no gradient and no state. In fp16 and fp32 alike."""
    for dtype in (torch.float32, torch.float16):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.rand(2, 2, 90, 4, generator=generator).to(dtype) for _ in range(3))
        mask = torch.rand(2, 90, generator=generator) > 0.4
        results = []
        for hidden in (junk, 0.0):
            keys, values = (x.masked_fill(~mask[:, None, :, None], hidden) for x in (k, v))
            leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
            out = op(*leaves, is_causal=is_causal, key_mask=mask, impl=impl)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
            assert found.isfinite().all()
