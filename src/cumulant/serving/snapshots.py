"""States after prefixes of texts, so that no prefix is read twice.

A prompt is read in pieces of P tokens, which begin at multiples of P whatever was read before. So
the state after kP tokens has the same bits on every way to it, and a reply does not depend on which
snapshots there are.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..models import ModelState
from ..ops.state import State, register_state


@dataclass(frozen=True)
class Snapshot(State):
    """The state of a model after some tokens.

    state: of all layers, with a batch of 1.
    logits: ``[1, vocab_size]`` fp32, after the last token; None where no text ended.
    """

    state: ModelState
    logits: Tensor | None


register_state(Snapshot)


def piece_keys(tokens: Sequence[int], piece: int) -> list[bytes]:
    """A key for each of the prefixes of 0, P, 2P, ... tokens, and one for all tokens if others.

    Each key is a hash of the one before and of a piece's tokens.
    """
    numbers = np.asarray(tokens, dtype="<u4")
    keys = [b""]
    for begin in range(0, len(numbers), piece):
        digest = hashlib.sha256(keys[-1])
        digest.update(numbers[begin : begin + piece].tobytes())
        keys.append(digest.digest())
    return keys


@dataclass
class _Entry:
    snapshot: Snapshot
    saved: int  # tokens that would be read again without it
    size: int
    value: float


class SnapshotStore:
    """Snapshots within a number of bytes, by key. Any thread may use it.

    The least valuable goes first: the value of a snapshot is the reading that it saves for each of
    its bytes, and it falls behind that of others while it is not used (GreedyDual-Size; Cao and
    Irani 1997).
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.size = self.evicted = 0
        self._entries: dict[bytes, _Entry] = {}
        self._level = 0.0  # the value of what went last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> Snapshot | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.value = self._level + entry.saved / entry.size
            return entry.snapshot

    def put(self, key: bytes, snapshot: Snapshot, saved: int) -> bool:
        """Keep a snapshot; whether there is room for one of its size.

        saved: how many tokens would be read again without it. One with logits is not replaced by
        one without.
        """
        old = self.get(key)
        if old is not None and (snapshot.logits is None or old.logits is not None):
            return True
        size, saved = snapshot.nbytes, max(saved, 1)
        with self._lock:
            if size > self.budget:
                return False
            self._drop(key)
            self._make_room(size)
            self._entries[key] = _Entry(snapshot, saved, size, self._level + saved / size)
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
        if entry is not None:
            self.size -= entry.size
