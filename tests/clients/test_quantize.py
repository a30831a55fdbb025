"""Quantised models are smaller, their logits stay near, and they generate, as a tiny Llama does."""

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from cumulant.models import PRESETS, CumulantForCausalLM, from_preset

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**SIZES, intermediate_size=128, tie_word_embeddings=True)
        ).eval()
    return CumulantForCausalLM(from_preset(name, **SIZES)).eval()


def linear_bytes(model):
    """Of the weights of the layers that were linear, the head aside."""
    found = 0
    for name, module in model.named_modules():
        if not name.endswith(("_proj", "in_proj")):
            continue
        for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            found += (
                value.untyped_storage().nbytes() if type(value) is nn.Parameter else value.nbytes
            )
    return found


def check(original, quantised, tolerance):
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, near = original(ids).logits, quantised(ids).logits.float()
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < tolerance
    out = quantised.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 28)


NAMES = [*PRESETS, "llama"]


@pytest.mark.parametrize("name", NAMES)
def test_torch_dynamic_quantisation(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that torchao takes its place
        quantised = torch.ao.quantization.quantize_dynamic(
            build(name), {nn.Linear}, dtype=torch.qint8
        )
    layers = [m for n, m in quantised.named_modules() if n.endswith("_proj")]
    assert layers
    assert all(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in layers)
    check(build(name), quantised, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_torchao(name):
    torchao = pytest.importorskip("torchao.quantization")
    original, quantised = build(name), build(name)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    layers = [m for m in quantised.modules() if isinstance(m, nn.Linear)]
    assert all(type(m.weight) is not nn.Parameter for m in layers)
    check(original, quantised, 0.1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes(name, bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    original = build(name)
    original.save_pretrained(tmp_path)
    small = [
        "logit_proj",
        "factor_proj",
        "lm_head",
    ]  # on a CPU bitsandbytes packs four bits of 32 rows; these have fewer
    kept = {"llm_int8_skip_modules": small} if name == "elita" else {}
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **kept)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    layers = [
        m
        for n, m in quantised.named_modules()
        if n.endswith("_proj") and not n.endswith(("logit_proj", "factor_proj"))
    ]
    assert layers
    assert all(isinstance(m, kind) for m in layers)
    assert linear_bytes(quantised) < linear_bytes(original) / (3 if bits == 8 else 5)
    check(original, quantised, 0.1 if bits == 8 else 0.5)
