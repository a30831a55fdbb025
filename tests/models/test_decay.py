"""Decays in the language model: presets, initial weights, options, files, refusals.

Presets with gates are among `PRESETS`, over which the other tests of models and clients run.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import DynamicCache

from cumulant import nn
from cumulant.models import (
    PRESETS,
    CumulantConfig,
    CumulantForCausalLM,
    CumulantForMaskedLM,
    TaylorViT,
    from_preset,
)
from cumulant.text.trainer import LanguageModelTrainer

from .common import build, tokens

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
GATED = [name for name in PRESETS if name.startswith("gated_")]
# options besides those of presets
OPTIONS = {
    "fixed": {"decay": "fixed"},
    "spans": {"decay": "fixed", "decay_spans": [2, 8.5, 60, math.inf]},
    "divided": {"decay": "gated", "decay_divisor": 16.0},
    "log-spaced": {"decay": "gated", "decay_spans": [16, 161, 1625, 16384]},
    "mamba2": {"decay": "mamba2"},
}


def mixers(model):
    return [block.mixer for block in model.model.layers]


def decays_of(model):
    return [m.decay for m in mixers(model) if getattr(m, "decay", None) is not None]


def at_the_start(**options):
    """A model as training begins with it."""
    torch.manual_seed(0)
    return CumulantForCausalLM(from_preset("taylor", **SIZES, **options))


def test_presets_with_gates():
    """They are the ungated presets with gates in each linear and Taylor mixer."""
    assert GATED == ["gated_linear", "gated_taylor", "gated_based"]
    for name in GATED:
        plain = name.removeprefix("gated_")
        assert PRESETS[name] == {**PRESETS[plain], "decay": "gated"}
        model = CumulantForCausalLM(from_preset(name, **SIZES))
        for mixer in mixers(model):
            kernel = isinstance(mixer, nn.LinearAttention | nn.TaylorAttention)
            assert kernel == isinstance(getattr(mixer, "decay", None), nn.GatedDecay)
    assert not decays_of(CumulantForCausalLM(from_preset("based", **SIZES)))


@pytest.mark.parametrize("name", GATED)
def test_gates_start_near_one(name):
    """The initial weights of the model are not those of a projection."""
    for decay in decays_of(CumulantForCausalLM(from_preset(name, **SIZES))):
        assert not decay.weight.any()
        torch.testing.assert_close(decay.bias.sigmoid(), torch.full((4,), 0.999))


def test_options_reach_the_mixers():
    x = torch.randn(1, 3, 32)
    for name, options in OPTIONS.items():
        model = at_the_start(num_key_value_heads=4, **options)
        kinds = {"fixed": nn.FixedDecay, "gated": nn.GatedDecay, "mamba2": nn.Mamba2Decay}
        assert [type(d) for d in decays_of(model)] == [kinds[options["decay"]]] * 3
        spans = options.get("decay_spans")
        for decay in decays_of(model):
            assert decay.spans == (None if spans is None else tuple(spans)), name
            if spans is not None:
                torch.testing.assert_close(decay(x)[0, :, 0], -1 / torch.tensor(spans))
            assert getattr(decay, "divisor", 1.0) == options.get("decay_divisor", 1.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_the_whole_and_generate(name):
    model = build("taylor", mixers=["linear", "taylor"], **OPTIONS[name])
    ids = tokens(2, 20)
    whole = model(ids).logits
    cache, outs = DynamicCache(config=model.config), []
    for piece in ids.split([7, 1, 1, 1, 10], 1):
        outs.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-8, atol=1e-8)
    model.float()
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    for t in range(20, 26):
        assert torch.equal(out[:, t], model(out[:, :t]).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("name", OPTIONS)
def test_folders(name, tmp_path):
    """Weights, spans (infinite ones too) and divisors come back, in bf16 as well."""
    model = build("taylor", **OPTIONS[name]).float()
    model.save_pretrained(tmp_path)
    again = CumulantForCausalLM.from_pretrained(tmp_path)
    assert again.config.decay_spans == model.config.decay_spans
    ids = tokens(1, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)
    low = CumulantForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    x = torch.randn(1, 5, 32)
    for decay, exact in zip(decays_of(low), decays_of(model), strict=True):
        assert decay(x.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(decay(x.bfloat16()), exact(x), rtol=0.1, atol=0)


def test_gates_that_a_file_lacks_are_as_new(tmp_path):
    """A model without gates is loaded with them: they start as in a new model."""
    plain = build("taylor").float()
    plain.save_pretrained(tmp_path)
    gated = CumulantForCausalLM.from_pretrained(tmp_path, decay="gated")
    for decay in decays_of(gated):
        assert not decay.weight.any()
        torch.testing.assert_close(decay.bias.sigmoid(), torch.full((4,), 0.999))
    ids = tokens(1, 12)
    torch.testing.assert_close(gated(ids).logits, plain(ids).logits, rtol=0.1, atol=0.05)
    assert not torch.equal(gated(ids).logits, plain(ids).logits)


def test_folders_without_the_fields(tmp_path):
    model = build("taylor").float()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for name in ("decay", "decay_spans", "decay_divisor"):
        del fields[name]
    file.write_text(json.dumps(fields))
    again = CumulantForCausalLM.from_pretrained(tmp_path)
    assert again.config.decay == "none"
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize("name", ["gated", "mamba2"])
def test_a_step_of_training_changes_gates(name):
    model = at_the_start(decay=name).train()
    before = [{n: p.detach().clone() for n, p in d.named_parameters()} for d in decays_of(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    ids = tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for decay, old in zip(decays_of(model), before, strict=True):
        for weight, value in decay.named_parameters():
            assert (value != old[weight]).all()


@pytest.mark.parametrize("name", ["gated", "mamba2"])
def test_weight_decay_does_not_shorten_spans(name):
    """Trainer leaves the biases of gates alone: at 0 they would forget in a token or two."""
    trainer = LanguageModelTrainer.__new__(LanguageModelTrainer)
    decayed = trainer.get_decay_parameter_names(at_the_start(decay=name))
    assert "model.layers.0.mixer.decay.weight" in decayed
    assert not [n for n in decayed if n.endswith(("decay.bias", "decay.dt_bias", "decay.A_log"))]


def test_errors():
    with pytest.raises(
        ValueError, match="decay: expected one of none, fixed, gated, mamba2, got 'gate'"
    ):
        CumulantConfig(decay="gate")
    with pytest.raises(ValueError, match="decay: 'gated' needs a linear or Taylor mixer, got mix"):
        CumulantConfig(decay="gated", mixers=["softmax"])
    with pytest.raises(ValueError, match="decay: expected str, got True"):
        CumulantConfig(decay=True)
    with pytest.raises(
        ValueError, match="decay_spans: expected 4 numbers, one for each key/value head, got 2"
    ):
        CumulantConfig(decay="fixed", decay_spans=(8, 64))
    assert CumulantConfig(decay="fixed", num_key_value_heads=2, decay_spans=(8, 64)).decay_spans
    with pytest.raises(ValueError, match=r"decay_spans: expected list\[float\] \| None, got '64'"):
        CumulantConfig(decay="fixed", decay_spans="64")
    for bad in (0, math.nan, "a", None):
        with pytest.raises(
            ValueError, match=f"decay_spans: expected numbers of tokens above 0, got .*{bad}"
        ):
            CumulantConfig(decay="gated", decay_spans=[1, 2, 3, bad])
    with pytest.raises(ValueError, match="decay_spans: gates start at finite spans"):
        CumulantConfig(decay="mamba2", decay_spans=[1, 2, 3, math.inf])
    with pytest.raises(ValueError, match="decay_spans: needs a decay, 'fixed', 'gated'"):
        CumulantConfig(decay_spans=[1, 2, 3, 4])
    for bad in (0, -1.0, math.inf):
        with pytest.raises(
            ValueError, match=f"decay_divisor: expected a finite number above 0, got {bad}"
        ):
            CumulantConfig(decay="gated", decay_divisor=bad)
    with pytest.raises(
        ValueError, match="decay_divisor: needs decay='gated', got 16 with decay='fixed'"
    ):
        CumulantConfig(decay="fixed", decay_divisor=16)
    with pytest.raises(ValueError, match="decay: feature_map 'softmax' divides by sums over keys"):
        CumulantConfig(mixers=["linear"], feature_map="softmax", decay="gated")


def test_models_that_see_later_tokens_have_no_decay():
    for name in GATED[:2]:
        with pytest.raises(
            ValueError, match="decay: 'gated' looks backwards only; an encoder .is_causal=False."
        ):
            CumulantForMaskedLM(from_preset(name, is_causal=False, **SIZES))
    with pytest.raises(ValueError, match="mixers: short_convolution looks backwards only"):
        from_preset("gated_based", is_causal=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'decay'"):
        TaylorViT(16, 4, decay="gated")
