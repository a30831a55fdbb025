"""How much memory is free, and how much a block of code takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available_bytes(device: str) -> int | None:
    """Bytes that can still be allocated; None if the system does not say."""
    if device.startswith("cuda"):
        return (
            torch.cuda.mem_get_info()[0]
            + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated()
        )
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return None


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns the peak since the start, less the bytes at the start.

    The bytes are the allocator's on CUDA and the process's on Linux; elsewhere the function returns
    None.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - start
        return
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory, whose reuse would not be counted
        _CLEAR.write_text("5", encoding="ascii")  # reset the peak to the present size
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError, TypeError):  # another system, another C library
        yield lambda: None
        return
    yield lambda: max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
