"""The command line with closed or narrow terminals, pipes, odd paths and other processes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as library

import cumulant.__main__ as entry
from cumulant import cli
from cumulant.bench import commands

from .test_cli import ENVIRONMENT

UTF8 = {**ENVIRONMENT, "LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of bytes that was not trained, in a folder whose name looks like markup."""
    from cumulant.models import CumulantForCausalLM, from_preset
    from cumulant.text.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("streams") / "a [red] :cat: b"
    torch.manual_seed(0)
    fields = {
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    CumulantForCausalLM(from_preset("linear", **fields)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs a command in this process; gives exit code, standard output and standard error."""
    for module, name in (
        (cli, "silence_libraries"),
        (cli, "silence_warnings"),
        (commands, "silence_libraries"),
    ):
        monkeypatch.setattr(module, name, lambda: None)  # they are for the whole process
    library.disable_progress_bar()

    def run(*arguments, stdin=b"", columns=200, home=None):
        monkeypatch.setattr(sys, "argv", ["cumulant", *map(str, arguments)])
        monkeypatch.setattr(
            sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        )
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(
            commands, "console", commands.Console()
        )  # a console keeps the width it was made with
        if home is not None:
            monkeypatch.setenv("HOME", str(home))
        with pytest.raises(SystemExit) as end:
            entry.main()
        return end.value.code, *capfd.readouterr()

    yield run
    library.enable_progress_bar()


def one_line(done):
    code, out, errors = done
    (line,) = errors.strip().splitlines()
    assert code == 2
    assert out == ""
    return line


def shell(line, **options):
    """Runs a line of bash, in which $CUMULANT is the program."""
    environment = {**UTF8, "CUMULANT": f"{sys.executable} -m cumulant"}
    return subprocess.run(["bash", "-c", line], capture_output=True, env=environment, **options)


def test_closed_streams(model, command):
    code, out, errors = command("generate", model, "--max-new-tokens", 3, "--seed", 0, stdin=None)
    assert (code, out[-1], errors) == (0, "\n", "")
    assert shell("$CUMULANT --version <&- 2>&-").stdout.startswith(b"cumulant ")
    assert shell("$CUMULANT --version >&-").returncode == 0


def test_a_reader_that_goes_away(model, tmp_path, command):
    """No message, no traceback, and the state."""
    state = tmp_path / "s"
    line = (
        f"$CUMULANT generate '{model}' --max-new-tokens 100000 --seed 0 --prompt a --save-state"
        f" '{state}'"
    )
    done = shell(f"{line} | head -c 20; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.endswith(b"141\n")
    assert done.stderr.decode() == f"cumulant: stopped; continue with: --load-state {state}\n"
    assert command("generate", model, "--max-new-tokens", 3, "--load-state", state)[0] == 0
    assert shell("$CUMULANT --help | head -n 0; echo ${PIPESTATUS[0]}").stderr == b""


def test_ctrl_c_leaves_the_state(model, tmp_path):
    state = tmp_path / "s"
    words = [
        sys.executable,
        "-m",
        "cumulant",
        "generate",
        model,
        "--max-new-tokens",
        10**6,
        "--save-state",
        state,
    ]
    process = subprocess.Popen(
        [*map(str, words), "--prompt", "ab"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **UTF8},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # also where the tests run in the background
    )
    process.stdout.read(30)  # it has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)  # a busy machine
    assert process.returncode == 130
    assert errors.decode() == f"cumulant: stopped; continue with: --load-state {state}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_full_disk(model):
    done = shell(f"$CUMULANT generate '{model}' --max-new-tokens 3 --prompt ab > /dev/full")
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert "No space left on device" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompt", "ab\udcff"],
            "--prompt: expected UTF-8 text, got the byte 0xff at character 2",
        ),
        (
            ["--prompt", "a", "--save-state", "/"],
            "/: is a folder; name a file to save the state in",
        ),
        (["--prompt", "a", "--save-state", "/no/such/folder/s"], "no such folder: /no/such/folder"),
        (["--prompt", "a", "--save-state", "/proc/s"], "/proc/s: cannot be written"),
        (
            ["--prompt", "a", "--load-state", "/"],
            "/: is a folder; name the file that a state was saved in",
        ),
        (["--prompt", "a", "--load-state", "/no/s"], "/no/s"),
        (["--prompt", "a", "--load-state", "/bin/sh"], "/bin/sh: not a safetensors file"),
        (
            ["--temperature", "inf"],
            "--temperature: expected 0 (greedy) or a number of at least 1e-06, got inf",
        ),
        (["--top-p", "nan"], "--top-p: expected a probability"),
        (["--seed", "99999999999999999999"], "--seed: expected"),
    ],
)
def test_mistakes_of_generate(model, command, arguments, message):
    assert message in one_line(command("generate", model, "--max-new-tokens", 3, *arguments))


def test_prompts_from_a_pipe_keep_their_bytes(model, command):
    options = ("generate", model, "--max-new-tokens", 9, "--temperature", 0)
    given = command(*options, "--prompt", "a\r\né")
    assert given[0] == 0
    for text in (
        b"a\r\n\xc3\xa9",
        b"\xef\xbb\xbfa\r\n\xc3\xa9",
    ):  # a mark of UTF-8 at the beginning is no text
        assert command(*options, stdin=text) == given
    line = one_line(command(*options, stdin=b"ab\xff"))
    assert "prompt: expected UTF-8 text on standard input, got the byte 0xff at byte 2" in line


def test_home_in_paths(model, tmp_path, command):
    (tmp_path / "model").symlink_to(model)
    options = ("generate", "~/model", "--max-new-tokens", 2)
    assert command(*options, "--save-state=~/s", home=tmp_path)[0] == 0
    assert (tmp_path / "s").is_file()
    assert command(*options, "--load-state=~/s", home=tmp_path)[0] == 0
    measured = (
        "bench",
        "--quick",
        "--length",
        16,
        "--mechanism",
        "linear",
        "--pass",
        "decode",
        "--output=~/bench",
    )
    assert command(*measured, home=tmp_path)[0] == 0
    assert command("report", "~/bench", home=tmp_path)[0] == 0
    assert (tmp_path / "bench" / "report.html").is_file()


def test_narrow_terminals_and_markup(model, tmp_path, command):
    """No number is cut, and brackets in a path are no markup."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    options = ("evaluate", model, "--data", text, "--context", 64)
    score = json.loads(command(*options, "--json")[1])["windows of 64 tokens"]
    for columns in (200, 60, 30, 8):
        code, shown, _ = command(*options, columns=columns)
        assert code == 0
        assert "…" not in shown
        for number in (f"{score['bits_per_byte']:.4f}", f"{score['loss']:.4f}", "960"):
            assert number in shown, columns
    out = tmp_path / "x [bold] [/] :dog:"
    code, printed, _ = command(
        "bench", "--quick", "--length", 16, "--pass", "decode", "--output", out, columns=40
    )
    assert code == 0
    assert "…" not in printed
    assert f"{out}: report.html" in printed
    assert re.search(r"softmax [\d.,]+", printed)


def test_a_file_is_not_a_model(tmp_path, command):
    text = tmp_path / "novel.txt"
    text.write_text("It was a dark and stormy night.")
    line = one_line(command("evaluate", text))
    assert (
        f"{text} is a file; expected the folder of a trained model (a text goes to --data)" in line
    )
    assert "cumulant train" not in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"x" * 20),
        ("model.safetensors", b""),
        ("config.json", b"[1"),
        ("config.json", b"[]"),
        ("tokenizer.json", b"{}"),
    ],
)
def test_damaged_models_are_one_line(name, content, model, tmp_path, command):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / name).write_bytes(content)
    assert str(copy) in one_line(command("generate", copy, "--prompt", "a"))


