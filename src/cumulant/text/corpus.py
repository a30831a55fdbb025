"""Documents from files, folders, globs, Hugging Face datasets, or Python's standard library."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .chat import Chat
from .enwik8 import ENWIK8, load_enwik8
from .files import STANDARD_INPUT, NotText, read_files, read_text

STDLIB = "stdlib"
LEAST_HELDOUT = 128  # bytes; bits per byte of fewer are noise
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "__pycache__"),
    *("site-packages", "dist-packages", "lib2to3"),
}


@dataclass(frozen=True)
class Corpus:
    """Documents, split into training and held-out ones.

    name: the source, as the user named it. train, heldout: documents as UTF-8 bytes.
    digest: SHA-256 over all of them, in order.
    skipped: files left out, each with the reason. notes: other changes to the documents.
    is_chat: they are chats written by a template, whose control tokens are to be read.
    """

    name: str
    train: list[bytes]
    heldout: list[bytes]
    digest: str
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_chat: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes to train on and held out."""
        return sum(map(len, self.train)), sum(map(len, self.heldout))

    def describe(self) -> list[str]:
        """Lines for the user: sizes first, then the files left out and why."""
        kept, held = self.sizes
        share = 100 * held / (kept + held)
        first = (
            f"text: {self.name}, {kept:,} bytes in {len(self.train)} documents, {held:,} held out"
            f" ({share:.1f}%)"
        )
        left = [f"text: left out: {reason}" for reason in self.skipped[:5]]
        if len(self.skipped) > 5:
            left.append(f"text: and {len(self.skipped) - 5} more files left out")
        return [first, *(f"text: {note}" for note in self.notes), *left]


def load_corpus(
    data: str | Sequence[str] | None = None,
    *,
    heldout: float = 0.05,
    text_column: str = "text",
    encoding: str | None = None,
    exclude: Collection[Path] = (),
    chat: Chat | None = None,
) -> Corpus:
    """Read documents and split them, the same way every time.

    Args:
        data: a file, a folder (all text files below it), a glob, "-" for standard input, "enwik8"
            (downloaded once), or the id of a Hugging Face dataset: ``owner/name``, or ``hf:ID`` or
            ``hf:ID:CONFIG`` for any, also a local one. None or "stdlib" is the source of Python's
            standard library without its tests. Several files, folders and globs are one text.
        heldout: share held out. Several documents are split by a hash of their names, or by a
            dataset's own validation or test split; copies of a document go with it. If no set of
            whole documents comes near the share, and for a single document, tails are held out, cut
            at lines. enwik8 keeps its usual split.
        text_column: column of a dataset that holds the text.
        encoding: of the files, if it is not UTF-8.
        exclude: folders left out of those that are read, such as that of the run itself.
        chat: turns a row of chat messages into text: see `chat_renderer`.

    Raises:
        ValueError: there is no data, only binary data, or too little to split.
    """
    if not 0 < heldout < 1:
        raise ValueError(f"heldout: expected a share between 0 and 1, got {heldout}")
    sources = _source_list(data)
    name = ", ".join(sources)
    if sources == [ENWIK8] and not Path(ENWIK8).exists():
        train_text, held_text = load_enwik8()
        return _make_corpus(ENWIK8, [train_text], [held_text], [], [])
    if len(sources) == 1 and _is_dataset(sources[0]):
        return _dataset_corpus(sources[0], heldout, text_column, chat)
    named, skipped, notes = _read_documents(sources, encoding, exclude)
    train, held = _split_documents(named, heldout, notes)
    return _make_corpus(name, train, held, skipped, notes)


class Documents(list[bytes]):
    """Texts as UTF-8 bytes. is_chat: they are chats, as in `Corpus`."""

    is_chat = False


def load_documents(
    data: str | Sequence[str],
    *,
    text_column: str = "text",
    encoding: str | None = None,
    chat: Chat | None = None,
) -> Documents:
    """All documents of `data`, as in `load_corpus`, unsplit."""
    sources = _source_list(data)
    if sources == [ENWIK8] and not Path(ENWIK8).exists():
        return Documents(load_enwik8())
    if len(sources) == 1 and _is_dataset(sources[0]):
        splits, held_split, _ = _load_splits(sources[0], text_column, chat)
        documents = Documents([*splits["train"], *(splits[held_split] if held_split else [])])
        documents.is_chat = splits["train"].is_chat
        return documents
    return Documents(text for _, text in _read_documents(sources, encoding, ())[0])


