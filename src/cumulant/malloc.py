"""Settings of glibc's `malloc` for processes that train: freed memory is kept for the next step.

By default glibc takes large blocks from the system and gives them back at once. A training step
then waits for the system to hand out the same pages, filled with zeros, every time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

# parameters of mallopt(3), by their numbers in malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**31 - 1  # which mallopt takes
OLD_LARGEST = 2**25  # as the mmap threshold, before glibc 2.35
PAD = 2**28  # bytes asked of the system at a time


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep what is freed, in this process from now on; whether it does.

    Nothing happens with another C library, or if the user has set its parameters by ``MALLOC_...``
    or ``GLIBC_TUNABLES``, or ``CUMULANT_MALLOC=system``.
    """
    if sys.platform != "linux" or environment.get("CUMULANT_MALLOC") == "system":
        return False
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in environment):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    library.mallopt.argtypes, library.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    threshold = any(library.mallopt(MMAP_THRESHOLD, n) for n in (LARGEST, OLD_LARGEST))
    others = [library.mallopt(TRIM_THRESHOLD, LARGEST), library.mallopt(TOP_PAD, PAD)]
    return threshold and all(others)
