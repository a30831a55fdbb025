"""Serving: continuous batching, snapshots of prefixes, and an HTTP server like OpenAI's.

`Engine` answers requests from Python. `cumulant serve` does over HTTP, and needs
``pip install cumulant[serve]``.
"""

from .counters import Counters
from .engine import Engine
from .reading import TokenScores
from .requests import Busy, Done, Failed, Read, Request, Stopping, Ticket, Update
from .sampling import SamplingOptions
from .snapshots import Snapshot

__all__ = [
    "Busy",
    "Counters",
    "Done",
    "Engine",
    "Failed",
    "Read",
    "Request",
    "SamplingOptions",
    "Snapshot",
    "Stopping",
    "Ticket",
    "TokenScores",
    "Update",
]
