"""Finding and reading text files."""

import gzip
import io
import os
import sys
from pathlib import Path

import pytest

from cumulant.text.corpus import load_corpus, load_documents
from cumulant.text.files import read_files

TEXT = "".join(f"line {i}: der Fluß fließt, 日本語 too\n" for i in range(400))


def test_every_file_once_by_its_real_path(tmp_path):
    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    (texts / "a.txt").write_text(TEXT)
    (texts / "b.txt").symlink_to("a.txt")
    (texts / "sub" / "loop").symlink_to(texts)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.txt").write_text("from a linked folder\n" * 20)
    (texts / "linked").symlink_to(elsewhere)
    found = read_files([str(texts)])
    assert [name for name, _ in found.texts] == ["a.txt", "linked/c.txt"]
    assert found.links == 1
    assert "1 further links to the same files read once" in load_corpus(str(texts)).notes
    assert len(read_files([str(texts / "a.txt"), str(texts / "*.txt"), str(texts)]).texts) == 2


def test_several_sources_are_one_text(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(TEXT[i * 50 : i * 50 + 400])
    sources = [str(tmp_path / "1*.txt"), str(tmp_path / "2.txt")]
    corpus = load_corpus(sources)
    assert len(corpus.train) + len(corpus.heldout) == 12
    assert corpus.name == ", ".join(sources)
    for other in ("stdlib", "hf:some/set"):
        with pytest.raises(ValueError, match="data: .* stands alone"):
            load_corpus([*sources, other])
    with pytest.raises(ValueError, match="data: expected at least one file"):
        load_corpus([])


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.txt")
    Path(name).write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT + "more\n")
    corpus = load_corpus(str(tmp_path))
    assert "".join(corpus.describe()).encode()
    assert load_documents(name) == [TEXT.encode()]
    Path(name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"n\\xff.txt is not UTF-8 text"):
        load_documents(name)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1251"]
)
def test_other_encodings(tmp_path, encoding):
    text = TEXT.replace("日本語", "") if encoding == "latin-1" else "Привет, мир\n" * 100
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    hint = "latin-1 or cp1252" if encoding in ("latin-1", "cp1251") else encoding
    with pytest.raises(ValueError, match=rf"a.txt is no.* at offset \d+; .*--encoding {hint}"):
        load_documents(str(path))
    assert load_documents(str(path), encoding=encoding) == [text.encode()]


def test_mistakes_in_encodings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ß" * 200)
    with pytest.raises(ValueError, match="encoding: Python knows no encoding 'utf-9'"):
        load_documents(str(path), encoding="utf-9")
    with pytest.raises(ValueError, match="a.txt is not ascii text: at byte 0"):
        load_documents(str(path), encoding="ascii")
    path.write_bytes(b"some text\0more")
    with pytest.raises(ValueError, match="a.txt is no text: a NUL at offset 9"):
        load_documents(str(path))


def test_byte_order_marks_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_documents(str(path)) == [TEXT.encode()]


def test_packed_files(tmp_path):
    import pyarrow

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    with pyarrow.output_stream(str(tmp_path / "b.zst"), compression="zstd") as file:
        file.write(TEXT.encode() + b"b")
    assert sorted(load_documents(str(tmp_path))) == [TEXT.encode(), TEXT.encode() + b"b"]
    whole = (tmp_path / "a.txt.gz").read_bytes()
    (tmp_path / "c.gz").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="c.gz cannot be unpacked"):
        load_documents(str(tmp_path / "c.gz"))
    (tmp_path / "b.zst").write_bytes((tmp_path / "b.zst").read_bytes()[:-20])
    with pytest.raises(ValueError, match="b.zst cannot be unpacked"):
        load_documents(str(tmp_path / "b.zst"))


def test_standard_input_and_pipes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert load_documents("-") == [TEXT.encode()]
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe\n" * 50)
    os.close(writing)
    assert load_documents(f"/dev/fd/{reading}") == [b"from a pipe\n" * 50]
    os.close(reading)


def test_what_is_left_out_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (tmp_path / "c.txt").write_bytes("Fluß".encode("latin-1") * 100)
    lines = load_corpus(str(tmp_path)).describe()
    assert sum("left out: " in line for line in lines) == 2
    assert any("b.png" in line and "binary data" in line for line in lines)
    assert any("c.txt" in line and "--encoding latin-1" in line for line in lines)


def test_folders_that_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    (tmp_path / "run" / "options.json").write_text("{}" * 100)
    assert len(load_corpus(str(tmp_path), exclude=[tmp_path / "run"]).train) == 1
    assert len(load_documents(str(tmp_path))) == 2


def test_training_and_scoring_take_several_files_in_their_encoding(tmp_path, capfd, monkeypatch):
    """The run's own folder inside the folder it reads is left out of the text."""
    from cumulant.cli import app

    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes("Fluß und Hügel\n".encode("latin-1") * 300)
    Path("b.txt").write_bytes("über Täler\n".encode("latin-1") * 300)
    Path("sub").mkdir()
    small = [
        "--width",
        "16",
        "--depth",
        "1",
        "--heads",
        "2",
        "--context",
        "16",
        "--batch",
        "2",
        "--steps",
        "2",
    ]

    def run(*arguments):
        app([*arguments], standalone_mode=False)
        return capfd.readouterr().out

    both = ["--data", "a.txt", "--data", "b.txt", "--encoding", "latin-1"]
    assert "in 2 documents" in run("train", *both, "--output", "run", *small)
    assert "9,000" in run("evaluate", "run", *both)  # bytes of both as UTF-8
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text.*--encoding"):
        run("evaluate", "run", "--data", "a.txt")
    with pytest.raises(ValueError, match="--encoding latin-1"):
        run("train", "--data", "a.txt", "--output", "other", *small)
    for path in ("a.txt", "b.txt"):
        Path("sub", path).write_text(f"{path}: text of a folder\n" * 200)
    monkeypatch.chdir(tmp_path / "sub")
    first = run("train", "--data", ".", "--output", "run", *small)
    again = run("train", "--data", ".", "--output", "run", *small[:-1], "4", "--resume")
    assert "in 2 documents" in first
    assert "in 2 documents" in again
    assert "resuming run from checkpoint-2" in again


def test_the_cost_of_whole_documents_is_said():
    from types import SimpleNamespace

    import numpy as np

    from cumulant.text.evaluate import LONG, notice_of_cost
    from cumulant.text.tokens import TokenFile

    def notice(kind, longest):
        text = TokenFile(np.zeros(longest + 10, dtype=np.uint16), np.array([0, 10]), longest)
        return notice_of_cost(SimpleNamespace(config=SimpleNamespace(layer_types=[kind])), text)

    assert "the longest has 16,385 tokens" in notice("full_attention", LONG + 1)
    assert notice("full_attention", LONG) == notice("cumulant_state", 10 * LONG) == ""
