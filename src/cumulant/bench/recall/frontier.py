"""The best mechanism for a state of a given size."""

from __future__ import annotations

from dataclasses import dataclass

from .best import Best

BUDGETS = (4, 8, 16, 32, 64, 128)  # kB of state


@dataclass(frozen=True)
class Owner:
    """The mechanism with the highest accuracy at the most pairs, in states of at most `budget` kB.

    second: the next mechanism. alike: mechanisms whose interval over the seeds overlaps with the
    best one's; None if there is one seed only, so that nobody can tell.
    """

    budget: int
    best: Best
    second: Best | None
    alike: list[Best] | None


def best_within(found: list[Best], budget: float) -> list[Best]:
    """Each mechanism at its best width with a state of at most `budget` kB, the best first."""
    top: dict[str, Best] = {}
    for b in found:
        if b.state_bytes <= 1000 * budget and (
            b.mechanism not in top or b.hardest_accuracy > top[b.mechanism].hardest_accuracy
        ):
            top[b.mechanism] = b
    return sorted(top.values(), key=lambda b: -b.hardest_accuracy)


def owners(found: list[Best]) -> list[Owner]:
    """The best mechanism of each budget that is enough for one."""
    ranked = {budget: best_within(found, budget) for budget in BUDGETS}
    return [
        Owner(budget, own[0], own[1] if len(own) > 1 else None, _alike(own))
        for budget, own in ranked.items()
        if own
    ]


def _alike(ranked: list[Best]) -> list[Best] | None:
    intervals = [b.interval for b in ranked]
    if intervals[0] is None or None in intervals:
        return None
    least = intervals[0][0]
    return [b for b, own in zip(ranked[1:], intervals[1:], strict=True) if own and own[1] >= least]


def steps(own: list[Best]) -> list[Best]:
    """The widths at which a mechanism gets better with a larger state, by size of the state."""
    found: list[Best] = []
    for b in sorted(own, key=lambda b: (b.state_bytes, -b.hardest_accuracy)):
        if not found or b.hardest_accuracy > found[-1].hardest_accuracy:
            found.append(b)
    return found
