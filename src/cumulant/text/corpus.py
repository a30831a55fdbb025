"""Documents to train on: files, folders, globs, Hugging Face datasets, or Python's own standard library."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .enwik8 import ENWIK8, load_enwik8

STDLIB = "stdlib"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Documents, already split.

    name: what was asked for. train, heldout: documents as UTF-8 bytes. digest: SHA-256 over all of them, in order.
    skipped: files left out because they hold no text.
    """

    name: str
    train: list[bytes]
    heldout: list[bytes]
    digest: str
    skipped: int = 0

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes to train on and held out."""
        return sum(map(len, self.train)), sum(map(len, self.heldout))


def load_corpus(data: str | None = None, *, heldout: float = 0.05, text_column: str = "text") -> Corpus:
    """Read documents and split them, the same way every time.

    Args:
        data: a file, a folder (all text files below it), a glob, the id of a Hugging Face dataset (``owner/name``;
            ``hf:ID`` or ``hf:ID:CONFIG`` for any, also a local one), "enwik8" (downloaded once), or None or "stdlib"
            for the source of Python's standard library without its tests.
        heldout: share held out. Several documents are split by a hash of their names (or by a dataset's own validation
            or test split); a single document loses its tail, cut at a line; enwik8 keeps its usual split.
        text_column: column of a dataset that holds the text.

    Raises:
        ValueError: nothing there, nothing but binary data, or too little to split.
    """
    if not 0 < heldout < 1:
        raise ValueError(f"heldout: expected a share between 0 and 1, got {heldout}")
    if data == ENWIK8 and not Path(data).exists():
        train_text, held_text = load_enwik8()
        return _corpus(ENWIK8, [train_text], [held_text], 0)
    if data is not None and _is_dataset(data):
        return _from_dataset(data, heldout, text_column)
    named, skipped = (stdlib_documents(), 0) if data in (None, STDLIB) else _from_files(str(data))
    train, held = _split(named, heldout)
    return _corpus(STDLIB if data is None else data, train, held, skipped)


def load_documents(data: str, *, text_column: str = "text") -> list[bytes]:
    """All documents of `data`, as in `load_corpus`, unsplit."""
    if data == ENWIK8 and not Path(data).exists():
        return list(load_enwik8())
    if _is_dataset(data):
        corpus = _from_dataset(data, 0.05, text_column)
        return [*corpus.train, *corpus.heldout]
    return [text for _, text in (stdlib_documents() if data == STDLIB else _from_files(data)[0])]


def stdlib_documents() -> list[tuple[str, bytes]]:
    """The standard library's Python files, without tests and installed packages, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    kept = [p for p in paths if not _SKIPPED_FOLDERS & set(p.parts)]
    documents = [(p.as_posix(), _text(root / p)) for p in kept]
    found = [(name, text) for name, text in documents if text]
    if not found:
        raise ValueError(f"data: Python's standard library has no source files under {root}; pass --data")
    return found


def _text(path: Path) -> bytes | None:
    """The file's bytes if they are UTF-8 text, else None."""
    raw = path.read_bytes()
    if b"\0" in raw:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return raw


def _from_files(data: str) -> tuple[list[tuple[str, bytes]], int]:
    if not data:
        raise ValueError("data: expected a file, folder, glob or dataset, got an empty name")
    path = Path(data).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        if not paths:
            raise ValueError(f"data: the folder {data} holds no files")
    elif path.is_file():
        paths = [path]
    elif glob.has_magic(data):
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not paths:
            raise ValueError(f"data: no file matches {data}")
    else:
        raise ValueError(f"data: no such file or folder: {data}")
    # names do not depend on how the place was spelled, and so neither does the split
    root = Path(os.path.commonpath([p.parent for p in paths]))
    texts = [(p.relative_to(root).as_posix(), _text(p)) for p in paths]
    named = [(name, text) for name, text in texts if text]
    if not named:
        binary = [name for name, text in texts if text is None]
        problem = f"{binary[0]} is not UTF-8 text" if binary else f"{texts[0][0]} is empty"
        raise ValueError(f"data: {problem}; pass text files")
    return named, sum(text is None for _, text in texts)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split(named: list[tuple[str, bytes]], heldout: float) -> tuple[list[bytes], list[bytes]]:
    if len(named) == 1:
        return _cut(named[0][1], heldout)
    ranked = sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest())
    budget = heldout * sum(len(text) for _, text in named)
    names: set[str] = set()
    for name, text in ranked:  # those that fit, in an order that has nothing to do with their content
        if len(text) <= budget:
            names.add(name)
            budget -= len(text)
    if not names:
        names.add(min(ranked, key=lambda item: len(item[1]))[0])
    return [t for n, t in named if n not in names], [t for n, t in named if n in names]


def _cut(text: bytes, heldout: float) -> tuple[list[bytes], list[bytes]]:
    at = text.find(b"\n", int(len(text) * (1 - heldout))) + 1
    if at == 0 or at == len(text):
        at = int(len(text) * (1 - heldout))
        while at < len(text) and text[at] & 0xC0 == 0x80:  # not inside a character
            at += 1
    if at == 0 or at >= len(text):
        raise ValueError(f"data: {len(text)} bytes are too few to hold any out")
    return [text[:at]], [text[at:]]


def _is_dataset(data: str) -> bool:
    """Marked as one, or of the form owner/name without a file's ending and with no folder `owner` here: a mistyped path
    is refused at once instead of being looked for on the hub."""
    if data.startswith("hf:"):
        return True
    named = re.fullmatch(r"[\w-]+/[\w.-]+", data) and not re.search(r"\.[A-Za-z]\w{0,4}$", data)
    return bool(named) and not Path(data).parent.exists()


def _from_dataset(data: str, heldout: float, text_column: str) -> Corpus:
    import datasets

    identifier, _, config = data.removeprefix("hf:").partition(":")
    try:
        splits = datasets.load_dataset(identifier, config or None)
    except Exception as error:  # the library raises whatever its loaders and the network raise
        nowhere = "" if data.startswith("hf:") else f"no such file or folder: {data}; and "
        raise ValueError(f"data: {nowhere}cannot load the dataset {identifier!r}: {error}") from error
    if not isinstance(splits, dict) or "train" not in splits:
        raise ValueError(f"data: the dataset {identifier!r} has no split named train")
    held_split = next((name for name in ("validation", "test") if name in splits), None)
    train = _rows(splits["train"], text_column, identifier)
    if held_split is not None:
        return _corpus(data, train, _rows(splits[held_split], text_column, identifier), 0)
    train, held = _split([(str(i), text) for i, text in enumerate(train)], heldout)
    return _corpus(data, train, held, 0)


def _rows(split: Iterable[dict[str, object]], column: str, identifier: str) -> list[bytes]:
    names = getattr(split, "column_names", [])
    if column not in names:
        raise ValueError(f"text_column: the dataset {identifier!r} has no column {column!r}; it has {', '.join(names)}")
    documents = [str(row[column]).encode() for row in split]
    return [text for text in documents if text]


def _corpus(name: str, train: list[bytes], heldout: list[bytes], skipped: int) -> Corpus:
    if not train or not heldout:
        raise ValueError(f"data: {name} holds too few documents to train on and to hold out")
    digest = hashlib.sha256()
    for text in (*train, b"\0heldout\0", *heldout):
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return Corpus(name, train, heldout, digest.hexdigest(), skipped)
