"""Held-out text is near the share asked for, and none of it is in the training text."""

import json

import pytest

from cumulant.text.corpus import LEAST_HELDOUT, load_corpus


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def story(seed, length):
    """A text of its own, in lines."""
    lines = (f"{seed}: line {i} of the story\n" for i in range(length))
    return "".join(lines)


def share(corpus):
    return corpus.sizes[1] / sum(corpus.sizes)


def assert_apart(corpus):
    """No held-out line is in the training text."""
    train = {line for text in corpus.train for line in text.splitlines()}
    held = [line for text in corpus.heldout for line in text.splitlines()]
    assert held
    assert not train & set(held)


@pytest.mark.parametrize("heldout", [0.01, 0.05, 0.3])
def test_three_novels(tmp_path, heldout):
    data = write(tmp_path, a=story("a", 3000), b=story("b", 4000), c=story("c", 5000))
    corpus = load_corpus(data, heldout=heldout)
    assert 0.8 * heldout < share(corpus) < 1.1 * heldout
    assert_apart(corpus)
    assert any("the tail of each" in note for note in corpus.notes) == (heldout < 0.1)


@pytest.mark.parametrize("heldout", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(
    "text",
    [
        "word " * 9000,
        "x" * 40_000,
        story("a", 2000),
        "short\n" * 10 + "y" * 50_000 + "\nend",
        "ß" * 20_000,
    ],
    ids=["one line", "no spaces", "lines", "one long last line", "two bytes each"],
)
def test_a_single_document(tmp_path, text, heldout):
    corpus = load_corpus(write(tmp_path, a=text), heldout=heldout)
    assert corpus.train[0] + corpus.heldout[0] == text.encode()
    assert 0.5 * heldout < share(corpus) < 2.1 * heldout
    corpus.heldout[0].decode()


def test_copies_are_on_one_side(tmp_path):
    """Twenty texts have five copies each, under any names."""
    texts = {f"{i}-{copy}": story(i, 50) for i in range(20) for copy in range(5)}
    corpus = load_corpus(write(tmp_path, **texts), heldout=0.2)
    assert 0.1 < share(corpus) <= 0.2
    assert_apart(corpus)
    assert len(corpus.train) + len(corpus.heldout) == 100
    assert "80 copies of other documents, kept on one side with them" in corpus.notes


def test_nothing_but_copies(tmp_path):
    corpus = load_corpus(
        write(tmp_path, a=story("a", 900), b=story("a", 900), c=story("a", 900)), heldout=0.1
    )
    assert_apart(corpus)
    assert 0.05 < share(corpus) < 0.15


def test_too_little_to_hold_out(tmp_path):
    data = write(tmp_path, a="a few words only\n" * 20)
    with pytest.raises(
        ValueError, match=rf"leaves \d+ bytes to hold out, too few .*{LEAST_HELDOUT}.*--heldout"
    ):
        load_corpus(data)
    assert load_corpus(data, heldout=0.6).sizes[1] >= LEAST_HELDOUT


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def write_rows(**splits):
        for split, rows in splits.items():
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return f"hf:{tmp_path / 'set'}"

    return write_rows


@pytest.mark.filterwarnings("ignore")
class TestDatasets:
    def test_nulls_are_no_text(self, dataset):
        rows = [{"text": f"a document, number {i} " * 3} for i in range(40)]
        corpus = load_corpus(dataset(train=[*rows, {"text": None}, {"text": None}]), heldout=0.2)
        assert not any(b"None" in text for text in (*corpus.train, *corpus.heldout))
        assert len(corpus.train) + len(corpus.heldout) == 40
        assert "2 rows without text (null) left out" in corpus.notes

    @pytest.mark.parametrize(
        ("value", "kind"),
        [(3, "int"), (2.5, "float"), (["a", "b"], "list"), ({"a": "b"}, "dict"), (True, "bool")],
    )
    def test_columns_that_are_not_text(self, dataset, value, kind):
        data = dataset(train=[{"text": value}] * 3)
        with pytest.raises(
            ValueError, match=f"text_column: the column 'text' .* holds no text, but {kind}"
        ):
            load_corpus(data)

    def test_chat_messages(self, dataset):
        rows = [{"chat": [{"role": "user", "content": f"question {i}?" * 5}]} for i in range(30)]
        data = dataset(train=rows)
        with pytest.raises(
            ValueError, match="holds chat messages, and the tokenizer has no chat template"
        ):
            load_corpus(data, text_column="chat")

        def chat(messages):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages)

        corpus = load_corpus(data, text_column="chat", heldout=0.2, chat=chat)
        assert sorted(corpus.train + corpus.heldout)[0].startswith(b"<user>question 0?")

    def test_held_out_documents_that_are_trained_on(self, dataset):
        train = [{"text": f"training text {i} " * 5} for i in range(20)]
        held = [{"text": f"held-out text {i} " * 5} for i in range(5)]
        corpus = load_corpus(dataset(train=train, validation=[*held, *train[:7]]))
        assert len(corpus.heldout) == 5
        assert any(
            note.startswith("7 documents of the split 'validation'") for note in corpus.notes
        )
