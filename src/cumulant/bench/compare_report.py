"""The page of `cumulant compare`, from its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from .folder import Folder, Row
from .page import Page, Picture, TableOf, write

T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's, by seeds


@dataclass(frozen=True)
class Mean:
    """Mean, its standard error (nan for one value), and of how many."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error, len(values))

    def text(self, *, sign: bool = False) -> str:
        value = f"{self.value:{'+' if sign else ''}.4f}"
        return value if math.isnan(self.error) else f"{value} ± {self.error:.4f}"

    def is_apart(self) -> bool:
        """From 0, at 95%."""
        return abs(self.value) > T95.get(self.count, 2.2) * self.error  # False for one value


@dataclass(frozen=True)
class Result:
    """A mechanism with its best learning rate; everything in bits per byte of the held-out text.

    final: at the end of training. difference: from the baseline's run of the same seed. curve: by step, of each seed.
    sweep: at the end by learning rate, from the first seed. positions: (first, last, mean) by tokens before. copying:
    (tokens between, first time, second time) of spans. cost: see `compare`.
    """

    mechanism: str
    rate: float
    final: Mean
    difference: Mean | None
    curve: list[list[tuple[int, float]]]
    sweep: dict[float, float]
    parameters: int
    cost: Row
    positions: list[tuple[int, int, float]]
    copying: list[tuple[int, float, float]]

    @property
    def at_edge(self) -> bool:
        return len(self.sweep) > 1 and self.rate in (min(self.sweep), max(self.sweep))


def final(run: Row) -> float:
    """Bits per byte of the held-out text after the last step; infinite for a run that diverged."""
    value = float(run["heldout"][-1][1])
    return value if math.isfinite(value) else math.inf


def sweep(runs: list[Row], mechanism: str) -> dict[float, float]:
    """What each learning rate came to from the first seed."""
    return {run["learning_rate"]: final(run) for run in runs if run["mechanism"] == mechanism and run["seed"] == 0}


def best_rate(runs: list[Row], mechanism: str) -> float:
    found = sweep(runs, mechanism)
    return min(found, key=lambda rate: found[rate])


def results(rows: list[Row], baseline: str) -> list[Result]:
    """A result for each mechanism that has been trained, in the recipe's order."""
    runs = [row for row in rows if row["row"] == "run"]
    found: list[Result] = []
    base: dict[int, float] = {}
    for cost in (row for row in rows if row["row"] == "cost"):
        name = cost["mechanism"]
        own = [run for run in runs if run["mechanism"] == name and run["learning_rate"] == _best(runs, name)]
        if not own:
            continue
        ends = {run["seed"]: final(run) for run in own}
        base = ends if name == baseline else base
        differences = [end - base[seed] for seed, end in ends.items() if seed in base]
        asked = [row for row in rows if row["row"] == "context" and row["mechanism"] == name]
        found.append(
            Result(
                name,
                best_rate(runs, name),
                Mean.of(list(ends.values())),
                Mean.of(differences) if differences and name != baseline else None,
                [run["heldout"] for run in own],
                sweep(runs, name),
                own[0]["parameters"],
                cost,
                [(int(a), int(b), x) for a, b, x in _means([row["positions"] for row in asked])],
                [(int(d), x, y) for d, x, y in _means([row["copying"] for row in asked])],
            )
        )
    return found


def _best(runs: list[Row], mechanism: str) -> float | None:
    return best_rate(runs, mechanism) if sweep(runs, mechanism) else None


