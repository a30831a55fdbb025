"""Cases of `make test` and those of `make test-all` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """The names as cases of a test; all but the quick ones have the mark `slow`."""
    kept, names = set(quick), list(names)
    assert kept <= set(names), kept - set(names)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
