"""Training on a small text, through the same code as in earnest."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cumulant.models.language_model import CumulantWithLogits
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.evaluate import evaluate_whole
from cumulant.text.generate import SamplingOptions, generate
from cumulant.text.options import TrainingOptions
from cumulant.text.runs import whole_checkpoints
from cumulant.text.tokenizer import byte_tokenizer
from cumulant.text.tokens import read_tokens
from cumulant.text.train import _uses_bf16, train

from .conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore")


def test_it_learns(run):
    assert 3.5 < run.losses[0][1] < 1.05 * math.log(257)  # the mean of the first steps
    assert run.losses[-1][1] < 1.0
    assert run.score.bits_per_byte < 1.0
    assert run.tokens_per_second > 0
    output = Path(run.output)
    names = {p.name for p in output.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "result.json",
        "tokens",
        "runs",
    }
    assert (
        json.loads((output / "result.json").read_text())["bits_per_byte"] == run.score.bits_per_byte
    )
    assert list((output / "runs").rglob("events*"))  # TensorBoard
    assert not list(output.rglob("*.tmp"))
    assert [p.name for p in whole_checkpoints(output)] == ["checkpoint-80", "checkpoint-160"]


def test_no_logits_are_formed(text, tmp_path, monkeypatch):
    """The trainer's steps and evaluations need the loss alone."""
    calls, own = [], CumulantWithLogits.logits
    monkeypatch.setattr(
        CumulantWithLogits, "logits", lambda self, x: calls.append(x.shape) or own(self, x)
    )
    options = TrainingOptions(data=str(text), output=str(tmp_path / "run"), steps=2, **SMALL)
    assert math.isfinite(train(options, say=lambda _: None).score.loss)
    assert not calls


def test_it_is_a_hugging_face_model(run):
    model = AutoModelForCausalLM.from_pretrained(run.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.output)
    ids = tokenizer("the cat sat on the ", return_tensors="pt", add_special_tokens=False)
    out = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert out in ("the cat sat on the mat", "the cat sat on the hat")


def test_packed_documents_and_options(text, tmp_path):
    """Packing, BPE, accumulation, bf16, checkpointing and dropout work on every preset."""
    for preset in ("softmax", "linear", "taylor", "based", "gated_taylor"):
        options = TrainingOptions(
            output=str(tmp_path / preset),
            data=str(text),
            preset=preset,
            steps=4,
            packed=True,
            train_bpe=280,
            accumulate=2,
            bf16=True,
            gradient_checkpointing=True,
            dropout=0.1,
            **SMALL,
        )
        result = train(options, say=lambda _: None)
        assert math.isfinite(result.score.bits_per_byte)
        model, tokenizer = load_checkpoint(result.output)
        assert model.config.vocab_size == len(tokenizer) > 257


def test_gates_are_trained_evaluated_and_continued(text, tmp_path):
    """A model with gates: its score, whole or in pieces, and its text, from a saved state too."""
    options = {**SMALL, "steps": 60, "model_option": ["decay_spans=[4, 1000]"]}
    result = train(
        TrainingOptions(
            output=str(tmp_path / "gated"), data=str(text), preset="gated_taylor", **options
        ),
        say=lambda _: None,
    )
    assert result.losses[-1][1] < 0.5 * result.losses[0][1]
    model, tokenizer = load_checkpoint(result.output)
    for block in model.model.layers:
        assert block.mixer.decay.spans == (4, 1000)
        assert block.mixer.decay.weight.abs().min() > 0
    heldout = read_tokens(Path(result.output) / "tokens")[1]
    whole = evaluate_whole(model, heldout, piece=1000).bits_per_byte
    assert evaluate_whole(model, heldout, piece=5).bits_per_byte == pytest.approx(whole, rel=1e-5)
    state, greedy = str(tmp_path / "s"), {"temperature": 0.0}
    once = generate(model, tokenizer, "the cat", SamplingOptions(12, **greedy))
    parts = [
        generate(model, tokenizer, "the cat", SamplingOptions(5, **greedy), save=state),
        generate(model, tokenizer, "", SamplingOptions(7, **greedy), load=state),
    ]
    assert "".join(part.text for part in parts) == once.text


