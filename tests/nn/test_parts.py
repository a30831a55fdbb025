"""The small parts against their formulas, and softmax mixers against plain attention."""

import math

import pytest
import torch
from torch.nn import functional as F

from cumulant import nn

from .common import spread


def test_rotary_turns_by_relative_position():
    rotary = nn.RotaryEmbedding(8, base=100.0)
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(-1, -1, 30, -1)
    y = rotary(x, torch.arange(30))
    products = y[0, 0] @ y[0, 0].T
    for distance in (0, 3, 11):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_rotary_equals_the_complex_form():
    """Pair i at position t: multiplication by exp(i t base^(-2i/dim)); exact to fp32 at position
    1,000,000.
    """
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
    """Positive features of 2K; and features whose inner product is (y_q·y_k)² / K."""
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
    """Also far out, and token by token."""
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
    """Bucket by bucket: one distance each, then logarithmic ranges, then all that is farther."""
    module = nn.T5RelativePositionBias(
        3, is_causal=is_causal, num_buckets=buckets, max_distance=farthest, scale=2.0
    ).double()
    module.embedding.weight.data.normal_()

    def bucket(distance):
        """T5's, in scalars; distance from the query back to the key."""
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


@pytest.mark.parametrize("is_causal", [True, False])
def test_flash_is_its_formula(is_causal):
    """The layer written out: norm, shift of the first half, four copies of one projection, rotation
    of some of their dimensions, groups, gate, residual."""
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
    """In training only; repeats with the seed; right in the mean; its gradient is that of what was
    drawn.
    """
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
    """length_scale="total": every row by its own length, whatever its padding."""
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
    """Rows of padding, slack after packed sequences: outputs and gradients finite, tokens as
    without.
    """
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
    """count_padding: n and places by slots, with a state too."""
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
    """Without a state, tokens are moved out of the way of padding, and one bias [T, T] serves all
    rows.
    """
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


def test_t5_bias_trains_after_inference():
    """What inference leaves behind does not reach a backward pass."""
    bias = nn.T5RelativePositionBias()
    with torch.inference_mode():
        expected = bias(6).clone()
    trained = bias(6)
    assert torch.equal(trained.detach(), expected)
    trained.sum().backward()
    assert bias.embedding.weight.grad.any()
