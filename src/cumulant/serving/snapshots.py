"""States after prefixes of texts, so that no prefix is read twice.

The state after a prefix has the same bits on every way to it: how a text is cut while it is read
makes no difference, or all cuts are at multiples of a piece (`cumulant.models.rows`). So a reply
does not depend on which snapshots there are.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..models import ModelState
from ..ops.state import State, register_state
from .place import Place


@dataclass(frozen=True)
class Snapshot(State):
    """The state of a model after some tokens.

    state: of all layers, with a batch of 1.
    logits: ``[1, vocab_size]`` fp32, after the last token; None where no text ended.
    """

    state: ModelState
    logits: Tensor | None


register_state(Snapshot)


class Files(Protocol):
    """A slower place for snapshots, which no error leaves (`cumulant.serving.prefix_files`)."""

    def put(self, place: Place, snapshot: Snapshot) -> None: ...

    def get(self, place: Place) -> Snapshot | None: ...

    def tails(self, chain: bytes) -> tuple[int, ...]: ...

    def touch(self, place: Place) -> None: ...

    def __len__(self) -> int: ...

    @property
    def size(self) -> int: ...


class TextKeys:
    """Keys of a text's prefixes: a piece's key is a hash of the one before and of its tokens.

    root: the key of no tokens.
    """

    def __init__(self, tokens: Sequence[int] | NDArray[np.uint32], piece: int, root: bytes = b""):
        self._tokens, self.piece = np.asarray(tokens, dtype="<u4"), piece
        self.chain = [root]  # of 0, 1, 2, ... whole pieces
        self._hash_pieces()

    def _hash_pieces(self) -> None:
        for end in range(len(self.chain) * self.piece, len(self._tokens) + 1, self.piece):
            self.chain.append(_hash(self.chain[-1], self._tokens[end - self.piece : end]))

    def extended(self, tokens: Sequence[int]) -> TextKeys:
        """Those of the text with further tokens."""
        longer = TextKeys((), self.piece, self.chain[0])
        longer._tokens = np.concatenate([self._tokens, np.asarray(tokens, dtype="<u4")])
        longer.chain = list(self.chain)
        longer._hash_pieces()
        return longer

    def place(self, count: int) -> Place:
        """The place of the first `count` tokens."""
        chain, tail = self.chain[count // self.piece], count % self.piece
        key = _hash(chain, self._tokens[count - tail : count]) if tail else chain
        return Place(chain, tail, key, count)

    def __len__(self) -> int:
        return len(self._tokens)


def _hash(before: bytes, tokens: NDArray[np.uint32]) -> bytes:
    digest = hashlib.sha256(before)
    digest.update(tokens.tobytes())
    return digest.digest()


@dataclass
class _Entry:
    place: Place
    snapshot: Snapshot
    saved: int  # tokens that would be read again without it
    size: int
    value: float


class SnapshotStore:
    """Snapshots within a number of bytes, by place. Any thread may use it.

    The least valuable goes first: the value of a snapshot is the reading that it saves for each of
    its bytes, and it falls behind that of others while it is not used (GreedyDual-Size; Cao and
    Irani 1997).

    files: where snapshots are kept as well, and found when memory has them no more.
    root: of the keys: a hash of what the bits of states depend on, besides tokens and weights.
    """

    def __init__(self, budget: int, files: Files | None = None, root: bytes = b""):
        self.budget, self.files, self.root = budget, files, root
        self.size = self.evicted = 0
        self._entries: dict[bytes, _Entry] = {}
        self._tails: dict[bytes, Counter[int]] = {}  # behind each chain
        self._level = 0.0  # the value of what went last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, place: Place) -> bool:
        return place.key in self._entries

    @property
    def keeps(self) -> bool:
        """Whether there is room for anything."""
        return self.budget > 0 or self.files is not None

    def get(self, place: Place, *, with_logits: bool = False) -> Snapshot | None:
        """The snapshot of a place; with_logits: only one that has them."""
        with self._lock:
            entry = self._entries.get(place.key)
            if entry is not None and not (with_logits and entry.snapshot.logits is None):
                entry.value = self._level + entry.saved / entry.size
            else:
                entry = None
        if entry is not None:
            if self.files is not None:
                self.files.touch(place)
            return entry.snapshot
        found = None if self.files is None else self.files.get(place)
        if found is not None and with_logits and found.logits is None:
            return None
        if found is not None:
            self._insert(place, found, place.tokens)
        return found

    def longest(
        self, keys: TextKeys, least: int, suits: Callable[[int], bool]
    ) -> tuple[Snapshot, int] | None:
        """The snapshot of the longest prefix of a text, and its number of tokens.

        It has more than `least` tokens, a number that suits, and the last logits if it is the text.
        """
        most = len(keys)
        piece = keys.piece
        for i in range(most // piece, least // piece - 1, -1):
            for tail in self._known_tails(keys.chain[i]):
                count = i * piece + tail
                if least < count <= most and suits(count):
                    found = self.get(keys.place(count), with_logits=count == most)
                    if found is not None:
                        return found, count
        return None

    def _known_tails(self, chain: bytes) -> list[int]:
        """Lengths behind a chain at which there are snapshots, the longest first."""
        with self._lock:
            known = set(self._tails.get(chain, ()))
        if self.files is not None:
            known.update(self.files.tails(chain))
        return sorted(known, reverse=True)

    def put(self, place: Place, snapshot: Snapshot, saved: int) -> bool:
        """Keep a snapshot; whether memory has room for one of its size.

        saved: how many tokens would be read again without it. One with logits is not replaced by
        one without.
        """
        with self._lock:
            old = self._entries.get(place.key)
        if self.files is not None:
            self.files.put(place, snapshot)
        if old is not None and (snapshot.logits is None or old.snapshot.logits is not None):
            return True
        return self._insert(place, snapshot, saved)

    def _insert(self, place: Place, snapshot: Snapshot, saved: int) -> bool:
        size, saved = snapshot.nbytes, max(saved, 1)
        with self._lock:
            if size > self.budget:
                return False
            self._drop(place.key)
            self._make_room(size)
            value = self._level + saved / size
            self._entries[place.key] = _Entry(place, snapshot, saved, size, value)
            self._tails.setdefault(place.chain, Counter())[place.tail] += 1
            self.size += size
        return True

    def reserve(self, size: int) -> bool:
        """Take bytes from the budget, or with a negative size give some back; whether it could."""
        with self._lock:
            if size > self.budget:
                return False
            self.budget -= size
            self._make_room(0)
        return True

    def shrink(self, size: int) -> None:
        """Drop snapshots of so many bytes, or all."""
        with self._lock:
            self._make_room(self.budget - self.size + size)

    def _make_room(self, size: int) -> None:
        while self._entries and self.size + size > self.budget:
            worst = min(self._entries, key=lambda k: self._entries[k].value)
            self._level = self._entries[worst].value
            self._drop(worst)
            self.evicted += 1

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.size -= entry.size
        tails = self._tails[entry.place.chain]
        tails[entry.place.tail] -= 1
        if not tails[entry.place.tail]:
            del tails[entry.place.tail]
        if not tails:
            del self._tails[entry.place.chain]
