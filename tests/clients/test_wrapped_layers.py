"""A user's own module in place of a linear layer, as adapters and quantizers put it there."""

import pytest
import torch
from torch import nn

from .common import PEERS, build, tokens


class Scaled(nn.Module):
    """Wraps a layer, and has none of its attributes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 1.2 * self.layer(x)


@pytest.mark.parametrize("kind", PEERS)
def test_decoding_through_wrapped_layers(kind):
    """Wrappers of linear layers take effect, and decoding agrees with and without a cache."""
    model, ids = build(kind), tokens(1, 7)
    before = model(ids).logits
    linear = [name for name, m in model.model.named_modules() if type(m) is nn.Linear]
    for name in linear:
        model.model.set_submodule(name, Scaled(model.model.get_submodule(name)))
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, **options, use_cache=False)
    )
