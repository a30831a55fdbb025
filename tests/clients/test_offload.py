"""accelerate loads weights when their module is called, and logits and tokens stay the same."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cumulant.models import PRESETS, CumulantForCausalLM, CumulantForMaskedLM, from_preset

accelerate = pytest.importorskip("accelerate")
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EVERYTHING = {
    "mixers": ["linear", "gau", "taylor", "short_convolution"],
    **{
        "feature_map": "hedgehog",
        "conv_size": 3,
        "gate_values": True,
        "token_shift": True,
        "qk_norm": True,
    },
    **{"wraps": 2, "logit_ffn": 16, "position_embedding": "scaled_sinusoidal", "logits_bias": True},
}
VARIANTS = {
    **{name: (name, {}) for name in PRESETS},
    "everything": ("linear", EVERYTHING),
    "ReBased": (
        "linear",
        {"feature_map": "rebased", "norm": "scalenorm", "final_norm": "layernorm"},
    ),
}


def build(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)).eval()
    preset, options = VARIANTS[name]
    return CumulantForCausalLM(from_preset(preset, **SIZES, **options)).eval()


def offload(model, how, folder):
    cpu = torch.device("cpu")
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=cpu)
    return accelerate.disk_offload(model, folder, execution_device=cpu)


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("name", [*VARIANTS, "llama"])
def test_offloaded_models(name, how, tmp_path):
    model = build(name)
    ids = torch.randint(90, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    exact = model(ids, attention_mask=mask).logits
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, **options)
    away = offload(copy.deepcopy(model), how, tmp_path / "weights")
    assert any(p.is_meta for p in away.parameters())
    torch.testing.assert_close(away(ids, attention_mask=mask).logits, exact)
    assert torch.equal(away.generate(ids, **options), tokens)


@pytest.mark.parametrize("preset", ["softmax", "linear", "taylor", "flash"])
def test_offloaded_encoders(preset, tmp_path):
    torch.manual_seed(0)
    options = (
        {"is_causal": False, "conv_size": 0, "token_shift": False}
        if preset != "flash"
        else {"is_causal": False}
    )
    model = CumulantForMaskedLM(from_preset(preset, **SIZES, **options)).eval()
    ids = torch.randint(90, (2, 20))
    exact = model(ids).logits
    away = offload(copy.deepcopy(model), "disk", tmp_path / "weights")
    torch.testing.assert_close(away(ids).logits, exact)
