"""States under autocast have the same dtypes as without, and either kind can be carried on."""

from __future__ import annotations

import pytest
import torch

from cumulant import nn

LAYERS = {
    "linear": lambda: nn.LinearAttention(32, num_heads=2, conv_size=4),
    "taylor": lambda: nn.TaylorAttention(32, num_heads=2, head_dim=8, conv_size=3, rotary=True),
    "gated": lambda: nn.TaylorAttention(32, num_heads=2, head_dim=8, decay="gated"),
    "elita": lambda: nn.ElitaAttention(32, num_heads=2),
    "flash": lambda: nn.MixedChunkAttention(32, query_key_dim=8, group_size=8),
    "convolution": lambda: nn.GatedShortConvolution(32),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [1, 2, 19])
@pytest.mark.parametrize("masked", [False, True])
def test_states_keep_their_dtypes(name: str, length: int, masked: bool):
    layer = LAYERS[name]().eval()
    x = torch.randn(2, length, 32)
    mask = torch.rand(2, length) > 0.3 if masked else None
    with torch.no_grad():
        _, plain = layer(x, key_mask=mask, return_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            _, state = layer(x, key_mask=mask, return_state=True)
            _, later = layer(x, state=state, return_state=True)
    wanted = {k: v.dtype for k, v in plain.tensors().items()}
    assert {k: v.dtype for k, v in state.tensors().items()} == wanted
    assert {k: v.dtype for k, v in later.tensors().items()} == wanted
    with torch.no_grad():
        layer(
            x[:, :1], state=state, return_state=True
        )  # one token, without autocast, onto autocast's state
