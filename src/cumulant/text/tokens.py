"""Token files, memory-mapped, and the batches drawn from them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from .corpus import Corpus
from .tokenizer import encode, share_lost, token_sizes

Ids = NDArray[Any]


@dataclass(frozen=True)
class TokenFile:
    """One split: documents end to end, each after an end-of-text token, memory-mapped.

    ids: ``[N]``. starts: offset of each document's leading end-of-text token, ``[documents]``.
    text_bytes: UTF-8 bytes of the documents.
    lost: share of these that the tokenizer does not keep (`share_lost`), if measured.
    """

    ids: Ids
    starts: Ids
    text_bytes: int
    lost: float = 0.0


def first_tokens(text: TokenFile, tokens: int, tokenizer: PreTrainedTokenizerFast) -> TokenFile:
    """The first documents of the text, the last one cut, with `tokens` tokens to predict."""
    if len(text.ids) <= tokens + 1:
        return text
    ids, starts = text.ids[: tokens + 1], text.starts[text.starts <= tokens]
    return TokenFile(ids, starts, int(token_sizes(tokenizer)[ids].sum()))


def tokenize(
    documents: list[bytes],
    tokenizer: PreTrainedTokenizerFast,
    *,
    measure: bool = True,
    control_tokens: bool = False,
) -> TokenFile:
    """Documents as tokens, in memory.

    measure: also measure the share that the tokenizer loses. control_tokens: see `encode`.
    """
    end = np.array([tokenizer.eos_token_id], dtype=np.uint32)
    encoded = encode(tokenizer, documents, control_tokens=control_tokens)
    pieces = [np.concatenate((end, ids)) for ids in encoded]
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    lost = share_lost(tokenizer, documents, encoded) if measure else 0.0
    return TokenFile(np.concatenate(pieces), starts, sum(map(len, documents)), lost)


def write_tokens(
    folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, context: int = 1
) -> None:
    """Tokenize a corpus into `folder`, atomically, unless its tokens are there already.

    A text shorter than a window of `context` tokens is refused before anything is written.
    """
    index = folder / "tokens.json"
    key = {"digest": corpus.digest, "tokenizer": _fingerprint(tokenizer)}
    if corpus.is_chat:
        key["control_tokens"] = "read"
    if _read_key(index) == key:
        return
    splits = {
        name: tokenize(
            documents, tokenizer, measure=name == "heldout", control_tokens=corpus.is_chat
        )
        for name, documents in (("train", corpus.train), ("heldout", corpus.heldout))
    }
    RandomWindows(splits["train"], context, 1, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    index.unlink(missing_ok=True)  # without it the folder counts as empty
    largest = max(int(tokens.ids.max()) for tokens in splits.values())
    dtype = np.uint16 if largest < 2**16 else np.uint32
    sizes = {}
    for split, tokens in splits.items():
        _save_array(folder / f"{split}.npy", tokens.ids.astype(dtype))
        _save_array(folder / f"{split}-starts.npy", tokens.starts)
        sizes[split] = tokens.text_bytes
    lost = splits["heldout"].lost
    _write_atomically(
        index,
        json.dumps(
            {"key": key, "bytes": sizes, "data": corpus.name, "lost": lost}, indent=2
        ).encode(),
    )


def check_tokens(folder: Path, corpus: Corpus) -> None:
    """Refuse a text other than the one that the run was started with."""
    index = folder / "tokens.json"
    if _read_key(index).get("digest") != corpus.digest:
        raise ValueError(
            f"data: {corpus.name} is not the text that the run in {folder.parent} was started with"
        )


def _read_key(index: Path) -> dict[str, Any]:
    """The text and tokenizer of the tokens; empty if they are missing or unreadable."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    key = found.get("key") if isinstance(found, dict) else None
    return key if isinstance(key, dict) else {}


def read_tokens(folder: Path) -> tuple[TokenFile, TokenFile]:
    """The training and the held-out split written by `write_tokens`."""
    index = folder / "tokens.json"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        sizes = {split: int(content["bytes"][split]) for split in ("train", "heldout")}
        lost = {"train": 0.0, "heldout": float(content.get("lost", 0.0))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"tokens: {index} is missing or damaged ({error!r}); the run's text has to be read anew"
        ) from error
    train, heldout = (
        TokenFile(
            _load_array(folder / f"{split}.npy", mapped=True),
            _load_array(folder / f"{split}-starts.npy"),
            sizes[split],
            lost[split],
        )
        for split in ("train", "heldout")
    )
    return train, heldout


