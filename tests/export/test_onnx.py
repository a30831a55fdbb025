"""Exported language models in onnxruntime: the eager model's logits, for prompts and steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cumulant import nn
from cumulant.cli import run_command
from cumulant.export import OnnxModel, StatefulModel, export_onnx
from cumulant.interop import Mamba2Mixer
from cumulant.models import PRESETS, CumulantForMaskedLM, from_preset, quantize
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.generate import SamplingOptions, generate

from .common import (
    CANCELLING,
    OPTIONS,
    PROMPT,
    STEPS,
    eager_logits,
    read_in_pieces,
    small,
    two_rows,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_generate.py"


def exported_logits(model, ids, folder, steps, **options):
    export_onnx(model, folder, **options)
    run = OnnxModel(folder, threads=1)
    found = read_in_pieces(lambda piece: run.read(piece.numpy(), logits_to_keep=0), ids, steps)
    assert run.states["past.position"] == [ids.shape[1]]
    return found


@pytest.mark.parametrize("operators", ["standard", "onnxruntime"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, operators, tmp_path):
    """A batch of two, a prompt in two pieces, and 200 steps."""
    model, ids = small(preset), two_rows(STEPS)
    found = exported_logits(model, ids, tmp_path / "out", STEPS, operators=operators)
    assert np.abs(found - eager_logits(model, ids)).max() < 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, tmp_path):
    model, ids = small(name), two_rows(20)
    found = exported_logits(model, ids, tmp_path / "out", 20)
    assert np.abs(found - eager_logits(model, ids)).max() < 1e-4


@pytest.mark.parametrize("name", CANCELLING)
def test_options_whose_terms_cancel(name, tmp_path):
    """Rounding is amplified as in the eager model, at once or token by token, to a factor of 4."""
    model, ids = small(name), two_rows(20)
    found = exported_logits(model, ids, tmp_path / "out", 20)
    eager = [eager_logits(model, ids), stepped_logits(model, ids)]
    exact = eager_logits(model.double(), ids)
    assert np.abs(found - exact).max() < 1e-4 + 4 * max(np.abs(x - exact).max() for x in eager)


@torch.no_grad()
def stepped_logits(model, ids):
    """The eager model's logits when it reads token by token."""
    stateful = StatefulModel(model)
    state, found = stateful.initial_state(2), []
    for t in range(ids.shape[1]):
        logits, state = stateful(ids[:, t : t + 1], state)
        found.append(logits.numpy())
    return np.concatenate(found, 1)


