"""Cases of `make test` and those of `make test-all` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], names: Iterable[Any]) -> list[Any]:
    """The names as cases of a test; all but the quick ones have the mark `slow`."""
    kept, names = list(quick), list(names)
    assert all(name in names for name in kept), kept
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
