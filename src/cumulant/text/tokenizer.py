"""Tokenizers: bytes, any ``tokenizer.json``, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .chat import read_chat_template

END = "<|endoftext|>"
# in characters; merging takes time by the square of a word's length, and text may have no spaces
LONGEST_WORD = 128


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte of UTF-8, with the byte's value as its id; 256 ends a text."""
    vocab = {character: byte for byte, character in byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap_tokenizer(tokenizer)


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` tokens, including the end of text."""
    if vocab_size < 257:
        raise ValueError(
            "train_bpe: expected at least 257 tokens (the bytes and the end of text), got"
            f" {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    runs = "|".join(
        f"{kind}{{{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(runs), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text.decode() for text in documents]
    interruptible(lambda: tokenizer.train_from_iterator(texts, trainer=trainer))
    return _wrap_tokenizer(tokenizer)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a ``tokenizer.json`` or a folder with one; an end-of-text token is added if it has none.

    Only settings that turn text into tokens are kept. Truncation, padding, tokens around a text, a
    space before it and random merges are dropped. Beside the file, only a chat template is read.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"tokenizer: no tokenizer.json at {path}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_str(json.dumps(_without_prefix_space(settings)))
    except Exception as error:  # the library raises plain Exception for anything it cannot parse
        raise ValueError(f"tokenizer: {file} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    end = next(
        (
            t
            for t in (END, "</s>", "<eos>", "<|end_of_text|>")
            if tokenizer.token_to_id(t) is not None
        ),
        END,
    )
    tokenizer = _with_token(tokenizer, end)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        pad_token=end,
        split_special_tokens=True,
        chat_template=read_chat_template(file.parent),
    )


def _without_prefix_space(settings: Any) -> Any:
    """The settings without a space before a text, which decoding would keep."""
    if isinstance(settings, dict):
        off = {"add_prefix_space": False} if settings.get("type") == "ByteLevel" else {}
        return {name: _without_prefix_space(value) for name, value in settings.items()} | off
    return (
        [_without_prefix_space(value) for value in settings]
        if isinstance(settings, list)
        else settings
    )


def _with_token(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer with `token` after the highest id.

    The library would number it by the count of tokens, which is the id of another token if ids have
    gaps.
    """
    ids = set(tokenizer.get_vocab().values())
    if tokenizer.token_to_id(token) is not None or len(ids) == max(ids, default=-1) + 1:
        return tokenizer
    settings = json.loads(tokenizer.to_str())
    settings["model"]["vocab"][token] = max(ids) + 1
    return Tokenizer.from_str(json.dumps(settings))


def _wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,
    )


def byte_characters() -> dict[int, str]:
    """The characters of the 256 bytes in byte-level vocabularies.

    Printable Latin-1 stands for itself, and the rest are numbered from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest id, since ids may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def token_sizes(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """Bytes of text in each token of a byte-level vocabulary, ``[vocabulary]``.

    Special tokens have none.
    """
    special = set(tokenizer.all_special_ids)
    # every character of a token stands for a byte
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocabulary_size(tokenizer))))
    return np.array(
        [0 if token is None or i in special else len(token) for i, token in enumerate(tokens)]
    )


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    return len(tokenizer) == 257 and tokenizer.convert_tokens_to_ids(byte_characters()[0]) == 0


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: list[bytes], *, control_tokens: bool = False
) -> list[NDArray[np.uint32]]:
    """Ids of each document, and of nothing else.

    No special tokens are added, and none are read: ``<|endoftext|>`` in a text is read as plain
    characters. Truncation and padding, which an earlier call may have set, are turned off.

    control_tokens: read special tokens, in chats that a template has written.
    """
    if is_bytes(tokenizer):
        return [np.frombuffer(text, dtype=np.uint8).astype(np.uint32) for text in documents]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not control_tokens
    encoded: list[NDArray[np.uint32]] = []
    for first in range(0, len(documents), 256):  # an encoding takes far more memory than its ids
        texts = [text.decode() for text in documents[first : first + 256]]
        batch = interruptible(lambda: backend.encode_batch_fast(texts, add_special_tokens=False))  # noqa: B023
        encoded += [np.array(e.ids, dtype=np.uint32) for e in batch]
    return encoded


def share_lost(
    tokenizer: PreTrainedTokenizerFast, documents: list[bytes], ids: list[NDArray[np.uint32]]
) -> float:
    """Share of the documents' bytes that decoding does not return; exactly 0 if it returns all.

    It is measured on up to 100 samples of 200 characters from the whole text, each encoded by
    itself, by the longest common blocks (difflib) of a sample and its decoded text.
    """
    if is_bytes(tokenizer):
        return 0.0
    backend = tokenizer.backend_tokenizer
    back = interruptible(
        lambda: backend.decode_batch([i.tolist() for i in ids], skip_special_tokens=False)
    )
    if all(text.decode() == came for text, came in zip(documents, back, strict=True)):
        return 0.0
    text = b"\n".join(documents).decode()
    pieces = [text[a : a + 200] for a in range(0, len(text), max(200, len(text) // 100))]
    encoded = encode(tokenizer, [piece.encode() for piece in pieces])
    size = kept = 0
    for piece, came in zip(
        pieces, (backend.decode(i.tolist(), skip_special_tokens=False) for i in encoded)
    ):
        blocks = SequenceMatcher(None, piece, came, autojunk=False).get_matching_blocks()
        kept += sum(len(piece[block.a : block.a + block.size].encode()) for block in blocks)
        size += len(piece.encode())
    return max(1 - kept / size, 1 / len(text.encode()))


def interruptible(work: Callable[[], Any]) -> Any:
    """The result of `work`, which runs in a thread so that Ctrl-C interrupts native code.

    That code runs on until it is done, or the program ends.
    """
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # handed to the caller
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failure:
        raise failure[0]
    return result[0]
