"""A step sees changes of ELiTA's settings, and of the modules around a model's blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.models.feed_forward import LogitFeedForward

from .stepping import build, start


def set_place(mixer, **values):
    for name, value in values.items():
        setattr(mixer.position, name, value)


SETTINGS = {
    "horizon": lambda m: set_place(m, horizon=3),
    "an array's horizon": lambda m: set_place(m, horizon=np.float64(3.0)),
    "time": lambda m: set_place(m, time=9.0),
    "clip": lambda m: setattr(m, "clip", 0.3),
    "positions": lambda m: nn.init.normal_(m.position.a2),
}


@pytest.mark.parametrize("first", ["nothing", "an array's horizon"])
@pytest.mark.parametrize("change", SETTINGS)
def test_settings_of_elita(change, first, runs):
    mixer, x = build("elita"), torch.randn(2, 6, 24)
    SETTINGS.get(first, lambda _: None)(mixer)
    with torch.no_grad():
        mixer(x[:, 4:5], state=start(mixer, x[:, :4]), return_state=True)
        SETTINGS[change](mixer)
        y = mixer(x[:, 4:5], state=start(mixer, x[:, :4]), return_state=True)[0]
        torch.testing.assert_close(y[:, 0], mixer(x)[:, 4], rtol=1e-4, atol=1e-5)
    assert len(runs) == 2


@pytest.mark.parametrize("horizon", [0, -5.0, float("inf")])
def test_a_wrong_horizon_is_named(horizon):
    mixer, x = build("elita"), torch.randn(2, 6, 24)
    state = start(mixer, x[:, :4])
    mixer.position.horizon = horizon
    with torch.no_grad(), pytest.raises(ValueError, match="horizon: expected a number"):
        mixer(x[:, 4:5], state=state, return_state=True)


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module


def swap_layers(model):
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]


CHANGES = {
    "a logit feed-forward": lambda m: setattr(m, "logit_ffn", randomised(LogitFeedForward(50, 7))),
    "no logit feed-forward": lambda m: setattr(m, "logit_ffn", None),
    "another head": lambda m: setattr(m, "lm_head", nn.Linear(32, 50, bias=False)),
    "another norm": lambda m: setattr(m.model, "norm", randomised(nn.LayerNorm(32))),
    "swapped layers": swap_layers,
    "another list of layers": lambda m: setattr(
        m.model, "layers", nn.ModuleList(reversed(list(m.model.layers)))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_of_a_model(change, runs):
    """The modules before the change live on, as someone may hold them."""
    torch.manual_seed(0)
    config = from_preset(
        "elita", vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        logit_ffn=7 if change.startswith("no ") else None,
    )  # fmt: skip
    model = randomised(CumulantForCausalLM(config).eval())
    ids, held = torch.randint(50, (2, 6)), list(model.modules())
    with torch.inference_mode():
        for changed in (False, True):
            if changed:
                CHANGES[change](model)
            cache = DynamicCache(config=config)
            model(input_ids=ids[:, :5], past_key_values=cache)
            found = model(input_ids=ids[:, 5:], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(
                found, model(input_ids=ids).logits[:, 5], rtol=1e-4, atol=1e-4
            )
    assert len(held) > 10
    assert len(runs) == 2
