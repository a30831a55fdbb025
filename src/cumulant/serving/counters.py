"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What an engine has done so far, and what it does now."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    reply_tokens: int = 0
    requests: int = 0
    hits: int = 0
    misses: int = 0
    failures: int = 0
    steps: int = 0
    seconds_busy: float = 0.0
    waiting: int = 0
    rows: int = 0

    def seconds_of(self, waiting: int) -> int:
        """About how long a request takes, from those before."""
        done = max(self.requests - waiting, 1)
        return max(1, min(60, round(self.seconds_busy / done)))