def _load_array(path: Path, *, mapped: bool = False) -> Ids:
    try:
        array: Ids = np.load(path, mmap_mode="r" if mapped else None)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"tokens: {path} is missing or damaged ({error}); the run's text has to be read anew"
        ) from error
    return array


def _fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _save_array(path: Path, array: Ids) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class RandomWindows(Dataset[dict[str, Tensor]]):
    """Window i has ``length + 1`` tokens, drawn from (seed, i).

    It is the same in any order, process or restart.
    """

    def __init__(self, tokens: TokenFile, length: int, count: int, seed: int):
        if len(tokens.ids) < length + 1:
            raise ValueError(
                f"context: the training text has {len(tokens.ids)} tokens, too few for one window"
                f" of {length} + 1; pass more text or a shorter --context"
            )
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = np.random.default_rng((self.seed, index))
        start = int(draw.integers(len(self.tokens.ids) - self.length))
        ids = torch.from_numpy(self.tokens.ids[start : start + self.length + 1].astype(np.int64))
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class DisjointWindows(Dataset[dict[str, Tensor]]):
    """Windows side by side, shuffled by (seed, pass) for each pass over the text."""

    def __init__(self, tokens: TokenFile, length: int, count: int, seed: int):
        RandomWindows(tokens, length, count, seed)  # the same demand on the text
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed
        self.windows = (len(tokens.ids) - 1) // length
        self.order: tuple[int, Ids] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, rank = divmod(index, self.windows)
        if self.order[0] != number:
            self.order = (
                number,
                np.random.default_rng((self.seed, number)).permutation(self.windows),
            )
        start = int(self.order[1][rank]) * self.length
        ids = torch.from_numpy(self.tokens.ids[start : start + self.length + 1].astype(np.int64))
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """Window i has whole documents end to end, and none sees another.

    Documents are drawn from (seed, i) in proportion to their length. A document longer than the
    window is cut to a random section, and the last document to the room that is left.
    """

    def __init__(self, tokens: TokenFile, length: int, count: int, seed: int):
        RandomWindows(tokens, length, count, seed)  # the same demand on the text
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = np.random.default_rng((self.seed, index))
        ids, starts = self.tokens.ids, self.tokens.starts
        sections: list[Ids] = []
        bounds, room = [0], self.length
        while room > 0:
            document = int(np.searchsorted(starts, draw.integers(len(ids)), side="right")) - 1
            first = int(starts[document])
            last = int(starts[document + 1]) if document + 1 < len(starts) else len(ids)
            if last - first > self.length + 1:
                first = int(draw.integers(first, last - self.length))
            stop = min(last, first + room) + 1  # with the end of text that follows
            section = ids[first:stop].astype(np.int64)
            if len(section) < 2:
                continue
            sections.append(section)
            room -= len(section) - 1
            bounds.append(self.length - room)
        return {
            "input_ids": torch.from_numpy(np.concatenate([ids[:-1] for ids in sections])),
            "labels": torch.from_numpy(np.concatenate([ids[1:] for ids in sections])),
            "bounds": torch.tensor(bounds),
        }


def collate(windows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack windows; packed ones go end to end into one row with `cu_seqlens`.

    `shift_labels` are aligned with the inputs: position t predicts ``shift_labels[t]``. ``fresh``
    marks the rows that start without a past, where states are carried.
    """
    if "bounds" not in windows[0]:
        batch = {
            "input_ids": torch.stack([w["input_ids"] for w in windows]),
            "shift_labels": torch.stack([w["labels"] for w in windows]),
        }
        if "fresh" in windows[0]:
            batch["fresh"] = torch.stack([w["fresh"] for w in windows])
        return batch
    length = len(windows[0]["input_ids"])
    bounds = [torch.zeros(1, dtype=torch.long)]
    bounds += [w["bounds"][1:] + i * length for i, w in enumerate(windows)]
    return {
        "input_ids": torch.cat([w["input_ids"] for w in windows])[None],
        "shift_labels": torch.cat([w["labels"] for w in windows])[None],
        "cu_seqlens": torch.cat(bounds).to(torch.int32),
    }
