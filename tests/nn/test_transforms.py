"""torch.func through modules: gradients of each sample, and tangents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from cumulant import nn
from cumulant.nn.norms import RMSNorm

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.LinearAttention(16, num_heads=2, conv_size=3, rotary=True),
    "linear, both directions": lambda: nn.LinearAttention(16, num_heads=2, is_causal=False),
    "taylor": lambda: nn.TaylorAttention(16, num_heads=2, num_kv_heads=1, head_dim=4),
    "gated": lambda: nn.TaylorAttention(16, num_heads=2, head_dim=4, decay="gated"),
    "mamba2": lambda: nn.LinearAttention(16, num_heads=2, conv_size=3, decay="mamba2"),
    "elita": lambda: nn.ElitaAttention(16, num_heads=2),
    "flash": lambda: nn.MixedChunkAttention(16, query_key_dim=4, group_size=4),
    "gau": lambda: nn.GatedAttentionUnit(16, query_key_dim=4),
    "softmax": lambda: nn.SoftmaxAttention(16, num_heads=2),
    "convolution": lambda: nn.GatedShortConvolution(16),
    "rms norm": lambda: RMSNorm(16),
    "sliding window": lambda: nn.SlidingWindowAttention(16, num_heads=2, window=4),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[torch.nn.Module, dict[str, Tensor], Tensor]:
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return (
        layer,
        {k: p.detach() for k, p in layer.named_parameters()},
        torch.randn(3, 9, 16, dtype=torch.float64),
    )


@by_layer
@pytest.mark.parametrize("masked", [False, True])
def test_per_sample_gradients(name: str, masked: bool):
    """A mapped call gives the gradients of every sample alone."""
    layer, parameters, x = made(name)
    if masked and name == "rms norm":
        pytest.skip("no mask")
    mask = torch.rand(3, 9) > 0.3
    mask[:, 0] = True

    def loss(parameters: dict[str, Tensor], row: Tensor, seen: Tensor) -> Tensor:
        options = {"key_mask": seen[None]} if masked else {}
        return functional_call(layer, parameters, (row[None],), options).sin().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, mask)
    for i in range(3):
        layer.zero_grad()
        own = {"key_mask": mask[i : i + 1]} if masked else {}
        layer(x[i : i + 1], **own).sin().sum().backward()
        for key, p in layer.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[key][i], p.grad, atol=1e-10, rtol=1e-10)


@by_layer
def test_tangents(name: str):
    """Finite differences give the same, for inputs and parameters."""
    layer, parameters, x = made(name)
    t, dp = torch.randn_like(x), {k: torch.randn_like(p) for k, p in parameters.items()}

    def run(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,))

    def moved(step: float) -> Tensor:
        return run(x + step * t, {k: p + step * dp[k] for k, p in parameters.items()})

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    found = jvp(run, (x, parameters), (t, dp))[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(p, dp[k]) for k, p in parameters.items()}
        out = forward_ad.unpack_dual(run(forward_ad.make_dual(x, t), duals)).tangent
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@by_layer
def test_hessians(name: str):
    layer, _, x = made(name)
    x, rest = x[:1, :3], x[:1, 3:5]

    def loss(x: Tensor) -> Tensor:
        return layer(torch.cat((x, rest), 1)).sin().sum()

    found = hessian(loss)(x).reshape(48, 48)
    step = torch.eye(48, dtype=x.dtype).view(48, *x.shape) * 1e-5
    slopes = [(grad(loss)(x + s) - grad(loss)(x - s)).flatten() / 2e-5 for s in step[::7]]
    torch.testing.assert_close(found[::7], torch.stack(slopes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "taylor", "convolution"])
def test_tangents_of_one_token(name: str):
    """Programs compute no tangents, so a call with tangents takes the ordinary path."""
    layer = LAYERS[name]().eval()
    x = torch.randn(1, 6, 16)
    with torch.no_grad(), forward_ad.dual_level():
        _, state = layer(x, return_state=True)
        weight = next(p for p in layer.parameters() if p.dim() == 2)
        parameters = dict(layer.named_parameters())
        key = next(k for k, p in parameters.items() if p is weight)
        parameters[key] = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
        out, _ = functional_call(
            layer, parameters, (x[:, :1],), {"state": state, "return_state": True}
        )
        assert forward_ad.unpack_dual(out).tangent.any()
