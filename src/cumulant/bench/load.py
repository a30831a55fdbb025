"""How much of the machine others take while something is measured."""

from __future__ import annotations

import os
import time

import psutil


class Load:
    """Counts from its making on. Repeats that agree do not show it: a scheduler's time slices are all alike."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        every, own = psutil.cpu_times(), self._process.cpu_times()
        busy = every.user + every.system + getattr(every, "steal", 0.0)
        return time.perf_counter(), busy - own.user - own.system

    def processors(self) -> float:
        """Processors that other processes, and other machines on the same hardware, took on average."""
        (before, taken), (after, then) = self._start, self._now()
        return max((then - taken) / max(after - before, 1e-9), 0.0)
