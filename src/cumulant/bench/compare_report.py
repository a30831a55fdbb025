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
    """Mean, its standard error (nan for one value, or where a run diverged), and of how many."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        if not all(map(math.isfinite, values)):
            return cls(math.inf, math.nan, len(values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error, len(values))

    def text(self, *, sign: bool = False) -> str:
        if not math.isfinite(self.value):
            return "diverged"
        value = f"{self.value:{'+' if sign else ''}.4f}"
        return value if math.isnan(self.error) else f"{value} ± {self.error:.4f}"

    def is_apart(self) -> bool:
        """From 0, at 95%."""
        return abs(self.value) > T95.get(self.count, 2.2) * self.error  # False for one value


@dataclass(frozen=True)
class Result:
    """A mechanism with its best learning rate; everything in bits per byte of the held-out text.

    final: at the end of training. difference: from the baseline's run of the same seed. curve: by step, of each seed.
    sweep: at the end by learning rate, from the first seed. cost, contexts, copying: see `compare`; means over seeds.
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
    costs = {row["mechanism"]: row for row in rows if row["row"] == "cost"}
    rates = {name: best_rate(runs, name) for name in costs if sweep(runs, name)}
    base = {run["seed"]: final(run) for run in _with_rate(runs, baseline, rates.get(baseline))}
    found = []
    for name, rate in rates.items():
        own = _with_rate(runs, name, rate)
        ends = {run["seed"]: final(run) for run in own}
        differences = [end - base[seed] for seed, end in ends.items() if seed in base]
        asked = _with_rate([row for row in rows if row["row"] == "context"], name, rate)
        found.append(
            Result(
                name,
                rate,
                Mean.of(list(ends.values())),
                Mean.of(differences) if differences and name != baseline else None,
                [run["heldout"] for run in own],
                sweep(runs, name),
                own[0]["parameters"],
                costs[name],
                [(int(a), int(b), x) for a, b, x, _ in _means([row["contexts"] for row in asked])],
                [(int(d), x, y, int(span)) for d, x, y, span in _means([row["copying"] for row in asked])],
            )
        )
    return found


def _with_rate(rows: list[Row], mechanism: str, rate: float | None) -> list[Row]:
    return [row for row in rows if (row["mechanism"], row["learning_rate"]) == (mechanism, rate)]


def _means(tables: list[list[list[float]]]) -> list[list[float]]:
    """Entry by entry."""
    return [[statistics.fmean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    from .compare_plots import draw_contexts, draw_copying, draw_curves, draw_sweep

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
    in_context, copied = [r for r in found if r.contexts], [r for r in found if r.copying]
    if in_context:
        caption = f"The same tokens with more and more before them; trained on {context:,}"
        pictures.append(Picture(draw_contexts(in_context, context, folder.path), caption))
        tables.append(_contexts(in_context))
    if copied:
        caption = "Spans of 128 bytes where they stood before, of what they cost where they did not"
        pictures.append(Picture(draw_copying(copied, context, folder.path), caption))
        tables.append(_copying(copied))
    answer = [
        *_answer(found, settings, text),
        *_beyond(in_context, context),
        *_copied(copied, context),
    ]
    title = f"Mechanisms on one text: {settings['recipe']}, on {settings['data']}"
    page = Page(title, answer, tables, pictures, _notes(found, settings, text))
    write(folder, page, console)
    return page


def _notes(found: list[Result], settings: dict[str, Any], text: Row) -> list[str]:
    differ = [
        f"{r.mechanism}: {', '.join(f'{name} {value}' for name, value in r.cost['differs'].items())}"
        for r in found
        if r.cost["differs"]
    ]
    return [
        f"{text['bytes']:,} bytes of {settings['data']} to train on, {text['heldout_bytes']:,} others scored, "
        f"{text['steps']:,} steps of {_step_tokens(settings):,} tokens in the same order for all; parameters within "
        "2%. The learning rate is each mechanism's best of the sweep, chosen by the first seed's result on the same "
        "held-out text. ± is the standard error of the mean over seeds.",
        f"Mechanisms come with the surroundings of their presets. Where models differ from {settings['baseline']}'s: "
        f"{'; '.join(differ)}.",
        "Time: the median of training steps taken in turns, so that whatever else ran met all alike. Kept: "
        "tensors that a step holds for its backward pass. State: of one sequence after "
        f"{settings['context']:,} tokens; softmax's grows with every token.",
    ]


def _step_tokens(settings: dict[str, Any]) -> int:
    tokens: int = settings["context"] * settings["batch"] * settings["accumulate"]
    return tokens


def _answer(found: list[Result], settings: dict[str, Any], text: Row) -> list[str]:
    ranked = sorted(found, key=lambda result: result.final.value)
    said = ", ".join(f"{result.mechanism} {result.final.text()}" for result in ranked)
    tokens = text["steps"] * _step_tokens(settings)
    lines = [f"Bits per byte of {settings['data']} after {tokens:,} tokens: {said}."]
    others = [(r.mechanism, r.difference) for r in ranked if r.difference is not None and r.difference.count > 1]
    if others:
        apart = [f"{name} ({difference.value:+.4f})" for name, difference in others if difference.is_apart()]
        lines.append(f"Apart from {settings['baseline']} at 95% over the seeds: {', '.join(apart) or 'none'}.")
    edge = [f"{result.mechanism} ({result.rate:g})" for result in found if result.at_edge]
    if edge:
        lines.append(f"Best rate at the end of the sweep, perhaps better beyond it: {', '.join(edge)}.")
    return lines


def _beyond(asked: list[Result], context: int) -> list[str]:
    """What tokens gain from more context than was trained on."""
    lasts = [last for _, last, _ in asked[0].contexts] if asked else []
    if context not in lasts[:-1]:
        return []
    at = lasts.index(context)
    each = ", ".join(f"{r.mechanism} {r.contexts[-1][2] - r.contexts[at][2]:+.3f}" for r in asked)
    return [f"The same tokens in windows of {lasts[-1]:,} tokens, less in the {context:,} trained on: {each}."]


def _copied(asked: list[Result], context: int) -> list[str]:
    """The farthest span that was read within the training length."""
    inside = [i for i, c in enumerate(asked[0].copying) if c[0] + 2 * c[3] <= context] if asked else []
    if not inside:
        return []
    at = inside[-1]
    each = ", ".join(f"{r.mechanism} {r.copying[at][1] / r.copying[at][2]:.0%}" for r in asked)
    between = asked[0].copying[at][0]
    return [f"A span seen before, with {between:,} tokens between, costs, of what it costs if it was not: {each}."]


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


def _contexts(asked: list[Result]) -> TableOf:
    headings = ("mechanism", *(f"{a:,}–{b:,}" for a, b, _ in asked[0].contexts))
    rows = [(r.mechanism, *(f"{x:.3f}" for _, _, x in r.contexts)) for r in asked]
    return TableOf("Bits per byte of the same tokens, a part of those scored, by tokens before them", headings, rows)


def _copying(asked: list[Result]) -> TableOf:
    headings = ("mechanism", *(f"{distance:,} between" for distance, *_ in asked[0].copying))
    rows = [(r.mechanism, *(f"{x:.3f} of {y:.3f}" for _, x, y, _ in r.copying)) for r in asked]
    title = (
        f"Bits per byte of {asked[0].copying[0][3]} tokens seen before, of the same that were not, by tokens between"
    )
    return TableOf(title, headings, rows)