MODULES = {
    "prenorm": lambda: nn.LinearAttention(32, 4, prenorm=True, bias=True, scale=0.5),
    "not normalised": lambda: nn.LinearAttention(32, 4, feature_map="identity", normalize=False),
    "plain sums": lambda: nn.LinearAttention(32, 4, feature_map="softmax", normalize=False),
    "no rotation": lambda: nn.TaylorAttention(32, 4, head_dim=6, value_dim=5, alpha=2.0),
    "shift": lambda: nn.TaylorAttention(32, 4, num_kv_heads=1, shift_tokens=True, conv_size=2),
    "gau": lambda: nn.GatedAttentionUnit(32, query_key_dim=12, scale_bias=True, rotary_dim=6),
    "plain gau": lambda: nn.GatedAttentionUnit(32, query_key_dim=12, relative_bias=False),
    "flash": lambda: nn.MixedChunkAttention(32, query_key_dim=12, group_size=7),
    "plain flash": lambda: nn.MixedChunkAttention(32, relative_bias=False, norm="rmsnorm"),
    "clipped": lambda: nn.ElitaAttention(32, 4, head_dim=5, horizon=9, clip=0.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_options_that_only_modules_have(name, tmp_path):
    model, ids = small("softmax"), two_rows(20)
    for block in model.model.layers[:2]:
        block.mixer = MODULES[name]()
        for p in block.mixer.parameters():  # the biases too
            torch.nn.init.normal_(p, std=0.3)
    found = exported_logits(model, ids, tmp_path / "out", 20)
    assert np.abs(found - eager_logits(model, ids)).max() < 1e-4


def test_any_batch_and_length(tmp_path):
    """Batches and prompts of other sizes than any example, and one token to the prompt's graph."""
    model = small("based")
    export_onnx(model, tmp_path / "out")
    run = OnnxModel(tmp_path / "out", threads=1)
    for B, T in ((1, 1), (3, 2), (1, 64), (5, 131)):
        ids = torch.randint(1, 50, (B, T))
        run.reset(B)
        given = {"input_ids": ids.numpy(), "logits_to_keep": np.array([0]), **run.states}
        logits = run._prompt.run(None, given)[0]
        assert np.abs(logits - eager_logits(model, ids)).max() < 1e-4


def test_a_long_text_after_many_tokens(tmp_path):
    """Positions, windows and groups behind 3,000 tokens, in which steps follow a long prompt."""
    model, ids = small("wrapped"), torch.randint(1, 50, (1, 3008))
    export_onnx(model, tmp_path / "out")
    run = OnnxModel(tmp_path / "out", threads=1)
    found = [run.read(ids[:, :3000].numpy())]
    found += [run.read(ids[:, t : t + 1].numpy()) for t in range(3000, 3008)]
    expected = eager_logits(model.double(), ids)[:, 2999:]
    assert np.abs(np.concatenate(found, 1) - expected).max() < 1e-4


@pytest.mark.parametrize(("kept", "count"), [(0, 12), (1, 1), (5, 5), (40, 12)])
def test_logits_to_keep(kept, count, tmp_path):
    model, ids = small("linear"), torch.randint(1, 50, (2, 12))
    export_onnx(model, tmp_path / "out")
    logits = OnnxModel(tmp_path / "out", threads=1).read(ids.numpy(), logits_to_keep=kept)
    assert logits.shape == (2, count, 50)
    assert np.abs(logits - eager_logits(model, ids)[:, -count:]).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_become_fp32(dtype, tmp_path):
    model, ids = small("gated_taylor").to(dtype), two_rows(4)
    found = exported_logits(model, ids, tmp_path / "out", 4)
    assert found.dtype == np.float32
    assert np.abs(found - eager_logits(model.float(), ids)).max() < 1e-4


def test_the_operator_and_the_weights(tmp_path):
    """LinearAttention reads prompts, and onnxruntime's tokens too. Weights are in one file."""
    model = small("gated_taylor")
    for operators, domain in (("standard", ""), ("onnxruntime", "com.microsoft")):
        folder = tmp_path / operators
        export_onnx(model, folder, operators=operators)
        for name in ("prompt", "step"):
            graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
            assert {o.domain: o.version for o in graph.opset_import}[""] == 27
            used = [n for n in graph.graph.node if n.op_type == "LinearAttention"]
            by_operator = name == "prompt" or operators == "onnxruntime"
            assert [n.domain for n in used] == [domain] * len(model.model.layers) * by_operator
            assert not {n.op_type for n in graph.graph.node} & {"Scan", "Loop"}
            stored = [w for w in graph.graph.initializer if w.external_data]
            assert {w.external_data[0].value for w in stored} == {"weights.bin"}
    weights = sum(p.numel() * 4 for p in model.parameters())  # tied logits count once
    features = 2 * 16 * 136 * 4  # two selections of Taylor features
    assert weights / 2 < (folder / "weights.bin").stat().st_size < weights + features + 10_000


def test_the_description(tmp_path):
    """It names all that the graphs take and return, in their order."""
    model = small("wrapped")
    export_onnx(model, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "cumulant_onnx.json").read_text())
    assert (about["vocab_size"], about["pad_token_id"]) == (50, 0)
    states = about["states"]
    assert len({state["input"] for state in states}) == len(states)
    for name in ("prompt", "step"):
        session = onnxruntime.InferenceSession(tmp_path / "out" / about[name])
        inputs = {x.name: x for x in session.get_inputs()}
        others = ["input_ids"] + ["logits_to_keep"] * (name == "prompt")
        assert list(inputs) == [*others, *(state["input"] for state in states)]
        assert [x.name for x in session.get_outputs()] == [
            "logits",
            *(state["output"] for state in states),
        ]
        types = {"float32": "tensor(float)", "float64": "tensor(double)", "int64": "tensor(int64)"}
        for state in states:
            assert inputs[state["input"]].shape == state["shape"]
            assert inputs[state["input"]].type == types[state["dtype"]]


def test_reading_refuses_what_is_not_ids(tmp_path):
    export_onnx(small("linear"), tmp_path / "out")
    run = OnnxModel(tmp_path / "out")
    for wrong in (np.zeros((1, 0), int), np.zeros(3, int), np.zeros((1, 3))):
        with pytest.raises(ValueError, match=r"ids: expected integers \[B, T\] with T at least 1"):
            run.read(wrong)


class Other(torch.Tensor):
    """A kind of weight that no graph knows, as other packages' quantised ones."""


def test_parts_that_cannot_be_exported(tmp_path):
    """Each is refused by name, before anything is written."""

    def refused(message, model, **options):
        with pytest.raises(ValueError) as caught:
            export_onnx(model, tmp_path / "out", **options)
        assert message in str(caught.value)
        assert not list(tmp_path.iterdir())

    model = small("based")
    model.model.layers[1].mixer = Mamba2Mixer(32, num_heads=8, head_dim=8, state_dim=8)
    where = "model: model.layers.1.mixer cannot be exported to ONNX: Mamba2Mixer has no form"
    refused(where, model)
    model = small("linear")
    model.model.layers[0].mixer.feature_map = torch.nn.Softplus()
    refused("model.layers.0.mixer.feature_map cannot be exported", model)
    model = small("linear")
    model.model.layers[2].feed_forward.up_proj = torch.nn.Sequential()
    refused("model.layers.2.feed_forward cannot be exported to ONNX: expected a torch.nn", model)
    model = small("linear")
    other = torch.nn.Parameter(model.lm_head.weight.as_subclass(Other))
    model.model.layers[2].feed_forward.up_proj.weight = other
    refused("model.layers.2.feed_forward cannot be exported to ONNX: expected a torch.nn.Linear or"
            " Embedding with an ordinary weight, got Linear with Other", model)  # fmt: skip
    refused("model: model.embed_tokens.weight is on the meta device", small("linear").to("meta"))
    model = small("linear")
    model.model.layers[0].mixer.register_forward_hook(lambda *_: None)
    refused("model: model.layers.0.mixer has a hook", model)
    refused("embed_tokens cannot be exported to ONNX: its weights have 4 bits; export the model"
            " that was quantised", quantize(small("taylor"), 4))  # fmt: skip
    encoder = CumulantForMaskedLM(from_preset("softmax", is_causal=False, vocab_size=50))
    refused("model: expected a CumulantForCausalLM, got CumulantForMaskedLM", encoder)
    refused("operators: expected standard or onnxruntime, got 'fast'", small("linear"),
            operators="fast")  # fmt: skip


def test_the_command(run, tmp_path, capsys, monkeypatch):
    folder = str(tmp_path / "out")
    command = ["export", run.output, "--format", "onnx", "--output", folder]
    assert run_command(command) == 0
    out = capsys.readouterr().out
    assert f"{folder}: " in out
    difference = float(out.split("within ")[1].split(" of")[0])
    assert difference < 1e-4

    def refused(kind, message, *arguments):
        with pytest.raises(kind) as caught:
            run_command(["export", *arguments])
        assert message in str(caught.value)

    other = ["--output", f"{folder}2"]
    refused(ValueError, f"output: {folder} holds something; name another", *command[1:])
    refused(ValueError, "format: expected onnx, got 'gguf'", run.output, "--format", "gguf")
    refused(ValueError, "operators: expected standard or", run.output, "--operators", "x", *other)
    refused(ValueError, "checkpoint: no model at", str(tmp_path / "nothing"), *other)
    refused(ValueError, "output: expected the name of a new folder", run.output, "--output", "")
    monkeypatch.setitem(sys.modules, "onnx", None)
    missing = "needs the package onnx: pip install 'cumulant[onnx]'"
    refused(ModuleNotFoundError, missing, run.output, *other)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_without_onnxruntime(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cumulant.export.checkpoint.find_spec", lambda name: None)
    assert run_command(["export", run.output, "--output", str(tmp_path / "out")]) == 0
    assert "not compared with PyTorch, as onnxruntime is not installed" in capsys.readouterr().out


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(small("linear"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_example_needs_no_torch(run, tmp_path):
    """It continues a prompt as the model's own greedy decoding does."""
    folder = tmp_path / "out"
    assert run_command(["export", run.output, "--output", str(folder)]) == 0
    model, tokenizer = load_checkpoint(run.output, "cpu")
    expected = generate(model, tokenizer, "the cat", SamplingOptions(40, temperature=0.0)).text
    script = (
        "import runpy, sys; sys.modules['torch'] = None;"
        f" sys.argv = ['x', {str(folder)!r}, 'the cat', '40'];"
        f" runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == f"the cat{expected}"
    assert "sat on the" in done.stdout


def test_prompts_may_be_read_token_by_token(tmp_path):
    """The graphs exchange states in both directions."""
    model, ids = small("flash"), two_rows(0)
    export_onnx(model, tmp_path / "out")
    run = OnnxModel(tmp_path / "out", threads=1)
    found = [run.read(ids[:, t : t + 1].numpy()) for t in range(PROMPT)]
    found.append(run.read(ids[:, PROMPT:].numpy(), logits_to_keep=0))
    assert np.abs(np.concatenate(found, 1) - eager_logits(model, ids)).max() < 1e-4
