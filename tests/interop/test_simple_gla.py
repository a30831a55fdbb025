"""Weights of flash-linear-attention's simple gated layer give the numbers of its formula.

The package needs a GPU. The stand-ins have its parameters and attributes, and compute its layer one
token at a time in float64, with sums over the past taps and a matrix for each head.
"""

import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from cumulant import nn
from cumulant.interop import (
    SimpleGatedLinearAttention,
    from_simple_gla,
    from_ssm_state,
    to_ssm_state,
)

D, H = 24, 4
LAYERS = {
    "default": {},
    "multi-query": {"kv_heads": 1},
    "expanded": {"keys": 3, "values": 7, "kv_heads": 2, "taps": 3},
    "biased": {"conv_bias": True, "normalizer": 2.5},
    "no convolution": {"taps": 0},
    "maps": {"feature_map": torch.relu, "gate_fn": torch.sigmoid, "eps": 0.1},
    "no weights in the norm": {"affine": False},
}


class Convolution(torch.nn.Conv1d):
    """Depthwise, causal, with silu; ``weight [E, 1, taps]``, the oldest tap first."""

    def __init__(self, channels, taps, bias):
        super().__init__(channels, channels, taps, groups=channels, bias=bias)

    def at(self, past):
        """The output for the newest of the inputs ``past``, each [B, E]."""
        taps = self.kernel_size[0]
        y = sum(self.weight[:, 0, taps - 1 - j] * x for j, x in enumerate(past[::-1][:taps]))
        return F.silu(y if self.bias is None else y + self.bias)


class Norm(torch.nn.Module):
    def __init__(self, size, eps, affine):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.rand(size) + 0.5) if affine else None

    def forward(self, x):
        y = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return y if self.weight is None else y * self.weight


class Theirs(torch.nn.Module):
    def __init__(
        self,
        *,
        keys=6,
        values=6,
        kv_heads=H,
        taps=4,
        conv_bias=False,
        feature_map=None,
        gate_fn=None,
        affine=True,
        eps=1e-5,
        normalizer=16,
    ):
        super().__init__()
        self.kv_heads, self.keys, self.values = kv_heads, keys, values
        self.feature_map_fn, self.gate_logit_normalizer = feature_map, normalizer
        sizes = {"q": H * keys, "k": kv_heads * keys, "v": kv_heads * values, "g": H * values}
        for name, size in sizes.items():
            setattr(self, f"{name}_proj", torch.nn.Linear(D, size, bias=False))
            if taps and name != "g":
                setattr(self, f"{name}_conv1d", Convolution(size, taps, conv_bias))
        self.gk_proj = torch.nn.Linear(D, H)
        if gate_fn is None:
            self.g_norm_swish_gate = Norm(values, eps, affine)
        else:
            self.g_norm, self.gate_fn = Norm(values, eps, affine), gate_fn
        self.o_proj = torch.nn.Linear(H * values, D, bias=False)

    def forward(self, x):
        """Outputs, and the last matrices [B, H, V, K]."""
        S = x.new_zeros(x.shape[0], H, self.values, self.keys)
        past, outputs = {"q": [], "k": [], "v": []}, []
        for t in range(x.shape[1]):
            now = {}
            for name, seen in past.items():
                seen.append(getattr(self, f"{name}_proj")(x[:, t]))
                conv = getattr(self, f"{name}_conv1d", None)
                now[name] = seen[-1] if conv is None else conv.at(seen)
                if self.feature_map_fn is not None and name != "v":
                    now[name] = self.feature_map_fn(now[name])
            gate = torch.sigmoid(self.gk_proj(x[:, t])) ** (1 / self.gate_logit_normalizer)
            heads, matrices = [], []
            for h in range(H):
                g = h * self.kv_heads // H
                q = now["q"][:, h * self.keys : (h + 1) * self.keys]
                k = now["k"][:, g * self.keys : (g + 1) * self.keys]
                v = now["v"][:, g * self.values : (g + 1) * self.values]
                matrices.append(gate[:, h, None, None] * S[:, h] + v[:, :, None] * k[:, None])
                heads.append((matrices[-1] @ q[..., None])[..., 0] / math.sqrt(self.keys))
            S, o, z = torch.stack(matrices, 1), torch.stack(heads, 1), self.g_proj(x[:, t])
            if hasattr(self, "g_norm"):
                o = self.g_norm(o).flatten(1) * self.gate_fn(z)
            else:
                o = self.g_norm_swish_gate(o).flatten(1) * z * torch.sigmoid(z)
            outputs.append(self.o_proj(o))
        return torch.stack(outputs, 1), S


