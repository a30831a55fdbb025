"""GAU and FLASH layers: their formulas, dropout, states, padding, and what they refuse."""

import math

import pytest
import torch
from torch.nn import functional as F

from cumulant import nn

from .common import spread


@pytest.mark.parametrize("is_causal", [True, False])
def test_flash_is_its_formula(is_causal):
    """The layer equals its formula, written out.

    Norm, shift of the first half, four copies of one projection, rotation of some of their
    dimensions, groups, gate, residual.
    """
    torch.manual_seed(0)
    g, T, D, K = 4, 11, 10, 6
    mixer = spread(
        nn.MixedChunkAttention(
            D,
            group_size=g,
            query_key_dim=K,
            expansion_factor=1.5,
            is_causal=is_causal,
            shift_tokens=True,
            rotary_dim=4,
        )
    ).double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    h = mixer.norm.weight * x / x.square().mean(-1, keepdim=True).sqrt()
    h = torch.cat((F.pad(h[..., :5], (0, 0, 1, -1)), h[..., 5:]), -1)
    value, gate = F.silu(mixer.value_proj(h)), F.silu(mixer.gate_proj(h))
    z = F.silu(mixer.qk_proj(h))
    copies = [z * mixer.offset_scale.gamma[i] + mixer.offset_scale.beta[i] for i in range(4)]
    turned = [mixer.rotary(c[:, None, :, :4], torch.arange(T))[:, 0] for c in copies]
    q, r, k, s = (torch.cat((t, c[..., 4:]), -1) for t, c in zip(turned, copies))
    index = torch.arange(T)
    bias = mixer.relative_bias(g)[0][index % g][:, index % g]
    group = index // g
    inside, across = group[:, None] == group, torch.ones(T, T, dtype=torch.bool)
    if is_causal:
        inside, across = inside & (index <= index[:, None]), group < group[:, None]
    quadratic = (q @ k.mT / g + bias).relu().square() * inside
    linear = (r @ s.mT) / (g if is_causal else T) * across
    out = x + mixer.out_proj(gate * ((quadratic + linear) @ value))
    assert torch.allclose(mixer(x), out, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gau_is_its_formula(is_causal):
    torch.manual_seed(0)
    mixer = spread(
        nn.GatedAttentionUnit(10, query_key_dim=6, is_causal=is_causal, activation="laplace")
    ).double()
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    h = F.layer_norm(x, (10,))
    q, k = (
        F.silu(mixer.qk_proj(h)) * mixer.offset_scale.gamma[i] + mixer.offset_scale.beta[i]
        for i in range(2)
    )
    n = torch.arange(1, 10)[:, None] if is_causal else 9
    scores = q @ k.mT / n + mixer.relative_bias(9)[0]
    weights = (1 + torch.erf((scores - 0.5**0.5) * (2 * math.pi) ** 0.5)) / 2
    weights = weights.tril() if is_causal else weights
    out = x + mixer.out_proj(F.silu(mixer.gate_proj(h)) * (weights @ F.silu(mixer.value_proj(h))))
    assert torch.allclose(mixer(x), out, atol=1e-12)


@pytest.mark.parametrize("part", ["weights", "output"])
@pytest.mark.parametrize("kind", [nn.MixedChunkAttention, nn.GatedAttentionUnit])
def test_dropout(kind, part):
    """It acts in training only, repeats with the seed, and is right in mean and gradient."""
    torch.manual_seed(0)
    options = {"group_size": 4} if kind is nn.MixedChunkAttention else {}
    dropout = {"dropout": 0.4, "residual": False} if part == "weights" else {"out_dropout": 0.4}
    mixer = spread(kind(10, query_key_dim=6, activation="laplace", **dropout, **options)).double()
    x = torch.randn(1, 11, 10, dtype=torch.float64, requires_grad=True)
    exact = mixer.eval()(x).detach()
    assert torch.equal(exact, mixer(x))
    mixer.train()

    def drawn(x, seed=5):
        torch.manual_seed(seed)
        return mixer(x)

    assert torch.equal(drawn(x), drawn(x))
    assert not torch.allclose(drawn(x), drawn(x, 6))
    with torch.no_grad():
        mean = torch.stack([mixer(x) for _ in range(3000)]).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.1
    assert torch.autograd.gradcheck(drawn, (x,), atol=1e-6, rtol=1e-4)


def test_a_flash_state_is_bounded():
    mixer, state, sizes = (
        nn.MixedChunkAttention(16, group_size=8, query_key_dim=6, shift_tokens=True),
        None,
        set(),
    )
    for _ in range(5):
        _, state = mixer(torch.randn(1, 7, 16), state=state, return_state=True)
        sizes.add(state.nbytes)
    assert sizes == {
        4 * (6 * 32 + 8 * (6 + 6 + 32) + 8) + 8
    }  # sums [K, V], group [g, K + K + V], shift, position
    assert state.position.tolist() == [35]


def test_gated_units_refuse_what_cannot_be():
    for kind in (nn.MixedChunkAttention, nn.GatedAttentionUnit):
        for bad in (8, 5, -2):
            with pytest.raises(
                ValueError,
                match=f"rotary_dim: expected an even number from 0 to query_key_dim=6, got {bad}",
            ):
                kind(10, query_key_dim=6, rotary_dim=bad)
        with pytest.raises(
            ValueError, match="out_dropout: expected a probability below 1, got 1.5"
        ):
            kind(10, out_dropout=1.5)
        with pytest.raises(
            ValueError, match="activation: expected one of 'relu2', 'laplace', got 'gelu'"
        ):
            kind(10, activation="gelu")
        with pytest.raises(
            ValueError,
            match="norm: expected one of 'layernorm', 'rmsnorm', 'scalenorm', got 'batchnorm'",
        ):
            kind(10, norm="batchnorm")
        with pytest.raises(ValueError, match="dropout: expected a probability below 1, got 1"):
            kind(10, dropout=1.0)
        with pytest.raises(ValueError, match="query_key_dim: expected at least 1, got 0"):
            kind(10, query_key_dim=0)
        both = kind(10, query_key_dim=6, is_causal=False)
        with pytest.raises(ValueError, match="state: only causal attention carries a state"):
            both(torch.randn(1, 5, 10), return_state=True)
    for bad in (0, 2.5):
        with pytest.raises(
            ValueError, match=f"group_size: expected an integer of at least 1 token, got {bad}"
        ):
            nn.MixedChunkAttention(10, group_size=bad)
    assert nn.MixedChunkAttention(10, query_key_dim=5).rotary.dim == 4
    unit, x = nn.GatedAttentionUnit(10, query_key_dim=6), torch.randn(2, 5, 10)
    with pytest.raises(
        ValueError, match=r"bias: expected \[T, S\] or \[B, 1, T, S\] = \[5, 5\] or .* got \[3, 3\]"
    ):
        unit(x, bias=torch.zeros(3, 3))
    with pytest.raises(TypeError, match=r"bias: expected a floating tensor .* got list"):
        unit(x, bias=[0.0])
    for bad in (0, -2.0, math.inf, "mean"):
        with pytest.raises(
            ValueError, match=r"length_scale: expected a positive number, 'total' or None, got "
        ):
            nn.GatedAttentionUnit(10, length_scale=bad)
    total = nn.GatedAttentionUnit(10, query_key_dim=6, length_scale="total")
    with pytest.raises(
        ValueError,
        match=r"state: length_scale='total' divides .* build with length_scale=<the length",
    ):
        total(torch.randn(1, 5, 10), return_state=True)
    scaled = nn.GatedAttentionUnit(10, query_key_dim=6, length_scale="total", scale_bias=True)
    with pytest.raises(
        ValueError, match="cu_seqlens: with scale_bias each packed sequence needs a bias of its own"
    ):
        scaled(torch.randn(1, 5, 10), cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="num_buckets: expected at least 4"):
        nn.T5RelativePositionBias(num_buckets=3)


@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_total_length_counts_tokens(is_causal, scale_bias):
    """With length_scale="total", every row is divided by its own length, without padding."""
    mixer = spread(
        nn.GatedAttentionUnit(
            10, query_key_dim=6, is_causal=is_causal, length_scale="total", scale_bias=scale_bias
        )
    ).double()
    x, mask = torch.randn(2, 9, 10, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    y = mixer(x, key_mask=mask)
    assert torch.allclose(y[0, 4:], mixer(x[:1, 4:])[0])
    assert torch.allclose(y[1], mixer(x[1:])[0])
    if not scale_bias:
        packed = mixer(x[:1], cu_seqlens=torch.tensor([0, 2, 7]))
        assert torch.allclose(packed[:, 2:7], mixer(x[:1, 2:7]))
    assert not torch.allclose(mixer(x)[:, :5], mixer(x[:, :5]))


@pytest.mark.parametrize("kind", [nn.MixedChunkAttention, nn.GatedAttentionUnit])
def test_fp16_with_padding(kind):
    """Padded rows and slack after packed sequences leave outputs and gradients finite."""
    torch.manual_seed(0)
    mixer = spread(kind(16, query_key_dim=6, norm="scalenorm")).half()
    x, mask = torch.randn(2, 9, 16).half(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :5] = False
    y = mixer(x, key_mask=mask)
    assert torch.allclose(y[0, 5:], mixer(x[:1, 5:])[0], atol=2e-3)
    packed = mixer(x[:1], cu_seqlens=torch.tensor([0, 3, 7]))
    assert not packed[:, 7:].any()
    (y.float().square().sum() + packed.float().square().sum()).backward()
    for p in mixer.parameters():
        assert p.grad.isfinite().all()


def test_gau_counts_padding_if_asked():
    """With count_padding, length and positions count padding, with a state too."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 9, 10, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 2:5] = False, False
    for options in ({}, {"scale_bias": True}, {"length_scale": 7}):
        mixer = spread(
            nn.GatedAttentionUnit(10, query_key_dim=6, count_padding=True, rotary_dim=4, **options)
        ).double()
        y, state = mixer(x, key_mask=mask, return_state=True)
        first, middle = mixer(x[:, :3], key_mask=mask[:, :3], return_state=True)
        rest, end = mixer(x[:, 3:], key_mask=mask[:, 3:], state=middle, return_state=True)
        assert torch.allclose(torch.cat((first, rest), 1), y)
        assert state.position.tolist() == end.position.tolist() == [9, 9]
        hidden = nn.GatedAttentionUnit(10, query_key_dim=6, rotary_dim=4, **options).double()
        hidden.load_state_dict(mixer.state_dict())
        assert not torch.allclose(hidden(x, key_mask=mask)[mask], y[mask]) or options == {
            "length_scale": 7
        }


def test_a_padded_gau_forms_no_bias_a_row():
    """Without a state, padding is moved aside, and one bias [T, T] serves all rows."""
    mixer = nn.GatedAttentionUnit(16, query_key_dim=6)
    mask = torch.ones(8, 200, dtype=torch.bool)
    mask[0, :5] = False
    with torch.profiler.profile(
        record_shapes=True, profile_memory=True, acc_events=True
    ) as profile:
        mixer(torch.randn(8, 200, 16), key_mask=mask)
        mixer(torch.randn(1, 2000, 16), cu_seqlens=torch.arange(0, 2001, 100))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 8 * 200 * 200 * 4  # neither B T T nor, packed, T T


def test_a_gau_state_crosses_autocast():
    mixer = nn.GatedAttentionUnit(16, query_key_dim=6)
    x = torch.randn(1, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x[:, :8], return_state=True)
    assert torch.allclose(mixer(x[:, 8:], state=state), mixer(x)[:, 8:], atol=0.02)
