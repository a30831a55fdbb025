"""`cumulant bench`: times and memory of each mechanism in each pass at each length.

A row is a cell (length, pass, mechanism). A cell that would take too much memory, or too long by
the time of shorter lengths, becomes a row that says so, and the measurement continues. Cells for
which the recipe's limit leaves no time are no rows, so the same command can measure them later.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.live import Live

from ..console import as_table
from ..reports.folder import Folder, Row
from ..reports.plots import pyplot
from .load import Load
from .memory import available_bytes, peak_memory
from .recipes import Cell, Recipe
from .report import REPORT, report
from .subjects import SUBJECTS, Shape, Subject
from .verdicts import format_number

# rounds over a group of cells; the spread of a cell's rounds shows disturbances by other programs
ROUNDS = 3
RUNS = 3  # least runs of a cell: to warm up, for the time, and for the memory


def run(
    recipe: Recipe, output: str, *, device: str, threads: int, force: bool, console: Console
) -> Folder:
    """Measure the cells that the folder lacks, and draw the report."""
    if threads < 0:
        raise ValueError(f"threads: expected at least 1, or 0 for all, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    for name, needed in recipe.obstacles(device).items():
        raise ValueError(f"mechanism: {name} needs {needed}")
    deadline = math.inf if recipe.limit is None else time.perf_counter() + recipe.limit
    pyplot()  # refuses before anything is measured
    settings = {**asdict(recipe), "device": device, "threads": torch.get_num_threads()}
    folder = Folder.start(output, REPORT.command, settings, force=force)
    done = {
        (row["length"], row["pass"], row["mechanism"]): row for row in folder.rows(REPORT.fields)
    }
    try:
        with Live(
            _progress_table(recipe, done, console), console=console, refresh_per_second=2
        ) as live:
            for group in recipe.groups():
                left = [cell for cell in group if cell not in done]
                rows = _measure_group(recipe, left, device, done, deadline)
                folder.append(*rows.values())
                done |= rows
                live.update(_progress_table(recipe, done, console))
    finally:
        if done:
            report(folder, console)
    return folder


def _measure_group(
    recipe: Recipe,
    cells: list[Cell],
    device: str,
    done: dict[Cell, Row],
    deadline: float = math.inf,
) -> dict[Cell, Row]:
    """A row for each cell. Cells are measured in turn, `ROUNDS` times.

    A cell with long runs is measured once, since disturbances are shorter than its runs. At the
    deadline, by `time.perf_counter`, the rounds end. If not even the first has been whole, there
    are no rows.
    """
    load = Load()
    found: dict[Cell, list[Row]] = {cell: [] for cell in cells}
    for cell, rows in found.items():
        expected = _expected_seconds(recipe, cell, done)
        needed = RUNS * expected if expected <= recipe.seconds else 0.0
        if time.perf_counter() + needed > deadline:
            return {}
        rows.append(_measure_cell(recipe, cell, device, done))
    for _ in range(ROUNDS - 1):
        for cell, rows in found.items():
            if rows[0]["status"] != "measured" or min(rows[-1]["times"]) >= recipe.budget:
                continue
            if time.perf_counter() + RUNS * max(rows[-1]["times"]) < deadline:
                rows.append(_measure_cell(recipe, cell, device, done, with_memory=False))
    others = round(load.busy_processors(), 2)
    return {cell: {**_merge_rounds(rows), "others": others} for cell, rows in found.items()}


def _measure_cell(
    recipe: Recipe, cell: Cell, device: str, done: dict[Cell, Row], with_memory: bool = True
) -> Row:
    """One round of a cell: the seconds of each run, and the memory of one if asked.

    A cell that cannot be measured becomes a row with the reason.
    """
    T, kind, mechanism = cell
    row: Row = {"length": T, "pass": kind, "mechanism": mechanism}
    shape = recipe.shape(T, device)
    expected = _expected_seconds(recipe, cell, done)
    if expected > recipe.seconds:
        why = "as at the length before" if expected == math.inf else f"about {expected:.0f} s a run"
        return {**row, "status": "too long", "why": why}
    needed, room = _least_bytes(shape, kind, mechanism), available_bytes(device)
    if room is not None and needed > 0.8 * room:
        return {
            **row,
            "status": "out of memory",
            "why": f"about {needed / 2**30:.1f} GiB of {room / 2**30:.1f}",
        }
    try:
        times, peak = _run_times(recipe, shape, kind, mechanism, with_memory)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {**row, "status": "out of memory", "why": str(error).splitlines()[0]}
    return {**row, "status": "measured", "times": times, "peak_bytes": peak}


def _merge_rounds(rounds: list[Row]) -> Row:
    """One row of all rounds.

    low, high: the least and the greatest median of a round; if there was one round, of its runs.
    """
    last = rounds[-1]
    if last["status"] != "measured":
        return last
    medians = [statistics.median(row["times"]) for row in rounds]
    if len(medians) == 1:
        medians = last["times"]
    times = [t for row in rounds for t in row["times"]]
    peaks = [row["peak_bytes"] for row in rounds if row["peak_bytes"] is not None]
    return {
        **{name: last[name] for name in ("length", "pass", "mechanism", "status")},
        "median": statistics.median(times), "mean": statistics.mean(times),
        "deviation": statistics.stdev(times) if len(times) > 1 else 0.0, "runs": len(times),
        "low": min(medians), "high": max(medians), "peak_bytes": max(peaks, default=None),
    }  # fmt: skip


def _expected_seconds(recipe: Recipe, cell: Cell, done: dict[Cell, Row]) -> float:
    """Seconds of a run, extrapolated from the longest shorter length.

    Infinite if that was itself too long.
    """
    T, kind, mechanism = cell
    before = [
        row
        for row in done.values()
        if (row["pass"], row["mechanism"]) == (kind, mechanism) and row["length"] < T
    ]
    if not before:
        return 0.0
    last = max(before, key=lambda row: row["length"])
    power = 2 if SUBJECTS[mechanism].quadratic and kind != "decode" else 1
    if last["status"] == "measured":
        return float(last["median"] * (T / last["length"]) ** power)
    if last["status"] != "too long":
        return 0.0
    return math.inf


def _least_bytes(shape: Shape, kind: str, mechanism: str) -> float:
    """Bytes that a run holds at least.

    They are inputs, outputs, gradients and, for a mechanism that keeps them, the T × T weights.
    """
    numbers = 4 * shape.B * shape.H * shape.T * shape.d * (2 if kind == "training" else 1)
    weights = (
        SUBJECTS[mechanism].weights
        * shape.B
        * shape.H
        * shape.T
        * (1 if kind == "decode" else shape.T)
    )
    return float(numbers + weights) * torch.empty(0, dtype=shape.dtype).element_size()


def _run_times(
    recipe: Recipe, shape: Shape, kind: str, mechanism: str, with_memory: bool = True
) -> tuple[list[float], int | None]:
    """Seconds of each run after a warm-up, and bytes.

    The bytes are the peak of a run; for decoding, the memory of the context.
    """
    torch.manual_seed(0)
    subject = SUBJECTS[mechanism]
    if kind == "decode":
        with torch.inference_mode():
            step, held = subject.step(shape)
            return _time_repeatedly(recipe, step, shape.device), held
    times = _time_repeatedly(recipe, _make_call(shape, kind, subject), shape.device)
    if not with_memory:
        return times, None
    with peak_memory(shape.device) as peak:
        _seconds(_make_call(shape, kind, subject), shape.device)
        return times, peak()


def _time_repeatedly(recipe: Recipe, call: Callable[[], Any], device: str) -> list[float]:
    first, times = _seconds(call, device), [_seconds(call, device)]
    if first >= recipe.budget:  # a warm-up does not show in so long a run
        return [first, *times]
    limit = time.perf_counter() + recipe.budget / ROUNDS
    while len(times) < -(-recipe.repeats // ROUNDS) and time.perf_counter() < limit:
        times.append(_seconds(call, device))
    return times


def _make_call(shape: Shape, kind: str, subject: Subject) -> Callable[[], Any]:
    if kind == "forward":
        return subject.forward(shape)
    leaves = tuple(x.requires_grad_() for x in subject.inputs(shape))

    def train() -> None:
        out = subject.run(leaves, shape.causal)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return train


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _progress_table(recipe: Recipe, done: dict[Cell, Row], console: Console) -> RenderableType:
    """A table of the times measured so far."""
    rows = []
    for kind in recipe.passes:
        for T in sorted(recipe.lengths):
            cells = [(T, kind, mechanism) for mechanism in recipe.mechanisms]
            if any(cell in done for cell in cells):
                rows.append((kind, f"{T:,}", *(_cell_text(cell, done) for cell in cells)))
    headings = ("pass", "tokens", *recipe.mechanisms)
    return as_table(console, headings, rows, "milliseconds, medians")


def _cell_text(cell: Cell, done: dict[Cell, Row]) -> str:
    row = done.get(cell)
    if row is None:
        return "not yet" if cell[1] in SUBJECTS[cell[2]].passes else "none"
    return (
        format_number(row["median"] * 1e3, 3) if row["status"] == "measured" else str(row["status"])
    )
