"""`cumulant bench accuracy`: the errors of every operation, implementation and dtype.

A row is the error of one causal operation, ``||out - exact|| / ||exact||``, over its last tokens
(at most 1,024), whose sums are the longest. The exact outputs are those of the same operation in
float64, on the same rounded inputs; the tests check float64 against the quadratic formulas. Values
are 1 + N(0, 1), so that outputs do not vanish with length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from rich.console import Console

from ..dtypes import DTYPES, require_dtype
from ..reports.folder import Folder, Row
from ..reports.plots import pyplot
from .report import REPORT, report
from .subjects import IMPLEMENTATIONS, LAST, OPERATIONS


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement on one head of 16 numbers. lengths: in tokens."""

    lengths: tuple[int, ...] = tuple(4**p for p in range(3, 11))
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    operations: tuple[str, ...] = tuple(OPERATIONS)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.dtypes:
            require_dtype(name)
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(
                    f"operation: expected one of {', '.join(OPERATIONS)}, got {name!r}"
                )
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"length: expected numbers of at least 1, got {list(self.lengths)}")


def run(settings: Settings, output: str, *, device: str, force: bool, console: Console) -> Folder:
    """Measure the rows that the folder lacks, and draw_errors the report."""
    pyplot()  # refuses before anything is measured
    folder = Folder.start(
        output, REPORT.command, {**asdict(settings), "device": device}, force=force
    )
    done = {(row["operation"], row["length"], row["dtype"]) for row in folder.rows(REPORT.fields)}
    try:
        for length in sorted(settings.lengths):
            for operation in settings.operations:
                for dtype in settings.dtypes:
                    if (operation, length, dtype) not in done:
                        for row in measure_errors(operation, length, dtype, settings.seed, device):
                            folder.append(row)
            console.print(f"{length:,} tokens", highlight=False)
    finally:
        if folder.rows():
            report(folder, console)
    return folder


@torch.inference_mode()
def measure_errors(operation: str, length: int, dtype: str, seed: int, device: str) -> list[Row]:
    """A row for each implementation that can run."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = {"generator": generator, "device": device}
    q, k, v = (torch.randn(1, 1, length, 16, **shape) for _ in range(3))  # type: ignore[call-overload]
    inputs = [x.to(DTYPES[dtype].torch) for x in (q, k, v + 1)]
    call = OPERATIONS[operation]
    exact = call(*(x.double() for x in inputs))[:, :, -LAST:]
    rows = []
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.can_run(inputs):
            out = implementation.run(call, inputs)[:, :, -LAST:].double()
            error = float((out - exact).norm() / exact.norm())
            found = {
                "operation": operation,
                "length": length,
                "dtype": dtype,
                "implementation": name,
                "error": error,
            }
            rows.append(found)
    return rows
