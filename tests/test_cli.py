"""The command line: its output and its errors."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from cumulant import __main__ as entry

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PATH": "/usr/bin:/bin",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "200",
}
ENVIRONMENT |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


def cumulant(*arguments, text=None):
    command = [sys.executable, "-m", "cumulant", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, input=text or "", env=ENVIRONMENT
    )


@pytest.fixture
def cumulant_here(monkeypatch, capfd):
    """The same in this process, which has imported everything: its exit code, and both outputs."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "keep_freed_memory", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cumulant", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as ended:
                entry.main()
        return ended.value.code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 400)
    done = cumulant(
        "train", "--data", folder / "text.txt", "--output", folder / "run", "--steps", 30,
        "--width", 32, "--depth", 2,
        "--heads", 2, "--context", 32, "--batch", 4, "--learning-rate", 0.01,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


def test_train_says_what_it_does(trained):
    _, done = trained
    assert "text: " in done.stdout
    assert "9,124 bytes in 1 documents, 476 held out (5.0%)" in done.stdout
    assert "model: taylor, " in done.stdout
    assert "held out: " in done.stdout
    assert "next: cumulant generate" in done.stdout
    assert "step     30  held out" in done.stdout
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate(trained):
    folder, _ = trained
    done = cumulant("evaluate", folder / "run", "--context", 8, "--context", 32, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert list(scores) == ["windows of 8 tokens", "windows of 32 tokens", "whole documents"]
    assert all(
        score["text_bytes"] == score["tokens"] == 476 for score in scores.values()
    )  # cut between words
    table = cumulant("evaluate", folder / "run", "--data", folder / "text.txt", "--no-whole")
    assert "bits per byte" in table.stdout
    assert "9,600" in table.stdout


def test_generate(trained):
    folder, _ = trained
    state = folder / "state"
    options = ["--temperature", 0, "--stats"]
    first = cumulant(
        "generate",
        folder / "run",
        "--prompt",
        "the cat",
        "--max-new-tokens",
        12,
        *options,
        "--save-state",
        state,
    )
    assert first.returncode == 0, first.stderr
    assert "12 tokens at " in first.stderr
    assert "tokens/s after 7 of context" in first.stderr
    assert "state " in first.stderr
    assert "peak memory" in first.stderr
    second = cumulant(
        "generate", folder / "run", "--max-new-tokens", 12, *options, "--load-state", state
    )
    piped = cumulant("generate", folder / "run", "--max-new-tokens", 24, *options, text="the cat")
    assert (first.stdout.rstrip("\n") + second.stdout) == piped.stdout
    assert len(piped.stdout) == 25


def test_info():
    done = cumulant("info")
    assert done.returncode == 0
    for word in (
        "cumulant",
        "torch",
        "transformers",
        "impl reference",
        "impl torch",
        "impl native",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--preset", "gpt"],
            (
                "preset: expected one of softmax, linear, taylor, higher_order, based, flash,"
                " elita, gated_linear, gated_taylor, gated_based, got 'gpt'"
            ),
        ),
        (["train", "--recipe", "gpt"], "recipe: expected one of flash-enwik8, got 'gpt'"),
        (
            ["train", "--model-option", "group_size"],
            "--model-option: expected field=value, got 'group_size'",
        ),
        (["train", "--model-option", "groupsize=3"], "groupsize: not a field of CumulantConfig"),
        (
            ["train", "--preset", "flash", "--width", "33"],
            "width: sinusoidal positions need an even number",
        ),
        (["train", "--model-option", "is_causal=false"], "conv_size: 4 looks backwards only"),
        (["train", "--model-option", "rotary=maybe"], "rotary: expected bool, got 'maybe'"),
        (
            ["train", "--preset", "flash", "--model-option", "group_size=0"],
            "group_size: expected at least 1, got 0",
        ),
        (["train", "--data", "/no/such/file"], "data: no such file or folder: /no/such/file"),
        (["train", "--tokenizer", "/no/such"], "tokenizer: no tokenizer.json at /no/such"),
        (
            ["train", "--steps", "3", "--steps", "4"],
            "--steps: given 2 times, but it takes one value; give it once",
        ),
        (
            ["train", "--data", "a.txt", "b.txt"],
            "--data: 1 more names after it, b.txt the first; quote a pattern",
        ),
        (["train", "--heads", "3", "--data", "/no/such"], "--heads: 3 must divide width=256"),
        (
            ["train", "--weight-decay", "inf"],
            "--weight-decay: expected a finite number, 0 or more, got inf",
        ),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "--depht", "3"], "No such option: --depht"),
        (
            ["train", "--device", "cuda"],
            "device: cuda was asked for, but PyTorch sees no CUDA device here",
        ),
        (["generate", "/no/such/run", "--prompt", "x"], "checkpoint: no model at /no/such/run"),
        (
            ["generate", "/no/such/run", "--temperature", "-1"],
            "temperature: expected 0 (greedy) or more, got -1.0",
        ),
        (["evaluate", "/no/such/run"], "checkpoint: no model at /no/such/run"),
        (
            ["train", "--preset", "elita", "--model-option", "wraps=0"],
            "wraps: expected at least 1, got 0",
        ),
        (
            ["train", "--freeze-backbone"],
            "--freeze-backbone: needs a trained model, --init-from, and something to train",
        ),
        (["train", "--init-from", "/no/such/run"], "checkpoint: no model at /no/such/run"),
        (["compare", "--data", "/no/such/file"], "data: no such file or folder: /no/such/file"),
        (
            ["compare", "--data", "x", "--recipe", "gpt"],
            "recipe: expected one of long-context, 20m-tokens, 20m-tokens-2048, gates,",
        ),
        (
            ["compare", "--data", "x", "--mechanism", "gpt"],
            "mechanism: expected one of softmax, taylor, linear, taylor, no convolution, based,",
        ),
        (
            ["compare", "--quick", "--mechanism", "gpt"],
            "mechanism: expected one of softmax, taylor,",
        ),
        (
            ["compare", "--steps", "3", "--epochs", "1"],
            "steps: pass either steps or epochs, not both",
        ),
        (
            ["compare", "--learning-rate", "0.1", "--learning-rate", "0.1"],
            "--learning-rate: each once, got [0.1, 0.1]",
        ),
        (["recall", "--mechanism", "mamba"], "mechanism: expected one of softmax, window-16,"),
        (["recall", "--workers", "-1"], "workers: expected at least 1, got -1"),
        (["recall", "--pairs", "100"], "length: expected an even number of at least 400"),
        (
            ["bench", "accuracy", "--seed", "1", "--seed", "2"],
            "--seed: given 2 times, but it takes one value",
        ),
        (
            ["bench", "--threads", "1", "--quick", "--threads", "2"],
            "--threads: given 2 times, but it takes one value",
        ),
        (
            ["bench", "--batch", "1", "--batch", "1", "accuracy"],
            "--batch: given 2 times, but it takes one value",
        ),
        (
            ["bench", "--recipe", "mine"],
            "recipe: expected one of fair, implementations, blog, got 'mine'",
        ),
        (
            ["bench", "--mechanism", "mamba"],
            "mechanism: expected one of softmax, naive softmax, linear,",
        ),
        (["bench", "--dtype", "fp8"], "dtype: expected one of fp32, bf16, fp16, fp64, got 'fp8'"),
        (
            ["bench", "accuracy", "--operation", "mamba"],
            "operation: expected one of linear, taylor-2,",
        ),
        (["report", "/no/such/folder"], "folder: /no/such/folder is not the folder of a report"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, cumulant_here):
    if arguments[0] in ("train", "compare", "recall", "bench"):
        arguments = [*arguments, "--output", tmp_path / "out"]
        if "cuda" in arguments and torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    code, _, errors = cumulant_here(*arguments)
    assert code == 2, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cumulant: ")
    assert message in lines[0]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (
        tmp_path / "out" / "options.json"
    ).exists()  # the corrected command may use the same folder


