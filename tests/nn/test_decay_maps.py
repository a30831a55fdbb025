"""Learned feature maps with decays: the operation and the module are their quadratic formula."""

import pytest
import torch
from torch.nn import functional as F

import cumulant as cm
from cumulant import nn

from ..ops.cases import IMPLEMENTATIONS
from .common import D, assert_agree, forgetful, perturbed

H, G, K, V, T = 4, 2, 5, 3, 70
MAPS = {"rebased": nn.RebasedFeatureMap, "hedgehog": nn.HedgehogFeatureMap}
by_map = pytest.mark.parametrize("name", MAPS)


def kernel(name, maps, q, k):
    """``φ(q_i)·φ(k_j)`` of one pair of heads h and g, ``[B, T, T]``."""
    if name == "rebased":
        q, k = (F.layer_norm(x, x.shape[-1:]) * m.gamma + m.beta for m, x in zip(maps, (q, k)))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.einsum("bhik,bhjk->bhij", q, k) ** 2 / q.shape[-1]
    total = 0
    k, weight = (x.repeat_interleave(q.shape[1] // k.shape[1], -3) for x in (k, maps[1].weight))
    for sign in (1, -1):
        a, b = (sign * q @ maps[0].weight).softmax(-1), (sign * k @ weight).softmax(-1)
        total = total + torch.einsum("bhik,bhjk->bhij", a, b)
    return total


def formula(name, maps, q, k, v, log_decay):
    """Weights times the product of the decays after the key, written out pair by pair."""
    shared = q.shape[1] // k.shape[1]
    gamma, v = (x.repeat_interleave(shared, 1) for x in (log_decay.exp(), v))
    n = q.shape[2]
    rows = []
    for i in range(n):
        factors = [gamma[:, :, j + 1 : i + 1].prod(-1) for j in range(i + 1)]
        rows.append(F.pad(torch.stack(factors, -1), (0, n - 1 - i)))
    weights = kernel(name, maps, q, k) * torch.stack(rows, 2)
    return weights / weights.sum(-1, keepdim=True) @ v


def shaken_maps(name):
    torch.manual_seed(0)
    maps = MAPS[name](H, K).double(), MAPS[name](G, K).double()
    for part in maps:
        for p in part.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return maps


def inputs():
    torch.manual_seed(1)
    sizes = ((H, K), (G, K), (G, V))
    q, k, v = (torch.randn(2, heads, T, n, dtype=torch.float64) for heads, n in sizes)
    log_decay = -3 * torch.rand(2, G, T, dtype=torch.float64) ** 4
    log_decay[:, :, 40] = -30  # all but forgets
    return [x.requires_grad_() for x in (q, k, v, log_decay)]


def gradients(y, maps, tensors):
    parameters = [p for part in maps for p in part.parameters()]
    return torch.autograd.grad((y * y.detach().cos()).sum(), (*tensors, *parameters))


@by_map
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("cuts", [[T], [33, 1, 36], [1] * T], ids=["whole", "pieces", "tokens"])
def test_the_operation(name, impl, cuts):
    """Outputs, and the gradients of queries, keys, values, decays and of the maps' weights."""
    maps, tensors = shaken_maps(name), inputs()
    expected = formula(name, maps, *tensors)
    state, outs = None, []
    for q, k, v, log_decay in zip(*(x.split(cuts, 2) for x in tensors), strict=True):
        y, state = cm.linear_attention(
            q,
            k,
            v,
            maps,
            is_causal=True,
            log_decay=log_decay,
            state=state,
            return_state=True,
            impl=impl,
        )
        outs.append(y)
    y = torch.cat(outs, 2)
    assert_agree([y], [expected])
    assert_agree(gradients(y, maps, tensors), gradients(expected, maps, tensors), 1e-7, 1e-8)


@by_map
def test_masks_and_packing(name):
    """Each row is the formula of its tokens, which alone decay."""
    maps, (q, k, v, log_decay) = shaken_maps(name), inputs()
    mask = torch.rand(2, T) > 0.3
    mask[:, 0] = True
    y = cm.linear_attention(q, k, v, maps, is_causal=True, log_decay=log_decay, key_mask=mask)
    for b in range(2):
        kept = [x[b : b + 1, :, mask[b]] for x in (q, k, v, log_decay)]
        assert_agree([y[b : b + 1, :, mask[b]]], [formula(name, maps, *kept)])
    row = [x[:1] for x in (q, k, v)]
    bounds = torch.tensor([0, 30, 30, T])
    y = cm.linear_attention(*row, maps, is_causal=True, log_decay=log_decay[:1], cu_seqlens=bounds)
    for a, b in ((0, 30), (30, T)):
        alone = [x[:1, :, a:b] for x in (q, k, v, log_decay)]
        assert_agree([y[:, :, a:b]], [formula(name, maps, *alone)])


@by_map
@pytest.mark.parametrize("decay", ["fixed", "gated", "mamba2"])
def test_the_module(name, decay):
    torch.manual_seed(0)
    mixer = perturbed(nn.LinearAttention(D, H, num_kv_heads=G, feature_map=name, decay=decay))
    mixer = mixer.double() if decay == "fixed" else forgetful(mixer).double()
    x = torch.randn(2, 19, D, dtype=torch.float64)
    q = mixer.q_proj(x).unflatten(-1, (H, -1)).transpose(1, 2)
    k, v = (p(x).unflatten(-1, (G, -1)).transpose(1, 2) for p in (mixer.k_proj, mixer.v_proj))
    maps = mixer.query_map, mixer.key_map
    expected = mixer.out_proj(
        formula(name, maps, q, k, v, mixer.decay(x)).transpose(1, 2).flatten(2)
    )
    y = mixer(x)
    assert_agree([y], [expected])
    parameters = list(mixer.parameters())
    found, exact = (torch.autograd.grad(z.square().sum(), parameters) for z in (y, expected))
    assert_agree(found, exact, 1e-7, 1e-8)