def test_a_model_that_has_diverged_is_one_line(model, tmp_path, command):
    copy = tmp_path / "diverged"
    shutil.copytree(model, copy)
    weights = {name: x * torch.nan for name, x in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "that run diverged" in one_line(command("generate", copy, "--prompt", "a"))


@pytest.mark.parametrize(
    ("error", "rank", "code", "line"),
    [
        (ValueError("heads: expected\n  more"), "0", 2, "cumulant: heads: expected more"),
        (MemoryError(), "0", 2, "cumulant: out of memory"),
        (
            RuntimeError("probability tensor contains nan"),
            "0",
            2,
            "cumulant: probability tensor contains nan",
        ),
        (OverflowError("too large"), "0", 2, "cumulant: too large"),
        (
            FileNotFoundError(2, "No such file or directory", "/x [y]"),
            "0",
            2,
            "cumulant: /x [y]: No such file or directory",
        ),
        (
            KeyError("step"),
            "0",
            1,
            "cumulant: KeyError: 'step' (a fault of cumulant; CUMULANT_DEBUG=1 shows where)",
        ),
        (ValueError("heads: expected more"), "3", 2, ""),
        (RuntimeError("[../gloo/pair.cc:1] Connection closed by peer"), "3", 2, ""),
        (RuntimeError("out of luck"), "3", 2, "cumulant: out of luck"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, rank, code, line, command, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(entry, "run", fail)
    monkeypatch.setenv("RANK", rank)
    assert command("info") == (code, "", line and line + "\n")
    monkeypatch.setenv("CUMULANT_DEBUG", "1")
    with pytest.raises(type(error)):
        entry.main()


def test_a_line_is_written_whatever_the_terminal_knows():
    script = (
        "import sys; import cumulant.__main__ as m; sys.argv = ['cumulant', '\\u4e16\\udcff'];"
        " m.main()"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr == "cumulant: No such command '\\u4e16\\udcff'.\n"


def test_a_work_goes_on_when_nobody_reads_what_it_says(tmp_path):
    script = (
        "import time\nfrom cumulant.cli import say\nfor i in range(3):\n    say(str(i));"
        " time.sleep(0.2)\n"
    )
    script += f"open({str(tmp_path / 'done')!r}, 'w').close()"
    done = shell(f'{sys.executable} -c "{script}" | head -n 1')
    assert done.stdout == b"0\n"
    assert done.stderr == b""
    assert (tmp_path / "done").is_file()
