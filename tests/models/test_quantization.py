"""Models of 8 and 4 bits: saved, loaded, stepped, refused for training."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from cumulant.models import (
    PRESETS,
    CumulantForCausalLM,
    CumulantForMaskedLM,
    QuantizationConfig,
    from_preset,
    quantize,
)
from cumulant.nn import QuantizedEmbedding, QuantizedLinear

BITS = (8, 4)


def build(preset, **fields):
    torch.manual_seed(0)
    options = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 90,
        "num_attention_heads": 4,
    }
    return CumulantForCausalLM(from_preset(preset, **options | fields)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


IDS = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("preset", PRESETS)
def test_whole_steps_and_file_agree(preset, bits, tmp_path):
    model = build(preset)
    exact = logits(model, IDS)
    assert quantize(model, bits) is model
    whole = logits(model, IDS)
    assert (whole - exact).norm() < (0.03 if bits == 8 else 0.4) * exact.norm()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, IDS), whole)
    assert loaded.is_quantized
    assert loaded.config.quantization_config.bits == bits
    cache, outs = DynamicCache(config=loaded.config), []
    with torch.no_grad():
        for piece in (IDS[:, :12], *IDS[:, 12:].split(1, 1)):
            outs.append(loaded(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_quantised_and_share_codes_if_tied(tied, tmp_path):
    model = quantize(build("taylor", tie_word_embeddings=tied), 4)
    model.save_pretrained(tmp_path)
    for found in (model, CumulantForCausalLM.from_pretrained(tmp_path)):
        head, embedding = found.lm_head, found.get_input_embeddings()
        assert isinstance(head, QuantizedLinear)
        assert isinstance(embedding, QuantizedEmbedding)
        assert (head.weight is embedding.weight) == tied
        assert (head.scales is embedding.scales) == tied


@pytest.mark.parametrize("bits", BITS)
def test_a_folder_is_quantised_while_it_is_loaded(bits, tmp_path):
    model = build("gated_taylor")
    model.save_pretrained(tmp_path)
    found = CumulantForCausalLM.from_pretrained(
        tmp_path, quantization_config=QuantizationConfig(bits)
    )
    assert torch.equal(logits(found, IDS), logits(quantize(model, bits), IDS))
    assert found.config.quantization_config.original == str(tmp_path)
    again = tmp_path / "again"
    found.save_pretrained(again)
    assert torch.equal(logits(CumulantForCausalLM.from_pretrained(again), IDS), logits(found, IDS))


def test_files_shrink_as_promised(tmp_path):
    """8.5 and 4.5 bits a weight, where rows are whole groups."""
    sizes = {}
    for bits in (32, *BITS):
        model = build("taylor", hidden_size=256, intermediate_size=512, vocab_size=2000)
        model = model if bits == 32 else quantize(model, bits)
        model.save_pretrained(tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    assert sizes[8] < sizes[32] * 0.28
    assert sizes[4] < sizes[32] * 0.155


def test_small_parts_stay_as_they_are():
    """Decays, heads' gates and ELiTA's logits have few rows, and convolutions and norms none."""
    model = quantize(build("gated_linear", gate_values=True), 4)
    left = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    parts = ("norm", "conv", "decay", "gate_proj", "scales")
    assert all(any(part in name for part in parts) for name in left)
    assert any("decay" in name for name in left)
    assert any("gate_proj" in name for name in left)


def test_fp32_stays_whatever_is_asked_for(tmp_path):
    quantize(build("taylor"), 8).save_pretrained(tmp_path)
    model = CumulantForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}


def test_encoders_too(tmp_path):
    config = from_preset("linear", hidden_size=64, num_hidden_layers=2, vocab_size=90, conv_size=0,
                         is_causal=False)  # fmt: skip
    model = quantize(CumulantForMaskedLM(config).eval(), 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(CumulantForMaskedLM.from_pretrained(tmp_path), IDS), logits(model, IDS)
    )


def test_training_names_what_to_train_instead(tmp_path):
    build("taylor").save_pretrained(tmp_path / "run")
    model = quantize(CumulantForCausalLM.from_pretrained(tmp_path / "run"), 4)
    what = f"weights of 4 bits cannot be trained; train the original, {tmp_path / 'run'},"
    with pytest.raises(ValueError) as caught:
        model.train()(input_ids=IDS, labels=IDS)
    assert what in str(caught.value)
    options = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    with pytest.raises(ValueError) as caught:
        Trainer(model, options, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}])
    assert what in str(caught.value)
    model.save_pretrained(tmp_path / "small")
    found = CumulantForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(ValueError) as caught:
        found.train()(input_ids=IDS)
    assert what in str(caught.value)
    with torch.no_grad():
        found(input_ids=IDS)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 2"):
        quantize(build("taylor"), 2)
    with pytest.raises(TypeError, match="bit"):
        QuantizationConfig(bit=4)
    model = quantize(build("taylor"), 8)
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, 4)
    broken = build("taylor")
    with torch.no_grad():
        broken.model.layers[1].mixer.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mixer\.q_proj\.weight: holds NaN"):
        quantize(broken, 8)
    assert not any(isinstance(part, QuantizedLinear) for part in broken.modules())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 5"):
        CumulantForCausalLM.from_pretrained(tmp_path)
