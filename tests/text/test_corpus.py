"""Corpora, tokenizers and batches."""

import json

import numpy as np
import pytest
import torch

from cumulant.text import corpus as corpora
from cumulant.text.corpus import load_corpus, load_documents
from cumulant.text.tokenizer import byte_tokenizer, encode, load_tokenizer, train_bpe
from cumulant.text.tokens import (
    PackedDocuments,
    RandomWindows,
    collate,
    read_tokens,
    tokenize,
    write_tokens,
)

TEXT = "".join(f"line {i}: der Fluß fließt, 日本語 too\n" for i in range(400))


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        path = tmp_path / "texts" / f"{i // 5}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT[i * 100 : (i + 3) * 400])
    (tmp_path / "texts" / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "texts" / ".hidden").write_text("not read")
    return tmp_path / "texts"


def test_one_file_loses_its_tail(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    corpus = load_corpus(str(path), heldout=0.1)
    assert len(corpus.train) == len(corpus.heldout) == 1
    assert corpus.train[0] + corpus.heldout[0] == TEXT.encode()
    assert corpus.heldout[0].startswith(b"line ")
    assert 0.08 < corpus.sizes[1] / len(TEXT.encode()) < 0.11
    long = tmp_path / "b.txt"
    long.write_text("ß" * 1000)  # no line to cut at: still not inside a character
    assert load_corpus(str(long), heldout=0.1).heldout[0].decode() == "ß" * 100


def test_folders_and_globs(folder):
    corpus = load_corpus(str(folder), heldout=0.2)
    assert len(corpus.skipped) == 1
    assert "image.png is not UTF-8 text: byte 0x89 at offset 0" in corpus.skipped[0]
    assert len(corpus.train) + len(corpus.heldout) == 20
    assert not set(corpus.train) & set(corpus.heldout)
    assert 0 < corpus.sizes[1] <= 0.2 * sum(corpus.sizes)
    assert corpus.digest == load_corpus(str(folder), heldout=0.2).digest
    assert b"not read" not in corpus.train + corpus.heldout
    some = load_corpus(str(folder / "*" / "1*.txt"), heldout=0.2)
    assert len(some.train) + len(some.heldout) == 11
    assert len(load_documents(str(folder))) == 20


def test_the_split_does_not_depend_on_spelling(folder, monkeypatch):
    digest = load_corpus(str(folder)).digest
    monkeypatch.chdir(folder.parent)
    assert load_corpus("texts").digest == load_corpus("./texts/").digest == digest
    assert load_corpus("texts/*/*.txt").digest == load_corpus(str(folder / "*/*.txt")).digest


def test_the_standard_library():
    names = [name for name, _ in corpora.stdlib_documents()]
    assert "argparse.py" in names
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)
    corpus = load_corpus()
    train, held = corpus.sizes
    assert train + held > 8e6
    assert 0.03 < held / (train + held) < 0.06
    assert load_corpus("stdlib").digest == corpus.digest


@pytest.mark.filterwarnings("ignore")
def test_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    source = tmp_path / "set"
    source.mkdir()
    rows = [{"text": f"document {i} " * 5, "id": i} for i in range(30)] + [{"text": "", "id": 30}]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(f"hf:{source}", heldout=0.2)
    assert sorted(corpus.train + corpus.heldout) == sorted(
        f"document {i} ".encode() * 5 for i in range(30)
    )
    (source / "validation.jsonl").write_text(json.dumps({"text": "held " * 40, "id": 1}))
    assert load_corpus(f"hf:{source}").heldout == [b"held " * 40]
    with pytest.raises(
        ValueError, match=r"text_column: the dataset .* has no column 'body'; it has text, id"
    ):
        load_corpus(f"hf:{source}", text_column="body")
    with pytest.raises(ValueError, match=r"data: cannot load the dataset"):
        load_corpus(f"hf:{tmp_path / 'nothing'}")


