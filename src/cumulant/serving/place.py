"""Where the state after a prefix belongs."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """The place of a prefix.

    chain: a hash of its whole pieces; empty without one.
    tail: tokens behind them.
    key: a hash of all its tokens.
    tokens: their number.
    """

    chain: bytes
    tail: int
    key: bytes
    tokens: int
