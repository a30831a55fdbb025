"""`cumulant recall`: which mechanisms find what they have read, and how much state that takes them.

Every setting is one run of `mqar.train`; runs are independent, each on one thread, as many at a time as there are
workers. A report names, for each mechanism, the learning rate that was best on average over the seeds.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .folder import Folder, Row
from .mqar import MECHANISMS, Setting, Task, train
from .page import Page, Picture, TableOf, write
from .recall_plots import FORMS, draw_pairs, draw_state


@dataclass(frozen=True)
class Sweep:
    """Every mechanism at every width and learning rate from every seed; conv: with and without a short convolution."""

    mechanisms: tuple[str, ...] = tuple(MECHANISMS)
    conv: tuple[bool, ...] = (True, False)
    widths: tuple[int, ...] = (32, 64, 128)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int = 1
    steps: int = 2000
    length: int = 128
    vocabulary: int = 512
    pairs: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        for name in self.mechanisms:
            if name not in MECHANISMS:
                raise ValueError(f"mechanism: expected one of {', '.join(MECHANISMS)}, got {name!r}")
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 8 or any(width % 8 for width in self.widths):
            raise ValueError(f"width: expected multiples of 8, got {list(self.widths)}")
        if not (self.learning_rates and all(0 < rate < math.inf for rate in self.learning_rates)):
            raise ValueError(f"learning_rate: expected numbers above 0, got {list(self.learning_rates)}")

    def settings(self) -> Iterator[Setting]:
        """A whole sweep of one seed before the next, so that a part of it says something."""
        task = Task(self.length, self.vocabulary, self.pairs)
        orders = range(self.seeds), self.conv, self.widths, self.mechanisms, self.learning_rates
        for seed, conv, width, mechanism, rate in product(*orders):
            yield Setting(task, mechanism, conv, width, rate, seed, self.steps)


FULL = Sweep()
QUICK = Sweep(("softmax", "taylor-16", "linear"), conv=(True,), widths=(64,), seeds=2)


def run(sweep: Sweep, output: str, *, workers: int, device: str, force: bool, console: Console) -> Folder:
    """Train what is not there yet, and draw the report; an interruption keeps what is done and draws that."""
    from .plots import pyplot

    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    wanted = list(sweep.settings())
    pyplot()  # refuses at once, not after training
    folder = Folder.start(output, "recall", asdict(sweep), force=force)
    done = {_key(row) for row in folder.rows()}
    left = [setting for setting in wanted if _key(asdict(setting)) not in done]
    try:
        _train(left, folder, workers, device, console)
    finally:
        if folder.rows():
            report(folder, console)
    return folder


def _train(left: list[Setting], folder: Folder, workers: int, device: str, console: Console) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(left))
        try:
            runs: dict[Future[Row], Setting] = {pool.submit(train, setting, device): setting for setting in left}
            for future in as_completed(runs):
                setting = runs[future]
                try:
                    row = {**asdict(setting), "device": device, **future.result()}
                except (torch.OutOfMemoryError, MemoryError) as error:
                    progress.print(f"{setting.mechanism}, width {setting.width}: out of memory, left out ({error})")
                    continue
                folder.append(row)
                shown = ", ".join(f"{n} pairs {right:.0%}" for n, right in row["accuracy"].items())
                conv = "" if setting.conv else " without convolution"
                progress.print(
                    f"{setting.mechanism}{conv}, width {setting.width}, rate {setting.learning_rate:g}, seed "
                    f"{setting.seed}: {shown}",
                    highlight=False,
                )
                progress.advance(bar)
        finally:
            workers_left = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in workers_left:  # idle at the end; after an interruption what they run is given up
                process.terminate()


def _prepare() -> None:
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run


def _key(row: Row) -> tuple[Any, ...]:
    """Which run of its sweep a row is."""
    return tuple(row[name] for name in ("mechanism", "conv", "width", "learning_rate", "seed"))


@dataclass(frozen=True)
class Best:
    """A mechanism at a width with its best learning rate. accuracy: mean and deviation over seeds, by pairs."""

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
    def hardest(self) -> float:
        """Accuracy at the most pairs."""
        return list(self.accuracy.values())[-1][0]


def best(rows: list[Row]) -> list[Best]:
    """The best rate is the one whose accuracy at the most pairs is highest on average."""
    groups: dict[tuple[str, bool, int], dict[float, list[Row]]] = {}
    for row in rows:
        rates = groups.setdefault((row["mechanism"], row["conv"], row["width"]), {})
        rates.setdefault(row["learning_rate"], []).append(row)
    found = []
    for (mechanism, conv, width), rates in groups.items():
        candidates = [_summary(mechanism, conv, width, rate, own) for rate, own in rates.items()]
        most = max(candidate.seeds for candidate in candidates)  # an unfinished seed says nothing yet
        found.append(max((c for c in candidates if c.seeds == most), key=lambda c: c.hardest))
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


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    found = best(folder.rows())
    pairs = list(found[0].accuracy)
    page = Page(
        "Recall: which mechanisms find what they have read",
        _answer(found, pairs[-1]),
        [_table(found, conv) for conv in (True, False) if any(b.conv == conv for b in found)],
        [
            Picture(draw_state(found, folder.path), f"Questions answered at {pairs[-1]} pairs, by bytes of state"),
            Picture(draw_pairs(found, folder.path), "Questions answered by number of pairs, each at its best width"),
        ],
        [
            "Multi-query associative recall as in Zoology (Arora et al. 2023): pairs of keys and values, then each key "
            "again, at whose second place the model must say the value. Any of the n values that were read is right "
            "once in n times. Models have two layers, based three (with its sliding window), and no feed-forwards.",
            "Each line is the mechanism's best learning rate; ± is the deviation over seeds. State counts all layers' "
            f"caches after {folder.settings['length']} tokens; softmax's grows with every token, the others' does not.",
        ],
    )
    write(folder, page, console)
    return page


def _answer(found: list[Best], most: str) -> list[str]:
    """The best width of each mechanism, the most able first."""
    top: dict[str, Best] = {}
    for b in found:
        if b.mechanism not in top or b.hardest > top[b.mechanism].hardest:
            top[b.mechanism] = b
    ranked = sorted(top.values(), key=lambda b: -b.hardest)
    both = len({b.conv for b in found}) > 1
    said = ", ".join(
        f"{b.mechanism} {b.hardest:.0%} ({b.state_bytes / 1000:,.0f} kB{', alone' if both and not b.conv else ''})"
        for b in ranked
    )
    return [f"Of {most} pairs in one context, the right values found, and the state that took: {said}."]


def _table(found: list[Best], conv: bool) -> TableOf:
    pairs = list(found[0].accuracy)
    headings = (
        "mechanism",
        "width",
        *(f"{n} pairs" for n in pairs),
        "rate",
        "seeds",
        "state, kB",
        "parameters",
        "seconds",
    )
    rows = []
    for b in found:
        if b.conv == conv:
            each = (
                f"{mean:.1%} ± {deviation:.1%}" if b.seeds > 1 else f"{mean:.1%}"
                for mean, deviation in b.accuracy.values()
            )
            rows.append(
                (b.mechanism, str(b.width), *each, f"{b.learning_rate:g}", str(b.seeds), f"{b.state_bytes / 1000:,.1f}",
                 f"{b.parameters:,}", f"{b.seconds:.0f}")
            )  # fmt: skip
    return TableOf(FORMS[conv], headings, rows)
