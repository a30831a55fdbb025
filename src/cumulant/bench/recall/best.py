"""The best learning rate of each mechanism, and its results."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from ..reports.confidence import t95
from ..reports.folder import Row


@dataclass(frozen=True)
class Best:
    """A mechanism at a width, with its best learning rate.

    accuracy: by number of pairs, mean and standard deviation over the seeds.
    """

    mechanism: str
    conv: bool
    width: int
    learning_rate: float
    accuracy: dict[str, tuple[float, float]]
    seeds: int
    state_bytes: int
    parameters: int
    seconds: float

    @property
    def hardest_accuracy(self) -> float:
        """Accuracy at the most pairs."""
        return list(self.accuracy.values())[-1][0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the accuracy at the most pairs lies at 95%, over the seeds; None for one seed."""
        if self.seeds == 1:
            return None
        mean, deviation = list(self.accuracy.values())[-1]
        half = t95(self.seeds) * deviation / math.sqrt(self.seeds)
        return max(mean - half, 0.0), min(mean + half, 1.0)


def best_rates(rows: list[Row]) -> list[Best]:
    """The learning rate with the highest accuracy at the most pairs, by mechanism and width."""
    groups: dict[tuple[str, bool, int], dict[float, list[Row]]] = {}
    for row in rows:
        rates = groups.setdefault((row["mechanism"], row["conv"], row["width"]), {})
        rates.setdefault(row["learning_rate"], []).append(row)
    found = []
    for (mechanism, conv, width), rates in groups.items():
        candidates = [_summary(mechanism, conv, width, rate, own) for rate, own in rates.items()]
        # a rate that lacks seeds is not compared yet
        most = max(candidate.seeds for candidate in candidates)
        found.append(
            max((c for c in candidates if c.seeds == most), key=lambda c: c.hardest_accuracy)
        )
    return found


def _summary(mechanism: str, conv: bool, width: int, rate: float, rows: list[Row]) -> Best:
    def spread(n: str) -> tuple[float, float]:
        values = [row["accuracy"][n] for row in rows]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    return Best(
        mechanism,
        conv,
        width,
        rate,
        {n: spread(n) for n in rows[0]["accuracy"]},
        len(rows),
        rows[0]["state_bytes"],
        rows[0]["parameters"],
        statistics.mean(row["seconds"] for row in rows),
    )
