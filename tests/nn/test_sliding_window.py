"""Sliding-window attention against its reference, and that against one softmax for each query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cumulant.kernels import reference
from cumulant.nn import SlidingWindowAttention

T = 21
MASK = torch.rand(2, T, generator=torch.Generator().manual_seed(3)) > 0.3
MASK[1, :5] = False
by_window = pytest.mark.parametrize("window", [1, 3, 8, 50])
by_groups = pytest.mark.parametrize("groups", [4, 2])
by_mask = pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])


def build(window: int, groups: int) -> tuple[SlidingWindowAttention, Tensor]:
    torch.manual_seed(0)
    mixer = SlidingWindowAttention(16, 4, window=window, num_kv_heads=groups).double()
    return mixer, torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)


def by_reference(mixer: SlidingWindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """The output of the whole module, with the reference's attention."""
    projections = mixer.q_proj, mixer.k_proj, mixer.v_proj
    q, k, v = (
        project(x).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for project in projections
    )
    out = reference.sliding_window_attention(q, k, v, window=mixer.window, key_mask=mask)
    return mixer.out_proj(out.transpose(1, 2).flatten(2))


@by_window
@by_mask
def test_the_reference_is_a_softmax_over_the_last_tokens(window, mask):
    q, k, v = (torch.randn(2, heads, T, 3, dtype=torch.float64) for heads in (4, 2, 2))
    out = reference.sliding_window_attention(q, k, v, window=window, key_mask=mask)
    for b in range(2):
        tokens = range(T) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for h in range(4):
            for i in range(T):
                last = [j for j in tokens if j <= i][-window:] if i in tokens else []
                weights = (k[b, h // 2, last] @ q[b, h, i] / 3**0.5).softmax(0)
                torch.testing.assert_close(out[b, h, i], weights @ v[b, h // 2, last])


@by_window
@by_groups
@by_mask
def test_whole(window, groups, mask):
    """Outputs and gradients agree with the reference's."""
    mixer, x = build(window, groups)
    out, exact = mixer(x, key_mask=mask), by_reference(mixer, x, mask)
    torch.testing.assert_close(out, exact)
    upstream = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(y, x, upstream)[0] for y in (out, exact))
    torch.testing.assert_close(found, wanted)


@by_window
@by_groups
@by_mask
def test_in_pieces(window, groups, mask):
    mixer, x = build(window, groups)
    state, parts = None, []
    for piece in (slice(0, 9), slice(9, 10), slice(10, T)):
        own = None if mask is None else mask[:, piece]
        part, state = mixer(x[:, piece], key_mask=own, state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), by_reference(mixer, x, mask))


@by_window
@by_groups
def test_packed(window, groups):
    mixer, x = build(window, groups)
    bounds = [0, 4, 4, 17]
    out = mixer(x[:1], cu_seqlens=torch.tensor(bounds))
    for a, b in zip(bounds, bounds[1:]):
        torch.testing.assert_close(out[:, a:b], by_reference(mixer, x[:1, a:b], None))
    assert not out[:, bounds[-1] :].any()
