"""What every mixer module holds: the law, masks, packing, gradients, and the protocol."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cumulant import nn
from cumulant.nn.kernel_attention import KernelAttention

from .common import lowered, spread

D = 24
MIXERS = {
    "taylor": lambda: nn.TaylorAttention(D, 4, head_dim=6),
    "taylor-everything": lambda: nn.TaylorAttention(
        D,
        4,
        num_kv_heads=2,
        head_dim=6,
        value_dim=5,
        rotary=True,
        gate_values=True,
        shift_tokens=True,
        conv_size=3,
    ),
    "taylor-4": lambda: nn.TaylorAttention(
        D, 4, head_dim=3, order=4, bias=True, prenorm=True, shift_tokens=True
    ),
    "taylor-uncombined": lambda: nn.TaylorAttention(
        D, 4, head_dim=6, combine_heads=False, gate_values=True
    ),
    "taylor-higher-order": lambda: nn.TaylorAttention(
        D, 4, head_dim=6, qk_norm=True, constant_term=False, rotary=True, conv_size=3
    ),
    "taylor-multi-query": lambda: nn.TaylorAttention(
        D, 4, num_kv_heads=1, head_dim=6, shift_tokens=True
    ),
    "linear": lambda: nn.LinearAttention(D, 4),
    "linear-everything": lambda: nn.LinearAttention(
        D, 4, num_kv_heads=2, rotary=True, gate_values=True, shift_tokens=True, conv_size=4
    ),
    "linear-softmax": lambda: nn.LinearAttention(D, 4, feature_map="softmax", conv_size=2),
    "linear-hedgehog": lambda: perturbed(
        nn.LinearAttention(D, 4, num_kv_heads=2, feature_map="hedgehog", bias=True)
    ),
    "linear-rebased": lambda: perturbed(
        nn.LinearAttention(D, 4, feature_map="rebased", prenorm=True, rotary=True)
    ),
    "linear-pair": lambda: nn.LinearAttention(
        D, 4, feature_map=(torch.exp, torch.nn.Softplus()), qk_norm=True
    ),
    "linear-module": lambda: nn.LinearAttention(
        D, 4, feature_map=torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Softplus())
    ),
    "gau": lambda: spread(nn.GatedAttentionUnit(D, query_key_dim=6)),
    "gau-everything": lambda: spread(
        nn.GatedAttentionUnit(
            D,
            query_key_dim=6,
            activation="laplace",
            length_scale=9,
            scale_bias=True,
            norm="rmsnorm",
            rotary_dim=4,
        )
    ),
    "gau-bare": lambda: spread(
        nn.GatedAttentionUnit(
            D, query_key_dim=6, scale_bias=True, norm=None, residual=False, expansion_factor=0.5
        )
    ),
    "flash": lambda: spread(nn.MixedChunkAttention(D, group_size=4, query_key_dim=6)),
    "flash-everything": lambda: spread(
        nn.MixedChunkAttention(
            D,
            group_size=5,
            query_key_dim=6,
            expansion_factor=1.5,
            activation="laplace",
            norm="layernorm",
            shift_tokens=True,
            rotary_dim=4,
        )
    ),
    "flash-bare": lambda: spread(
        nn.MixedChunkAttention(
            D,
            group_size=7,
            query_key_dim=5,
            norm=None,
            residual=False,
            relative_bias=False,
            rotary_dim=0,
        )
    ),
    "elita": lambda: placed(nn.ElitaAttention(D, 4, features=3, horizon=10)),
    "elita-published": lambda: placed(
        nn.ElitaAttention(D, 3, head_dim=5, horizon=30, time=2.5, query_logit=False, clip=1.5)
    ),
    "softmax": lambda: nn.SoftmaxAttention(D, 4, num_kv_heads=2, rotary=True),
    "window": lambda: nn.SlidingWindowAttention(D, 4, num_kv_heads=2, rotary=True, window=5),
    "window-1": lambda: nn.SlidingWindowAttention(D, 4, window=1),
    "convolution": lambda: nn.GatedShortConvolution(D, size=3),
}


def perturbed(mixer):
    """Learned maps away from where they start."""
    with torch.no_grad():
        for part in (mixer.query_map, mixer.key_map):
            for p in part.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return mixer


def placed(mixer):
    """Logits of content and of position that matter: both start near zero."""
    with torch.no_grad():
        mixer.logit_proj.weight.normal_(std=0.3)
        for p in mixer.position.parameters():
            p.normal_(std=2)
    return mixer


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def grads(loss, module, x):
    return torch.autograd.grad(loss, (x, *module.parameters()))


def weight(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)


@pytest.mark.parametrize("cuts", [[1] * 19, [7, 1, 11], [18, 1], [0, 19]], ids=str)
def test_any_split_is_the_whole(mixer, cuts):
    """Outputs, states and gradients, those of the parameters included."""
    results = []
    for lengths in ([19], cuts):
        x = torch.randn(
            2,
            19,
            D,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
            requires_grad=True,
        )
        state, outs = None, []
        for piece in x.split(lengths, 1):
            y, state = mixer(piece, state=state, return_state=True)
            outs.append(y)
        y = torch.cat(outs, 1)
        assert state.position.tolist() == [19, 19]
        results.append([y, *state.tensors().values(), *grads((y * weight(y)).sum(), mixer, x)])
    for actual, exact in zip(*results):
        assert torch.allclose(actual, exact, rtol=1e-9, atol=1e-10)


def test_a_call_without_state_is_the_same(mixer):
    x = torch.randn(2, 19, D, dtype=torch.float64)
    assert torch.allclose(mixer(x), mixer(x, return_state=True)[0], atol=1e-12)


def test_outputs_do_not_depend_on_later_tokens(mixer):
    x = torch.randn(2, 19, D, dtype=torch.float64)
    y = mixer(x)
    for t in (1, 6, 12):
        changed = x.clone()
        changed[:, t:] = 9
        assert torch.allclose(mixer(changed)[:, :t], y[:, :t], atol=1e-13)


@pytest.mark.parametrize("junk", [float("nan"), 50.0])
def test_masked_tokens_do_not_exist(mixer, junk):
    """Left, right and scattered padding over two calls: outputs, states and gradients of each row
    by itself.
    """
    T = 22
    x = torch.randn(4, T, D, dtype=torch.float64)
    mask = torch.rand(4, T) > 0.4
    mask[0], mask[1], mask[2] = True, True, True
    mask[0, :13], mask[1, 4:], mask[2, 10:] = False, False, False
    x[~mask] = junk
    x.requires_grad_()
    state, outs = None, []
    for piece, kept in zip(x.split([9, 13], 1), mask.split([9, 13], 1)):
        y, state = mixer(piece, key_mask=kept, state=state, return_state=True)
        outs.append(y)
    y = torch.cat(outs, 1)
    more = torch.randn(4, 3, D, dtype=torch.float64)
    after = mixer(more, state=state, return_state=True)[0]
    assert state.position.tolist() == mask.sum(1).tolist()
    assert not y[~mask].any()
    found = grads((y * weight(y)).sum() + after.sum(), mixer, x)
    assert all(torch.isfinite(g).all() for g in found)
    assert not found[0][~mask].any()
    total = [torch.zeros_like(p) for p in mixer.parameters()]
    for b in range(4):
        alone = torch.cat((x[b][mask[b]], more[b]))[None].detach().requires_grad_()
        expected = mixer(alone)
        n = int(mask[b].sum())
        assert torch.allclose(y[b][mask[b]], expected[0, :n], atol=1e-10)
        assert torch.allclose(after[b], expected[0, n:], atol=1e-10)
        loss = (expected[0, :n] * weight(y)[b][mask[b]]).sum() + expected[0, n:].sum()
        gradient, *parameters = grads(loss, mixer, alone)
        assert torch.allclose(found[0][b][mask[b]], gradient[0, :n], atol=1e-9)
        total = [a + g for a, g in zip(total, parameters)]
    for actual, exact in zip(found[1:], total):
        assert torch.allclose(actual, exact, rtol=1e-8, atol=1e-8)


def test_packed_is_separate(mixer):
    """With an empty sequence, and NaN in the slack after the last, that reaches no weight."""
    bounds = [0, 6, 6, 15, 17]
    x = torch.randn(1, 20, D, dtype=torch.float64)
    x[:, 17:] = float("nan")
    x.requires_grad_()
    y = mixer(x, cu_seqlens=torch.tensor(bounds))
    found = grads((y[:, :17] * weight(y)[:, :17]).sum(), mixer, x)
    assert all(torch.isfinite(g).all() for g in found)
    total = [torch.zeros_like(p) for p in mixer.parameters()]
    for a, b in zip(bounds, bounds[1:]):
        if a == b:
            continue
        alone = x[:, a:b].detach().requires_grad_()
        expected = mixer(alone)
        assert torch.allclose(y[:, a:b], expected, atol=1e-12)
        gradient, *parameters = grads((expected * weight(y)[:, a:b]).sum(), mixer, alone)
        assert torch.allclose(found[0][:, a:b], gradient, atol=1e-10)
        total = [s + g for s, g in zip(total, parameters)]
    for actual, exact in zip(found[1:], total):
        assert torch.allclose(actual, exact, rtol=1e-8, atol=1e-9)


def test_states_are_values_and_can_be_selected(mixer):
    x, more = torch.randn(3, 9, D, dtype=torch.float64), torch.randn(3, 2, D, dtype=torch.float64)
    _, state = mixer(x, return_state=True)
    before = state.clone()
    mixer(more, state=state, return_state=True)
    for a, b in zip(state.tensors().values(), before.tensors().values()):
        assert torch.equal(a, b)
    index = torch.tensor([2, 2, 0])
    picked = mixer(more, state=state.select(index), return_state=True)[0]
    expected = mixer(torch.cat((x[index], more), 1))[:, 9:]
    assert torch.allclose(picked, expected, atol=1e-11)


def test_states_hold_no_more_than_they_say(mixer):
    """No view into the whole sequence: what a state keeps alive is what it counts."""
    _, state = mixer(torch.randn(2, 60, D, dtype=torch.float64), return_state=True)
    held = sum(x.untyped_storage().nbytes() for x in state.tensors().values())
    assert held == state.nbytes


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_inputs(mixer, length):
    x = torch.randn(2, length, D, dtype=torch.float64)
    y, state = mixer(x, return_state=True)
    assert y.shape == x.shape
    more = torch.randn(2, 4, D, dtype=torch.float64)
    nothing, state = mixer(more[:, :0], state=state, return_state=True)
    assert nothing.shape == (2, 0, D)
    assert torch.allclose(
        mixer(more, state=state, return_state=True)[0],
        mixer(torch.cat((x, more), 1))[:, length:],
        atol=1e-11,
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["taylor", "linear"])
def test_any_options_masks_and_splits(kind, data):
    """Drawn groups, dims, options, masks and splits: in pieces as row by row, unpadded and
    whole.
    """
    B, G, R, K, V = (data.draw(st.integers(1, 3)) for _ in range(5))
    T = data.draw(st.integers(0, 20))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    options = {"num_kv_heads": G, "value_dim": V, "conv_size": data.draw(st.integers(0, 3))}
    flags = ("rotary", "prenorm", "qk_norm", "gate_values", "combine_heads", "shift_tokens", "bias")
    options |= {name: data.draw(st.booleans(), label=name) for name in flags}
    options["head_dim"] = 2 * K if options["rotary"] else K
    if kind == "taylor":
        mixer = nn.TaylorAttention(
            D, G * R, order=data.draw(st.sampled_from([2, 4])), **options
        ).double()
    else:
        maps = st.sampled_from(["elu", "relu", "softmax", "hedgehog", "rebased"])
        mixer = nn.LinearAttention(D, G * R, feature_map=data.draw(maps), **options).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T)), dtype=torch.bool
    )
    mask = mask.view(B, T)
    state, outs, at = None, [], 0
    for end in [*sorted(data.draw(st.lists(st.integers(0, T), max_size=3))), T]:
        y, state = mixer(x[:, at:end], key_mask=mask[:, at:end], state=state, return_state=True)
        outs.append(y)
        at = end
    y = torch.cat(outs, 1)
    assert not y[~mask].any()
    for b in range(B):
        alone = mixer(x[b][mask[b]][None])[0]
        assert torch.allclose(y[b][mask[b]], alone, rtol=1e-7, atol=1e-8)
    both = mixer_in_both_directions(mixer)
    y = both(x, key_mask=mask) if both else y
    for b in range(B if both else 0):
        alone = both(x[b][mask[b]][None])[0]
        assert torch.allclose(y[b][mask[b]], alone, rtol=1e-7, atol=1e-8)


def mixer_in_both_directions(mixer):
    """The same mixer, seeing later tokens too; None where a convolution forbids it."""
    if mixer.conv is not None:
        return None
    mixer.is_causal = False
    return mixer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision(mixer, dtype):
    """Close to float64, outputs and gradients finite; also for a module cast to bfloat16."""
    exact, y = lowered(mixer, dtype, torch.randn(2, 19, D, dtype=torch.float64))
    if getattr(mixer, "constant_term", True):
        assert float((y - exact).norm() / exact.norm()) < 0.015
    else:  # a few denominators pass close to zero and magnify any rounding
        errors = (y - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert float(errors.median()) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_compile(mixer):
    """Fullgraph, with and without a state."""
    torch._dynamo.reset()
    mixer = mixer.float()
    x = torch.randn(2, 12, D)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, state = mixer(x, return_state=True)
    assert torch.allclose(compiled(x), y, atol=1e-5)
    assert torch.allclose(
        compiled(x, state=state, return_state=True)[0],
        mixer(x, state=state, return_state=True)[0],
        atol=1e-5,
    )


@pytest.mark.filterwarnings("ignore")
def test_export(mixer):
    """One program for any batch and length."""
    if isinstance(mixer, nn.SlidingWindowAttention):
        pytest.skip("its blocks depend on the length")
    mixer = mixer.float().eval()
    B, T = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(
        mixer, (torch.randn(2, 20, D),), dynamic_shapes={"x": {0: B, 1: T}}
    )
    x = torch.randn(3, 150, D)
    assert torch.allclose(program.module()(x), mixer(x), atol=1e-4, rtol=1e-4)


def test_errors(mixer):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, D\] with D=24, got \[2, 5, 25\]"):
        mixer(torch.randn(2, 5, 25))
    with pytest.raises(ValueError, match=r"key_mask: expected \[B, S\] = \[2, 5\], got \[2, 4\]"):
        mixer(x, key_mask=torch.ones(2, 4).bool())
    with pytest.raises(TypeError, match=r"key_mask: expected a boolean tensor"):
        mixer(x, key_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"cu_seqlens: packed sequences need B = 1"):
        mixer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(
        ValueError, match=r"cu_seqlens: cannot be combined with key_mask, state or return_state"
    ):
        mixer(x[:1], cu_seqlens=torch.tensor([0, 5]), return_state=True)
    with pytest.raises(TypeError, match="unexpected keyword"):
        mixer(x, mask=None)
    _, state = mixer(x, return_state=True)
    with pytest.raises(
        ValueError, match=r"state: expected 1 rows, as x has, got 2; choose rows with state.select"
    ):
        mixer(x[:1], state=state)
    with pytest.raises(
        TypeError, match=r"state: expected a \w+State from return_state=True, got tuple"
    ):
        mixer(x, state=(1, 2))


@pytest.mark.parametrize("kind", [nn.TaylorAttention, nn.LinearAttention, nn.SoftmaxAttention])
def test_bidirectional(kind):
    torch.manual_seed(0)
    mixer = kind(D, 4, is_causal=False, rotary=True).double()
    x = torch.randn(2, 11, D, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = False
    y = mixer(x, key_mask=mask)
    assert torch.allclose(y[0, 4:], mixer(x[:1, 4:])[0], atol=1e-11)
    changed = x.clone()
    changed[:, -1] = 3
    assert not torch.allclose(mixer(changed)[:, 0], mixer(x)[:, 0])  # first tokens see the last
    with pytest.raises(ValueError, match="only causal attention carries a state"):
        mixer(x, return_state=True)


@pytest.mark.parametrize("order", [1, 3, 6])
def test_any_order_by_the_reference(order):
    """A module whose order only the reference takes, against the polynomial of the scores."""
    torch.manual_seed(0)
    mixer = nn.TaylorAttention(D, 2, head_dim=3, order=order, impl="reference").double()
    x = 0.1 * torch.randn(1, 9, D, dtype=torch.float64)
    q, k = (p(x).unflatten(-1, (2, 3)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x).unflatten(-1, (2, 12)).transpose(1, 2)
    scores = q @ k.mT / 3**0.5
    weights = sum(scores**p / math.factorial(p) for p in range(order + 1)).tril()
    out = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(mixer(x), mixer.out_proj(out), atol=1e-12)


def test_mercats_layer_is_its_formula():
    """LayerNorm of q and k, scores over alpha sqrt(K), no constant term."""
    torch.manual_seed(0)
    mixer = nn.TaylorAttention(
        D, 2, head_dim=5, qk_norm=True, constant_term=False, bias=True
    ).double()
    x = torch.randn(1, 9, D, dtype=torch.float64)
    q, k = (p(x).unflatten(-1, (2, 5)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj))
    q, k = (
        (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for y in (q, k)
    )
    scores = q @ k.mT / (3 * 5**0.5)
    weights = (scores + scores**2 / 2).tril()
    out = (
        weights
        / weights.sum(-1, keepdim=True)
        @ mixer.v_proj(x).unflatten(-1, (2, 12)).transpose(1, 2)
    )
    assert torch.allclose(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(2)), atol=1e-10)


def test_construction_errors():
    with pytest.raises(
        ValueError, match="num_kv_heads: the 3 key/value heads must divide the 4 query heads"
    ):
        nn.TaylorAttention(D, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="num_kv_heads: the 3 key/value heads must divide the 4 query heads"
    ):
        nn.SoftmaxAttention(D, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="num_heads: 5 must divide dim=24, or value_dim must be given"
    ):
        nn.TaylorAttention(D, 5)
    with pytest.raises(
        ValueError, match="num_heads: 5 must divide dim=24, or head_dim must be given"
    ):
        nn.SoftmaxAttention(D, 5)
    with pytest.raises(ValueError, match="order: expected an integer of at least 1, got 0"):
        nn.TaylorAttention(D, 4, order=0)
    with pytest.raises(ValueError, match="feature_map: expected one of"):
        nn.LinearAttention(D, 4, feature_map="gelu")
    with pytest.raises(
        ValueError, match="dim: rotary embedding needs an even number of dimensions, got 5"
    ):
        nn.TaylorAttention(D, 4, head_dim=5, rotary=True)
    with pytest.raises(
        ValueError,
        match="conv_size: the short convolution looks backwards only; it needs is_causal",
    ):
        nn.LinearAttention(D, 4, is_causal=False, conv_size=3)
    for bad in (0, -1.5, math.nan):
        with pytest.raises(ValueError, match=f"alpha: expected a positive number, got {bad}"):
            nn.TaylorAttention(D, 4, qk_norm=True, alpha=bad)
    with pytest.raises(ValueError, match="alpha: given beside scale; leave one out"):
        nn.TaylorAttention(D, 4, alpha=2, scale=0.5)
    with pytest.raises(ValueError, match="head_dim: expected at least 1, got 0"):
        nn.TaylorAttention(D, 4, head_dim=0)
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        nn.LinearAttention(D, 0)
    with pytest.raises(ValueError, match="dropout: expected a probability below 1, got 1"):
        nn.TaylorAttention(D, 4, dropout=1.0)
    with pytest.raises(
        TypeError, match="feature_map: expected a pair of callables, for queries and for keys"
    ):
        nn.LinearAttention(D, 4, feature_map=(torch.exp, "elu"))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        nn.SlidingWindowAttention(D, 4, window=0)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        nn.GatedShortConvolution(D, size=0)


def test_every_mixer_is_in_the_matrix():
    kinds = {type(make()) for make in MIXERS.values()}
    exported = {getattr(nn, name) for name in nn.__all__}
    mixers = {k for k in exported if isinstance(k, type) and issubclass(k, torch.nn.Module)}
    parts = {nn.ChannelFirst, nn.RotaryEmbedding, nn.ShortConvolution}
    parts |= {nn.HedgehogFeatureMap, nn.RebasedFeatureMap, nn.OffsetScale, nn.ScaleNorm}
    parts |= {
        nn.ScaledSinusoidalEmbedding,
        nn.T5RelativePositionBias,
        nn.ElitaFeedForward,
        nn.SinusoidalLogits,
    }
    assert mixers - kinds == parts
    assert issubclass(nn.TaylorAttention, KernelAttention)
