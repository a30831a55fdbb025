"""The page of `cumulant bench accuracy`, from its rows."""

from __future__ import annotations

from rich.console import Console

from ..reports.folder import Folder, Row
from ..reports.page import Page, Picture, Report, Table, write_page
from .plots import draw_errors
from .subjects import QUADRATIC, STEPWISE


def report(folder: Folder, console: Console | None = None) -> Page:
    """Picture and page from the folder's rows."""
    rows = folder.rows(REPORT.fields)
    page = Page(
        "Accuracy: error against float64 by length",
        _answer(rows),
        [_table(rows, operation) for operation in dict.fromkeys(row["operation"] for row in rows)],
        [
            Picture(
                draw_errors(rows, folder.path),
                "Error of the last 1,024 outputs against float64, by length",
            )
        ],
        [
            (
                "Operations are causal, with one head of 16 numbers and values 1 + N(0, 1). The"
                " exact outputs are those of the same operation in float64 on the same rounded"
                " inputs. Outputs in bf16 and fp16 are themselves rounded, by about 1.7e-3 and"
                f" 2e-4. The reference, which has T x T weights, is run up to {QUADRATIC:,} tokens;"
                f" steps of one token are run up to {STEPWISE:,}."
            ),
        ],
    )
    write_page(folder, page, console)
    return page


def _table(rows: list[Row], operation: str) -> Table:
    """A line for each dtype and implementation, a column for each length."""
    cells = {
        (row["dtype"], row["implementation"], row["length"]): row["error"]
        for row in rows
        if row["operation"] == operation
    }
    lines = dict.fromkeys((dtype, implementation) for dtype, implementation, _ in cells)
    lengths = sorted({length for *_, length in cells})
    body = []
    for dtype, implementation in lines:
        errors = (cells.get((dtype, implementation, T)) for T in lengths)
        body.append(
            (dtype, implementation, *("" if error is None else f"{error:.1e}" for error in errors))
        )
    return Table(operation, ("dtype", "implementation", *(f"{T:,}" for T in lengths)), body)


def _answer(rows: list[Row]) -> list[str]:
    """The largest error in each dtype."""
    longest = max(row["length"] for row in rows)
    said = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        worst = max(
            (row for row in rows if row["dtype"] == dtype), key=lambda row: float(row["error"])
        )
        where = f"{worst['operation']}, {worst['implementation']}, {worst['length']:,} tokens"
        said.append(f"{dtype} {worst['error']:.1e} ({where})")
    return [f"The largest error up to {longest:,} tokens: {'; '.join(said)}."]


REPORT = Report(
    "bench accuracy", ("operation", "length", "dtype", "implementation", "error"), report
)
