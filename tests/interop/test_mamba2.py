"""Weights of Mamba-2's mixer give the numbers of its formula, and of transformers' module.

mamba-ssm needs a GPU. The stand-ins have its parameters and attributes, and compute its layer one
token at a time in float64. transformers' mixer runs on the CPU, in fp32 inside.
"""

import pytest
import torch
from torch.nn import functional as F

from cumulant import nn
from cumulant.interop import Mamba2Mixer, from_mamba2, from_ssm_state, to_ssm_state

D = 20
LAYERS = {
    "default": {},
    "groups": {"groups": 2},
    "biases": {"bias": True, "conv_bias": False, "taps": 3},
    "norm first": {"norm_before_gate": True, "groups": 2, "eps": 0.1},
    "no norm": {"rmsnorm": False},
    "a skip for each channel": {"skip": 6, "limit": (0.3, 0.8)},
}


class Norm(torch.nn.Module):
    """Of parts of `group_size` channels (all, if None), before or after the gate."""

    def __init__(self, size, eps, group_size, before):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size) + 0.5)
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, before

    def forward(self, y, z, size):
        gate = z / (1 + (-z).exp())
        y = y if self.norm_before_gate else y * gate
        parts = [
            part / (part.square().mean(-1, keepdim=True) + self.eps).sqrt()
            for part in y.split(size, -1)
        ]
        y = torch.cat(parts, -1) * self.weight
        return y * gate if self.norm_before_gate else y


