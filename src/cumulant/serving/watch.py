"""Keeps a process within its memory, whatever the allocator makes of the plan."""

from __future__ import annotations

import ctypes
import time

import psutil

from .snapshots import SnapshotStore

SHARE = 0.95  # of the limit, from which memory is given back
PERIOD = 0.1  # seconds between two looks


class MemoryWatch:
    """Gives memory back that was freed, and then drops snapshots, before a limit is reached.

    limit: bytes of the process that may be resident; None: no limit.
    """

    def __init__(self, store: SnapshotStore, limit: int | None):
        self._store, self._limit = store, limit
        self._process, self._next = psutil.Process(), 0.0

    def look(self) -> None:
        """Called often; it looks at most every `PERIOD` seconds."""
        now = time.monotonic()
        if self._limit is None or now < self._next:
            return
        self._next = now + PERIOD
        most = int(SHARE * self._limit)
        if self._resident() <= most:
            return
        _trim()
        over = self._resident() - most
        if over > 0:
            self._store.shrink(over)
            _trim()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


def _trim() -> None:
    """Return freed memory to the system, if the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
