"""`cumulant bench accuracy`: error against float64 by length, for every implementation and dtype.

A row is the error of one causal operation, ``||out - exact|| / ||exact||`` over its last tokens (at most 1,024), whose
sums are the longest. The exact outputs are the same operation's in float64 on the same, already rounded, inputs; the
tests hold float64 to the quadratic formulas. Values are 1 + N(0, 1), so that outputs do not vanish with length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..ops.dispatch import native_obstacle
from ..ops.elita import elita_attention
from ..ops.linear import linear_attention
from ..ops.mixed_chunk import mixed_chunk_attention
from ..ops.taylor import taylor_attention
from .folder import Folder, Row
from .page import Page, Picture, TableOf, write
from .speed import DTYPES

LAST = 1024
QUADRATIC = 4096  # tokens up to which the reference, T × T, is run
STEPWISE = 16384  # and one token at a time
STEPS = "one token at a time"
IMPLEMENTATIONS = ("reference", "torch", "native", STEPS)


def _taylor(order: int) -> Callable[..., Any]:
    return lambda q, k, v, **options: taylor_attention(q, k, v, order, is_causal=True, **options)


def _elita(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return elita_attention(k[..., 0].contiguous(), q[..., 0].contiguous(), q[..., 1].contiguous(), v, **options)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "linear": lambda q, k, v, **options: linear_attention(q, k, v, is_causal=True, **options),
    "taylor-2": _taylor(2),
    "taylor-3": _taylor(3),
    "elita": _elita,
    "mixed_chunk": lambda q, k, v, **options: mixed_chunk_attention(
        q, k, q.flip(-1), k.flip(-1), v, group_size=64, is_causal=True, **options
    ),
}


@dataclass(frozen=True)
class Settings:
    """One head of 16 numbers; `lengths` tokens."""

    lengths: tuple[int, ...] = tuple(4**p for p in range(3, 11))
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    operations: tuple[str, ...] = tuple(OPERATIONS)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(f"operation: expected one of {', '.join(OPERATIONS)}, got {name!r}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"length: expected numbers of at least 1, got {list(self.lengths)}")


def run(settings: Settings, output: str, *, device: str, force: bool, console: Console) -> Folder:
    """Measure what is not there yet, and draw the report."""
    from .plots import pyplot

    pyplot()
    folder = Folder.start(output, "bench accuracy", {**asdict(settings), "device": device}, force=force)
    done = {(row["operation"], row["length"], row["dtype"]) for row in folder.rows()}
    try:
        for length in sorted(settings.lengths):
            for operation in settings.operations:
                for dtype in settings.dtypes:
                    if (operation, length, dtype) not in done:
                        for row in measure(operation, length, dtype, settings.seed, device):
                            folder.append(row)
            console.print(f"{length:,} tokens", highlight=False)
    finally:
        if folder.rows():
            report(folder, console)
    return folder


@torch.inference_mode()
def measure(operation: str, length: int, dtype: str, seed: int, device: str) -> list[Row]:
    """A row for each implementation that can run."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = {"generator": generator, "device": device}
    q, k, v = (torch.randn(1, 1, length, 16, **shape) for _ in range(3))  # type: ignore[call-overload]
    inputs = [x.to(DTYPES[dtype]) for x in (q, k, v + 1)]
    call = OPERATIONS[operation]
    exact = call(*(x.double() for x in inputs))[:, :, -LAST:]
    rows = []
    for impl, out in _outputs(call, inputs, length):
        found = out[:, :, -LAST:].double()
        error = float((found - exact).norm() / exact.norm())
        row = {"operation": operation, "length": length, "dtype": dtype, "implementation": impl, "error": error}
        rows.append(row)
    return rows


def _outputs(call: Callable[..., Any], inputs: list[Tensor], length: int) -> Iterator[tuple[str, Tensor]]:
    if length <= QUADRATIC:
        yield "reference", call(*inputs, impl="reference")
    yield "torch", call(*inputs, impl="torch")
    if not native_obstacle(inputs[0]):
        yield "native", call(*inputs, impl="native")
    if length <= STEPWISE:
        state, outs = None, []
        for t in range(length):
            out, state = call(*(x[:, :, t : t + 1] for x in inputs), state=state, return_state=True)
            outs.append(out)
        yield STEPS, torch.cat(outs[-LAST:], 2)


def report(folder: Folder, console: Console | None = None) -> Page:
    """Picture and page from the folder's rows."""
    from .accuracy_plots import draw

    rows = folder.rows()
    tables = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        own = [row for row in rows if row["operation"] == operation]
        lines = dict.fromkeys((row["dtype"], row["implementation"]) for row in own)
        lengths = sorted({row["length"] for row in own})
        cells = {(row["dtype"], row["implementation"], row["length"]): row["error"] for row in own}
        body = [
            (dtype, impl, *(f"{cells[dtype, impl, T]:.1e}" if (dtype, impl, T) in cells else "" for T in lengths))
            for dtype, impl in lines
        ]
        tables.append(TableOf(operation, ("dtype", "implementation", *(f"{T:,}" for T in lengths)), body))
    page = Page(
        "Accuracy: error against float64 by length",
        _answer(rows),
        tables,
        [Picture(draw(rows, folder.path), "Error of the last 1,024 outputs against float64, by length")],
        [
            "Causal, one head of 16 numbers, values 1 + N(0, 1). Exact outputs are the same operation's in float64 on "
            "the same rounded inputs; outputs in bf16 and fp16 are themselves rounded, by about 1.7e-3 and 2e-4. "
            f"The reference, T x T weights, is run up to {QUADRATIC:,} tokens, single tokens up to {STEPWISE:,}.",
        ],
    )
    write(folder, page, console)
    return page


def _answer(rows: list[Row]) -> list[str]:
    longest = max(row["length"] for row in rows)
    said = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        worst = max((row for row in rows if row["dtype"] == dtype), key=lambda row: float(row["error"]))
        where = f"{worst['operation']}, {worst['implementation']}, {worst['length']:,} tokens"
        said.append(f"{dtype} {worst['error']:.1e} ({where})")
    return [f"The largest error up to {longest:,} tokens: {'; '.join(said)}."]