def test_a_recipe_is_options_by_name(tmp_path):
    """An option on the command line wins over the recipe's, even at its own default."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; " * 400)
    options = [
        "--data",
        text,
        "--output",
        tmp_path / "run",
        "--width",
        16,
        "--depth",
        4,
        "--steps",
        2,
        "--context",
        64,
    ]
    done = cumulant(
        "train",
        "--recipe",
        "flash-enwik8",
        *options,
        "--accumulate",
        1,
        "--model-option",
        "group_size=32",
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["mixers"] == ["flash"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["group_size"]) == (16, 4, 32)
    assert (config["gated_activation"], config["token_shift"], config["preset"]) == (
        "laplace",
        True,
        "flash",
    )
    noted = json.loads((tmp_path / "run" / "options.json").read_text())
    assert (noted["clip"], noted["learning_rate"], noted["batch"], noted["accumulate"]) == (
        0.5,
        2e-4,
        4,
        1,
    )
    written = cumulant(
        "generate", tmp_path / "run", "--prompt", "the", "--max-new-tokens", 5, "--stats"
    )
    assert written.returncode == 0, written.stderr


def test_help():
    done = cumulant("train", "--help")
    assert done.returncode == 0
    for option in (
        "--data",
        "--preset",
        "--context",
        "--resume",
        "--packed",
        "--train-bpe",
        "--recipe",
    ):
        assert option in done.stdout
    assert cumulant("--help").returncode == 0


@pytest.mark.slow
def test_measurements_leave_reports(tmp_path):
    """From the command line to the page, and the page again."""
    two = ["--mechanism", "linear", "--mechanism", "softmax"]
    bench = cumulant("bench", "--quick", "--length", 16, *two, "--output", tmp_path / "b")
    assert bench.returncode == 0, bench.stderr
    assert "On this machine, forward: " in bench.stdout
    recall = cumulant(
        "recall", "--quick", "--mechanism", "linear", "--steps", 2, "--seeds", 1,
        "--learning-rate", 0.001,
        "--width", 16, "--workers", 1, "--output", tmp_path / "r",
    )  # fmt: skip
    assert recall.returncode == 0, recall.stderr
    assert "Accuracy on 32 pairs in one context" in recall.stdout
    accuracy = cumulant(
        "bench", "accuracy", "--length", 32, "--operation", "elita", "--output", tmp_path / "a"
    )
    assert accuracy.returncode == 0, accuracy.stderr
    for name in "bra":
        page = tmp_path / name / "report.html"
        first = page.read_text()
        page.unlink()
        assert cumulant("report", tmp_path / name).returncode == 0
        assert page.read_text() == first
