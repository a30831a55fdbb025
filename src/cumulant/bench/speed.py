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
from itertools import product
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.live import Live

from .console import as_table
from .folder import Folder, Row
from .memory import available, measured
from .page import Page, Picture, TableOf, write
from .subjects import SUBJECTS, Shape, Subject

PASSES = ("forward", "training", "decode")  # training: forward and backward; decode: one more token
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BASELINE = "softmax"
HELD = "Most memory held during a run, inputs and all; in decoding, what is kept of the context"


@dataclass(frozen=True)
class Recipe:
    """B sequences, H heads of d numbers. seconds: the most that a cell's single run may take; repeats: at most, and at
    least one; budget: seconds after which a cell is not repeated further."""

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

    def quick(self) -> Recipe:
        """Every second length up to 8192, briefly."""
        lengths = tuple(T for T in self.lengths if T <= 8192)[::2]
        return replace(self, lengths=lengths, repeats=7, budget=0.4, seconds=2.0)

    def cells(self) -> Iterator[tuple[int, str, str]]:
        for T in sorted(self.lengths):
            for kind in self.passes:
                for mechanism in self.mechanisms:
                    yield T, kind, mechanism


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
            for cell in recipe.cells():
                if cell not in done:
                    done[cell] = _measure(recipe, cell, device, done)
                    folder.append(done[cell])
                    live.update(_progress(recipe, done, console))
    finally:
        if done:
            report(folder, console)
    return folder


def _measure(recipe: Recipe, cell: tuple[int, str, str], device: str, done: dict[tuple[int, str, str], Row]) -> Row:
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
        times, peak = _times(recipe, shape, kind, mechanism)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {**row, "status": "out of memory", "why": str(error).splitlines()[0]}
    deviation = statistics.stdev(times) if len(times) > 1 else 0.0
    median, mean = statistics.median(times), statistics.mean(times)
    return {
        **row, "status": "measured", "median": median, "mean": mean, "deviation": deviation, "runs": len(times),
        "peak_bytes": peak,
    }  # fmt: skip


def _expected(recipe: Recipe, cell: tuple[int, str, str], done: dict[tuple[int, str, str], Row]) -> float:
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


def _times(recipe: Recipe, shape: Shape, kind: str, mechanism: str) -> tuple[list[float], int | None]:
    """Seconds of each run after one to warm up; and the most bytes held, inputs and all, or, decoding, of context."""
    torch.manual_seed(0)
    subject = SUBJECTS[mechanism]
    if kind == "decode":
        with torch.inference_mode():
            step, held = subject.step(shape)
            return _repeat(recipe, step, shape.device), held
    times = _repeat(recipe, _call(shape, kind, subject), shape.device)
    with measured(shape.device) as peak:
        _timed(_call(shape, kind, subject), shape.device)
        return times, peak()


def _repeat(recipe: Recipe, call: Callable[[], Any], device: str) -> list[float]:
    first = _timed(call, device)
    if first > recipe.seconds:
        return [first]
    times, limit = [_timed(call, device)], time.perf_counter() + recipe.budget
    while len(times) < recipe.repeats and time.perf_counter() < limit:
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


def _progress(recipe: Recipe, done: dict[tuple[int, str, str], Row], console: Console) -> RenderableType:
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
    return _number(row["median"] * 1e3, 3) if row["status"] == "measured" else str(row["status"])


def crossing(rows: list[Row], kind: str, mechanism: str) -> int | None:
    """The first measured length from which on the mechanism is faster than softmax, wherever both were measured."""
    both = _pairs(rows, kind, mechanism)
    ahead = None
    for T, own, softmax in reversed(both):
        if own >= softmax:
            break
        ahead = T
    return ahead


def _pairs(rows: list[Row], kind: str, mechanism: str, other: str = BASELINE) -> list[tuple[int, float, float]]:
    """Length, the mechanism's and the other's time, by length."""
    found = {
        (row["length"], row["mechanism"]): float(row["median"])
        for row in rows
        if row["pass"] == kind and row["status"] == "measured"
    }
    lengths = sorted(T for T, name in found if name == mechanism and (T, other) in found)
    return [(T, found[T, mechanism], found[T, other]) for T in lengths]


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


def answers(rows: list[Row], mechanisms: list[str]) -> list[str]:
    """From where each mechanism beats softmax here, and by how much at the greatest common length."""
    found = []
    for kind in PASSES:
        parts = []
        for mechanism in mechanisms:
            both = _pairs(rows, kind, mechanism)
            if mechanism == BASELINE or not both:
                continue
            T, own, softmax = both[-1]
            ahead = crossing(rows, kind, mechanism)
            where = f"beats softmax from T = {ahead:,}" if ahead else "does not beat softmax"
            parts.append(f"{mechanism} {where} ({_number(softmax / own, 3)} times as fast at {T:,})")
        if parts:
            found.append(f"On this machine, {kind}: {'; '.join(parts)}.")
    return [*found, *_against_torch(rows, mechanisms)] or ["Nothing to compare with softmax was measured yet."]


def _against_torch(rows: list[Row], mechanisms: list[str]) -> list[str]:
    """The chosen implementation's speed over that of PyTorch's operations, the least and the most of all lengths."""
    parts = []
    for name, kind in product((m for m in mechanisms if f"{m}, torch" in mechanisms), PASSES):
        ratios = {T: other / own for T, own, other in _pairs(rows, kind, name, f"{name}, torch")}
        if ratios:
            least = min(ratios, key=lambda T: ratios[T])
            most = _number(max(ratios.values()), 2)
            parts.append(f"{name} {kind} {_number(ratios[least], 2)} (at {least:,}) to {most}")
    return [f"Times as fast as PyTorch's operations: {'; '.join(parts)}."] if parts else []


def _number(x: float, digits: int) -> str:
    """So many digits, all those before the point, and no exponent."""
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}"


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
    return f"{_number(row['median'] * 1e3, 4)} ± {_number(row['deviation'] * 1e3, 2)}"