def _means(tables: list[list[list[float]]]) -> list[list[float]]:
    """Entry by entry."""
    return [[statistics.fmean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    from .compare_plots import draw_copying, draw_curves, draw_positions, draw_sweep

    rows, settings = folder.rows(), folder.settings
    found = results(rows, settings["baseline"])
    if not found:
        raise ValueError(f"folder: {folder.path} has no finished run yet")
    text = next(row for row in rows if row["row"] == "text")
    context = settings["context"]
    pictures = [
        Picture(draw_curves(found, settings, folder.path), "Held-out text during training, by steps and by time"),
        Picture(draw_sweep(found, folder.path), "Held-out text at the end by learning rate, first seed"),
    ]
    tables = [_table(found, settings)]
    asked = [result for result in found if result.positions]
    if asked:
        pictures += [
            Picture(draw_positions(asked, context, folder.path), f"By position; trained on {context:,} tokens"),
            Picture(draw_copying(asked, context, folder.path), "Spans of 128 bytes the first and the second time"),
        ]
        tables += [_positions(asked), _copying(asked)]
    page = Page(
        f"Mechanisms on one text: {settings['recipe']}",
        _answer(found, asked, settings, text),
        tables,
        pictures,
        [
            f"{text['bytes']:,} bytes of {settings['data']} to train on, {text['heldout_bytes']:,} held out, "
            f"{text['steps']:,} steps of {_step_tokens(settings):,} tokens in the same order for all; parameters "
            "within 2%. The learning rate is each mechanism's best of the sweep, chosen by the first seed's result on "
            "the same held-out text. ± is the standard error of the mean over seeds.",
            "Time: the median of training steps taken in turns, so that whatever else ran met all alike. Kept: tensors "
            "that a step holds for its backward pass. State: of one sequence after "
            f"{context:,} tokens; softmax's grows with every token.",
        ],
    )
    write(folder, page, console)
    return page


def _step_tokens(settings: dict[str, Any]) -> int:
    tokens: int = settings["context"] * settings["batch"] * settings["accumulate"]
    return tokens


def _answer(found: list[Result], asked: list[Result], settings: dict[str, Any], text: Row) -> list[str]:
    ranked = sorted(found, key=lambda result: result.final.value)
    said = ", ".join(f"{result.mechanism} {result.final.text()}" for result in ranked)
    tokens = text["steps"] * _step_tokens(settings)
    lines = [f"Bits per byte after {tokens:,} tokens: {said}."]
    others = [result for result in ranked if result.difference is not None]
    apart = [f"{r.mechanism} ({r.difference.value:+.4f})" for r in others if r.difference and r.difference.is_apart()]
    if any(result.difference and result.difference.count > 1 for result in others):
        lines.append(f"Apart from {settings['baseline']} at 95% over the seeds: {', '.join(apart) or 'none'}.")
    edge = [f"{result.mechanism} ({result.rate:g})" for result in found if result.at_edge]
    if edge:
        lines.append(f"Best rate at the end of the sweep, perhaps better beyond it: {', '.join(edge)}.")
    if asked:
        lines += [*_beyond(asked, settings["context"]), *_copied(asked, settings["context"])]
    return lines


def _beyond(asked: list[Result], context: int) -> list[str]:
    """How the last stretch of all compares with the last one within the training length."""
    within = [i for i, p in enumerate(asked[0].positions) if p[1] <= context]
    if not within or within[-1] == len(asked[0].positions) - 1:
        return []
    one, two = within[-1], -1
    (a, b, _), (c, d, _) = asked[0].positions[one], asked[0].positions[two]
    each = ", ".join(f"{r.mechanism} {r.positions[two][2] - r.positions[one][2]:+.3f}" for r in asked)
    return [
        f"Trained on {context:,} tokens, at {c:,} to {d:,} bits per byte differ from those at {a:,} to {b:,}: {each}."
    ]


def _copied(asked: list[Result], context: int) -> list[str]:
    """The farthest span within the training length."""
    inside = [i for i, c in enumerate(asked[0].copying) if c[0] < context]
    if not inside:
        return []
    at = inside[-1]
    each = ", ".join(f"{r.mechanism} {r.copying[at][2] / r.copying[at][1]:.0%}" for r in asked)
    return [f"A span that stood {asked[0].copying[at][0]:,} tokens before costs, of what it cost then: {each}."]


def _table(found: list[Result], settings: dict[str, Any]) -> TableOf:
    headings = (
        "mechanism",
        "bits per byte",
        f"less {settings['baseline']}",
        "rate",
        "seeds",
        "tokens/s",
        "kept, MiB",
        "state, kB",
        "parameters",
    )
    first = next((r.cost for r in found if r.mechanism == settings["baseline"]), found[0].cost)
    micro = settings["batch"] * settings["context"]
    rows: list[tuple[str, ...]] = []
    for r in found:
        kept, seconds = r.cost["kept_bytes"], r.cost["seconds"]
        rows.append(
            (
                r.mechanism,
                r.final.text(),
                r.difference.text(sign=True) if r.difference else "",
                f"{r.rate:g}" + (" (end of the sweep)" if r.at_edge else ""),
                str(r.final.count),
                f"{micro / seconds:,.0f} ({first['seconds'] / seconds:.2f}x)",
                f"{kept / 2**20:,.0f} ({kept / first['kept_bytes']:.2f}x)",
                f"{r.cost['state_bytes'] / 1000:,.1f}",
                f"{r.parameters:,}",
            )
        )
    return TableOf("At the end of training", headings, rows)


def _positions(asked: list[Result]) -> TableOf:
    headings = ("mechanism", *(f"{a:,}–{b:,}" for a, b, _ in asked[0].positions))
    rows = [(r.mechanism, *(f"{x:.3f}" for _, _, x in r.positions)) for r in asked]
    return TableOf("Bits per byte by tokens before", headings, rows)


def _copying(asked: list[Result]) -> TableOf:
    headings = ("mechanism", "first time", *(f"{d:,} tokens on" for d, _, _ in asked[0].copying))
    rows = [
        (r.mechanism, f"{statistics.fmean(c[1] for c in r.copying):.3f}", *(f"{y:.3f}" for _, _, y in r.copying))
        for r in asked
        if r.copying
    ]
    return TableOf("Bits per byte of a span the second time", headings, rows)
