"""Student's t distribution, for means over a few seeds."""

from __future__ import annotations

# at 95%, by number of values
_T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def t95(count: int) -> float:
    """The mean of `count` values lies within so many of its standard errors, at 95%."""
    return _T95.get(count, 2.2)
