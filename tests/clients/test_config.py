"""Fields of the configuration that clients read, and names that are not fields."""

import json

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, LlamaConfig

from cumulant.models import CumulantConfig, from_preset

from .common import KINDS, build, config

MISTAKES = {
    "hiden_size": (64, "did you mean hidden_size?"),
    "num_layers": (2, "did you mean num_hidden_layers?"),
    "d_model": (64, "did you mean hidden_size?"),
    "rope_theta": (1e4, "did you mean rotary_base?"),
    "num_attention_head": (4, "did you mean num_attention_heads?"),
    "mixer": (["taylor"], "did you mean mixers?"),
    "temperature": (0.5, r"it belongs to generate\(\) or model.generation_config"),
    "zzz": (1, "zzz: not a field of CumulantConfig$"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_unknown_names(name):
    value, message = MISTAKES[name]
    for make in (CumulantConfig, lambda **fields: from_preset("taylor", **fields)):
        with pytest.raises(ValueError, match=f"{name}: not a field of CumulantConfig") as caught:
            make(**{name: value})
        caught.match(message)


COMMON = {
    "num_labels": 3,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "problem_type": "regression",
    "output_hidden_states": True,
    "output_attentions": False,
    "return_dict": False,
    "torch_dtype": "float32",
    "dtype": "bfloat16",
    "architectures": ["CumulantForCausalLM"],
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "name_or_path": "somewhere",
    "attn_implementation": "sdpa",
    "classifier_dropout": 0.1,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "auto_map": {},
    "transformers_version": "5.0.0",
    "tie_word_embeddings": False,
    "use_cache": False,
}


@pytest.mark.parametrize("name", COMMON)
def test_what_every_configuration_takes(name):
    """Beside a Llama's."""
    given = {name: COMMON[name]}
    ours, llama = CumulantConfig(**given), LlamaConfig(**given)
    if name not in ("auto_map", "transformers_version", "torch_dtype"):
        attribute = "_attn_implementation" if name == "attn_implementation" else name
        assert getattr(ours, attribute) == getattr(llama, attribute)


def test_a_file_of_a_later_version(tmp_path, caplog):
    """Unknown keys are named, kept and saved again, and have no effect."""
    config("taylor").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    later = {"kernel_backend": "x", "pruned_heads": {}, "max_length": 20, "layer_types": []}
    path.write_text(json.dumps({**json.loads(path.read_text()), **later}))
    for load in (CumulantConfig, AutoConfig):
        caplog.clear()
        found = load.from_pretrained(tmp_path)
        assert "kernel_backend, pruned_heads" in caplog.text
        assert "max_length" not in caplog.text
    assert found.kernel_backend == "x"
    assert found.layer_types == ["cumulant_state"] * 2
    found.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["kernel_backend"] == "x"
    changed, unused = AutoConfig.from_pretrained(
        tmp_path, hidden_size=48, hiden_size=5, return_unused_kwargs=True
    )
    assert (changed.hidden_size, unused) == (48, {"hiden_size": 5})


def test_programs_that_form_the_logits_themselves():
    assert CumulantConfig().final_logit_softcapping is None
    made = CumulantConfig(logit_ffn=8)
    assert CumulantConfig.from_dict(made.to_dict()).logit_ffn == 8
    with pytest.raises(ValueError, match="logit_ffn: this program forms the logits itself"):
        getattr(made, "final_logit_softcapping", None)


def test_layer_types_follow_from_mixers():
    """Tools that shorten a model set them again, and only to the right values."""
    made = config("taylor")
    made.num_hidden_layers = 1
    made.layer_types = ["cumulant_state"]
    with pytest.raises(
        ValueError, match="layer_types: follows from mixers, and is .'cumulant_state'.; set mixers"
    ):
        made.layer_types = ["full_attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    made = config(kind)
    made.save_pretrained(tmp_path)
    again = CumulantConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "transformers_version": 0} == {
        **made.to_dict(),
        "transformers_version": 0,
    }
    assert CumulantConfig.from_dict(made.to_dict()).to_dict() == made.to_dict()
    assert json.loads(made.to_json_string())["auto_map"] == made.auto_map


def test_any_length():
    """The longest length is a number, because programs cut texts to it; the model ignores it."""
    assert CumulantConfig().max_position_embeddings == 2**20
    with pytest.raises(ValueError, match="max_position_embeddings: expected at least 1, got 0"):
        CumulantConfig(max_position_embeddings=0)
    model = build("elita", max_position_embeddings=4)
    ids = torch.arange(9)[None]
    assert model(ids).logits.shape == (1, 9, 257)
    generation = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert model.generate(ids, generation).shape == (1, 12)
