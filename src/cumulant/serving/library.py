"""States that clients keep by an id: texts that were read once, to be asked many times."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..models import ModelState, export_state
from ..models.rows import reads_exactly
from ..nn import KeyValueState
from ..ops.state import State, load_state, register_state, save_state
from ..text.generate import fingerprint
from .prefix_files import PrefixFiles, remove_orphans
from .snapshots import Snapshot, SnapshotStore

STATE_LIMIT = 8 * 2**30  # bytes
MOST_QUEUED = 256 * 2**20  # bytes of prefixes that wait to be written
ID = re.compile(r"state-[0-9a-f]{32}")


@dataclass(frozen=True)
class Document(State):
    """A text that a model has read.

    tokens: ``[1, n]`` int64.
    border: the state after the last whole piece, or None for texts that are shorter.
    end: the state after all tokens, with their last logits.
    """

    tokens: Tensor
    border: Snapshot | None
    end: Snapshot


register_state(Document)


@dataclass(frozen=True)
class Entry:
    """What a list tells of a document. created: seconds since 1970."""

    id: str
    tokens: int
    bytes: int
    created: int


class NoRoom(RuntimeError):
    """There is no memory for another document."""


class UnknownState(KeyError):
    """No document has this id."""

    def __str__(self) -> str:
        return f"state_id: no state {self.args[0]!r} here"


def model_fingerprint(model: Any) -> str:
    """A hash of all weights and of the configuration."""
    settings = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        settings.pop(name, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{fingerprint(model)} {text}".encode()).hexdigest()


class StateLibrary:
    """The documents of one model: in memory, or in files that survive the server.

    Several servers may share a folder. A file appears when it is complete.

    Args:
        model: that reads them.
        piece: of the engine; documents of servers with other pieces are refused, unless reading is
            exact (`cumulant.models.rows.reads_exactly`).
        store: from whose budget documents in memory are taken. With a folder it keeps its own
            snapshots there, too.
        folder: where files go; None: in memory.
        limit: the most bytes of these files, of which documents are never deleted to make room.
    """

    def __init__(
        self,
        model: Any,
        piece: int,
        store: SnapshotStore,
        folder: Path | None = None,
        limit: int = STATE_LIMIT,
    ):
        self._model, self._piece, self._store = model, piece, store
        self.exact, self._limit = reads_exactly(model), limit
        self.weights = model_fingerprint(model)
        self._layout = _layout(_small_state(model))
        self._kept: dict[str, tuple[Document, int]] = {}
        self.folder = None if folder is None else folder / self.weights[:16]
        self._prefixes: PrefixFiles | None = None
        self._writing = threading.Lock()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            queue = min(MOST_QUEUED, store.budget // 8)
            store.reserve(2 * queue)  # a snapshot is copied while it is written or read
            remove_orphans(self.folder)
            self._prefixes = store.files = PrefixFiles(
                self.folder / "prefixes", limit, {"weights": self.weights}, device=model.device,
                fits=self._fits_part, reserved=self._document_bytes, queue_bytes=queue,
            )  # fmt: skip
            self._prefixes.trim()

    def close(self) -> None:
        """Write what is still to be written."""
        if self._prefixes is not None:
            self._prefixes.close()

    def _document_bytes(self) -> int:
        """Bytes of the documents' files."""
        assert self.folder is not None
        sizes = []
        for path in self.folder.glob("state-*.safetensors"):
            with suppress(OSError):  # deleted meanwhile
                sizes.append(path.stat().st_size)
        return sum(sizes)

    def add(self, document: Document) -> Entry:
        """Keep a document under a new id."""
        name, now = f"state-{secrets.token_hex(16)}", int(time.time())
        if self.folder is not None:
            self._write(self._path(name), document)
        elif not self._store.reserve(document.nbytes):
            raise NoRoom(
                f"no memory for a state of {document.nbytes:,} bytes: delete others, or start the"
                " server with more --memory or with --state-dir"
            )
        else:
            self._kept[name] = document, now
        return self.entry(name)

    def _write(self, path: Path, document: Document) -> None:
        assert self._prefixes is not None
        full = NoRoom(
            f"no room for a state of {document.nbytes:,} bytes in the server's folder: delete"
            " others, or start the server with more --state-limit"
        )
        with self._writing:
            if self._document_bytes() + document.nbytes > self._limit:
                raise full
            self._prefixes.trim(document.nbytes)
            save_state(path, document, self._metadata())
            if self._document_bytes() > self._limit:  # with what the file tells of itself
                path.unlink(missing_ok=True)
                raise full
            self._prefixes.trim()

    def get(self, name: str) -> Document:
        if self.folder is None:
            return (self._kept.get(name) or self._missing(name))[0]
        return self._load(self._existing(name))

    def entry(self, name: str) -> Entry:
        if self.folder is None:
            document, created = self._kept.get(name) or self._missing(name)
            return Entry(name, document.tokens.shape[1], document.nbytes, created)
        path = self._existing(name)
        about = path.stat()
        return Entry(name, _count_tokens(path), about.st_size, int(about.st_mtime))

    def entries(self) -> list[Entry]:
        """All documents, the oldest first."""
        if self.folder is None:
            names = list(self._kept)
        else:
            names = [p.stem for p in self.folder.glob("state-*.safetensors")]
        found = []
        for name in names:
            try:
                found.append(self.entry(name))
            except (UnknownState, ValueError, OSError):  # deleted meanwhile, or damaged
                continue
        return sorted(found, key=lambda entry: (entry.created, entry.id))

    def fork(self, name: str) -> Entry:
        """The same document under another id."""
        return self.add(self.get(name))

    def delete(self, name: str) -> None:
        if self.folder is not None:
            try:
                self._existing(name).unlink()
            except FileNotFoundError as error:
                raise UnknownState(name) from error
        else:
            kept = self._kept.pop(name, None) or self._missing(name)
            self._store.reserve(-kept[0].nbytes)

    def dump(self, name: str) -> bytes:
        """The document's file."""
        if self.folder is not None:
            return self._existing(name).read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            save_state(path, self.get(name), self._metadata())
            return path.read_bytes()

    def restore(self, path: Path) -> Entry:
        """Keep the document in a file, which may come from anywhere.

        Raises:
            ValueError: the file is damaged, or another model's.
        """
        return self.add(self._load(path, "the uploaded file"))

    def _metadata(self) -> dict[str, str]:
        return {"weights": self.weights, "piece": "any" if self.exact else str(self._piece)}

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _existing(self, name: str) -> Path:
        if ID.fullmatch(name) and (path := self._path(name)).is_file():
            return path
        raise UnknownState(name)

    def _missing(self, name: str) -> Any:
        raise UnknownState(name)

    def _load(self, path: Path, shown: str | None = None) -> Document:
        shown = shown or path.name
        try:
            document, metadata = load_state(path, self._model.device, return_metadata=True)
        except FileNotFoundError as error:  # deleted meanwhile
            raise UnknownState(path.stem) from error
        except Exception as error:  # whatever a file from anywhere may hold
            raise ValueError(f"state: {shown} is not a state, or is damaged") from error
        if not isinstance(document, Document) or metadata.get("weights") != self.weights:
            raise ValueError(f"state: {shown} belongs to another model")
        if metadata.get("piece") != self._metadata()["piece"]:
            raise ValueError(
                f"state: {shown} was written by a server with --piece {metadata.get('piece')};"
                f" this one has {self._piece}"
            )
        try:
            fits = self._fits(document)
        except Exception:  # parts that are no tensors, or no states
            fits = False
        if not fits:
            raise ValueError(f"state: {shown} does not fit this model, or is damaged")
        return document

    def _fits(self, document: Document) -> bool:
        """Whether this model could have read the document."""
        tokens, size = document.tokens, self._model.config.vocab_size
        count = tokens.shape[1]
        if tokens.shape != (1, count) or tokens.dtype != torch.int64 or not count:
            return False
        if not bool(((tokens >= 0) & (tokens < size)).all()) or document.end.logits is None:
            return False
        if (document.border is not None) != (count >= self._piece and not self.exact):
            return False
        parts = [(document.end, count)]
        if document.border is not None:
            parts.append((document.border, count // self._piece * self._piece))
        return all(self._fits_part(part, length) for part, length in parts)

    def _fits_part(self, part: Snapshot, length: int) -> bool:
        """Whether it is a snapshot after so many tokens."""
        size = self._model.config.vocab_size
        return _is_row(part.logits, size) and self._fits_after(part.state, length)

    def _fits_after(self, state: ModelState, length: int) -> bool:
        """Whether the state is one after so many tokens."""
        if _layout(state) != self._layout or not _is_finite(state):
            return False
        positions = [x for n, x in state.tensors().items() if n.rpartition(".")[2] == "position"]
        if any(x.tolist() != [length] for x in positions):
            return False
        layers = self._model.model.layers
        for i, layer in enumerate(state.layers):
            if isinstance(layer, KeyValueState):
                window = getattr(layers[i % len(layers)].mixer, "window", None)
                kept = length if window is None else min(length, window - 1)
                if layer.key.shape[2] != kept or layer.value.shape[2] != kept:
                    return False
        return True


def _small_state(model: Any) -> ModelState:
    """A state of the model after one token."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model.model(ids, past_key_values=cache, use_cache=True)
    return export_state(cache)


def _is_row(logits: Tensor | None, size: int) -> bool:
    """Whether they are None or logits of one token."""
    return logits is None or (
        logits.shape == (1, size)
        and logits.dtype == torch.float32
        and bool(logits.isfinite().all())
    )


def _layout(state: ModelState) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of all tensors; the tokens of keys and values count as one."""
    growing = {
        f"layers.{i}.{part}"
        for i, layer in enumerate(state.layers)
        if isinstance(layer, KeyValueState)
        for part in ("key", "value")
    }
    return [
        (
            name,
            tuple(1 if name in growing and d == 2 else n for d, n in enumerate(x.shape)),
            x.dtype,
        )
        for name, x in state.tensors().items()
    ]


def _is_finite(state: ModelState) -> bool:
    """Whether all numbers are finite, but for the -inf of an empty logarithm."""
    for name, x in state.tensors().items():
        if not x.dtype.is_floating_point:
            continue
        fine = x.isfinite() | (x == -torch.inf) if name.endswith("log_weight") else x.isfinite()
        if not bool(fine.all()):
            return False
    return True


def _count_tokens(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            return int(file.get_slice("tokens").get_shape()[1])
    except (SafetensorError, IndexError) as error:
        raise ValueError(f"state: {path.name} is damaged") from error
