"""What the commands print: plain text without markup, and numbers that are never cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import rich.console
from rich.console import Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class Console(rich.console.Console):
    """rich's console without markup, as a path may contain ``[x]`` or ``:cat:``."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)


def as_table(
    console: rich.console.Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
) -> RenderableType:
    """A table if the terminal is wide enough, else one line for each row."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(Text(heading))
    for row in rows:
        table.add_row(*map(Text, row))
    wide = console.options.update(max_width=10_000, width=10_000)
    if Measurement.get(console, wide, table).maximum <= console.width:
        return table
    lines = [
        f"{row[0]}: " + ", ".join(f"{h} {cell}" for h, cell in zip(headings[1:], row[1:]))
        for row in rows
    ]
    return Group(*(Text(line) for line in ([title] if title else []) + lines))


def print_table(
    console: rich.console.Console, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table, or a line for each row."""
    console.print(as_table(console, headings, rows))


def expand_home(path: str | None) -> str | None:
    """A path with ``~`` expanded, which shells leave alone in ``--output=~/runs``."""
    return None if path is None else os.path.expanduser(path)
