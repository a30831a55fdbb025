"""Text is printed as its tokens come, and the pieces make the whole wherever a run is cut."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cumulant.text.stream import MOST, IncrementalDecoder
from cumulant.text.tokenizer import byte_tokenizer, train_bpe

END = "<|endoftext|>"
TEXT = "Die Möwe flog über das Meer; 世界 and 🙂🏳️‍🌈, naïve café.\nThe cats' mats sat.\n" * 3


def word_pieces():
    words = ["[UNK]", END, "the", "cat", "##s", "sat", "##ting", "on", "mat", ".", ",", "##!"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def byte_fallback():
    """A tokenizer like Llama's: spaces belong to the next word, unknown characters are bytes."""
    words = [
        "<unk>",
        END,
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"Diethflogvnasdr",
        "▁the",
        "cat",
    ]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bpe": lambda: train_bpe([TEXT.encode()], 300),
    "word pieces": word_pieces,
    "byte fallback": byte_fallback,
}


def pieces(tokenizer, prompt, tokens, cuts=()):
    """The text of `tokens` behind `prompt`; at each cut a new decoder takes over."""
    decoder = IncrementalDecoder(tokenizer)
    decoder.read_prompt(prompt)
    found = []
    for i, token in enumerate(tokens):
        if i in cuts:
            decoder = IncrementalDecoder(tokenizer, tuple(decoder.tokens), decoder.given)
        found.append(decoder.add(token))
    return [*found, decoder.finish()]


def ids_of(tokenizer, name):
    if name == "word pieces":
        return random.Random(0).choices(range(2, len(tokenizer)), k=200)
    return tokenizer.encode(TEXT, add_special_tokens=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_are_the_text(name):
    tokenizer = TOKENIZERS[name]()
    ids = ids_of(tokenizer, name)
    for prompt in (0, 1, 3, 40, 41, 42):
        found = pieces(tokenizer, ids[:prompt], ids[prompt:])
        before = tokenizer.decode(ids[:prompt], clean_up_tokenization_spaces=False)
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not before.endswith("\ufffd"):  # a prompt is text: it ends with a character
            assert before + "".join(found) == whole
            assert all("\ufffd" not in piece for piece in found)
        assert sum(map(bool, found)) > len(ids) / 8  # it comes as it goes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cut_anywhere(name):
    tokenizer = TOKENIZERS[name]()
    ids = ids_of(tokenizer, name)
    once = pieces(tokenizer, ids[:5], ids[5:])
    assert pieces(tokenizer, ids[:5], ids[5:], range(len(ids))) == once
    assert pieces(tokenizer, ids[:5], ids[5:], (7, 50, 51)) == once


@pytest.mark.parametrize("name", ["bytes", "byte fallback"])
def test_bytes_that_are_no_text(name):
    """They become replacement characters as soon as that is certain."""
    tokenizer = TOKENIZERS[name]()
    first = 0 if name == "bytes" else tokenizer.convert_tokens_to_ids("<0x00>")
    sure = pieces(tokenizer, [], [first + b for b in b"a\xff\xe4b\xe4\xb8"])
    # the second decoder shows a run of bytes that is not UTF-8 throughout as so many of them
    assert "".join(sure) == ("a\ufffd\ufffdb\ufffd" if name == "bytes" else "a" + 5 * "\ufffd")
    assert "\ufffd" not in "".join(sure[:3])
    assert sure[-1].startswith("\ufffd")
    garbage = [first + 0x80] * (3 * MOST)
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(map(decoder.add, garbage))
    assert len(decoder.tokens) <= MOST + 1
    assert text.count("\ufffd") == len(text) >= 2 * MOST


def test_special_tokens_are_no_text_and_take_no_room():
    tokenizer = byte_tokenizer()
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.add(256) for _ in range(2 * MOST)) + decoder.add(65) == "A"
    assert len(decoder.tokens) <= MOST + 1


def test_only_the_end_of_a_prompt_is_kept():
    tokenizer = TOKENIZERS["bpe"]()
    decoder = IncrementalDecoder(tokenizer)
    decoder.read_prompt(tokenizer.encode(TEXT * 50))
    assert len(decoder.tokens) <= 40
    assert decoder.finish() == ""
