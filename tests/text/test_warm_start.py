"""Runs that start from a trained model, and how the text is read and the learning rate falls."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.generate import SamplingOptions, generate
from cumulant.text.options import TrainingOptions
from cumulant.text.tokens import DisjointWindows, TokenFile
from cumulant.text.train import train

from .conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore")


def start(run, text, output, **options):
    options = {
        "device": "cpu",
        "context": 32,
        "batch": 4,
        "learning_rate": 1e-2,
        "steps": 40,
    } | options
    return train(
        TrainingOptions(str(output), data=str(text), init_from=run.output, **options),
        say=lambda _: None,
    )


@pytest.fixture(scope="module")
def corrected(run, text, tmp_path_factory):
    """A feed-forward over the logits, trained on a frozen backbone."""
    return start(
        run, text, tmp_path_factory.mktemp("ffn") / "out", freeze_backbone=True, logit_ffn=24
    )


def test_only_the_logit_feed_forward_is_trained(run, corrected):
    before, after = (
        dict(load_checkpoint(r.output, "cpu")[0].named_parameters()) for r in (run, corrected)
    )
    new = {name for name in after if name.startswith("logit_ffn.")}
    assert set(after) - new == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after["logit_ffn.out_proj.weight"].any()
    assert after["logit_ffn.up_proj.weight"].shape == (24, 257)
    assert corrected.score.bits_per_byte < run.score.bits_per_byte
    assert corrected.parameters - run.parameters == 2 * 24 * 257 + 24 + 257


def test_a_new_logit_feed_forward_changes_nothing(run):
    model, _ = load_checkpoint(run.output, "cpu")
    config = type(model.config)(**{**model.config.to_dict(), "logit_ffn": 24})
    wider = CumulantForCausalLM.from_pretrained(run.output, config=config)
    ids = torch.randint(0, 257, (2, 9))
    assert torch.equal(wider(ids).logits, model(ids).logits)


def test_the_formula_of_the_logit_feed_forward():
    torch.manual_seed(0)
    model = CumulantForCausalLM(
        from_preset("taylor", hidden_size=32, vocab_size=20, logit_ffn=6)
    ).double()
    ffn = model.logit_ffn
    torch.nn.init.normal_(ffn.out_proj.weight)
    ids = torch.randint(0, 20, (1, 5))
    outputs = model(ids, output_hidden_states=True)
    z = outputs.hidden_states[-1] @ model.model.embed_tokens.weight.T
    hidden = z @ ffn.up_proj.weight.T + ffn.up_proj.bias
    expected = z + (hidden * hidden.sigmoid()) @ ffn.out_proj.weight.T + ffn.out_proj.bias
    assert torch.allclose(outputs.logits, expected, atol=1e-12)
    assert torch.allclose(model(ids, logits_to_keep=1).logits, expected[:, -1:], atol=1e-12)


def test_it_generates_and_goes_on(run, corrected, text, tmp_path):
    model, tokenizer = load_checkpoint(corrected.output, "cpu")
    sampling = SamplingOptions(20, 0.0, 0, 1.0, None)
    assert generate(model, tokenizer, "the cat ", sampling).text
    output = tmp_path / "out"
    shutil.copytree(corrected.output, output)
    for name in ("model.safetensors", "checkpoint-40"):
        target = output / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    resumed = train(TrainingOptions(str(output), resume=True, device="cpu"), say=lambda _: None)
    assert resumed.score.loss == pytest.approx(corrected.score.loss, abs=1e-6)
    again, _ = load_checkpoint(str(output), "cpu")
    for name, p in model.named_parameters():
        assert torch.allclose(p, again.get_parameter(name), atol=1e-6), name


def test_without_freezing_everything_is_trained(run, text, tmp_path):
    result = start(run, text, tmp_path / "out", steps=10, learning_rate=1e-4)
    assert (
        result.losses[0][1] < 1.2 * run.losses[-1][1]
    )  # it starts where the run ended, not at log 257
    before, after = (load_checkpoint(r.output, "cpu")[0] for r in (run, result))
    assert not any(
        torch.equal(p, after.get_parameter(name)) for name, p in before.named_parameters()
    )


def test_mistakes(run, text, tmp_path):
    def refuses(message, **options):
        given = {
            "output": str(tmp_path / "x"),
            "data": str(text),
            "device": "cpu",
            "init_from": run.output,
        } | options
        with pytest.raises(ValueError, match=message):
            train(TrainingOptions(**given), say=lambda _: None)
        assert not (tmp_path / "x").exists()

    refuses(
        "freeze_backbone: needs a trained model, --init-from, and something to train",
        freeze_backbone=True,
    )
    refuses("freeze_backbone: needs", freeze_backbone=True, logit_ffn=8, init_from=None)
    refuses("logit_ffn: expected at least 1, got 0", logit_ffn=0)
    refuses("init_from: the model there comes with its tokenizer; pass no other", train_bpe=300)
    refuses("checkpoint: no model at .*nothing", init_from=str(tmp_path / "nothing"))
    refuses("width: the model in .* has 32, and a trained model keeps its own", width=64)
    refuses(
        "preset: the model in .* has 'taylor', and a trained model keeps its own", preset="softmax"
    )
    refuses("checkpoint: the weights in .* do not fit", model_option=["feed_forward=gelu"])
    refuses("nonsense: not a field of CumulantConfig", model_option=["nonsense=1"])
    refuses(
        "schedule: expected one of cosine, capped_inverse_sqrt, got 'linear'", schedule="linear"
    )
    refuses("adam_beta2: expected a number between 0 and 1, got 1", adam_beta2=1.0)
    refuses(
        "disjoint: pass either disjoint windows or packed documents, not both",
        disjoint=True,
        packed=True,
    )


def test_disjoint_windows():
    """Each pass reads every window once, in an order of its own that the seed decides."""
    ids = np.arange(1000, dtype=np.uint16)
    tokens = TokenFile(ids, np.zeros(1, dtype=np.int64), 1000)
    windows = DisjointWindows(tokens, 9, 222, seed=3)
    each = 999 // 9
    firsts = [int(windows[i]["input_ids"][0]) for i in range(222)]
    assert sorted(firsts[:each]) == sorted(firsts[each:]) == [9 * i for i in range(each)]
    assert firsts[:each] != firsts[each:]
    again = DisjointWindows(tokens, 9, 222, seed=3)
    assert [int(again[i]["input_ids"][0]) for i in reversed(range(222))] == firsts[::-1]
    assert [
        int(DisjointWindows(tokens, 9, 222, seed=4)[i]["input_ids"][0]) for i in range(9)
    ] != firsts[:9]
    window = windows[5]
    assert torch.equal(window["labels"], window["input_ids"] + 1)


def test_the_capped_schedule(text, tmp_path):
    """The rate is learning_rate · min(1, 10 / sqrt(step)): constant for 100 steps."""
    options = {**SMALL, "steps": 150, "width": 16, "depth": 1, "schedule": "capped_inverse_sqrt"}
    train(
        TrainingOptions(str(tmp_path / "x"), data=str(text), save_every=150, **options),
        say=lambda _: None,
    )
    state = json.loads((Path(tmp_path) / "x" / "checkpoint-150" / "trainer_state.json").read_text())
    rates = {e["step"]: e["learning_rate"] for e in state["log_history"] if "learning_rate" in e}
    assert len(rates) > 10
    for step, rate in rates.items():
        assert rate == pytest.approx(1e-2 * min(1, 10 / step**0.5), rel=1e-9), step
    assert min(rates.values()) < 0.9e-2
