"""How many processors other processes take during a measurement."""

from __future__ import annotations

import os
import time

import psutil


class Load:
    """Counts from its creation on.

    Times that agree do not show that a machine is busy, because a scheduler's time slices all have
    the same length.
    """

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        every, own = psutil.cpu_times(), self._process.cpu_times()
        # "nice" has the time of processes of low priority, which also take processors
        busy = every.user + every.system + sum(getattr(every, n, 0.0) for n in ("nice", "steal"))
        return time.perf_counter(), busy - own.user - own.system

    def busy_processors(self) -> float:
        """Mean number of processors that other processes, or other virtual machines, used."""
        (before, taken), (after, then) = self._start, self._now()
        return max((then - taken) / max(after - before, 1e-9), 0.0)