def test_a_dataset_by_its_id(tmp_path, monkeypatch):
    """owner/name is a dataset unless it is a path: files on disk come first."""
    import datasets

    asked = []

    def load(identifier, config):
        asked.append((identifier, config))
        splits = {"train": ["one text", "another text"], "test": ["held out " * 20]}
        return datasets.DatasetDict(
            {k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    assert load_corpus("owner/name").train == [b"one text", b"another text"]
    assert load_corpus("hf:owner/name:small").name == "hf:owner/name:small"
    assert asked == [("owner/name", None), ("owner/name", "small")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text(TEXT)
    assert load_corpus("owner/name").train[0].startswith(b"line 0")
    for path in ("owner/missing", "texts/novel.txt"):
        with pytest.raises(ValueError, match=rf"data: no such file or folder: {path}$"):
            load_corpus(path)
    assert len(asked) == 2


def test_bad_data(tmp_path):
    def refuses(name, message, **options):
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name), **options)

    with pytest.raises(
        ValueError, match="data: expected a file, folder, glob or dataset, got an empty name"
    ):
        load_corpus("")
    refuses("missing.txt", r"data: no such file or folder: ")
    with pytest.raises(
        ValueError,
        match=(
            r"data: no such file or folder: org/name; and there is no dataset of that name within"
            r" reach"
        ),
    ):
        load_corpus("org/name")
    (tmp_path / "empty.txt").write_text("")
    refuses("empty.txt", r"empty.txt is empty; pass text files")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    refuses(
        "binary.bin",
        r"binary.bin is not UTF-8 text: byte 0x80 at offset 128; it looks like binary data: leave"
        r" it out",
    )
    (tmp_path / "latin.txt").write_bytes("Flu\xdf".encode("latin-1"))
    refuses("latin.txt", r"latin.txt is not UTF-8 text")
    (tmp_path / "none").mkdir()
    refuses("none", r"the folder .* holds no files")
    refuses("*.md", r"data: no file matches ")
    (tmp_path / "tiny.txt").write_text("x")
    refuses(
        "tiny.txt",
        r"holds too few documents|leaves 1 bytes to hold out, too few to measure anything",
    )
    refuses("tiny.txt", r"heldout: expected a share between 0 and 1, got 1.5", heldout=1.5)


def test_byte_tokenizer():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == 256
    ids = tokenizer(TEXT[:50], add_special_tokens=False)["input_ids"]
    assert ids == list(TEXT[:50].encode())
    assert tokenizer.decode(ids) == TEXT[:50]
    assert [x.tolist() for x in encode(tokenizer, [b"ab", b""])] == [[97, 98], []]
    batch = tokenizer(["a", "abc"], padding=True, padding_side="left", return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_trained_and_loaded_tokenizers(tmp_path):
    tokenizer = train_bpe([TEXT.encode()], 300)
    assert len(tokenizer) == 300
    ids = encode(tokenizer, [TEXT.encode()])[0]
    assert len(ids) < len(TEXT.encode()) / 2
    assert tokenizer.decode(ids) == TEXT
    tokenizer.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.eos_token_id == tokenizer.eos_token_id
        assert np.array_equal(encode(again, [TEXT.encode()])[0], ids)
    with pytest.raises(ValueError, match="train_bpe: expected at least 257 tokens"):
        train_bpe([b"x"], 100)
    with pytest.raises(ValueError, match=r"tokenizer: no tokenizer.json at "):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_token_files(folder, tmp_path):
    corpus, tokenizer = load_corpus(str(folder), heldout=0.2), byte_tokenizer()
    write_tokens(tmp_path / "t", corpus, tokenizer)
    train, heldout = read_tokens(tmp_path / "t")
    assert isinstance(train.ids, np.memmap)
    assert train.ids.dtype == np.uint16
    assert (train.text_bytes, heldout.text_bytes) == corpus.sizes
    assert (train.ids[train.starts] == 256).all()
    assert len(train.ids) == train.text_bytes + len(corpus.train)
    assert bytes(train.ids[1 : train.starts[1]].astype(np.uint8)) == corpus.train[0]
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "t").iterdir())]
    write_tokens(tmp_path / "t", corpus, tokenizer)  # nothing to do
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "t").iterdir())]
    write_tokens(tmp_path / "t", load_corpus(str(folder), heldout=0.4), tokenizer)
    assert read_tokens(tmp_path / "t")[1].text_bytes > heldout.text_bytes


def test_windows_depend_on_nothing_but_seed_and_index():
    tokens = tokenize([TEXT.encode()], byte_tokenizer())
    windows = RandomWindows(tokens, 32, 100, seed=3)
    assert len(windows) == 100
    first = windows[7]
    assert torch.equal(first["input_ids"][1:], first["labels"][:-1])
    assert torch.equal(RandomWindows(tokens, 32, 9, seed=3)[7]["labels"], first["labels"])
    assert not torch.equal(RandomWindows(tokens, 32, 9, seed=4)[7]["labels"], first["labels"])
    exact = tokenize([b"x" * 32], byte_tokenizer())  # with the end of text, one window
    assert RandomWindows(exact, 32, 1, seed=0)[0]["input_ids"].tolist() == [256] + [120] * 31
    with pytest.raises(
        ValueError,
        match=r"context: the training text has 33 tokens, too few for one window of 33 \+ 1",
    ):
        RandomWindows(exact, 33, 1, seed=0)


def test_packed_windows_hold_documents():
    documents = [bytes([65 + i]) * (3 + 7 * i) for i in range(8)]
    packed = PackedDocuments(tokenize(documents, byte_tokenizer()), 40, 50, seed=0)
    ends = 0
    for i in range(50):
        window = packed[i]
        assert len(window["input_ids"]) == len(window["labels"]) == 40
        bounds = window["bounds"].tolist()
        assert (bounds[0], bounds[-1]) == (0, 40)
        for a, b in zip(bounds, bounds[1:]):
            inputs, labels = window["input_ids"][a:b].tolist(), window["labels"][a:b].tolist()
            letters = {x for x in inputs + labels if x != 256}
            assert len(letters) == 1  # one document
            assert inputs[1:] == labels[:-1]
            assert 256 not in labels[:-1]
            ends += labels[-1] == 256
    assert ends > 20  # where a document ends, that is to be predicted
    batch = collate([packed[0], packed[1]])
    assert batch["input_ids"].shape == (1, 80)
    cu_seqlens = batch["cu_seqlens"].tolist()
    assert cu_seqlens == packed[0]["bounds"].tolist() + [
        x + 40 for x in packed[1]["bounds"].tolist()[1:]
    ]
    assert torch.equal(batch["shift_labels"][0, 40:], packed[1]["labels"])
