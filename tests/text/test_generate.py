"""Generation across runs: what is printed, what a state file keeps, and interruptions."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import cumulant as cm
from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.text import generate as module
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.generate import SamplingOptions, fingerprint, generate
from cumulant.text.options import TrainingOptions
from cumulant.text.tokenizer import byte_tokenizer
from cumulant.text.train import train

from .conftest import SMALL
from .test_stream import byte_fallback, word_pieces

GREEDY = {"temperature": 0.0}


def build(size=257, **options):
    torch.manual_seed(0)
    fields = {
        "vocab_size": size,
        "hidden_size": size + size % 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    return CumulantForCausalLM(
        from_preset("linear", **fields, tie_word_embeddings=False, **options)
    ).eval()


def cycle(size, ids):
    """A model that repeats `ids`: each of its tokens has one next token."""
    model = build(size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.out_proj.weight.zero_()
            layer.feed_forward.out_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        model.lm_head.weight.zero_()
        for a, b in zip(ids, [*ids[1:], ids[0]]):
            model.lm_head.weight[b, a] = 1
    return model


def speaker(kind):
    if kind == "bytes":
        return cycle(257, list("世é🙂 b".encode())), byte_tokenizer(), " "
    if kind == "byte fallback":
        tokenizer = byte_fallback()
        ids = tokenizer.encode("Die 世é🙂", add_special_tokens=False)
        return cycle(len(tokenizer), ids), tokenizer, "Die"
    tokenizer = word_pieces()
    ids = tokenizer.convert_tokens_to_ids(["the", "cat", "##s", "sat", ".", "##!"])
    return cycle(len(tokenizer), ids), tokenizer, "the cat"


@pytest.mark.parametrize("kind", ["bytes", "byte fallback", "word pieces"])
def test_two_runs_make_the_text_of_one(kind, tmp_path, capsys):
    """Cut after any token, inside characters and words, the text is the same to the byte."""
    model, tokenizer, prompt = speaker(kind)
    state = str(tmp_path / "s")
    whole = generate(model, tokenizer, prompt, SamplingOptions(24, **GREEDY), stream=True)
    printed = capsys.readouterr().out
    assert printed == whole.text + "\n"
    for cut in range(1, 24):
        a = generate(
            model, tokenizer, prompt, SamplingOptions(cut, **GREEDY), save=state, stream=True
        )
        b = generate(
            model, tokenizer, "", SamplingOptions(24 - cut, **GREEDY), load=state, stream=True
        )
        assert a.text + b.text == whole.text, cut
        assert capsys.readouterr().out == printed
    if kind == "word pieces":
        assert whole.text.startswith("s sat.! the cats")
    else:
        assert "世é🙂" in whole.text
        assert "\ufffd" not in whole.text[:-1]


def test_a_run_in_three_parts_and_a_new_prompt(tmp_path):
    model, tokenizer, prompt = speaker("bytes")
    state = str(tmp_path / "s")
    parts = [generate(model, tokenizer, prompt, SamplingOptions(1, **GREEDY), save=state).text]
    parts += [
        generate(model, tokenizer, "", SamplingOptions(1, **GREEDY), load=state, save=state).text
        for _ in "123"
    ]
    assert parts == ["b", "", "", "世"]
    # a prompt behind an unfinished character: that is none any more, and what was asked is not
    # repeated
    generate(model, tokenizer, "", SamplingOptions(1, **GREEDY), load=state, save=state)
    assert generate(model, tokenizer, "é", SamplingOptions(4, **GREEDY), load=state).text == "🙂"


def test_without_a_state_to_save_the_end_is_printed(capsys):
    model, tokenizer, prompt = speaker("bytes")
    result = generate(model, tokenizer, prompt, SamplingOptions(2, **GREEDY), stream=True)
    assert result.text == "b\ufffd"
    assert capsys.readouterr().out == "b\ufffd\n"


def weights(model):
    return [name for name, _ in model.named_parameters()]


def test_a_state_belongs_to_all_weights(tmp_path):
    model, tokenizer, prompt = speaker("word pieces")
    state = str(tmp_path / "s")
    generate(model, tokenizer, prompt, SamplingOptions(3), save=state)
    before = fingerprint(model)
    for name in weights(model):
        weight = model.get_parameter(name)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        assert fingerprint(model) != before, name
        with pytest.raises(ValueError, match="load_state: .*s was written by another model"):
            generate(model, tokenizer, "", SamplingOptions(3), load=state)
        with torch.no_grad():
            weight.copy_(kept)
    assert fingerprint(model) == before
    generate(model, tokenizer, "", SamplingOptions(3), load=state)


def rewritten(path, **metadata):
    with safetensors.safe_open(path, "pt") as file:
        kept = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: value for name, value in {**kept, **metadata}.items() if value is not None}
    safetensors.torch.save_file(tensors, path, kept)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"weights": None, "model": "0123", "pending": "7"}, "an earlier version wrote it"),
        ({"weights": None, "text": None}, "another program"),
        ({"weights": "no"}, "was written by another model"),
        ({"text": None}, "is damaged"),
        ({"text": "{"}, "is damaged"),
        ({"text": "[1]"}, "is damaged"),
        ({"text": json.dumps({"unread": "x", "tokens": [], "given": 0})}, "is damaged"),
        (
            {"text": json.dumps({"unread": [999], "tokens": [], "given": 0})},
            "tokens that the model does not have",
        ),
        ({"text": json.dumps({"unread": [], "tokens": [], "given": 0})}, "is damaged"),
    ],
)
def test_states_that_cannot_be_continued(metadata, message, tmp_path):
    model, tokenizer, prompt = speaker("word pieces")
    state = str(tmp_path / "s")
    generate(model, tokenizer, prompt, SamplingOptions(3), save=state)
    rewritten(state, **metadata)
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, "", SamplingOptions(3), load=state)


@pytest.mark.parametrize("place", ["a folder", "no folder", "a device", "unwritable"])
def test_a_place_that_cannot_hold_the_state_is_found_before_generating(
    place, tmp_path, monkeypatch
):
    model, tokenizer, _ = speaker("word pieces")
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("generated"))
    path = {
        "a folder": tmp_path,
        "no folder": tmp_path / "no" / "s",
        "a device": "/dev/null",
        "unwritable": "/proc/s",
    }
    with pytest.raises(OSError, match=f"{path[place]}: "):
        generate(model, tokenizer, "the", SamplingOptions(3), save=str(path[place]))
    assert list(tmp_path.iterdir()) == []


class Pipe(io.TextIOWrapper):
    """A terminal of one encoding, whose reader goes away after some bytes."""

    def __init__(self, encoding, room=10**9):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.room = room

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_closed_pipe_leaves_the_state(tmp_path, monkeypatch):
    model, tokenizer, prompt = speaker("bytes")
    whole = generate(model, tokenizer, prompt, SamplingOptions(200, **GREEDY)).text
    pipe, state = Pipe("utf-8", room=30), str(tmp_path / "s")
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(BrokenPipeError):
        generate(model, tokenizer, prompt, SamplingOptions(200, **GREEDY), save=state, stream=True)
    read = pipe.buffer.getvalue().decode()
    assert whole.startswith(read)
    assert len(read) == 30
    monkeypatch.undo()
    rest = generate(model, tokenizer, "", SamplingOptions(40, **GREEDY), load=state).text
    assert whole.startswith(
        read + whole[30] + rest.removesuffix("\ufffd")
    )  # from the character that nobody read


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "b\\u4e16\\xe9\\U0001f642 "), ("latin-1", "b\\u4e16é\\U0001f642 ")],
)
def test_a_terminal_without_the_characters(encoding, shown, monkeypatch):
    model, tokenizer, prompt = speaker("bytes")
    monkeypatch.setattr(sys, "stdout", pipe := Pipe(encoding))
    generate(model, tokenizer, prompt, SamplingOptions(11, **GREEDY), stream=True)
    monkeypatch.undo()
    assert pipe.buffer.getvalue().decode(encoding) == shown + "\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_the_state(number, tmp_path, monkeypatch):
    """It may come between two tokens or two pieces of a long prompt; the text goes on alike."""
    model, tokenizer, prompt = speaker("bytes")
    state, seen = str(tmp_path / "s"), []

    class Interrupted(Exception):
        pass

    def handler(*_):
        raise Interrupted

    monkeypatch.setattr(module, "CHUNK", 4)
    forward = type(model.model).forward

    def interrupting(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == at:
            os.kill(os.getpid(), number)
        return forward(self, *args, **kwargs)

    before = signal.signal(number, handler)
    try:
        whole = generate(model, tokenizer, prompt * 18, SamplingOptions(30, **GREEDY))
        monkeypatch.setattr(type(model.model), "forward", interrupting)
        for at, unread in ((2, 10), (9, 1)):
            seen.clear()
            with pytest.raises(Interrupted):
                generate(model, tokenizer, prompt * 18, SamplingOptions(30, **GREEDY), save=state)
            assert len(seen) == at
            assert signal.getsignal(number) is handler
            note = json.loads(cm.load_state(state, return_metadata=True)[1]["text"])
            assert len(note["unread"]) == unread
            done = 0 if at == 2 else 4
            seen = [1] * 100
            rest = generate(model, tokenizer, "", SamplingOptions(30 - done, **GREEDY), load=state)
            assert whole.text.endswith(rest.text)
            assert rest.context == whole.context
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 1e-39},
            "temperature: expected 0 .greedy. or a number of at least 1e-06, got 1e-39",
        ),
        ({"temperature": float("inf")}, "temperature: .*got inf"),
        ({"temperature": float("nan")}, "temperature: .*got nan"),
        ({"temperature": -1.0}, "temperature: expected 0 .greedy. or more, got -1.0"),
        ({"top_p": float("nan")}, "top_p: .*got nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**30}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**30}, "seed"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-6}, {"temperature": 1e300}, {"top_p": 1e-30}, {"top_k": 10**9}]
)
def test_options_at_their_ends_sample(options):
    model, tokenizer, prompt = speaker("word pieces")
    assert generate(model, tokenizer, prompt, SamplingOptions(5, seed=0, **options)).new_tokens == 5


def test_prompts_that_are_no_text():
    model, tokenizer, _ = speaker("word pieces")
    with pytest.raises(
        ValueError, match="prompt: expected UTF-8 text, got the byte 0xff at character 3"
    ):
        generate(model, tokenizer, "the\udcff", SamplingOptions(3))


@pytest.mark.filterwarnings("ignore")
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


@pytest.mark.filterwarnings("ignore")
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
