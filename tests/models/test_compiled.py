"""Whole models compiled for any length, and traced."""

import warnings

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from cumulant.models import PRESETS, CumulantForCausalLM, from_preset

from ..quick import slow_but

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
LENGTHS = (33, 48, 95, 130)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(preset):
    torch.manual_seed(0)
    return CumulantForCausalLM(from_preset(preset, **SIZES)).eval()


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "padding"])
@pytest.mark.parametrize("preset", slow_but(("based", "flash", "elita", "gated_taylor"), PRESETS))
def test_one_graph_for_all_lengths(preset, masked):
    model, counter = build(preset), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    for T in LENGTHS:
        ids = torch.randint(96, (2, T))
        mask = None
        if masked:
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
        with torch.no_grad():
            logits = compiled(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(
                logits, model(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4
            )
    assert counter.frame_count == 1


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("preset", PRESETS)
def test_traced_models(preset):
    model = build(preset)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # lengths are constants of a trace
        traced = torch.jit.trace(Logits(model), torch.randint(96, (2, 40)), check_trace=False)
        ids = torch.randint(96, (2, 40))
        torch.testing.assert_close(traced(ids), model(ids).logits, rtol=1e-4, atol=1e-4)
