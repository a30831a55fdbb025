"""Snapshots in files: slower than memory, but they survive the server.

Servers may share a folder. Each file holds one snapshot, and is named after the tokens that were
read. A file appears when it is complete; the least recently used go when there are too many bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..ops.state import load_state, save_state
from .place import Place
from .prefix_names import NAME, WITH, WITHOUT, checksum, ending, file_name, short
from .snapshots import Snapshot

log = logging.getLogger("cumulant.serving")

QUEUE_BYTES = 64 << 20  # of snapshots that wait to be written
TOUCH_SECONDS = 10.0  # between two notes that a file is used
SETTLED = 0.1  # seconds; clocks of file systems may be so coarse
ORPHANED = 3600.0  # seconds after which nobody is writing a temporary file any more
CLOSE_SECONDS = 10.0  # how long `close` waits for the disk

_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")  # as `save_state` names them
_KEY, _TOKENS, _SUM = "prefix.key", "prefix.tokens", "prefix.sum"  # in the metadata


class _File(NamedTuple):
    size: int
    inode: int
    chain: str
    tail: int


class PrefixFiles:
    """Snapshots within a number of bytes, in the files of a folder. Any thread may use it.

    No error of the disk is raised but by the constructor: each kind is logged once.

    Args:
        folder: where the files are; it is made if missing. Other processes may use it too.
        limit: bytes of all files, and of what `reserved` tells. One more is there while the least
            recently used is deleted.
        metadata: what a file must say to be used here, like a hash of the weights.
        device: where loaded snapshots go.
        fits: whether a snapshot can be the one after so many tokens.
        reserved: bytes of the limit that are taken otherwise.
        queue_bytes: of snapshots that wait to be written; a larger one is not written.

    Attributes:
        limit: may be set; the next write or `trim` follows it.
        dropped: how many snapshots were not written, because too many were waiting.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        metadata: Mapping[str, str],
        *,
        device: torch.device | str = "cpu",
        fits: Callable[[Snapshot, int], bool],
        reserved: Callable[[], int] = lambda: 0,
        queue_bytes: int = QUEUE_BYTES,
    ):
        self._reserved, self._queue_bytes = reserved, queue_bytes
        self._listed = -SETTLED  # when `tails` looked last
        self._touched: dict[str, float] = {}
        self.folder, self.limit, self.dropped = folder, limit, 0
        self._metadata, self._device, self._fits = dict(metadata), device, fits
        self._index = threading.Lock()  # of the next five
        self._files: dict[str, _File] = {}  # by name
        self._chains: dict[str, dict[str, int]] = {}  # the tails of all files that may be used
        self._foreign: set[tuple[str, int]] = set()  # names and inodes of those that may not
        self._size = 0
        self._seen: tuple[int, int] | None = None  # the folder when listed, if nothing was missed
        self._told: set[tuple[str, ...]] = set()
        self._change = threading.Condition()  # of the next three
        self._queue: dict[Place, Snapshot] = {}
        self._pending = 0  # bytes that wait or are being written
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True)
        remove_orphans(folder)
        self._refresh()
        self._writer = threading.Thread(target=self._run, name="prefix-files", daemon=True)
        self._writer.start()

    def __len__(self) -> int:
        return len(self._files)

    @property
    def size(self) -> int:
        """Bytes of all files known."""
        return self._size

    def put(self, place: Place, snapshot: Snapshot) -> None:
        """Have a snapshot written soon, unless there is one as good."""
        size, letter = snapshot.nbytes, ending(snapshot)
        if self._is_too_large(size):
            return
        if self._has(place, letter) and self._seen is not None and self._seen == self._look():
            return
        with self._change:
            queued = self._queue.get(place)
            if self._closed or (queued is not None and ending(queued) <= letter):
                return
            freed = 0 if queued is None else queued.nbytes
            if self._pending - freed + size > self._queue_bytes:
                self.dropped += 1
                return
            self._queue[place] = snapshot
            self._pending += size - freed
            self._change.notify_all()

    def get(self, place: Place) -> Snapshot | None:
        """The snapshot of a place, with logits if there is one; None if it cannot be had."""
        self._refresh()
        for letter in (WITH, WITHOUT):
            name = file_name(place, letter)
            if self._is_usable(name) and (found := self._load(name, place)) is not None:
                return found
        return None

    def tails(self, chain: bytes) -> tuple[int, ...]:
        """The tails known behind a chain, the longest first; 0 for the chain itself."""
        now = time.monotonic()  # prompts ask for many chains
        if now - self._listed >= SETTLED:
            self._refresh()
            self._listed = now
        with self._index:
            known = set(self._chains.get(short(chain), {}).values())
        return tuple(sorted(known, reverse=True))

    def touch(self, place: Place) -> None:
        """Note that a snapshot is used, which memory has as well."""
        now = time.monotonic()
        for name in (file_name(place, WITH), file_name(place, WITHOUT)):
            if self._is_usable(name) and now - self._touched.get(name, 0.0) > TOUCH_SECONDS:
                if len(self._touched) > 10_000:
                    self._touched.clear()
                self._touched[name] = now
                with contextlib.suppress(OSError):
                    os.utime(self.folder / name)

    def trim(self, new: int = 0) -> None:
        """Delete the least recently used until others, and `new` bytes, are within the limit."""
        self._refresh()
        most = self.limit - self._reserved() - new
        if self._size <= most:
            return
        with self._index:
            names = list(self._files)
        found = []
        for name in names:
            try:
                about = os.stat(self.folder / name)
            except OSError:  # deleted meanwhile, or else the next listing tells
                self._forget(name)
                continue
            # one too large for the limit would drive out all others before itself
            found.append((about.st_size <= most, about.st_mtime_ns, name))
        for _, _, name in sorted(found):
            if self._size <= most:
                break
            self._delete(name)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits to be written; whether that was within `timeout` seconds."""
        with self._change:
            return self._change.wait_for(lambda: not self._pending, timeout)

    def close(self) -> None:
        """Write what waits, for some seconds at most, and take no more."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._writer.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """Write one snapshot, or wait for one; False at the end."""
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return False
            place = next(iter(self._queue))
            snapshot = self._queue.pop(place)
        try:
            self._write(place, snapshot)
        except Exception as error:  # the thread must go on whatever happened
            self._warn_of("write", error)
        finally:
            with self._change:
                self._pending -= snapshot.nbytes
                self._change.notify_all()
        return True

    def _write(self, place: Place, snapshot: Snapshot) -> None:
        letter = ending(snapshot)
        self._refresh()
        if self._has(place, letter):
            return
        snapshot = snapshot.to("cpu")
        about = {_KEY: place.key.hex(), _TOKENS: str(place.tokens), _SUM: checksum(snapshot)}
        name = file_name(place, letter)
        self.folder.mkdir(parents=True, exist_ok=True)
        # `save_state` alone could mix two processes that in their containers have the same id
        staged = self.folder / f".{secrets.token_hex(8)}.{os.getpid()}.tmp"
        try:
            save_state(staged, snapshot, self._metadata | about)
            found = staged.stat()
            if self._is_too_large(found.st_size):
                return
            staged.replace(self.folder / name)
        finally:
            staged.unlink(missing_ok=True)
        with self._index:
            self._add(name, _File(found.st_size, found.st_ino, short(place.chain), place.tail))
        if letter == WITH and self._is_usable(worse := file_name(place, WITHOUT)):
            self._delete(worse)
        self.trim()

    def _load(self, name: str, place: Place) -> Snapshot | None:
        path = self.folder / name
        try:
            if path.stat().st_size > self.limit:
                return None
            found, about = load_state(path, return_metadata=True)
            if self._metadata.items() <= about.items():
                snapshot = self._check(found, about, place)
                with contextlib.suppress(OSError):
                    os.utime(path)  # now used, for all processes
                return snapshot
            self._warn(("foreign",), f"{name} is from another model, or from another server")
            self._ignore(name)
        except FileNotFoundError:  # deleted meanwhile
            self._forget(name)
        except (OSError, MemoryError, RuntimeError) as error:  # the last for memory of a device
            self._warn_of("read", error)
        except Exception as error:  # whatever a file may hold
            log.warning("%s: damaged, and so deleted: %s", path, error)
            self._delete(name)
        return None

    def _check(self, found: Any, about: Mapping[str, str], place: Place) -> Snapshot:
        """What a file holds, if it is the snapshot of a place."""
        if about.get(_KEY) != place.key.hex() or about.get(_TOKENS) != str(place.tokens):
            raise ValueError("of other tokens than its name says")
        if not isinstance(found, Snapshot):
            raise ValueError("not a snapshot")
        # a loaded tensor is the mapped file, whose bytes would stay on the disk once deleted
        snapshot: Snapshot = found.clone()
        if about.get(_SUM) != checksum(snapshot):
            raise ValueError("another checksum")
        snapshot = snapshot.to(self._device)
        try:
            fits = self._fits(snapshot, place.tokens)
        except Exception:  # parts that are no tensors, or no states
            fits = False
        if not fits:
            raise ValueError("does not fit the model")
        return snapshot

    def _look(self) -> tuple[int, int] | None:
        """What changes with the folder's listing; None if there is no folder."""
        with contextlib.suppress(OSError):
            found = os.stat(self.folder)
            return found.st_ino, found.st_mtime_ns
        return None

    def _refresh(self) -> None:
        """List the folder again if it may have changed."""
        with self._index:
            now = time.time_ns()
            seen = self._look()
            if seen is not None and seen == self._seen:
                return
            self._seen = None
            try:
                files = {} if seen is None else self._list()
            except OSError as error:
                self._warn_of("list", error)
                return
            self._foreign = {pair for pair in self._foreign if pair[0] in files}
            for name in [n for n, file in self._files.items() if files.get(n) is not file]:
                self._remove(name)
            for name, file in files.items():
                if name not in self._files:
                    self._add(name, file)
            # a change in the same tick of the clock as the last one would not be noticed later
            if seen is not None and now - seen[1] > SETTLED * 1e9:
                self._seen = seen

    def _list(self) -> dict[str, _File]:
        """All files by name; only new ones are looked at."""
        files = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name, inode = entry.name, entry.inode()
                old = self._files.get(name)
                if old is not None and old.inode == inode:
                    files[name] = old
                elif match := NAME.fullmatch(name):
                    try:
                        about = entry.stat(follow_symlinks=False)
                    except OSError:  # deleted meanwhile
                        continue
                    if stat.S_ISREG(about.st_mode):
                        files[name] = _File(about.st_size, inode, match[1], int(match[2]))
        return files

    def _add(self, name: str, file: _File) -> None:
        self._remove(name)
        self._files[name] = file
        self._size += file.size
        if (name, file.inode) not in self._foreign:
            self._chains.setdefault(file.chain, {})[name] = file.tail

    def _remove(self, name: str) -> None:
        if (file := self._files.pop(name, None)) is not None:
            self._size -= file.size
            self._hide(name, file.chain)

    def _hide(self, name: str, chain: str) -> None:
        tails = self._chains.get(chain, {})
        if tails.pop(name, None) is not None and not tails:
            del self._chains[chain]

    def _forget(self, name: str) -> None:
        with self._index:
            self._remove(name)

    def _ignore(self, name: str) -> None:
        """Use a file no more, though its bytes count."""
        with self._index:
            if (file := self._files.get(name)) is not None:
                self._foreign.add((name, file.inode))
                self._hide(name, file.chain)

    def _delete(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
            self._forget(name)
        except OSError as error:
            self._warn_of("delete", error)

    def _is_usable(self, name: str) -> bool:
        with self._index:
            file = self._files.get(name)
            return file is not None and (name, file.inode) not in self._foreign

    def _has(self, place: Place, letter: str) -> bool:
        """Whether there is a file that is as good."""
        return any(self._is_usable(file_name(place, end)) for end in (WITH, letter))

    def _is_too_large(self, size: int) -> bool:
        if size > self.limit:
            self._warn(("large",), f"a snapshot of {size:,} bytes is beyond the limit: not kept")
        return size > self.limit

    def _warn_of(self, action: str, error: Exception) -> None:
        code = getattr(error, "errno", None)
        message = f"could not {action}: {type(error).__name__}: {error}"
        self._warn((action, type(error).__name__, str(code)), message)

    def _warn(self, kind: tuple[str, ...], message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s: %s (told once)", self.folder, message)


def remove_orphans(folder: Path) -> None:
    """Delete temporary files of processes that were killed."""
    oldest = time.time() - ORPHANED
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # gone already, or not ours to delete
            if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime < oldest:
                path.unlink()
