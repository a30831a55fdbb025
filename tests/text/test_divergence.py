"""Runs that diverge, disks that fill and odd vocabularies are reported, and nothing is lost."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.generate import SamplingOptions, generate
from cumulant.text.options import TrainingOptions
from cumulant.text.runs import find_damage, whole_checkpoints, write_json
from cumulant.text.train import train
from cumulant.text.trainer import Diverged, LanguageModelTrainer

from .conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore")


def quiet_train(output, text, **options):
    return train(
        TrainingOptions(str(output), data=str(text), **{**SMALL, **options}), say=lambda _: None
    )


def poison(monkeypatch, step, what):
    """From `step` on the losses, or the gradients alone, are not finite."""
    real = LanguageModelTrainer.training_step

    def training_step(self, *arguments, **options):
        loss = real(self, *arguments, **options)
        if self.state.global_step + 1 < step:
            return loss
        if what == "gradient":
            next(p for p in self.model.parameters()).grad.fill_(math.inf)
        else:
            self.step_losses.append(loss * math.nan)
        return loss

    monkeypatch.setattr(LanguageModelTrainer, "training_step", training_step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_diverged_run_stops_and_keeps_what_was_good(text, tmp_path, monkeypatch, what):
    output = tmp_path / "run"
    expected = "the loss is nan" if what == "loss" else "the gradient is not finite"
    with monkeypatch.context() as patch:
        poison(patch, 8, what)
        with pytest.raises(
            Diverged,
            match=f"step 8: {expected}: training diverged; lower --learning-rate .*point-7",
        ):
            quiet_train(output, text, steps=20, save_every=1, evaluate_every=1)
    assert not (output / "result.json").exists()
    assert not (output / "model.safetensors").exists()
    assert whole_checkpoints(output)[-1].name == "checkpoint-7"
    assert find_damage(output / "checkpoint-7") is None
    load_checkpoint(str(output))
    lower = TrainingOptions(str(output), resume=True, learning_rate=1e-3)
    assert train(lower, say=lambda _: None).losses[-1][0] == 20


def test_a_rate_that_cannot_be(text, tmp_path):
    with pytest.raises(Diverged, match="training diverged"):
        quiet_train(tmp_path / "run", text, steps=30, learning_rate=1e30, warmup=0.0)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.output, copy)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = math.nan
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="checkpoint: the weights in .* hold NaN or infinity"):
        load_checkpoint(str(copy))


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [1.0, -math.inf], "c": "NaN"})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.0, None],
        "c": "NaN",
    }


@pytest.mark.parametrize(
    "name", ["weight_decay", "clip", "dropout", "heldout", "warmup", "learning_rate", "adam_beta2"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        TrainingOptions(**{name: value})


def test_a_full_disk(text, tmp_path, monkeypatch):
    """The checkpoint being written is removed, and the run goes on from those before it."""
    output, real = tmp_path / "run", torch.save

    def save(content, path, *arguments, **options):
        if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
            real(content, path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(
            ValueError,
            match=r"output: no space left for .*checkpoint-6 .*; checkpoint-4 is whole; make",
        ):
            quiet_train(output, text, steps=8, save_every=2)
    assert [p.name for p in sorted(output.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    assert not list(output.rglob("*.tmp"))
    assert train(TrainingOptions(str(output), resume=True), say=lambda _: None).losses[-1][0] == 8


@pytest.mark.slow
def test_a_disk_that_is_really_full(text, tmp_path):
    """With files of 150 kB at most, the weights fit and the optimizer's state does not."""
    output = tmp_path / "run"
    options = (
        "--steps 4 --save-every 2 --context 32 --batch 2 --width 32 --depth 1 --heads 2"
        " --device cpu"
    )
    line = f"{sys.executable} -m cumulant train --data {text} --output {output}"
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -f 150; exec {line} {options}"],
        capture_output=True,
        text=True,
        timeout=200,
        env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")},  # it writes too
    )
    (said,) = [line for line in limited.stderr.splitlines() if line.startswith("cumulant: ")]
    assert limited.returncode == 2
    assert "Traceback" not in limited.stderr
    assert re.search(
        r"output: no space left for .*checkpoint-2 .*there is no checkpoint yet; make room", said
    )
    assert not list(output.glob("checkpoint-*"))
    assert not list(output.rglob("*.tmp"))
    done = subprocess.run([*line.split(), "--resume"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_padded_vocabulary(text, tmp_path):
    """The model loads, and never draws an id without a token."""
    result = quiet_train(tmp_path / "run", text, steps=2, model_option=["vocab_size=320"])
    model, tokenizer = load_checkpoint(result.output)
    assert model.config.vocab_size == 320
    with torch.no_grad():
        model.lm_head.weight[257:] = 100 * torch.randn(63, 32)
    written = generate(
        model, tokenizer, "the", SamplingOptions(30, temperature=2.0, top_p=1.0, seed=0)
    )
    assert written.new_tokens > 0
    ids = model.generate(torch.tensor([[65]]), max_new_tokens=40, do_sample=True, temperature=2.0)
    assert int(ids.max()) < 257
    with pytest.raises(
        ValueError, match="vocab_size: expected at least 257, since the tokenizer has ids up to 256"
    ):
        quiet_train(tmp_path / "small", text, steps=2, model_option=["vocab_size=200"])
    assert not (tmp_path / "small").exists()


def test_a_tokenizer_with_gaps_in_its_ids(text, tmp_path):
    words = {
        word: 3 * i
        for i, word in enumerate(("the", "cat", "sat", "on", "mat", "dog", "hat", ";", "?"))
    }
    tokenizer = Tokenizer(models.WordLevel({**words, "<|endoftext|>": 71}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = quiet_train(
        tmp_path / "run", text, steps=2, tokenizer=str(tmp_path / "tokenizer.json")
    )
    assert load_checkpoint(result.output)[0].config.vocab_size == 72


def test_the_model_is_checked_before_the_text_is_read(tmp_path):
    for option, message in (
        ({"heads": 3}, "heads: 3 must divide width=32"),
        ({"model_option": ["hidden_size=abc"]}, "hidden_size: expected int, got 'abc'"),
        ({"model_option": ["dropout=NaN"]}, "dropout: "),
        ({"train_bpe": 12}, "train_bpe: expected at least 257 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet_train(tmp_path / "run", "/no/such/text", **option)
        assert not (tmp_path / "run").exists()