def layer(name="default"):
    torch.manual_seed(0)
    return Theirs(**LAYERS[name]).double()


def draw(length=19):
    return torch.randn(2, length, D, dtype=torch.float64)


by_layer = pytest.mark.parametrize("name", LAYERS)


@by_layer
def test_it_is_the_layer(name):
    """Outputs, the last state, and the gradients of the input and of all weights."""
    original = layer(name)
    ours = from_simple_gla(original)
    x = draw().requires_grad_()
    expected, S = original(x)
    y, state = ours(x, return_state=True)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(to_ssm_state(state.sums), S, atol=1e-12)
    mine = gradients_by_name(ours, x, y)
    loss = (expected * expected.detach().cos()).sum()
    names = [n for n, _ in original.named_parameters()]
    gradients = torch.autograd.grad(loss, (x, *original.parameters()))
    assert torch.allclose(mine.pop("x"), gradients[0], atol=1e-10)
    # gradients have the shapes of the weights, and move between the two layers as they do
    moved = from_simple_gla(dict(zip(names, gradients[1:], strict=True))).state_dict()
    assert moved.keys() == mine.keys()
    for key, gradient in mine.items():
        assert torch.allclose(gradient, moved[key], rtol=1e-9, atol=1e-10), key


def gradients_by_name(ours, x, y):
    names = [n for n, _ in ours.named_parameters()]
    loss = (y * y.detach().cos()).sum()
    return dict(zip(["x", *names], torch.autograd.grad(loss, (x, *ours.parameters())), strict=True))


@by_layer
@pytest.mark.parametrize("cuts", [[1] * 19, [7, 1, 11], [2, 17]], ids=str)
def test_any_split_is_the_layer(name, cuts):
    original = layer(name)
    ours, x = from_simple_gla(original), draw()
    state, outs = None, []
    for piece in x.split(cuts, 1):
        y, state = ours(piece, state=state, return_state=True)
        outs.append(y)
    expected, S = original(x)
    assert torch.allclose(torch.cat(outs, 1), expected, atol=1e-12)
    assert torch.allclose(to_ssm_state(state.sums), S, atol=1e-12)


def test_padding_and_packing():
    """Each row is the layer on its tokens alone."""
    original = layer("expanded")
    ours, x = from_simple_gla(original), draw()
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :5], mask[1, 9:12] = False, False
    y, packed = ours(x, key_mask=mask), ours(x[:1], cu_seqlens=torch.tensor([0, 4, 19]))
    for b in range(2):
        alone = original(x[b : b + 1, mask[b]])[0][0]
        assert torch.allclose(y[b][mask[b]], alone, atol=1e-12)
    separate = torch.cat((original(x[:1, :4])[0], original(x[:1, 4:])[0]), 1)
    assert torch.allclose(packed, separate, atol=1e-12)


def test_a_generation_of_the_package_is_continued():
    """Its cache holds the last inputs of the three convolutions, and matrices [B, H, V, K]."""
    original = layer("default")
    ours, x = from_simple_gla(original), draw()
    S = original(x[:, :9])[1]
    caches = [
        torch.stack([getattr(original, f"{name}_proj")(x[:, t]) for t in range(5, 9)], -1)
        for name in "qkv"
    ]
    tail = torch.cat(caches, 1)[..., 1:].mT
    state = nn.KernelAttentionState(from_ssm_state(S), None, tail)
    y = ours(x[:, 9:], state=state, return_state=True)[0]
    assert torch.allclose(y, original(x)[0][:, 9:], atol=1e-12)


