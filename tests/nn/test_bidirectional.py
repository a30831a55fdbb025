"""Self attention in both directions: its formula, masks, packing, low precision, compilation."""

import pytest
import torch

from cumulant import nn

from .common import D, assert_agree, lowered, spread

EVERYTHING = {
    "num_kv_heads": 2,
    "value_dim": 5,
    "rotary": True,
    "prenorm": True,
    "qk_norm": True,
    "gate_values": True,
    "shift_tokens": True,
    "bias": True,
    "is_causal": False,
}
MIXERS = {
    "taylor": lambda: nn.TaylorAttention(D, 4, head_dim=6, is_causal=False),
    "taylor-everything": lambda: nn.TaylorAttention(D, 4, head_dim=6, order=4, **EVERYTHING),
    "linear": lambda: nn.LinearAttention(D, 4, is_causal=False),
    "linear-everything": lambda: nn.LinearAttention(D, 4, head_dim=6, **EVERYTHING),
    "linear-softmax": lambda: nn.LinearAttention(D, 4, feature_map="softmax", is_causal=False),
    "linear-hedgehog": lambda: nn.LinearAttention(
        D, 4, num_kv_heads=2, feature_map="hedgehog", is_causal=False
    ),
    "linear-rebased": lambda: nn.LinearAttention(
        D, 4, feature_map="rebased", is_causal=False, combine_heads=False
    ),
    "gau": lambda: spread(nn.GatedAttentionUnit(D, query_key_dim=6, is_causal=False)),
    "gau-laplace": lambda: spread(
        nn.GatedAttentionUnit(
            D, query_key_dim=6, is_causal=False, activation="laplace", length_scale=9, rotary_dim=4
        )
    ),
    "flash": lambda: spread(
        nn.MixedChunkAttention(D, group_size=4, query_key_dim=6, is_causal=False, shift_tokens=True)
    ),
    "flash-one-group": lambda: spread(
        nn.MixedChunkAttention(
            D, group_size=64, query_key_dim=6, is_causal=False, activation="laplace"
        )
    ),
    "flash-unreduced": lambda: spread(
        nn.MixedChunkAttention(
            D,
            group_size=5,
            query_key_dim=6,
            is_causal=False,
            reduce_group_non_causal_attn=False,
            norm="layernorm",
        )
    ),
    "softmax": lambda: nn.SoftmaxAttention(D, 4, num_kv_heads=2, rotary=True, is_causal=False),
}


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def alone(mixer, rows):
    """Output and gradients of each row alone; gradients of parameters are summed."""
    outs, inputs, total = [], [], [torch.zeros_like(p) for p in mixer.parameters()]
    for row in rows:
        x = row[None].detach().requires_grad_()
        y = mixer(x)
        dx, *found = torch.autograd.grad(y.sin().sum(), (x, *mixer.parameters()))
        outs.append(y[0].detach())
        inputs.append(dx[0])
        total = [a + g for a, g in zip(total, found)]
    return outs, inputs, total


@pytest.mark.parametrize("name", ["taylor", "linear"])
@pytest.mark.parametrize("length", [11, 300], ids=["one block", "several chunks"])
def test_it_is_its_formula(name, length):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    x = draw(2, length, D)
    q, k, v = (
        p(x).unflatten(-1, (4, 6)).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    if name == "taylor":
        s = q @ k.mT / 6**0.5
        w = 1 + s + s**2 / 2
    else:
        w = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    out = (w / w.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(mixer(x), mixer.out_proj(out), atol=1e-12)


def test_first_tokens_see_the_last(mixer):
    x = draw(1, 11, D)
    changed = x.clone()
    changed[:, -1] = 3
    early = slice(0, 4)  # a relu may hide it from one of them
    apart = getattr(mixer, "reduce_group_non_causal_attn", True) is False  # no group sees another
    assert torch.allclose(mixer(changed)[:, early], mixer(x)[:, early]) == apart


@pytest.mark.parametrize("junk", [float("nan"), 50.0])
@pytest.mark.parametrize("length", [15, 150])
def test_masked_tokens_do_not_exist(mixer, junk, length):
    x = draw(3, length, D)
    mask = torch.rand(3, length) > 0.4
    mask[0, : length // 2], mask[:, -1] = False, True
    x[~mask] = junk
    x.requires_grad_()
    y = mixer(x, key_mask=mask)
    assert not y[~mask].any()
    dx, *found = torch.autograd.grad(y.sin().sum(), (x, *mixer.parameters()))
    assert not dx[~mask].any()
    outs, inputs, total = alone(mixer, [x[b][mask[b]] for b in range(3)])
    assert_agree([y[b][mask[b]] for b in range(3)], outs, rtol=1e-8, atol=1e-9)
    assert_agree([dx[b][mask[b]] for b in range(3)], inputs, rtol=1e-8, atol=1e-9)
    assert_agree(found, total, rtol=1e-8, atol=1e-8)


def test_packed_is_separate(mixer):
    """With an empty sequence, one longer than a chunk, and NaN behind the last."""
    bounds = [0, 6, 6, 150, 152]
    x = draw(1, 155, D)
    x[:, 152:] = float("nan")
    x.requires_grad_()
    y = mixer(x, cu_seqlens=torch.tensor(bounds))
    dx, *found = torch.autograd.grad(y[:, :152].sin().sum(), (x, *mixer.parameters()))
    spans = [(a, b) for a, b in zip(bounds, bounds[1:]) if b > a]
    outs, inputs, total = alone(mixer, [x[0, a:b] for a, b in spans])
    assert_agree([y[0, a:b] for a, b in spans], outs, rtol=1e-8, atol=1e-9)
    assert_agree([dx[0, a:b] for a, b in spans], inputs, rtol=1e-8, atol=1e-9)
    assert_agree(found, total, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [0, 1])
def test_short_inputs(mixer, length):
    assert mixer(draw(2, length, D)).shape == (2, length, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision(mixer, dtype):
    exact, y = lowered(mixer, dtype, draw(2, 19, D))
    assert float((y - exact).norm() / exact.norm()) < 0.015


@pytest.mark.filterwarnings("ignore")
def test_compile(mixer):
    torch._dynamo.reset()
    mixer = mixer.float()
    x = torch.randn(2, 150, D)
    results = []
    for f in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.sum(), tuple(mixer.parameters()))])
    for actual, exact in zip(*results):
        assert torch.allclose(actual, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_export(mixer):
    """One program for any batch and length."""
    mixer = mixer.float().eval()
    B, T = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(
        mixer, (torch.randn(2, 20, D),), dynamic_shapes={"x": {0: B, 1: T}}
    )
    x = torch.randn(3, 150, D)
    assert torch.allclose(program.module()(x), mixer(x), atol=1e-5)


def test_errors(mixer):
    x = draw(2, 5, D)
    with pytest.raises(ValueError, match=r"key_mask: expected \[B, S\] = \[2, 5\], got \[2, 4\]"):
        mixer(x, key_mask=torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match=r"only causal attention carries a state"):
        mixer(x, return_state=True)


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
