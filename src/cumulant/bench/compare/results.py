"""Results of `cumulant compare` from its rows: best rates, means over seeds, differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..reports.confidence import t95
from ..reports.folder import Row


@dataclass(frozen=True)
class Mean:
    """The mean of `count` values and its standard error.

    The error is nan for one value, and if a run diverged.
    """

    value: float
    error: float
    count: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Mean:
        if not all(map(math.isfinite, values)):
            return cls(math.inf, math.nan, len(values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error, len(values))

    def text(self, *, sign: bool = False) -> str:
        if not math.isfinite(self.value):
            return "diverged"
        value = f"{self.value:{'+' if sign else ''}.4f}"
        return value if math.isnan(self.error) else f"{value} ± {self.error:.4f}"

    def differs_from_zero(self) -> bool:
        """Whether it differs from 0 at 95%."""
        return abs(self.value) > t95(self.count) * self.error  # False for one value


@dataclass(frozen=True)
class Result:
    """A mechanism with its best learning rate; losses are in bits per byte of the held-out text.

    final: at the end of training. difference: from the baseline's run of the same seed. curve: by
        step, of each seed.
    sweep: at the end by learning rate, from the first seed; of shorter trainings if the recipe has
        them. cost, contexts, copying: see `work`; means over seeds. passing: contexts after steps
        with states passed on.
    """

    mechanism: str
    rate: float
    final: Mean
    difference: Mean | None
    curve: list[list[tuple[int, float]]]
    sweep: dict[float, float]
    parameters: int
    cost: Row
    contexts: list[tuple[int, int, float]]
    copying: list[tuple[int, float, float, int]]
    passing: list[tuple[int, int, float]]

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the least or the greatest of the sweep."""
        return len(self.sweep) > 1 and self.rate in (min(self.sweep), max(self.sweep))


def final_loss(run: Row) -> float:
    """Bits per byte of the held-out text after the last step; infinite for a run that diverged."""
    value = float(run["heldout"][-1][1])
    return value if math.isfinite(value) else math.inf


def swept_steps(steps: int, share: float) -> int:
    """Steps of the trainings that compare learning rates."""
    return max(1, round(steps * share))


def losses_by_rate(rows: list[Row], mechanism: str) -> dict[float, float]:
    """The final loss by learning rate, from the first seed: of the sweep's trainings, if any."""
    own = [row for row in rows if row.get("mechanism") == mechanism and row.get("seed") == 0]
    swept = [row for row in own if row["row"] == "sweep"]
    return {
        run["learning_rate"]: final_loss(run)
        for run in swept or [row for row in own if row["row"] == "run"]
    }


def best_rate(rows: list[Row], mechanism: str) -> float:
    """The learning rate with the least final loss from the first seed."""
    found = losses_by_rate(rows, mechanism)
    return min(found, key=lambda rate: found[rate])


def results(rows: list[Row], baseline: str) -> list[Result]:
    """A result for each mechanism that was trained with its best rate, in the order of the rows."""
    runs = [row for row in rows if row["row"] == "run"]
    costs = {row["mechanism"]: row for row in rows if row["row"] == "cost"}
    rates = {name: best_rate(rows, name) for name in costs if losses_by_rate(rows, name)}
    base = {run["seed"]: final_loss(run) for run in _with_rate(runs, baseline, rates.get(baseline))}
    found = []
    for name, rate in rates.items():
        own = _with_rate(runs, name, rate)
        if not own:
            continue
        ends = {run["seed"]: final_loss(run) for run in own}
        differences = [end - base[seed] for seed, end in ends.items() if seed in base]
        asked, passing = (
            _with_rate([row for row in rows if row["row"] == kind], name, rate)
            for kind in ("context", "passing")
        )
        found.append(
            Result(
                name,
                rate,
                Mean.from_values(list(ends.values())),
                Mean.from_values(differences) if differences and name != baseline else None,
                [run["heldout"] for run in own],
                losses_by_rate(rows, name),
                own[0]["parameters"],
                costs[name],
                _mean_contexts(asked),
                [
                    (int(d), x, y, int(span))
                    for d, x, y, span in _mean_table([row["copying"] for row in asked])
                ],
                _mean_contexts(passing),
            )
        )
    return found


def _with_rate(rows: list[Row], mechanism: str, rate: float | None) -> list[Row]:
    return [row for row in rows if (row["mechanism"], row["learning_rate"]) == (mechanism, rate)]


def _mean_contexts(rows: list[Row]) -> list[tuple[int, int, float]]:
    return [(int(a), int(b), x) for a, b, x, _ in _mean_table([row["contexts"] for row in rows])]


def _mean_table(tables: list[list[list[float]]]) -> list[list[float]]:
    """The mean of several tables, entry by entry."""
    return [
        [statistics.fmean(cells) for cells in zip(*rows, strict=True)]
        for rows in zip(*tables, strict=True)
    ]