@by_layer
def test_state_dicts(name):
    """The weights tell heads, sizes and biases; the rest is given by name."""
    original, given = layer(name), LAYERS[name]
    options = {
        "norm_eps": given.get("eps"),
        "gate_logit_normalizer": given.get("normalizer"),
    }
    if name == "maps":
        options |= {"feature_map": "relu", "gate_fn": "sigmoid"}
    ours = from_simple_gla(original.state_dict(), **options)
    x = draw()
    assert torch.allclose(ours(x), original(x)[0], atol=1e-12)
    original.q_proj.weight.data.zero_()
    assert ours.q_proj.weight.any()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_low_precision(autocast):
    original = layer("default")
    x = draw(60)
    expected = original(x)[0]
    ours = from_simple_gla(original)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            y = ours.float()(x.float())
    else:
        y = ours.bfloat16()(x.bfloat16())
    assert float(((y.double() - expected).norm() / expected.norm()).detach()) < 0.015


def test_errors():
    original = layer("default")
    weights = original.state_dict()
    with pytest.raises(ValueError, match="norm_eps: read off the layer; give it only with a state"):
        from_simple_gla(original, norm_eps=1e-5)
    with pytest.raises(TypeError, match="expected a SimpleGatedLinearAttention of .*, got Linear"):
        from_simple_gla(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="or its state dict, got str"):
        from_simple_gla("weights.pt")
    with pytest.raises(ValueError, match="source: 'q_proj.weight' is missing, .* found nothing"):
        from_simple_gla({})
    for name in weights:
        if name != "g_norm_swish_gate.weight":  # a norm may have no weights
            with pytest.raises(ValueError, match=f"source: '{name}' is missing"):
                from_simple_gla({n: w for n, w in weights.items() if n != name})
    with pytest.raises(ValueError, match="source: 'A_log' has no place in SimpleGatedLinear"):
        from_simple_gla({**weights, "A_log": torch.zeros(4)})
    with pytest.raises(
        ValueError, match=r"weight for out_proj.weight has shape \[3, 3\], expected \[24, 24\]"
    ):
        from_simple_gla({**weights, "o_proj.weight": torch.zeros(3, 3)})
    with pytest.raises(
        ValueError, match="source: 4 gates do not fit 24 query, 23 key and 24 output channels"
    ):
        from_simple_gla({**weights, "k_proj.weight": torch.zeros(23, D)})
    with pytest.raises(ValueError, match=r"q_conv1d.weight has shape \[24, 4\], expected \[E, 1"):
        from_simple_gla({**weights, "q_conv1d.weight": torch.zeros(24, 4)})
    with pytest.raises(ValueError, match=r"convolutions of one size, got \[3, 4, 4\]"):
        from_simple_gla({**weights, "q_conv1d.weight": torch.zeros(24, 1, 3)})
    with pytest.raises(ValueError, match="feature_map: expected one of relu, .* got 'elu'"):
        from_simple_gla(weights, feature_map="elu")
    with pytest.raises(ValueError, match="gate_fn: expected one of relu, .* got 'tanh'"):
        SimpleGatedLinearAttention(D, gate_fn="tanh")
    with pytest.raises(ValueError, match="divisor: expected a finite number above 0, got 0"):
        from_simple_gla(weights, gate_logit_normalizer=0)
    with pytest.raises(ValueError, match="num_kv_heads: the 3 key/value heads must divide the 4"):
        SimpleGatedLinearAttention(D, num_kv_heads=3)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sqrelu", lambda x: torch.where(x > 0, x * x, 0)),
        ("swish", lambda x: x / (1 + (-x).exp())),
        ("gelu", lambda x: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))),
        ("logsigmoid", lambda x: -(1 + (-x).exp()).log()),
    ],
)
def test_activations_by_name(name, formula):
    """Names of the package are its functions; a module with any of them can be pickled."""
    torch.manual_seed(0)
    original = Theirs(feature_map=formula, gate_fn=formula).double()
    ours = from_simple_gla(original.state_dict(), feature_map=name, gate_fn=name)
    x = draw()
    assert torch.allclose(ours(x), original(x)[0], atol=1e-12)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
