"""`cumulant recall`: trains every mechanism of a sweep on the recall test.

Each setting is one call of `training.train_model`. Runs are independent, with one thread each, and
as many run at a time as there are workers. Every mechanism is trained with all learning rates from
the first seed, and with its best rate from the other seeds.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..reports.folder import Folder, Row
from ..reports.plots import pyplot
from .best import best_rates
from .mechanisms import MECHANISMS, Setting
from .report import REPORT, report
from .task import Task
from .training import train_model


@dataclass(frozen=True)
class Sweep:
    """Each mechanism at each width, with all learning rates and then from all seeds.

    conv: whether the first layer is a short convolution. steps, length, vocabulary, pairs: see
        `Setting` and `Task`.
    """

    mechanisms: tuple[str, ...] = tuple(MECHANISMS)
    conv: tuple[bool, ...] = (True, False)
    widths: tuple[int, ...] = (32, 64, 128)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int = 3
    steps: int = 2000
    length: int = 128
    vocabulary: int = 512
    pairs: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        for name in self.mechanisms:
            if name not in MECHANISMS:
                raise ValueError(
                    f"mechanism: expected one of {', '.join(MECHANISMS)}, got {name!r}"
                )
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 8 or any(width % 8 for width in self.widths):
            raise ValueError(f"width: expected multiples of 8, got {list(self.widths)}")
        if not (self.learning_rates and all(0 < rate < math.inf for rate in self.learning_rates)):
            raise ValueError(
                f"learning_rate: expected numbers above 0, got {list(self.learning_rates)}"
            )

    def first_settings(self) -> Iterator[Setting]:
        """All learning rates from the first seed."""
        task = Task(self.length, self.vocabulary, self.pairs)
        orders = self.conv, self.widths, self.mechanisms, self.learning_rates
        for conv, width, mechanism, rate in product(*orders):
            yield Setting(task, mechanism, conv, width, rate, 0, self.steps)

    def other_settings(self, rows: list[Row]) -> Iterator[Setting]:
        """The best rate of these rows' first seed from the other seeds, seed by seed."""
        best = {
            (b.conv, b.width, b.mechanism): b.learning_rate
            for b in best_rates([row for row in rows if row["seed"] == 0])
        }
        task = Task(self.length, self.vocabulary, self.pairs)
        orders = range(1, self.seeds), self.conv, self.widths, self.mechanisms
        for seed, conv, width, mechanism in product(*orders):
            rate = best.get((conv, width, mechanism))
            if rate is not None:  # the memory was enough
                yield Setting(task, mechanism, conv, width, rate, seed, self.steps)


FULL = Sweep()
QUICK = Sweep(("softmax", "taylor-16", "linear"), conv=(True,), widths=(64,), seeds=2)


def run(
    sweep: Sweep, output: str, *, workers: int, device: str, force: bool, console: Console
) -> Folder:
    """Train the models that the folder lacks, and draw the report, even after an interruption.

    The folder keeps its rows when the user asks for more mechanisms, widths, rates or seeds.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    wanted = list(sweep.first_settings())
    pyplot()  # refuses before anything is trained
    extends = ("mechanisms", "conv", "widths", "learning_rates", "seeds")
    folder = Folder.start(output, REPORT.command, asdict(sweep), force=force, extends=extends)
    try:
        _train_all(_left(wanted, folder), folder, workers, device, console)
        others = sweep.other_settings(folder.rows(REPORT.fields))
        _train_all(_left(others, folder), folder, workers, device, console)
    finally:
        if folder.rows():
            report(folder, console)
    return folder


def _left(wanted: Iterable[Setting], folder: Folder) -> list[Setting]:
    """The settings that have no row yet."""
    done = {_run_key(row) for row in folder.rows(REPORT.fields)}
    return [setting for setting in wanted if _run_key(asdict(setting)) not in done]


def _train_all(
    left: list[Setting], folder: Folder, workers: int, device: str, console: Console
) -> None:
    if not left:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(left))
        try:
            runs: dict[Future[Row], Setting] = {
                pool.submit(train_model, setting, device): setting for setting in left
            }
            for future in as_completed(runs):
                setting = runs[future]
                try:
                    row = {**asdict(setting), "device": device, **future.result()}
                except (torch.OutOfMemoryError, MemoryError) as error:
                    progress.print(
                        f"{setting.mechanism}, width {setting.width}: out of memory, left out"
                        f" ({error})"
                    )
                    continue
                folder.append(row)
                shown = ", ".join(f"{n} pairs {right:.0%}" for n, right in row["accuracy"].items())
                conv = "" if setting.conv else " without convolution"
                progress.print(
                    f"{setting.mechanism}{conv}, width {setting.width}, rate"
                    f" {setting.learning_rate:g}, seed {setting.seed}: {shown}",
                    highlight=False,
                )
                progress.advance(bar)
        finally:
            workers_left = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in workers_left:  # they are idle, or an interruption gives up their runs
                process.terminate()


def _prepare_worker() -> None:
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the run


def _run_key(row: Row) -> tuple[Any, ...]:
    """The fields that identify a run within its sweep."""
    return tuple(row[name] for name in ("mechanism", "conv", "width", "learning_rate", "seed"))
