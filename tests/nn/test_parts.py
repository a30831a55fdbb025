"""The small parts against their formulas, and softmax mixers against plain attention."""

import math

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
    """Pair i at position t is multiplied by exp(i t base^(-2i/dim)), also at t = 1,000,000."""
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
    assert torch.allclose(
        nn.ShortConvolution(5, 4)(x.float())[0], x.float(), atol=0.5
    )  # near the identity at first


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
    q, k, v = (
        p(x).unflatten(-1, (4, 4)).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    weights = (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(
        mixer(x), mixer.out_proj((weights @ v).transpose(1, 2).flatten(2)), atol=1e-12
    )


def test_fixed_states_do_not_grow():
    for mixer in (
        nn.TaylorAttention(16, 4, conv_size=3),
        nn.LinearAttention(16, 4),
        nn.GatedShortConvolution(16),
    ):
        sizes = set()
        state = None
        for _ in range(4):
            _, state = mixer(torch.randn(1, 50, 16), state=state, return_state=True)
            sizes.add(state.nbytes)
        assert len(sizes) == 1


def test_hedgehog_and_rebased_are_their_formulas():
    """Hedgehog has 2K positive features; Rebased has the inner product (y_q·y_k)² / K."""
    torch.manual_seed(0)
    x, z = (
        torch.randn(2, 3, 7, 5, dtype=torch.float64),
        torch.randn(2, 3, 7, 5, dtype=torch.float64),
    )
    hedgehog = nn.HedgehogFeatureMap(3, 5).double()
    assert torch.allclose(
        hedgehog(x), torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    )  # W starts as the identity
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
        with pytest.raises(
            ValueError,
            match=r"feature_map: expected \[B, H, T, K\] with H=3, K=5, got \[2, 2, 7, 5\]",
        ):
            module(x[:, :2])


def test_scale_norm_is_its_formula():
    norm = nn.ScaleNorm(6).double()
    norm.weight.data.fill_(1.7)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.allclose(norm(x), 1.7 * x / (x.square().mean(-1, keepdim=True)).sqrt())
    assert not norm(torch.zeros(1, 6, dtype=torch.float64)).any()
    tiny = torch.full((1, 6), 1e-9, dtype=torch.float64)
    assert torch.allclose(norm(tiny), 1.7 * tiny / 1e-5)
    half = norm.half()
    assert half((x * 300).half()).isfinite().all()  # squares beyond fp16
    assert not half(torch.zeros(1, 6).half()).any()  # 1 / eps beyond fp16
    small = torch.full((1, 6), 1e-5).half()
    assert torch.allclose(half(small), torch.full((1, 6), 1.7).half(), rtol=0.05)


def test_scaled_sinusoidal_is_its_formula():
    """Distant positions and single tokens are included."""
    module = nn.ScaledSinusoidalEmbedding(8)
    assert float(module.scale.detach()) == pytest.approx(8**-0.5)
    position = torch.tensor([0, 1, 7, 999, 1_000_000])
    angle = position[:, None].double() * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    expected = torch.cat((angle.sin(), angle.cos()), -1) * 8**-0.5
    assert torch.allclose(module(position).double(), expected, atol=1e-6)
    assert torch.equal(module(position[3:4]), module(position)[3:4])
    assert module(position.expand(2, -1)).shape == (2, 5, 8)
    with pytest.raises(
        ValueError, match="dim: sinusoidal positions need an even number of channels, got 7"
    ):
        nn.ScaledSinusoidalEmbedding(7)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (4, 3)])
def test_t5_bias_is_its_definition(is_causal, buckets, farthest):
    """Near distances have a bucket each, farther ones share logarithmic ranges."""
    module = nn.T5RelativePositionBias(
        3, is_causal=is_causal, num_buckets=buckets, max_distance=farthest, scale=2.0
    ).double()
    module.embedding.weight.data.normal_()

    def bucket(distance):
        """T5's bucket of a distance from the query back to the key."""
        count, offset = buckets, 0
        if is_causal:
            distance = max(distance, 0)
        else:
            count //= 2
            offset, distance = (count if distance < 0 else 0), abs(distance)
        exact = count // 2
        if distance < exact:
            return offset + distance
        far = exact + int(
            math.log(distance / exact) / math.log(farthest / exact) * (count - exact) + 1e-6
        )
        return offset + min(far, count - 1)

    bias = module(9, 150)
    assert bias.shape == (3, 9, 150)
    for i in range(9):
        row = torch.stack(
            [module.embedding.weight[bucket((141 + i) - j)] * 2 for j in range(150)], -1
        )
        assert torch.equal(bias[:, i], row)
    places = torch.randint(0, 200, (2, 12))
    scattered = module.at(places[:, :5], places)
    for b in range(2):
        whole = module(200, 200)
        assert torch.equal(scattered[b], whole[:, places[b, :5]][:, :, places[b]])
    assert module(0).shape == (3, 0, 0)
    assert torch.equal(module(1, 9), module(9)[:, -1:])  # a step is the last row


def test_offset_scale_is_its_formula():
    module = nn.OffsetScale(4, 3)
    assert module.beta.abs().max() == 0
    module.beta.data.normal_()
    x = torch.randn(2, 5, 4)
    y = module(x)
    assert y.shape == (2, 3, 5, 4)
    for h in range(3):
        assert torch.allclose(y[:, h], x * module.gamma[h] + module.beta[h])


def test_t5_bias_trains_after_inference():
    """A tensor that inference caches does not enter a backward pass."""
    bias = nn.T5RelativePositionBias()
    with torch.inference_mode():
        expected = bias(6).clone()
    trained = bias(6)
    assert torch.equal(trained.detach(), expected)
    trained.sum().backward()
    assert bias.embedding.weight.grad.any()
