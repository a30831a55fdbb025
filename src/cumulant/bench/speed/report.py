"""The page of `cumulant bench`, from its rows."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..reports.folder import Folder, Row
from ..reports.page import Page, Picture, Report, Table, write_page
from .plots import draw_memory, draw_times
from .subjects import SUBJECTS
from .verdicts import answers, format_number, measured_interval

TIMES = (
    "Time by length, median and interval; a ring marks the length from which a mechanism is faster"
    " than softmax"
)
ONNXRUNTIME = (
    "The columns of onnxruntime are its operators LinearAttention and GroupQueryAttention, on as"
    " many threads, with inputs and outputs bound before the first call. Its linear attention is"
    " the plain recurrence of k vᵀ, with the state before and after. It has no feature map and no"
    " normaliser, which the column linear has. Its softmax attention keeps the context in a buffer."
    " Neither has gradients, so they are not trained."
)
MEMORY = "Peak memory of a run, with its inputs; in decoding, the memory of the context"


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    rows, settings = folder.rows(REPORT.fields), folder.settings
    mechanisms = [
        name for name in settings["mechanisms"] if any(row["mechanism"] == name for row in rows)
    ]
    pictures = []
    if any(row["status"] == "measured" for row in rows):
        pictures.append(Picture(draw_times(rows, mechanisms, folder.path), TIMES))
    if any(row.get("peak_bytes") for row in rows):
        pictures.append(Picture(draw_memory(rows, mechanisms, folder.path), MEMORY))
    shape = (
        f"batch {settings['batch']}, {settings['heads']} heads of {settings['dim']},"
        f" {settings['dtype']}"
    )
    page = Page(
        "Speed: time and memory by length",
        [*answers(rows, mechanisms), *_missing(rows, settings)],
        [_table(rows, mechanisms, kind) for kind in settings["passes"]],
        pictures,
        [
            (
                f"The attention of one layer: {shape},"
                f" {'causal' if settings['causal'] else 'in both directions'}, on"
                f" {settings['device']} with {settings['threads']} threads. Queries and keys have"
                " 16 numbers in Taylor attention. In FLASH they have 128, and one head holds the"
                " values of all heads. Softmax is PyTorch's fused attention; naive softmax keeps"
                " all weights in memory. Decoding computes one token behind a context of that"
                " length. Times are medians. Brackets and bands have the interval that the"
                " sentences above compare, from the least to the greatest median of a cell's"
                " rounds, or of the runs of a cell with one round. In rows of earlier versions it"
                " is a standard deviation of single runs to each side."
            ),
            (
                "A cell that was not measured says why: a run would take too long, by the time of"
                " the length before, or need more memory than there is."
            ),
            *([ONNXRUNTIME] if any(m.endswith(", onnxruntime") for m in mechanisms) else []),
        ],
    )
    write_page(folder, page, console)
    return page


def _missing(rows: list[Row], settings: dict[str, Any]) -> list[str]:
    """A sentence that names the lengths of each pass that were not measured yet, if there are."""
    done = {(row["length"], row["pass"], row["mechanism"]) for row in rows}
    parts = []
    for kind in settings["passes"]:
        names = [m for m in settings["mechanisms"] if m in SUBJECTS and kind in SUBJECTS[m].passes]
        lengths = [
            f"{T:,}"
            for T in sorted(set(settings.get("lengths", ())))
            if any((T, kind, name) not in done for name in names)
        ]
        if lengths:
            parts.append(f"{kind} at {', '.join(lengths)}")
    if not parts:
        return []
    return [f"Not measured yet: {'; '.join(parts)}. The same command goes on with them."]


def _table(rows: list[Row], mechanisms: list[str], kind: str) -> Table:
    cells = {(row["length"], row["mechanism"]): row for row in rows if row["pass"] == kind}
    names = [name for name in mechanisms if any(name == other for _, other in cells)]
    lines = []
    for T in sorted({T for T, _ in cells}):
        lines.append((f"{T:,}", *(_cell_text(cells.get((T, name))) for name in names)))
    return Table(f"{kind}, milliseconds", ("tokens", *names), lines)


def _cell_text(row: Row | None) -> str:
    """Median and interval in milliseconds, or the reason why there are none."""
    if row is None:
        return ""
    if row["status"] != "measured":
        return (
            f"{row['status']}: {row['why']}"
            if row["status"] == "out of memory"
            else str(row["status"])
        )
    low, high = (format_number(seconds * 1e3, 3) for seconds in measured_interval(row))
    return f"{format_number(row['median'] * 1e3, 3)} ({low} to {high})"


REPORT = Report("bench", ("length", "pass", "mechanism", "status"), report)
