"""Token ids of a text do not depend on settings in a tokenizer's file."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from cumulant.text.tokenizer import (
    END,
    byte_tokenizer,
    encode,
    load_tokenizer,
    share_lost,
    train_bpe,
    vocabulary_size,
)

TEXT = "".join(f"line {i}: Der Fluß fließt, 日本語 too\n" for i in range(400))


def encode_text(tokenizer, text):
    return encode(tokenizer, [text.encode()])[0].tolist()


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT.encode()], 300)


def truncation(t):
    t.enable_truncation(64)


def padding(t):
    t.enable_padding(length=100_000, pad_id=7)


def added(t):
    t.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )


def prefix(t):
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def dropout(t):
    t.model.dropout = 0.5


@pytest.mark.parametrize("setting", [truncation, padding, added, prefix, dropout])
def test_a_file_does_not_change_what_a_text_is(bpe, setting, tmp_path):
    tokenizer = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    setting(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    expected = encode(bpe, [TEXT.encode()])[0]
    assert np.array_equal(encode(loaded, [TEXT.encode()])[0], expected)
    assert encode_text(loaded, TEXT) == expected.tolist()
    assert loaded(TEXT)["input_ids"] == expected.tolist()


def test_a_call_leaves_nothing_behind(bpe):
    bpe(["ab", TEXT], truncation=True, max_length=8, padding="max_length")
    assert bpe.decode(encode_text(bpe, TEXT)) == TEXT


@pytest.mark.parametrize("kind", ["bytes", "bpe", "loaded"])
def test_the_end_of_text_in_a_text_is_plain(bpe, kind, tmp_path):
    bpe.save_pretrained(tmp_path)
    tokenizer = {"bytes": byte_tokenizer(), "bpe": bpe, "loaded": load_tokenizer(tmp_path)}[kind]
    text = f"before{END}after"
    ids = encode_text(tokenizer, text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert encode(tokenizer, [text.encode()])[0].tolist() == ids == tokenizer(text)["input_ids"]


def test_gaps_in_the_ids(tmp_path):
    gaps = Tokenizer(
        models.WordLevel({"a": 0, "b": 2, "c": 3, "[UNK]": 5, "d": 4}, unk_token="[UNK]")
    )
    gaps.pre_tokenizer = pre_tokenizers.Whitespace()
    for vocab in ({"a": 0, "b": 2, "[UNK]": 3}, {"a": 0, "b": 2, "c": 3, "d": 9, "[UNK]": 5}):
        gaps.model = models.WordLevel(vocab, unk_token="[UNK]")
        gaps.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.eos_token_id == max(vocab.values()) + 1
        assert vocabulary_size(tokenizer) == max(vocab.values()) + 2
        assert encode_text(tokenizer, "b a") == [2, 0]
        tokenizer.save_pretrained(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").eos_token_id == tokenizer.eos_token_id
    assert vocabulary_size(byte_tokenizer()) == 257


def test_what_a_tokenizer_loses_is_measured(bpe, tmp_path):
    def lost(tokenizer, text):
        return share_lost(tokenizer, [text.encode()], encode(tokenizer, [text.encode()]))

    assert lost(bpe, TEXT) == lost(byte_tokenizer(), TEXT) == 0
    lower = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    lower.save(str(tmp_path / "tokenizer.json"))
    text = "ABCDEfghij" * 50
    assert lost(load_tokenizer(tmp_path), text) == pytest.approx(0.5)
    assert lost(load_tokenizer(tmp_path), "ab" * 100_000 + "A") > 0
    unknown = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    unknown.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown.save(str(tmp_path / "tokenizer.json"))
    assert lost(load_tokenizer(tmp_path), "日本語" * 100) == 1


def test_words_of_any_length(bpe):
    text = (
        "abcdefgh" * 20_000 + " " * 5000 + "7" * 5000 + "-" * 5000
    )  # one word of 160,000 letters: quadratic, unbounded
    tokenizer = train_bpe([text.encode()], 300)
    assert tokenizer.decode(encode_text(tokenizer, text)) == text
    longest = max(len(t) for t in tokenizer.get_vocab())
    assert longest <= 128
