"""Recipes, and enwik8, which is fetched, checked and kept."""

import hashlib
import zipfile

import pytest

from cumulant.text import enwik8
from cumulant.text.corpus import load_corpus, load_documents
from cumulant.text.options import TrainingOptions
from cumulant.text.recipes import RECIPES, from_recipe

TEXT = "<page>Fluß, 日本語</page>\n".encode() * 40


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small archive in place of the real one, at an address that answers."""
    archive = tmp_path / "server" / "enwik8.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("enwik8", TEXT)
    monkeypatch.setenv("CUMULANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(enwik8, "URL", archive.as_uri())
    monkeypatch.setattr(enwik8, "ZIP_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(enwik8, "SPLIT", (700, 900))
    return archive


def test_enwik8_is_fetched_once_and_split_at_characters(served, tmp_path):
    corpus = load_corpus("enwik8")
    train, held = corpus.train[0], corpus.heldout[0]
    assert TEXT.startswith(train + held)
    assert 700 <= len(train) < 704
    assert 900 <= len(train + held) < 904
    train.decode(), held.decode()
    served.unlink()
    assert load_corpus("enwik8").digest == corpus.digest
    assert load_documents("enwik8") == [train, held]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["enwik8.zip"]


def test_what_comes_is_checked(served, tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "ZIP_SHA256", "0" * 64)
    with pytest.raises(
        ValueError,
        match=r"data: what came from file:.* is not enwik8: its SHA-256 differs; nothing was",
    ):
        load_corpus("enwik8")
    assert not list((tmp_path / "cache").iterdir())


def test_what_was_kept_is_checked(served, tmp_path):
    kept = tmp_path / "cache" / "enwik8.zip"
    kept.parent.mkdir()
    kept.write_bytes(b"half of it")
    with pytest.raises(
        ValueError, match=r"data: .*enwik8.zip is damaged \(File is not a zip file\); remove it"
    ):
        load_corpus("enwik8")
    damaged = bytearray(served.read_bytes())
    damaged[45:60] = b"x" * 15  # inside the compressed text
    kept.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"data: .*enwik8.zip is damaged .*; remove it"):
        load_corpus("enwik8")
    with zipfile.ZipFile(kept, "w") as file:
        file.writestr("enwik8", TEXT[:-1])
    with pytest.raises(
        ValueError, match=r"data: the text in .*enwik8.zip is not enwik8; remove it"
    ):
        load_corpus("enwik8")


def test_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("CUMULANT_CACHE", str(tmp_path))
    monkeypatch.setattr(enwik8, "URL", "http://127.0.0.1:9/enwik8.zip")
    with pytest.raises(
        ValueError,
        match=r"data: cannot download enwik8 from http://127.0.0.1:9/enwik8.zip .*pass --data",
    ):
        load_corpus("enwik8")
    assert not list(tmp_path.iterdir())


def test_a_file_of_that_name_is_that_file(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enwik8").write_text("line\n" * 1000)
    assert sum(load_corpus("enwik8").sizes) == 5000


def test_recipes():
    for name in RECIPES:
        options = from_recipe(name)
        assert {key: getattr(options, key) for key in RECIPES[name]} == RECIPES[name]
    options = from_recipe("flash-enwik8", depth=4, steps=1000, model_option=["group_size=64"])
    assert (options.depth, options.steps, options.evaluate_every, options.width) == (
        4,
        1000,
        1000,
        512,
    )
    assert options.overrides() == {
        "group_size": 64,
        "gated_activation": "laplace",
        "token_shift": True,
        "tie_word_embeddings": False,
        "logits_bias": True,
    }
    mixed = TrainingOptions(model_option=["a=[1, 2]", "b=x", "c=null", "d=False"])
    assert mixed.overrides() == {"a": [1, 2], "b": "x", "c": None, "d": False}
    with pytest.raises(ValueError, match="recipe: expected one of flash-enwik8, got 'x'"):
        from_recipe("x")
    with pytest.raises(TypeError, match="unexpected keyword argument 'dept'"):
        from_recipe("flash-enwik8", dept=3)
