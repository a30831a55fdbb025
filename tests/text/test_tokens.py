"""Token files, and what they report of the text."""

import _thread
import signal
import threading
import time

import pytest
from tokenizers import Tokenizer, models, normalizers

from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.text import evaluate
from cumulant.text.corpus import load_corpus
from cumulant.text.evaluate import Score
from cumulant.text.tokenizer import byte_tokenizer, interruptible, load_tokenizer
from cumulant.text.tokens import check_tokens, read_tokens, tokenize, write_tokens


def test_what_a_tokenizer_loses_is_kept_and_said(tmp_path):
    tokenizer = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.model = models.BPE(vocab={**tokenizer.get_vocab(), "ab": 300}, merges=[("a", "b")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("ABcd" * 4000)
    write_tokens(tmp_path / "t", load_corpus(str(tmp_path / "a.txt")), load_tokenizer(tmp_path))
    lost = read_tokens(tmp_path / "t")[1].lost
    assert lost == pytest.approx(0.5, abs=0.01)
    score = Score(1.0, 1.0, 1, 1, lost)
    assert score.as_dict()["lost"] == lost
    assert score.note.startswith("the tokenizer does not keep the text: 50% of its bytes differ")
    assert not Score(1.0, 1.0, 1, 1).note


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"bytes": 3}', '{"bytes": {"train": "x", "heldout": 1}}']
)
def test_broken_notes_of_tokens(content, tmp_path):
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ValueError, match="tokens: .*tokens.json is missing or damaged"):
        read_tokens(tmp_path)


@pytest.mark.parametrize("name", ["train.npy", "heldout.npy", "heldout-starts.npy", "tokens.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_token_arrays_that_cannot_be_read(name, damage, tmp_path):
    corpus = stories(tmp_path)
    write_tokens(tmp_path / "t", corpus, byte_tokenizer())
    file = tmp_path / "t" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:100] if damage == "cut" else b"")
    with pytest.raises(ValueError, match=rf"tokens: .*{name} is missing or damaged"):
        read_tokens(tmp_path / "t")


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "3", '{"key": 3}', '{"key": {"digest": 5}}', "\xff"]
)
def test_notes_of_another_text_are_written_anew(content, tmp_path):
    corpus = stories(tmp_path)
    write_tokens(tmp_path / "t", corpus, byte_tokenizer())
    note = tmp_path / "t" / "tokens.json"
    whole = note.read_bytes()
    note.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"data: .* is not the text that the run in .* was started with"
    ):
        check_tokens(tmp_path / "t", corpus)
    write_tokens(tmp_path / "t", corpus, byte_tokenizer())
    assert note.read_bytes() == whole


def stories(folder):
    (folder / "a.txt").write_text("a story that ends. " * 900)
    return load_corpus(str(folder / "a.txt"))


def test_no_figure_for_bytes_that_were_not_scored(tmp_path, monkeypatch):
    """A tokenizer that cuts documents scores 64 tokens, which all bytes must not divide."""
    text = tokenize([b"a text of some words. " * 20], byte_tokenizer())
    config = from_preset(
        "linear", vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = CumulantForCausalLM(config)
    whole = evaluate.windowed
    assert evaluate.evaluate_windowed(model, text, 32).tokens == len(text.ids) - 1
    monkeypatch.setattr(evaluate, "windowed", lambda *a, **k: (whole(*a, **k)[0], 64))
    with pytest.raises(
        ValueError, match="text: 64 tokens were scored, but the text has 440 to score"
    ):
        evaluate.evaluate_windowed(model, text, 32)


def test_interrupts_are_answered_while_native_code_runs():
    """Tokenizing and training a BPE take long, and hold no Python that could be interrupted."""
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests run in the background
    try:
        threading.Timer(0.3, _thread.interrupt_main).start()
        started = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            interruptible(lambda: time.sleep(10))
        assert time.perf_counter() - started < 5
    finally:
        signal.signal(signal.SIGINT, before)
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)
