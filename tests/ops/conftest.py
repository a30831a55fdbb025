"""Which rows the test matrix has, and fixtures for short chunks and for threads."""

from typing import Any

import pytest
import torch

from cumulant.kernels.native import library
from cumulant.ops.repeated import forget

from .cases import CHUNK
from .interpreter import HAS_TRITON, is_slow, speed_up
from .walking import walk

if HAS_TRITON:
    speed_up()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves out the tests of a case on implementations that it does not have."""

    def exists(item: Any) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return (
            "case" not in given
            or "impl" not in given
            or given["impl"] in given["case"].implementations
        )

    items[:] = [item for item in items if exists(item)]
    for item in items:
        if hasattr(item, "callspec") and is_slow(item.originalname, item.callspec.params):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def short_chunks(monkeypatch):
    walk(monkeypatch, chunk=CHUNK, span=CHUNK, block=CHUNK)
    walk(monkeypatch, triton_chunk=16, triton_processors=1000)
    walk(monkeypatch, elita_span=1, elita_chunk=4)  # chunks of chunks as well


@pytest.fixture
def shorter_chunks(monkeypatch):
    walk(monkeypatch, chunk=4, block=4)
    walk(monkeypatch, elita_chunk=2, elita_block=4)


@pytest.fixture
def small_grains(monkeypatch):
    """Lets the native kernels start any number of threads, for any work."""
    monkeypatch.setattr(library, "GRAIN", 1)
    forget()


@pytest.fixture
def kept_threads():
    """Restores the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unwritten_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
