"""How much memory there is, and how much a stretch of code takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available(device: str) -> int | None:
    """Bytes that can still be had; None where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@contextmanager
def measured(device: str) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells the most bytes held since, beyond those at the start: the allocator's on CUDA, the
    process's on Linux, None elsewhere."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - start
        return
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, or would be used again unseen
        _CLEAR.write_text("5", encoding="ascii")  # the high-water mark starts again from here
        before = _field("VmRSS")
    except (OSError, AttributeError, TypeError):  # another system, another C library
        yield lambda: None
        return
    yield lambda: max(_field("VmHWM") - before, 0)


def _field(name: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
