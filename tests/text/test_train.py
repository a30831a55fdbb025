"""Training, evaluation, generation: on a small text, through the same code as in earnest."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.evaluate import evaluate_whole, evaluate_windowed
from cumulant.text.generate import SamplingOptions, generate
from cumulant.text.options import TrainingOptions
from cumulant.text.runs import whole_checkpoints
from cumulant.text.tokenizer import byte_tokenizer
from cumulant.text.tokens import read_tokens, tokenize
from cumulant.text.train import train

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


def test_it_is_a_hugging_face_model(run):
    model = AutoModelForCausalLM.from_pretrained(run.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.output)
    ids = tokenizer("the cat sat on the ", return_tensors="pt", add_special_tokens=False)
    out = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert out in ("the cat sat on the mat", "the cat sat on the hat")


def test_evaluation_is_the_code_length(run):
    """Bits per byte against a token-by-token sum, both ways; windows of any length; text the model
    has not seen.
    """
    model, tokenizer = load_checkpoint(run.output)
    documents = ["the cat sat on the mäuse;".encode(), b"the dog"]
    text = tokenize(documents, tokenizer)
    assert text.text_bytes == 26 + 7
    nats = 0.0
    for document in documents:
        ids = torch.tensor([[256, *document]])
        log_p = model(ids).logits.log_softmax(-1)[0, :-1]
        nats -= float(log_p.gather(1, ids[0, 1:, None]).sum())
    ids = torch.tensor([[256, *documents[0], 256, *documents[1]]])
    boundary = float(
        model(ids[:, :27]).logits.log_softmax(-1)[0, -1, 256]
    )  # the second text's start is predicted too
    whole = evaluate_whole(model, text, piece=5)
    assert whole.tokens == 34
    assert whole.bits_per_byte == pytest.approx((nats - boundary) / math.log(2) / 33, rel=1e-5)
    assert whole.loss == pytest.approx((nats - boundary) / 34, rel=1e-5)
    for context in (1, 7, 34, 100):
        nats = 0.0
        for a in range(0, 34, context):
            window = ids[:, a : a + context + 1]
            log_p = model(window).logits.log_softmax(-1)[0, :-1]
            nats -= float(log_p.gather(1, window[0, 1:, None]).sum())
        score = evaluate_windowed(model, text, context, batch_size=2)
        assert score.tokens == 34
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 33, rel=1e-5)
    with pytest.raises(ValueError, match="context: expected at least 1 token, got 0"):
        evaluate_windowed(model, text, 0)
    with pytest.raises(ValueError, match="batch: expected at least 1 window, got 0"):
        evaluate_windowed(model, text, 8, batch_size=0)


def test_the_score_reported_is_that_of_the_model_kept(run):
    model, _ = load_checkpoint(run.output)
    heldout = read_tokens(Path(run.output) / "tokens")[1]
    score = evaluate_windowed(model, heldout, 32)
    assert score.bits_per_byte == pytest.approx(run.score.bits_per_byte, rel=1e-4)
    assert score.text_bytes == run.score.text_bytes


def test_generation_with_a_saved_state(run, tmp_path):
    """Stopping, leaving the state in a file, and going on later is as never having stopped."""
    model, tokenizer = load_checkpoint(run.output)
    greedy = {"temperature": 0.0}
    whole = generate(model, tokenizer, "the cat sat", SamplingOptions(40, **greedy))
    path = str(tmp_path / "state")
    first = generate(model, tokenizer, "the cat sat", SamplingOptions(15, **greedy), save=path)
    size = Path(path).stat().st_size
    second = generate(model, tokenizer, "", SamplingOptions(25, **greedy), load=path, save=path)
    assert first.text + second.text == whole.text
    assert Path(path).stat().st_size == pytest.approx(size, abs=64)
    assert (first.context, second.context) == (11 + 15, 11 + 40)
    appended = generate(model, tokenizer, "; the dog", SamplingOptions(10, **greedy), load=path)
    expected = generate(
        model, tokenizer, "the cat sat" + whole.text + "; the dog", SamplingOptions(10, **greedy)
    )
    assert appended.text == expected.text
    assert expected.state_bytes == first.state_bytes
    with pytest.raises(FileNotFoundError, match="no such folder: /no/such"):
        generate(model, tokenizer, "the", SamplingOptions(3), save="/no/such/state")
    again = [generate(model, tokenizer, "the", SamplingOptions(20, seed=5)).text for _ in range(2)]
    assert again[0] == again[1]
    assert generate(model, tokenizer, "", SamplingOptions(5)).new_tokens == 5


def test_states_of_another_model_are_refused(run, tmp_path, text):
    model, tokenizer = load_checkpoint(run.output)
    path = str(tmp_path / "state")
    generate(model, tokenizer, "the", SamplingOptions(3), save=path)
    other = train(
        TrainingOptions(output=str(tmp_path / "o"), data=str(text), steps=1, seed=1, **SMALL),
        say=lambda _: None,
    )
    stranger, _ = load_checkpoint(other.output)
    with pytest.raises(ValueError, match="load_state: .* was written by another model"):
        generate(stranger, tokenizer, "", SamplingOptions(3), load=path)


def test_packed_documents_and_options(text, tmp_path):
    """Packed windows, BPE, accumulation, bf16, gradient checkpointing and dropout, on every
    preset.
    """
    for preset in ("softmax", "linear", "taylor", "based"):
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


COMMAND = [
    sys.executable,
    "-m",
    "cumulant",
    "train",
    "--preset",
    "linear",
    "--width",
    "32",
    "--depth",
    "2",
    "--heads",
    "2",
]
COMMAND += [
    "--context",
    "32",
    "--batch",
    "4",
    "--device",
    "cpu",
    "--steps",
    "120",
    "--save-every",
    "12",
    "--evaluate-every",
    "12",
]


def losses_in(output):
    return json.loads((Path(output) / "result.json").read_text())["losses"]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(text, tmp_path, kind):
    """Killed at some moment, with a checkpoint cut short lying there: the losses are those of a run
    in one piece.
    """
    data = ["--data", str(text)]
    subprocess.run(
        [*COMMAND, *data, "--output", str(tmp_path / "whole")], check=True, capture_output=True
    )
    output = tmp_path / "cut"
    process = subprocess.Popen(
        [*COMMAND, *data, "--output", str(output)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # also where the tests run in the background
    )
    deadline = time.time() + 120
    while len(whole_checkpoints(output)) < 2 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(kind)
    _, errors = process.communicate()
    assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130)
    if kind == signal.SIGINT:
        assert b"interrupted; go on with: cumulant train --output" in errors
        assert b"Traceback" not in errors
    partial = output / "checkpoint-9999"  # as a kill in the middle of writing leaves it
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    resume = [sys.executable, "-m", "cumulant", "train", "--output", str(output), "--resume"]
    done = subprocess.run(resume, check=True, capture_output=True, text=True)
    assert "resuming" in done.stdout
    assert not partial.exists()
    assert losses_in(output) == losses_in(tmp_path / "whole")


TWO_PROCESSES = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    *("-m", "cumulant"),
]


def test_two_processes_say_once_what_is_wrong(tmp_path):
    """Found by the first process alone, which reads the text."""
    (tmp_path / "short.txt").write_text("a text that is too short for its windows. " * 100)
    options = ["--data", str(tmp_path / "short.txt"), "--context", "99999", "--device", "cpu"]
    done = subprocess.run(
        [*TWO_PROCESSES, "train", *options, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("cumulant: ")]
    assert len(said) == 1, done.stderr
    assert "too few for one window of 99999" in said[0]
    assert not (tmp_path / "run" / "tokens").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_equal_one(text, tmp_path, sharded):
    """Over gloo: two processes with half of the batch each take the same two steps as one."""
    common = [
        "--data",
        str(text),
        "--steps",
        "2",
        "--context",
        "32",
        "--width",
        "32",
        "--depth",
        "2",
        "--heads",
        "2",
    ]
    common += ["--device", "cpu", "--seed", "3"]
    one = [
        sys.executable,
        "-m",
        "cumulant",
        "train",
        *common,
        "--batch",
        "8",
        "--output",
        str(tmp_path / "one"),
    ]
    subprocess.run(one, check=True, capture_output=True)
    two = [
        *TWO_PROCESSES,
        "train",
        *common,
        "--batch",
        "4",
        "--output",
        str(tmp_path / "two"),
        *["--fsdp"] * sharded,
    ]
    subprocess.run(two, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert np.allclose(losses_in(tmp_path / "one"), losses_in(tmp_path / "two"), atol=1e-4)
    scores = [
        json.loads((tmp_path / n / "result.json").read_text())["bits_per_byte"]
        for n in ("one", "two")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    weights = [load_checkpoint(str(tmp_path / n))[0].state_dict() for n in ("one", "two")]
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-4)


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
        "preset: expected one of softmax, linear, taylor, higher_order, based, flash, elita, got"
        " 'gpt'",
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
        ValueError, match="holds a run already; go on with it by --resume, or name .* --output"
    ):
        train(TrainingOptions(output=run.output, data=str(text), **SMALL), say=lambda _: None)
    assert (Path(run.output) / "model.safetensors").read_bytes() == before


def test_resuming_checks_what_it_resumes(run, text, tmp_path):
    import shutil

    def refuses(message, **options):
        with pytest.raises(ValueError, match=message):
            train(TrainingOptions(output=str(output), resume=True, **options), say=lambda _: None)

    output = tmp_path / "copy"
    shutil.copytree(run.output, output)
    (output / "checkpoint-mine").mkdir()  # not ours
    refuses("resume: the run in .*copy was started with width=32, not 64", width=64)
    refuses(
        "resume: the run in .*copy was started with preset='taylor', not 'softmax'",
        preset="softmax",
    )
    before = text.read_text()
    text.write_text(before + "more")
    refuses(
        "data: .*text.txt is not the text that the run in .*copy was started with", data=str(text)
    )
    text.write_text(before)
    assert (output / "checkpoint-mine").is_dir()
    shutil.rmtree(output / "checkpoint-160")
    again = train(
        TrainingOptions(output=str(output), resume=True), say=lambda _: None
    )  # options come from the run
    assert again.losses == run.losses
    assert again.score.bits_per_byte == pytest.approx(run.score.bits_per_byte, rel=1e-6)


def test_default_runs_can_be_resumed(text, tmp_path):
    """Ten checkpoints a run, also without asking for any; three are kept."""
    train(
        TrainingOptions(output=str(tmp_path / "r"), data=str(text), steps=20, **SMALL),
        say=lambda _: None,
    )
    assert [p.name for p in whole_checkpoints(tmp_path / "r")] == [
        "checkpoint-16",
        "checkpoint-18",
        "checkpoint-20",
    ]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 to 2,147,483,647, got 0"),
        ({"temperature": -1}, "temperature: expected 0"),
        ({"top_p": 0}, "top_p: expected a probability above 0"),
        ({"top_k": -2}, "top_k: expected 0"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_the_option_lists_the_models_presets():
    from cumulant.models import PRESETS
    from cumulant.text import options

    assert tuple(PRESETS) == options.PRESETS
