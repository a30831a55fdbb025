"""The learning rate by step, also for a run that was lengthened or given another rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULES = ("cosine", "capped_inverse_sqrt")


@dataclass(frozen=True)
class Leg:
    """Steps that one command asked for: those after `first`, up to `last`.

    start: the rate at `first`, that of the leg before; 0 at the beginning of a run.
    peak: ``--learning-rate``.
    warmup: steps in which the rate goes from `start` to `peak` in a straight line.
    """

    first: int
    last: int
    start: float
    peak: float
    warmup: int


def plan_leg(first: int, last: int, start: float, peak: float, warmup_share: float) -> Leg:
    """A leg whose warm-up has at least one step, or none if its share is zero."""
    warmup = max(1, round(warmup_share * (last - first))) if warmup_share else 0
    return Leg(first, last, start, peak, warmup)


def rate_at(legs: Sequence[Leg], schedule: str, done: int) -> float:
    """The learning rate of the step that follows `done` steps.

    cosine: in each leg from its start to its peak, then ``peak · (1 + cos(π x)) / 2`` with x from 0
        to 1 at its end.
    capped_inverse_sqrt: ``peak · min(1, 10 / sqrt(done + 1))``.
    """
    leg = [leg for leg in legs if leg.first <= done][-1]
    if schedule == "capped_inverse_sqrt":
        return leg.peak * min(1.0, 10 / math.sqrt(done + 1))
    step = done - leg.first
    if step < leg.warmup:
        return leg.start + (leg.peak - leg.start) * (step / leg.warmup)
    progress = min(1.0, (step - leg.warmup) / max(1, leg.last - leg.first - leg.warmup))
    return leg.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