def _source_list(data: str | Sequence[str] | None) -> list[str]:
    if data is None:
        return [STDLIB]
    sources = [data] if isinstance(data, str) else list(data)
    if not sources:
        raise ValueError("data: expected at least one file, folder, glob or dataset, got none")
    if len(sources) > 1:
        for source in sources:
            if source in (STDLIB, ENWIK8) or _is_dataset(source):
                raise ValueError(
                    f"data: {source} stands alone; only files, folders and globs are read together"
                )
    return sources


def _read_documents(
    sources: list[str], encoding: str | None, exclude: Collection[Path]
) -> tuple[list[tuple[str, bytes]], list[str], list[str]]:
    """Named documents, the reasons for files left out, and notes."""
    if sources == [STDLIB]:
        return stdlib_documents(), [], []
    found = read_files(sources, encoding=encoding, exclude=exclude)
    notes = [f"{found.links} further links to the same files read once"] if found.links else []
    return found.texts, found.skipped, notes


def stdlib_documents() -> list[tuple[str, bytes]]:
    """The standard library's Python files by relative path, without tests and packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    found = []
    for path in paths:
        if _SKIPPED_FOLDERS & set(path.parts):
            continue
        try:
            text = read_text(root / path)
        except NotText:  # a few files are kept in other encodings on purpose
            continue
        if text:
            found.append((path.as_posix(), text))
    if not found:
        raise ValueError(
            f"data: Python's standard library has no source files under {root}; pass --data"
        )
    return found


def _split_documents(
    named: list[tuple[str, bytes]], heldout: float, notes: list[str]
) -> tuple[list[bytes], list[bytes]]:
    """Hold out whole documents if a set of them comes near the share, else the tail of each.

    Copies of a document are in the same split.
    """
    copies = Counter(text for _, text in named)
    first = dict.fromkeys(text for _, text in named)
    if len(first) < len(named):
        again = len(named) - len(first)
        notes.append(
            f"{again} {'copy' if again == 1 else 'copies'} of other documents, kept on one side"
            " with them"
        )
    names: dict[bytes, str] = {}
    for name, text in named:
        names.setdefault(text, name)
    ranked = sorted(first, key=lambda text: hashlib.sha256(os.fsencode(names[text])).digest())
    total = sum(len(text) for _, text in named)
    room, held = heldout * total, set[bytes]()
    for text in ranked:  # those that fit, in an order that does not depend on their content
        if len(text) * copies[text] <= room:
            held.add(text)
            room -= len(text) * copies[text]
    if not held:
        shortest = min(ranked, key=len)
        if len(shortest) * copies[shortest] <= 2 * heldout * total:
            held.add(shortest)
    if sum(len(text) * copies[text] for text in held) >= heldout * total / 2 and len(held) < len(
        first
    ):
        return [t for _, t in named if t not in held], [t for _, t in named if t in held]
    if len(named) > 1:
        notes.append(
            "no set of whole documents comes near the share held out: the tail of each is held out"
        )
    # each text once, since a copy's head and the tail of its original would overlap
    pairs = [_cut_tail(text, heldout) for text in first]
    return [head for head, _ in pairs if head], [tail for _, tail in pairs if tail]


def _cut_tail(text: bytes, heldout: float) -> tuple[bytes, bytes]:
    """Head and tail, cut at a line near the share, else at a space, else between characters."""
    at, length = int(len(text) * (1 - heldout)), len(text)
    share = length - at
    for separator in (b"\n", b" "):
        after, before = text.find(separator, at) + 1, text.rfind(separator, 0, at) + 1
        if after and length - after >= share / 2:
            return text[:after], text[after:]
        if before and length - before <= 2 * share:
            return text[:before], text[before:]
    while at < length and text[at] & 0xC0 == 0x80:  # not inside a character
        at += 1
    return text[:at], text[at:]


def _is_dataset(data: str) -> bool:
    """Whether `data` names a dataset: by "hf:", or as owner/name.

    A name with a file's ending, or with a folder `owner` here, is a path. So a mistyped path is
    refused at once instead of being looked for on the hub.
    """
    if data.startswith("hf:"):
        return True
    named = re.fullmatch(r"[\w-]+/[\w.-]+", data) and not re.search(r"\.[A-Za-z]\w{0,4}$", data)
    return bool(named) and data != STANDARD_INPUT and not Path(data).parent.exists()


def _dataset_corpus(data: str, heldout: float, text_column: str, chat: Chat | None) -> Corpus:
    splits, held_split, notes = _load_splits(data, text_column, chat)
    train = splits["train"]
    if held_split is None:
        kept, held = _split_documents(
            [(str(i), text) for i, text in enumerate(train)], heldout, notes
        )
        return replace(_make_corpus(data, kept, held, [], notes), is_chat=train.is_chat)
    known = set(train)
    held = [text for text in splits[held_split] if text not in known]
    if len(held) < len(splits[held_split]):
        again = len(splits[held_split]) - len(held)
        notes.append(
            f"{again} documents of the split {held_split!r} are in the training split, and not"
            " held out"
        )
    return replace(_make_corpus(data, train, held, [], notes), is_chat=train.is_chat)


def _load_splits(
    data: str, text_column: str, chat: Chat | None
) -> tuple[dict[str, Documents], str | None, list[str]]:
    """The documents of a dataset's splits, the name of its held-out split, and notes."""
    import datasets

    identifier, _, config = data.removeprefix("hf:").partition(":")
    if not data.startswith("hf:"):
        _find_on_hub(data)
    try:
        splits = datasets.load_dataset(identifier, config or None)
    except Exception as error:  # the library raises whatever its loaders and the network raise
        nowhere = "" if data.startswith("hf:") else f"no such file or folder: {data}; and "
        raise ValueError(
            f"data: {nowhere}cannot load the dataset {identifier!r}: {error}"
        ) from error
    if not isinstance(splits, dict) or "train" not in splits:
        raise ValueError(f"data: the dataset {identifier!r} has no split named train")
    held_split = next((name for name in ("validation", "test") if name in splits), None)
    notes: list[str] = []
    wanted = ["train", *([held_split] if held_split else [])]
    return (
        {name: _read_column(splits[name], text_column, identifier, chat, notes) for name in wanted},
        held_split,
        notes,
    )


