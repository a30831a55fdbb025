"""`cumulant bench`: time and memory of every mechanism by length, on this machine.

Rows are cells of (mechanism, pass, length). A cell that would take too long, judged from the shorter ones, or too much
memory is recorded as such, and the run goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.live import Live

from .console import as_table
from .folder import Folder, Row
from .load import Load
from .memory import available, measured
from .page import Page, Picture, TableOf, write
from .subjects import SUBJECTS, Shape, Subject
from .verdicts import PASSES, answers, number

ROUNDS = 3  # a cell is measured so many times, the other mechanisms between: what else ran meanwhile shows as a spread
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
HELD = "Most memory held during a run, inputs and all; in decoding, what is kept of the context"


Cell = tuple[int, str, str]  # length, pass, mechanism


@dataclass(frozen=True)
class Recipe:
    """B sequences, H heads of d numbers. seconds: the most that a cell's single run may take; repeats: at most, and at
    least one; budget: seconds after which a cell is not repeated further, over all its rounds."""

    mechanisms: tuple[str, ...]
    passes: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int = 1
    heads: int = 8
    dim: int = 64
    causal: bool = True
    repeats: int = 20
    budget: float = 2.0
    seconds: float = 20.0
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        for name in self.mechanisms:
            if name not in SUBJECTS:
                raise ValueError(f"mechanism: expected one of {', '.join(SUBJECTS)}, got {name!r}")
        for name in self.passes:
            if name not in PASSES:
                raise ValueError(f"pass: expected one of {', '.join(PASSES)}, got {name!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"length: expected numbers of at least 1, got {list(self.lengths)}")
        for name in ("batch", "heads", "dim", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("budget", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def quick(self) -> Recipe:
        """Every second length up to 8192, briefly."""
        lengths = tuple(T for T in self.lengths if T <= 8192)[::2]
        return replace(self, lengths=lengths, repeats=9, budget=0.5, seconds=2.0)

    def groups(self) -> Iterator[list[Cell]]:
        """Cells that are compared with one another: they are measured in turn."""
        for T in sorted(set(self.lengths)):
            for kind in dict.fromkeys(self.passes):
                yield [(T, kind, mechanism) for mechanism in dict.fromkeys(self.mechanisms)]

    def cells(self) -> Iterator[Cell]:
        for group in self.groups():
            yield from group


LENGTHS = tuple(2**p for p in range(7, 21))
MECHANISMS = ("softmax", "linear", "taylor", "flash", "elita")
RECIPES = {
    "fair": Recipe(MECHANISMS, PASSES, LENGTHS),
    # What `impl="auto"` takes beside PyTorch's operations: it should be behind at no length.
    "implementations": Recipe(
        ("softmax", *(f"{name}{impl}" for name in MECHANISMS[1:] for impl in ("", ", torch"))),
        PASSES,
        tuple(2**p for p in range(4, 15, 2)),
    ),
    # "Linear Attention Is All You Need": one layer, d = 64, batch 32, forward, mean and deviation of 100 runs on a T4,
    # the softmax with all its weights in memory; beside it PyTorch's fused softmax, and Taylor attention.
    "blog": Recipe(
        ("naive softmax", "softmax", "linear", "taylor"),
        ("forward",),
        (128, 256, 512, 1000, 2000, 4000, 6000),
        batch=32,
        heads=1,
        causal=False,
        repeats=100,
        budget=20.0,
        seconds=60.0,
    ),
}


def run(recipe: Recipe, output: str, *, device: str, threads: int, force: bool, console: Console) -> Folder:
    """Measure what is not there yet, and draw the report."""
    from .plots import pyplot

    if threads < 0:
        raise ValueError(f"threads: expected at least 1, or 0 for all, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    pyplot()
    settings = {**asdict(recipe), "device": device, "threads": torch.get_num_threads()}
    folder = Folder.start(output, "bench", settings, force=force)
    done = {(row["length"], row["pass"], row["mechanism"]): row for row in folder.rows()}
    try:
        with Live(_progress(recipe, done, console), console=console, refresh_per_second=2) as live:
            for group in recipe.groups():
                rows = _measure_group(recipe, [cell for cell in group if cell not in done], device, done)
                folder.append(*rows.values())
                done |= rows
                live.update(_progress(recipe, done, console))
    finally:
        if done:
            report(folder, console)
    return folder


def _measure_group(recipe: Recipe, cells: list[Cell], device: str, done: dict[Cell, Row]) -> dict[Cell, Row]:
    """A row for each cell, measured in turn, `ROUNDS` times over. One whose runs are long is measured once: little that
    comes and goes in the meantime is as long."""
    load = Load()
    found: dict[Cell, list[Row]] = {cell: [_measure(recipe, cell, device, done)] for cell in cells}
    for _ in range(ROUNDS - 1):
        for cell, rows in found.items():
            if rows[-1]["status"] == "measured" and min(rows[-1]["times"]) < recipe.budget:
                rows.append(_measure(recipe, cell, device, done, weigh=False))
    others = round(load.processors(), 2)
    return {cell: {**_merged(rows), "others": others} for cell, rows in found.items()}


def _measure(recipe: Recipe, cell: Cell, device: str, done: dict[Cell, Row], weigh: bool = True) -> Row:
    """The seconds of each run of one round and, asked to `weigh`, the memory that takes; or why there are none."""
    T, kind, mechanism = cell
    row: Row = {"length": T, "pass": kind, "mechanism": mechanism}
    shape = Shape(recipe.batch, recipe.heads, T, recipe.dim, DTYPES[recipe.dtype], device, recipe.causal)
    expected = _expected(recipe, cell, done)
    if expected > recipe.seconds:
        why = "as at the length before" if expected == math.inf else f"about {expected:.0f} s a run"
        return {**row, "status": "too long", "why": why}
    needed, room = _bytes(shape, kind, mechanism), available(device)
    if room is not None and needed > 0.8 * room:
        return {**row, "status": "out of memory", "why": f"about {needed / 2**30:.1f} GiB of {room / 2**30:.1f}"}
    try:
        times, peak = _times(recipe, shape, kind, mechanism, weigh)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {**row, "status": "out of memory", "why": str(error).splitlines()[0]}
    return {**row, "status": "measured", "times": times, "peak_bytes": peak}


def _merged(rounds: list[Row]) -> Row:
    """One row of all rounds. low, high: the least and the most of their medians; of its runs, where there was one."""
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


def _expected(recipe: Recipe, cell: Cell, done: dict[Cell, Row]) -> float:
    """Seconds of a run, from the longest before it that was measured; infinite once one was too long."""
    T, kind, mechanism = cell
    before = [
        row for row in done.values() if (row["pass"], row["mechanism"]) == (kind, mechanism) and row["length"] < T
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


def _bytes(shape: Shape, kind: str, mechanism: str) -> float:
    """What a run holds at least: inputs, outputs and gradients, and the weights of what keeps them all."""
    numbers = 4 * shape.B * shape.H * shape.T * shape.d * (2 if kind == "training" else 1)
    weights = SUBJECTS[mechanism].weights * shape.B * shape.H * shape.T * (1 if kind == "decode" else shape.T)
    return float(numbers + weights) * torch.empty(0, dtype=shape.dtype).element_size()


def _times(
    recipe: Recipe, shape: Shape, kind: str, mechanism: str, weigh: bool = True
) -> tuple[list[float], int | None]:
    """Seconds of each run after one to warm up; and the most bytes held, inputs and all, or, decoding, of context."""
    torch.manual_seed(0)
    subject = SUBJECTS[mechanism]
    if kind == "decode":
        with torch.inference_mode():
            step, held = subject.step(shape)
            return _repeat(recipe, step, shape.device), held
    times = _repeat(recipe, _call(shape, kind, subject), shape.device)
    if not weigh:
        return times, None
    with measured(shape.device) as peak:
        _timed(_call(shape, kind, subject), shape.device)
        return times, peak()


def _repeat(recipe: Recipe, call: Callable[[], Any], device: str) -> list[float]:
    first = _timed(call, device)
    if first > recipe.seconds:
        return [first]
    times, limit = [_timed(call, device)], time.perf_counter() + recipe.budget / ROUNDS
    while len(times) < -(-recipe.repeats // ROUNDS) and time.perf_counter() < limit:
        times.append(_timed(call, device))
    return times


def _call(shape: Shape, kind: str, subject: Subject) -> Callable[[], Any]:
    inputs = subject.inputs(shape)
    if kind == "forward":
        return torch.inference_mode()(lambda: subject.run(inputs, shape.causal))
    leaves = tuple(x.requires_grad_() for x in inputs)

    def train() -> None:
        out = subject.run(leaves, shape.causal)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return train


def _timed(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _progress(recipe: Recipe, done: dict[Cell, Row], console: Console) -> RenderableType:
    """What there is so far."""
    rows = []
    for kind in recipe.passes:
        for T in sorted(recipe.lengths):
            cells = [done.get((T, kind, mechanism)) for mechanism in recipe.mechanisms]
            if any(cells):
                rows.append((kind, f"{T:,}", *map(_cell, cells)))
    return as_table(console, ("pass", "tokens", *recipe.mechanisms), rows, "milliseconds")


def _cell(row: Row | None) -> str:
    if row is None:
        return "not yet"
    return number(row["median"] * 1e3, 3) if row["status"] == "measured" else str(row["status"])


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    from .speed_plots import draw_memory, draw_times

    rows, settings = folder.rows(), folder.settings
    mechanisms = [name for name in settings["mechanisms"] if any(row["mechanism"] == name for row in rows)]
    pictures = []
    if any(row["status"] == "measured" for row in rows):
        caption = "Time by length; rings mark where softmax is overtaken"
        pictures.append(Picture(draw_times(rows, mechanisms, folder.path), caption))
    if any(row.get("peak_bytes") for row in rows):
        pictures.append(
            Picture(
                draw_memory(rows, mechanisms, folder.path),
                HELD,
            )
        )
    what = f"{settings['batch']} x {settings['heads']} heads of {settings['dim']}, {settings['dtype']}"
    page = Page(
        "Speed: time and memory by length",
        answers(rows, mechanisms),
        [_table(rows, mechanisms, kind) for kind in settings["passes"]],
        pictures,
        [
            f"One layer's attention: {what}, {'causal' if settings['causal'] else 'in both directions'}, on "
            f"{settings['device']}, {settings['threads']} threads; queries and keys of 16 numbers in Taylor attention, "
            "of 128 in FLASH (one head, its values as wide as all heads'). Softmax is PyTorch's fused attention; the "
            "naive one keeps all weights. Medians; ± is the deviation of single runs. Decoding is one token onto a "
            "context of that length.",
            "Cells that were not measured say why: a run would take too long, judged from the one before, or need more "
            "memory than there is.",
        ],
    )
    write(folder, page, console)
    return page


def _table(rows: list[Row], mechanisms: list[str], kind: str) -> TableOf:
    cells = {(row["length"], row["mechanism"]): row for row in rows if row["pass"] == kind}
    lines = []
    for T in sorted({T for T, _ in cells}):
        lines.append((f"{T:,}", *(_spread(cells.get((T, name))) for name in mechanisms)))
    return TableOf(f"{kind}, milliseconds", ("tokens", *mechanisms), lines)


def _spread(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "measured":
        return f"{row['status']}: {row['why']}" if row["status"] == "out of memory" else str(row["status"])
    return f"{number(row['median'] * 1e3, 4)} ± {number(row['deviation'] * 1e3, 2)}"
