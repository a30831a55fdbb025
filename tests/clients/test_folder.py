"""Saved folders are loaded and saved by programs that never imported Cumulant."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import cumulant.models
from cumulant.models import CumulantConfig, CumulantForCausalLM, CumulantForMaskedLM, CumulantModel
from cumulant.models.folder import CLASSES

from .common import KINDS, TOKENIZER, build, config, tokens

STRANGER = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
assert "cumulant" not in sys.modules
path, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(AutoConfig.from_pretrained(path, trust_remote_code=True)) is type(model.config)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
prompt = tokenizer("ab", return_tensors="pt")
print(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0].tolist())
model.save_pretrained(again)
AutoModel.from_pretrained(again, trust_remote_code=True).save_pretrained(again + "-base")
"""


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_program_that_never_heard_of_us(tmp_path):
    """One process loads, generates and saves without the import; its folder loads again."""
    model = build("taylor")
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    expected = model.generate(torch.tensor([[97, 98]]), max_new_tokens=5, do_sample=False)[
        0
    ].tolist()
    arguments = [sys.executable, "-c", STRANGER, str(tmp_path / "model"), str(tmp_path / "again")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (
        again["auto_map"]
        == json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    )
    assert {"modeling_cumulant.py", "README.md"} <= files(tmp_path / "again")


def test_the_folder_names_existing_classes(tmp_path):
    build("taylor").save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == set(CLASSES)
    namespace = {}
    exec((tmp_path / "modeling_cumulant.py").read_text(), namespace)
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert module == "modeling_cumulant"
        assert namespace[name] is getattr(cumulant.models, name)
    assert len((tmp_path / "modeling_cumulant.py").read_text().splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_saving_after_register_for_auto_class(kind, tmp_path):
    """transformers copies the files of the class; its relative imports once crashed that."""
    CumulantConfig.register_for_auto_class()
    CumulantForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model, ids = build(kind), tokens(1, 5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
    assert not [
        name for name in files(tmp_path) if name.endswith(".py") and name != "modeling_cumulant.py"
    ]


class Own(CumulantForCausalLM):
    """A user's class."""


def test_a_users_own_class_is_registered_as_ever():
    Own.register_for_auto_class("AutoModelForCausalLM")
    assert Own._auto_class == "AutoModelForCausalLM"
    assert CumulantForCausalLM._auto_class is None


def test_other_entries_stay():
    hub = "someone/repo--modeling_cumulant.CumulantModel"
    found = CumulantConfig(
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None], "AutoModel": hub}
    ).auto_map
    assert found["AutoTokenizer"] == ["tokenization_own.Own", None]
    assert found["AutoModel"] == "modeling_cumulant.CumulantModel"


def test_the_readme(tmp_path):
    """The README of a saved model is true, and a user's own is never changed."""
    build("elita").save_pretrained(tmp_path / "causal")
    card = (tmp_path / "causal" / "README.md").read_text()
    assert "`elita`" in card
    assert "pipeline_tag: text-generation" in card
    block = card.split("```python\n")[1].split("```")[0]
    code = block.replace('"causal"', repr(str(tmp_path / "causal"))).splitlines()
    namespace = {}
    exec("\n".join(line for line in code if "okenizer =" not in line), namespace)
    assert type(namespace["model"]) is CumulantForCausalLM
    (tmp_path / "causal" / "README.md").write_text("mine")
    build("elita").save_pretrained(tmp_path / "causal")
    assert (tmp_path / "causal" / "README.md").read_text() == "mine"
    CumulantForMaskedLM(config("flash", is_causal=False)).save_pretrained(tmp_path / "masked")
    assert "AutoModelForMaskedLM" in (tmp_path / "masked" / "README.md").read_text()
    CumulantModel(config("taylor")).save_pretrained(tmp_path / "base")
    assert "import AutoModel," in (tmp_path / "base" / "README.md").read_text()
    assert not [
        name for path in tmp_path.iterdir() for name in files(path) if name.endswith(".tmp")
    ]


def test_a_configuration_alone(tmp_path):
    config("taylor").save_pretrained(tmp_path)
    assert files(tmp_path) == {"config.json", "modeling_cumulant.py"}
    assert type(AutoConfig.from_pretrained(tmp_path)) is CumulantConfig
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match="should be a directory"):
        config("taylor").save_pretrained(tmp_path / "file")


def test_only_the_writing_process_writes(tmp_path):
    build("taylor").save_pretrained(tmp_path, is_main_process=False)
    assert not {"config.json", "README.md", "modeling_cumulant.py"} & files(tmp_path)