class Mamba2(torch.nn.Module):
    """4 heads of 6 channels; B and C of 5."""

    activation = "silu"
    heads, channels, states = 4, 6, 5

    def __init__(
        self,
        *,
        groups=1,
        bias=False,
        conv_bias=True,
        taps=4,
        skip=1,
        rmsnorm=True,
        norm_before_gate=False,
        eps=1e-5,
        limit=(0.0, float("inf")),
    ):
        super().__init__()
        H, inner, mixed = self.heads, 24, 24 + 2 * groups * self.states
        self.ngroups, self.dt_limit = groups, limit
        self.in_proj = torch.nn.Linear(D, inner + mixed + H, bias=bias)
        self.conv1d = torch.nn.Conv1d(mixed, mixed, taps, groups=mixed, bias=conv_bias)
        self.dt_bias = torch.nn.Parameter(torch.randn(H))
        self.A_log = torch.nn.Parameter(torch.randn(H))
        self.D = torch.nn.Parameter(torch.randn(H * skip))
        if rmsnorm:
            self.norm = Norm(inner, eps, inner // groups, norm_before_gate)
        self.out_proj = torch.nn.Linear(inner, D, bias=bias)

    def forward(self, u):
        """Outputs, and the last matrices [B, H, P, N]."""
        H, P, N, G = self.heads, self.channels, self.states, self.ngroups
        h, past, outputs = u.new_zeros(u.shape[0], H, P, N), [], []
        taps = self.conv1d.kernel_size[0]
        for t in range(u.shape[1]):
            z, xBC, dt = self.in_proj(u[:, t]).split([H * P, H * P + 2 * G * N, H], -1)
            past.append(xBC)
            mixed = sum(
                self.conv1d.weight[:, 0, taps - 1 - j] * x for j, x in enumerate(past[::-1][:taps])
            )
            mixed = F.silu(mixed if self.conv1d.bias is None else mixed + self.conv1d.bias)
            x, B, C = mixed.split([H * P, G * N, G * N], -1)
            dt = (1 + (dt + self.dt_bias).exp()).log().clamp(*self.dt_limit)
            matrices, rows = [], []
            for i in range(H):
                g, now = i * G // H, x[:, i * P : (i + 1) * P]
                b, c = B[:, g * N : (g + 1) * N], C[:, g * N : (g + 1) * N]
                kept = (-dt[:, i] * self.A_log[i].exp()).exp()[:, None, None] * h[:, i]
                matrices.append(kept + dt[:, i, None, None] * now[:, :, None] * b[:, None])
                skip = self.D.view(H, -1)[i] * now
                rows.append((matrices[-1] * c[:, None]).sum(-1) + skip)
            h, y = torch.stack(matrices, 1), torch.cat(rows, -1)
            y = self.norm(y, z, H * P // G) if hasattr(self, "norm") else y * F.silu(z)
            outputs.append(self.out_proj(y))
        return torch.stack(outputs, 1), h


def layer(name="default"):
    torch.manual_seed(0)
    return Mamba2(**LAYERS[name]).double()


def draw(length=19):
    return torch.randn(2, length, D, dtype=torch.float64)


def options(name):
    """What the weights do not tell."""
    given = LAYERS[name]
    return {
        "ngroups": given.get("groups", 1),
        "norm_eps": given.get("eps"),
        "norm_before_gate": given.get("norm_before_gate"),
        "dt_limit": given.get("limit"),
    }


def gradients(y, inputs):
    return torch.autograd.grad((y * y.detach().cos()).sum(), inputs)


by_layer = pytest.mark.parametrize("name", LAYERS)


@by_layer
@pytest.mark.parametrize("as_weights", [False, True], ids=["layer", "weights"])
def test_it_is_the_layer(name, as_weights):
    """Outputs, the last state, and the gradients of the input and of all weights."""
    original = layer(name)
    ours = (
        from_mamba2(original.state_dict(), **options(name)) if as_weights else from_mamba2(original)
    )
    x = draw().requires_grad_()
    expected, h = original(x)
    y, state = ours(x, return_state=True)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(to_ssm_state(state.sums), h, atol=1e-12)
    found = gradients(y, (x, *ours.parameters()))
    exact = gradients(expected, (x, *original.parameters()))
    assert torch.allclose(found[0], exact[0], rtol=1e-9, atol=1e-10)
    # gradients have the shapes of the weights, and move between the two layers as they do
    names = [n for n, _ in original.named_parameters()]
    moved = from_mamba2(dict(zip(names, exact[1:], strict=True)), **options(name)).state_dict()
    for (key, _), gradient in zip(ours.named_parameters(), found[1:], strict=True):
        assert torch.allclose(gradient, moved.pop(key), rtol=1e-9, atol=1e-10), key
    assert not moved


@by_layer
@pytest.mark.parametrize("cuts", [[1] * 19, [7, 1, 11], [2, 17]], ids=str)
def test_any_split_is_the_layer(name, cuts):
    original = layer(name)
    ours, x = from_mamba2(original), draw()
    state, outs = None, []
    for piece in x.split(cuts, 1):
        y, state = ours(piece, state=state, return_state=True)
        outs.append(y)
    expected, h = original(x)
    assert torch.allclose(torch.cat(outs, 1), expected, atol=1e-12)
    assert torch.allclose(to_ssm_state(state.sums), h, atol=1e-12)


def test_padding_and_packing():
    """Each row is the layer on its tokens alone, though the convolution has a bias."""
    original = layer("groups")
    ours, x = from_mamba2(original), draw()
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :5], mask[1, 9:12] = False, False
    y, packed = ours(x, key_mask=mask), ours(x[:1], cu_seqlens=torch.tensor([0, 4, 19]))
    for b in range(2):
        alone = original(x[b : b + 1, mask[b]])[0][0]
        assert torch.allclose(y[b][mask[b]], alone, atol=1e-12)
    separate = torch.cat((original(x[:1, :4])[0], original(x[:1, 4:])[0]), 1)
    assert torch.allclose(packed, separate, atol=1e-12)


def test_a_norm_without_groups():
    """A `Mamba2Simple` has groups in its norm on its fused path only."""
    original = layer("groups")
    original.norm.group_size, x = None, draw()
    original.use_mem_eff_path = True
    fused = original(x)[0]
    assert torch.allclose(from_mamba2(original)(x), fused, atol=1e-12)
    original.use_mem_eff_path = False
    whole = from_mamba2(original)(x)
    assert not torch.allclose(whole, fused, atol=1e-3)
    original.norm.forward = lambda y, z, size: Norm.forward(original.norm, y, z, 24)
    assert torch.allclose(whole, original(x)[0], atol=1e-12)
    same = from_mamba2(original.state_dict(), ngroups=2, norm_groups=1)
    assert torch.equal(same(x), whole)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_low_precision(autocast):
    original = layer()
    x = draw(60)
    expected, ours = original(x)[0].detach(), from_mamba2(original)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            y = ours.float()(x.float())
    else:
        y = ours.bfloat16()(x.bfloat16())
    assert float((y.detach().double() - expected).norm() / expected.norm()) < 0.02


@pytest.fixture(params=[1, 2])
def published(request):
    """transformers' mixer, for as many groups."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Published

    config = transformers.Mamba2Config(
        hidden_size=D,
        num_heads=4,
        head_dim=10,
        expand=2,
        state_size=5,
        n_groups=request.param,
        num_hidden_layers=1,
        chunk_size=8,
    )
    torch.manual_seed(0)
    mixer = Published(config, layer_idx=0).eval()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def test_transformers(published):
    """On any length and for gradients, as a module and from its weights."""
    ours = from_mamba2(published)
    assert not ours.training
    same = from_mamba2(published.state_dict(), ngroups=published.n_groups)
    for length in (1, 8, 43):
        x = torch.randn(2, length, D, requires_grad=True)
        expected, y = published(x), ours(x)
        assert torch.allclose(y, expected, atol=1e-5)
        assert torch.equal(same(x), y)
        found, exact = gradients(y, x)[0], gradients(expected, x)[0]
        assert torch.allclose(found, exact, rtol=1e-3, atol=1e-5)


def test_masks_of_transformers(published):
    """Padding on the left agrees; between tokens, theirs decays the sums and fills a tap."""
    ours, x = from_mamba2(published), torch.randn(2, 19, D)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :7] = False
    y, expected = ours(x, key_mask=mask), published(x, attention_mask=mask.long())
    assert torch.allclose(y[mask], expected[mask], atol=1e-5)
    mask[1, 4:9] = False
    y, expected = ours(x, key_mask=mask), published(x, attention_mask=mask.long())
    assert torch.allclose(y[1][mask[1]], published(x[1:, mask[1]])[0], atol=1e-5)
    assert not torch.allclose(y[1, 9:], expected[1, 9:], atol=1e-2)


def test_a_generation_of_transformers_is_continued(published):
    """Its cache holds the last inputs of the convolution, and matrices [B, H, P, N]."""
    from transformers import DynamicCache, Mamba2Config

    x = torch.randn(2, 19, D)
    cache = DynamicCache(config=Mamba2Config(num_hidden_layers=1))
    published(x[:, :11], cache_params=cache)
    conv, ssm = cache.get_conv_state(0, state_idx=0), cache.get_recurrent_state(0, state_idx=0)
    state = nn.KernelAttentionState(
        from_ssm_state(ssm, torch.tensor([11, 11])), None, conv[..., -3:].mT
    )
    ours = from_mamba2(published)
    y, state = ours(x[:, 11:], state=state, return_state=True)
    assert torch.allclose(y, published(x)[:, 11:], atol=1e-5)
    assert state.position.tolist() == [19, 19]


def test_errors():
    original = layer("groups")
    weights = original.state_dict()
    with pytest.raises(ValueError, match="ngroups: the weights do not tell it; give ngroups=..."):
        from_mamba2(weights)
    with pytest.raises(ValueError, match="ngroups: read off the layer; give it only with a state"):
        from_mamba2(original, ngroups=2)
    with pytest.raises(ValueError, match="ngroups: 3 must divide the 10 channels of B and the 4"):
        from_mamba2(weights, ngroups=3)
    with pytest.raises(ValueError, match="ngroups: expected at least 1, got 0"):
        from_mamba2(weights, ngroups=0)
    with pytest.raises(TypeError, match="source: expected a Mamba-2 mixer of mamba-ssm or trans"):
        from_mamba2(torch.nn.Linear(2, 2))
    for name in weights:
        if name.endswith("bias") and name != "dt_bias":
            continue  # the layer may have none
        if name != "norm.weight":
            with pytest.raises(ValueError, match=f"source: '{name}' is missing"):
                from_mamba2({n: w for n, w in weights.items() if n != name}, ngroups=2)
    with pytest.raises(ValueError, match="source: 'init_states' has no place in Mamba2Mixer"):
        from_mamba2({**weights, "init_states": torch.zeros(4, 6, 5)}, ngroups=2)
    with pytest.raises(
        ValueError, match=r"in_proj with 90 rows does not fit 24 output channels, 44 .* and 4 heads"
    ):
        from_mamba2({**weights, "in_proj.weight": torch.zeros(90, D)}, ngroups=2)
    with pytest.raises(ValueError, match=r"weight for A_log has shape \[3\], expected \[4\]"):
        from_mamba2({**weights, "A_log": torch.zeros(3)}, ngroups=2)
    with pytest.raises(ValueError, match=r"weight for D has shape \[5\], expected \[24\]"):
        from_mamba2({**weights, "D": torch.zeros(5)}, ngroups=2)
    original.activation = "relu"
    with pytest.raises(ValueError, match="source: its activation 'relu' has no counterpart"):
        from_mamba2(original)
    for wrong, message in (
        ({"num_groups": 3}, "num_groups: 3 must divide the 4 heads"),
        ({"norm_groups": 3, "head_dim": 5}, "norm_groups: 3 must divide the 20 channels"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit: expected 0 <= least <= greatest, got"),
        ({"head_dim": 0}, "head_dim: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Mamba2Mixer(D, num_heads=4, **wrong)
