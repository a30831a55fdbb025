"""A fixture that counts how often a step ran as a program."""

from __future__ import annotations

import pytest

from cumulant.ops.step import Program


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by one item whenever a program runs."""
    found, run = [], Program.run

    def counted(self, *arguments):
        found.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(Program, "run", counted)
    return found