def _find_on_hub(identifier: str) -> None:
    """Ask the hub once, and briefly, since loading a mistyped path retries many times."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(identifier, timeout=5)
    except Exception as error:  # whatever the network and the hub raise
        raise ValueError(
            f"data: no such file or folder: {identifier}; and there is no dataset of that name"
            f" within reach ({type(error).__name__}); hf:{identifier} loads one that is on disk"
            " already"
        ) from error


def _read_column(
    split: Iterable[dict[str, object]],
    column: str,
    identifier: str,
    chat: Chat | None,
    notes: list[str],
) -> Documents:
    """Texts of a column; notes count the empty rows and the chats with control tokens left out."""
    names = getattr(split, "column_names", [])
    if column not in names:
        raise ValueError(
            f"text_column: the dataset {identifier!r} has no column {column!r}; it has"
            f" {', '.join(names)}"
        )
    documents, kinds, without, unsafe = Documents(), set(), 0, 0
    for row in split:
        value = row[column]
        if value is None:
            without += 1
            continue
        text = _row_text(value, column, identifier, chat)
        kinds.add(type(value))
        if text is None:
            unsafe += 1
        elif text:
            documents.append(text.encode())
    if len(kinds) > 1:
        raise ValueError(
            f"text_column: the column {column!r} of {identifier!r} holds texts and chats; name one"
            " of them"
        )
    documents.is_chat = list in kinds
    if without:
        notes.append(f"{without} rows without text (null) left out")
    if unsafe:
        notes.append(
            f"{unsafe} chats left out, as their messages hold control tokens of the tokenizer"
        )
    return documents


def _row_text(value: object, column: str, identifier: str, chat: Chat | None) -> str | None:
    """The text of a row; None for a chat that `chat` does not render."""
    if isinstance(value, str):
        return value
    messages = (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )
    if messages and chat is not None:
        return chat(value)  # type: ignore[arg-type]
    what = (
        "chat messages, and the tokenizer has no chat template"
        if messages
        else f"no text, but {type(value).__name__}"
    )
    raise ValueError(
        f"text_column: the column {column!r} of the dataset {identifier!r} holds {what}; name a"
        " column of text or write one first"
    )


def _make_corpus(
    name: str, train: list[bytes], heldout: list[bytes], skipped: list[str], notes: list[str]
) -> Corpus:
    if not train or not heldout:
        raise ValueError(f"data: {name} holds too few documents to train on and to hold out")
    digest = hashlib.sha256()
    for text in (*train, b"\0heldout\0", *heldout):
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    corpus = Corpus(name, train, heldout, digest.hexdigest(), skipped, notes)
    if corpus.sizes[1] < LEAST_HELDOUT:
        raise ValueError(
            f"data: {name} leaves {corpus.sizes[1]} bytes to hold out, too few to measure anything"
            f" (at least {LEAST_HELDOUT}); pass more text or a larger --heldout"
        )
    return corpus