def test_accumulation_is_a_larger_batch(text, tmp_path):
    losses = []
    for name, batch, accumulate in (("a", 4, 1), ("b", 2, 2)):
        options = {**SMALL, "batch": batch, "accumulate": accumulate, "steps": 5}
        losses.append(
            train(
                TrainingOptions(output=str(tmp_path / name), data=str(text), **options),
                say=lambda _: None,
            ).losses
        )
    assert np.allclose(losses[0], losses[1], atol=2e-4)


def test_bad_options(tmp_path, text):
    def refuses(message, **options):
        with pytest.raises(ValueError, match=message):
            train(
                TrainingOptions(
                    **{"output": str(tmp_path / "x"), "data": str(text), **SMALL, **options}
                ),
                say=lambda _: None,
            )
        assert not (tmp_path / "x").exists()  # nothing half-written

    refuses(
        "preset: expected one of softmax, linear, taylor, higher_order, based, flash, elita,"
        " gated_linear, gated_taylor, gated_based, got 'gpt'",
        preset="gpt",
    )
    refuses("steps: expected at least 1, got 0", steps=0)
    refuses("warmup: expected a share of the steps below 1, got 1", warmup=1)
    refuses("learning_rate: expected a positive number, got -1", learning_rate=-1)
    refuses("evaluate_every: expected 0 or more steps, got -5", evaluate_every=-5)
    refuses(
        "train_bpe: pass either a tokenizer or the size of one to train",
        tokenizer="x",
        train_bpe=300,
    )
    refuses("intermediate: expected at least 1, got -5", intermediate=-5)
    refuses("clip: expected a finite number, 0 or more, got nan", clip=math.nan)
    refuses("save_every: expected a multiple of evaluate_every=3", evaluate_every=3, save_every=4)
    refuses("resume: there is no run in .*x; start one without --resume", resume=True)
    refuses("device: expected auto, cpu or cuda, got 'tpu'", device="tpu")
    refuses("context: the training text has .* too few for one window of 999999", context=999999)
    refuses("heads: 3 must divide width=32", heads=3)
    if not torch.cuda.is_available():
        refuses("device: cuda was asked for, but PyTorch sees no CUDA device", device="cuda")


def test_an_output_that_holds_a_run_is_left_alone(run, text):
    before = (Path(run.output) / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match="holds a run already; continue it with --resume, or name .* --output"
    ):
        train(TrainingOptions(output=run.output, data=str(text), **SMALL), say=lambda _: None)
    assert (Path(run.output) / "model.safetensors").read_bytes() == before


def test_checkpoints_that_do_not_fit(run, tmp_path):
    import shutil

    with pytest.raises(
        ValueError,
        match="checkpoint: no model at .*nowhere; train one with: cumulant train --output",
    ):
        load_checkpoint(str(tmp_path / "nowhere"))
    copy = tmp_path / "copy"
    shutil.copytree(run.output, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(
        ValueError, match="checkpoint: the weights in .* do not fit its config.json"
    ):
        load_checkpoint(str(copy))
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match="checkpoint: the weights in .* do not fit its config.json: model.layers.2"
    ):
        load_checkpoint(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint: the weights in .* do not fit"):
        load_checkpoint(str(copy))
    shutil.copy(Path(run.output) / "model.safetensors", copy)
    from cumulant.text.tokenizer import train_bpe

    train_bpe([b"some text some text"], 260).save_pretrained(copy)
    with pytest.raises(
        ValueError, match="tokenizer: .* holds a tokenizer of 260 tokens, but the model has 257"
    ):
        load_checkpoint(str(copy))
    assert len(byte_tokenizer()) == 257


def test_the_option_lists_the_models_presets():
    from cumulant.models import PRESETS
    from cumulant.text import options

    assert tuple(PRESETS) == options.PRESETS


@pytest.mark.parametrize(
    ("device", "gpu", "chosen", "expected"),
    [
        ("auto", True, None, True),
        ("auto", True, False, False),
        ("cpu", True, None, False),
        ("auto", False, None, False),
        ("cpu", False, True, True),
    ],
)
def test_gpus_multiply_in_bf16_by_default(device, gpu, chosen, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    options = TrainingOptions(output=str(tmp_path), data=["x"], device=device, bf16=chosen)
    assert _uses_bf16(options) is expected
