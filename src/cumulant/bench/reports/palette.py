"""Colours and markers of all pictures, so that a mechanism looks the same in each of them.

A mechanism names its style where it is defined. Each colour here belongs to one marker, so that
lines can also be told apart without colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, cycle, product
from typing import Any, Protocol, TypeVar

# line and fill of a mechanism's variants, its own first
VARIANTS = (("-", "full"), ("--", "none"), (":", "left"), ("-.", "top"))


@dataclass(frozen=True)
class Style:
    """How a line is drawn.

    colour: as #rrggbb. marker, line, fill: matplotlib's marker, linestyle and fillstyle.
    """

    colour: str
    marker: str
    line: str = "-"
    fill: str = "full"

    def variant(self, number: int = 1) -> Style:
        """The same colour and marker with another line, for a variant of the mechanism."""
        line, fill = VARIANTS[number % len(VARIANTS)]
        return replace(self, line=line, fill=fill)

    def line_options(self) -> dict[str, Any]:
        """Arguments for matplotlib's ``plot`` and ``errorbar``."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": 5,
            "linestyle": self.line,
            "fillstyle": self.fill,
        }


# Okabe and Ito's colours, which the colour-blind can tell apart, and darker ones of the same
# families
BLACK = Style("#000000", "o")
GREY = Style("#999999", "v")
SLATE = Style("#666666", "h")
PURPLE = Style("#6A3D9A", "p")
ORANGE = Style("#E69F00", "^")
BLUE = Style("#0072B2", "s")
SKY = Style("#56B4E9", "<")
NAVY = Style("#004C7A", ">")
GREEN = Style("#009E73", "D")
PINK = Style("#CC79A7", "P")
VERMILION = Style("#D55E00", "X")
BROWN = Style("#8C6D1F", "*")
PALETTE = (BLACK, BLUE, ORANGE, GREEN, PINK, VERMILION, SKY, GREY, BROWN, NAVY, SLATE, PURPLE)


def styles_for(names: Iterable[str], known: Mapping[str, Style]) -> dict[str, Style]:
    """A style for each name: the known one, or a free one for an unknown name."""
    names = list(dict.fromkeys(names))
    taken = {known[name] for name in names if name in known}
    variants = (style.variant(number) for number, style in product(range(len(VARIANTS)), PALETTE))
    free = chain((style for style in variants if style not in taken), cycle(PALETTE))
    return {name: known[name] if name in known else next(free) for name in names}


class Drawn(Protocol):
    """An object that pictures show as a line."""

    @property
    def name(self) -> str: ...

    @property
    def style(self) -> Style: ...


DrawnT = TypeVar("DrawnT", bound=Drawn)


def by_name(drawn: Iterable[DrawnT]) -> dict[str, DrawnT]:
    """A dictionary of the objects by name.

    Raises:
        ValueError: two have the same name, or would look the same in a picture.
    """
    found: dict[str, DrawnT] = {}
    for new in drawn:
        for old in found.values():
            if old.name == new.name:
                raise ValueError(f"name: {new.name!r} is defined twice")
            if old.style == new.style:
                raise ValueError(
                    f"style: {old.name!r} and {new.name!r} share {new.style}; give one another"
                    " style"
                )
        found[new.name] = new
    return found
