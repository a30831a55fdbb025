"""Calls on the meta device, which have shapes and no numbers."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, Case, tensors_of


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_shapes_and_dtypes_on_the_meta_device(case: Case, impl: str):
    """Outputs, states and gradients have the shapes and dtypes that the CPU gives."""
    for dtype in (torch.float32, torch.bfloat16):
        for is_causal in (True, False)[: 1 + case.bidirectional]:
            found = []
            for device in ("cpu", "meta"):
                q, k, v = (x.to(device).requires_grad_() for x in case.inputs(T=21, dtype=dtype))
                mask = torch.ones(2, 21, dtype=torch.bool, device=device)
                with torch.device(device):  # a bias is made by the case
                    out, state = case.run(q, k, v, is_causal, key_mask=mask, impl=impl)
                grads = torch.autograd.grad(out.sum(), (q, k, v))
                found.append([(x.shape, x.dtype) for x in (out, *tensors_of(state), *grads)])
            assert found[0] == found[1]
