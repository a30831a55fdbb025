"""Tokenizers: bytes, any ``tokenizer.json``, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, its id the byte's value; 256 ends a text."""
    vocab = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    return _wrap(tokenizer, regex=False)


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` tokens, the end of text among them."""
    if vocab_size < 257:
        raise ValueError(f"train_bpe: expected at least 257 tokens (the bytes and the end of text), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode() for text in documents), trainer=trainer)
    return _wrap(tokenizer, regex=True)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """From a ``tokenizer.json`` or a folder that holds one; its end-of-text token is kept, or added."""
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"tokenizer: no tokenizer.json at {path}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for anything it cannot parse
        raise ValueError(f"tokenizer: {file} is not a tokenizer.json: {error}") from error
    end = next((t for t in (END, "</s>", "<eos>", "<|end_of_text|>") if tokenizer.token_to_id(t) is not None), END)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)


def _wrap(tokenizer: Tokenizer, *, regex: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_characters() -> dict[int, str]:
    """Stand-ins of the 256 bytes in byte-level vocabularies: printable Latin-1 for itself, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def token_sizes(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """Bytes of text in each token of a byte-level vocabulary, special tokens having none: ``[vocabulary]``."""
    special = set(tokenizer.all_special_ids)
    # every character of a token stands for a byte
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if i in special else len(token) for i, token in enumerate(tokens)])


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    return len(tokenizer) == 257 and tokenizer.convert_tokens_to_ids(_byte_characters()[0]) == 0


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[bytes]) -> list[NDArray[np.uint32]]:
    """Ids of each document, no special tokens added."""
    if is_bytes(tokenizer):
        return [np.frombuffer(text, dtype=np.uint8).astype(np.uint32) for text in documents]
    encoded: list[NDArray[np.uint32]] = []
    for first in range(0, len(documents), 256):  # an encoding takes many times the memory of its ids
        texts = [text.decode() for text in documents[first : first + 256]]
        batch = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        encoded += [np.array(e.ids, dtype=np.uint32) for e in batch]
    return encoded
