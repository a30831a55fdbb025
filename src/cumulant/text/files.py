"""Text files: finding them, and reading what is in them as UTF-8."""

from __future__ import annotations

import glob
import gzip
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STANDARD_INPUT = "-"
_BYTE_ORDER_MARKS = {  # byte order marks, the longer ones first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class NotText(ValueError):
    """A file's bytes are not text in the expected encoding; the message says where and why."""


@dataclass
class Found:
    """Files as read.

    texts: (name, UTF-8 bytes). skipped: files left out, with the reason. links: further names of
    files that were read.
    """

    texts: list[tuple[str, bytes]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    links: int = 0


def read_files(
    sources: list[str], *, encoding: str | None = None, exclude: Collection[Path] = ()
) -> Found:
    """The text files that `sources` name: files, folders, globs, or "-" for standard input.

    A file is read once, even if several links lead to it. Folders are read with all below them, and
    links are followed; hidden entries and everything under `exclude` are left out. Names are
    relative to the common folder of all files, so they do not depend on its spelling.
    """
    found, seen = Found(), set[str]()
    wanted: list[tuple[Path, bool]] = []  # a path, and whether it was named itself
    for source in sources:
        wanted += _expand_source(source, exclude)
    regular = [path for path, _ in wanted if str(path) != STANDARD_INPUT]
    root = os.path.commonpath([os.path.abspath(path.parent) for path in regular]) if regular else ""
    empty = []
    for path, named in wanted:
        name = (
            path.name
            if str(path) == STANDARD_INPUT
            else Path(os.path.relpath(path, root)).as_posix()
        )
        real = os.path.realpath(path)
        if real in seen:
            found.links += 1
            continue
        seen.add(real)
        try:
            text = read_text(path, encoding)
        except NotText as error:
            if named and len(wanted) == 1:
                raise ValueError(f"data: {error}") from error
            found.skipped.append(str(error))
            continue
        if text:
            found.texts.append((name, text))
        else:
            empty.append(printable_name(name))
    if not found.texts:
        problem = (
            found.skipped[0] if found.skipped else f"{empty[0]} is empty" if empty else "no files"
        )
        raise ValueError(f"data: {problem}; pass text files")
    return found


def _expand_source(source: str, exclude: Collection[Path]) -> list[tuple[Path, bool]]:
    if not source:
        raise ValueError("data: expected a file, folder, glob or dataset, got an empty name")
    if source == STANDARD_INPUT:
        return [(Path(STANDARD_INPUT), True)]
    path = Path(source).expanduser()
    if path.is_dir():
        below = sorted(_walk_files(path, {os.path.realpath(e) for e in exclude}))
        if not below:
            raise ValueError(f"data: the folder {printable_name(source)} holds no files")
        return [(p, False) for p in below]
    if path.exists():  # a file, a pipe, a device such as /dev/fd/3
        return [(path, True)]
    if glob.has_magic(source):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [p for p in matches if p.is_file()]
        if not files:
            raise ValueError(f"data: no file matches {printable_name(source)}")
        return [(p, False) for p in files]
    raise ValueError(f"data: no such file or folder: {printable_name(source)}")


def _walk_files(folder: Path, exclude: set[str]) -> Iterator[Path]:
    """Files below a folder, links to folders followed, each folder once."""
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited or real in exclude:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(place, name)
            for name in files
            if not name.startswith(".") and Path(place, name).is_file()
        )


def printable_name(name: str | Path) -> str:
    """A file's name for messages: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_text(path: Path, encoding: str | None = None) -> bytes:
    """The file's text as UTF-8 bytes, without a byte order mark, unpacked if compressed.

    Raises:
        NotText: the bytes are not text in `encoding` (default: UTF-8).
    """
    raw = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else path.read_bytes()
    name = "standard input" if str(path) == STANDARD_INPUT else printable_name(path)
    raw = _unpack(raw, name)
    try:
        text = raw.decode(encoding or "utf-8")
    except LookupError as error:
        raise ValueError(f"encoding: Python knows no encoding {encoding!r}") from error
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        if encoding is not None:
            raise NotText(
                f"{name} is not {encoding} text: at byte {at}: {getattr(error, 'reason', error)}"
            ) from error
        raise NotText(
            f"{name} is not UTF-8 text: byte 0x{raw[at]:02x} at offset {at}; {_guess_encoding(raw)}"
        ) from error
    if "\0" in text:
        raise NotText(f"{name} is no text: a NUL at offset {raw.index(0)}; {_guess_encoding(raw)}")
    return text.removeprefix("\ufeff").encode()


def _unpack(raw: bytes, name: str) -> bytes:
    try:
        if raw.startswith(b"\x1f\x8b"):
            return gzip.decompress(raw)
        if raw.startswith(b"\x28\xb5\x2f\xfd"):
            import pyarrow

            unpacked: bytes = pyarrow.CompressedInputStream(
                pyarrow.BufferReader(raw), "zstd"
            ).read()
            return unpacked
    except (OSError, EOFError) as error:  # both libraries' errors for a damaged file
        raise NotText(f"{name} cannot be unpacked: {error}") from error
    return raw


def _guess_encoding(raw: bytes) -> str:
    """A guess at the encoding of bytes that are not UTF-8, with advice."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            return f"it begins as {encoding.upper()} does: pass --encoding {encoding}"
    start = raw[:4096]
    for encoding in ("utf-16-le", "utf-16-be"):
        text = start[: len(start) // 2 * 2].decode(encoding, "replace")
        if 0 in start and text.count(" ") + text.count("\n") > len(text) / 50 and "\0" not in text:
            return f"it looks like {encoding.upper()}: pass --encoding {encoding}"
    controls = sum(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in start)
    if controls > 0.01 * len(start):
        return "it looks like binary data: leave it out"
    return "if it is text in another encoding, name it, for example --encoding latin-1 or cp1252"
