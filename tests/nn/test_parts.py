"""The small parts against their formulas, and softmax mixers against plain attention."""

import pytest
import torch
from torch.nn import functional as F

from cumulant import nn


def test_rotary_turns_by_relative_position():
    rotary = nn.RotaryEmbedding(8, base=100.0)
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(-1, -1, 30, -1)
    y = rotary(x, torch.arange(30))
    products = y[0, 0] @ y[0, 0].T
    for distance in (0, 3, 11):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_rotary_equals_the_complex_form():
    """Pair i at position t: multiplication by exp(i t base^(-2i/dim)); exact to fp32 at position 1,000,000."""
    rotary = nn.RotaryEmbedding(6)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    position = torch.tensor([0, 1, 999, 1_000_000])
    frequency = 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    turn = torch.polar(torch.ones(4, 3, dtype=torch.float64), position[:, None] * frequency)
    expected = torch.view_as_real(torch.view_as_complex(x.view(2, 3, 4, 3, 2)) * turn).flatten(-2)
    assert torch.allclose(rotary(x, position), expected, atol=1e-6)
    rows = position.expand(2, -1)
    assert torch.equal(rotary(x, rows), rotary(x, position))
    half = rotary(x.half(), position)
    assert half.dtype == torch.float16
    assert torch.allclose(half.double(), expected, atol=1e-2)


def test_token_shift():
    x = torch.arange(12.0).view(1, 3, 4)
    y, tail = nn.token_shift(x)
    assert y[0].tolist() == [[0, 1, 0, 0], [4, 5, 2, 3], [8, 9, 6, 7]]
    assert tail.tolist() == [[[10, 11]]]
    odd, _ = nn.token_shift(torch.arange(6.0).view(1, 2, 3))
    assert odd[0].tolist() == [[0, 1, 0], [3, 4, 2]]


def test_short_convolution_is_conv1d():
    conv = nn.ShortConvolution(5, 3).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    kernel = conv.weight.flip(0).T[:, None]
    expected = F.conv1d(F.pad(x.mT, (2, 0)), kernel, groups=5).mT
    assert torch.allclose(conv(x)[0], expected)
    assert torch.allclose(nn.ShortConvolution(5, 4)(x.float())[0], x.float(), atol=0.5)  # near the identity at first


@pytest.mark.parametrize("window", [1, 3, 8, 50])
@pytest.mark.parametrize("groups", [4, 2])
def test_windows_are_banded_attention(window, groups):
    torch.manual_seed(0)
    mixer = nn.SlidingWindowAttention(16, 4, window=window, num_kv_heads=groups).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
    distance = torch.arange(21)[:, None] - torch.arange(21)
    band = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    assert torch.allclose(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(2)), atol=1e-12)


def test_window_state_is_bounded():
    mixer = nn.SlidingWindowAttention(16, 4, window=8)
    state = None
    for _ in range(5):
        _, state = mixer(torch.randn(1, 6, 16), state=state, return_state=True)
    assert state.key.shape == (1, 4, 7, 4)
    assert state.position.tolist() == [30]


def test_softmax_is_sdpa():
    torch.manual_seed(0)
    mixer = nn.SoftmaxAttention(16, 4).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    weights = (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(mixer(x), mixer.out_proj((weights @ v).transpose(1, 2).flatten(2)), atol=1e-12)


def test_fixed_states_do_not_grow():
    for mixer in (nn.TaylorAttention(16, 4, conv_size=3), nn.LinearAttention(16, 4), nn.GatedShortConvolution(16)):
        sizes = set()
        state = None
        for _ in range(4):
            _, state = mixer(torch.randn(1, 50, 16), state=state, return_state=True)
            sizes.add(state.nbytes)
        assert len(sizes) == 1


def test_hedgehog_and_rebased_are_their_formulas():
    """Positive features of 2K; and features whose inner product is (y_q·y_k)² / K."""
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    hedgehog = nn.HedgehogFeatureMap(3, 5).double()
    assert torch.allclose(hedgehog(x), torch.cat((x.softmax(-1), (-x).softmax(-1)), -1))  # W starts as the identity
    hedgehog.weight.data.normal_()
    y = torch.stack([x[:, h] @ hedgehog.weight[h] for h in range(3)], 1)
    assert torch.allclose(hedgehog(x), torch.cat((y.softmax(-1), (-y).softmax(-1)), -1))
    rebased = nn.RebasedFeatureMap(3, 5).double()
    rebased.gamma.data.normal_()
    rebased.beta.data.normal_()
    assert rebased(x).shape[-1] == 15
    q, k = (F.layer_norm(s, (5,)) * rebased.gamma + rebased.beta for s in (x, z))
    assert torch.allclose(rebased(x) @ rebased(z).mT, (q @ k.mT) ** 2 / 5)
    for module in (hedgehog, rebased):
        with pytest.raises(ValueError, match=r"feature_map: expected \[B, H, T, K\] with H=3, K=5, got \[2, 2, 7, 5\]"):
            module(x[:, :2])
