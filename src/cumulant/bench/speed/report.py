"""The page of `cumulant bench`, from its rows."""

from __future__ import annotations

from rich.console import Console

from ..reports.folder import Folder, Row
from ..reports.page import Page, Picture, Report, Table, write_page
from .plots import draw_memory, draw_times
from .verdicts import answers, format_number

TIMES = "Time by length; a ring marks the length from which a mechanism is faster than softmax"
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
        answers(rows, mechanisms),
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
                " length. Times are medians; ± is the standard deviation of single runs."
            ),
            (
                "A cell that was not measured says why: a run would take too long, by the time of"
                " the length before, or need more memory than there is."
            ),
        ],
    )
    write_page(folder, page, console)
    return page


def _table(rows: list[Row], mechanisms: list[str], kind: str) -> Table:
    cells = {(row["length"], row["mechanism"]): row for row in rows if row["pass"] == kind}
    lines = []
    for T in sorted({T for T, _ in cells}):
        lines.append((f"{T:,}", *(_cell_text(cells.get((T, name))) for name in mechanisms)))
    return Table(f"{kind}, milliseconds", ("tokens", *mechanisms), lines)


def _cell_text(row: Row | None) -> str:
    """Median and deviation in milliseconds, or the reason why there are none."""
    if row is None:
        return ""
    if row["status"] != "measured":
        return (
            f"{row['status']}: {row['why']}"
            if row["status"] == "out of memory"
            else str(row["status"])
        )
    return f"{format_number(row['median'] * 1e3, 4)} ± {format_number(row['deviation'] * 1e3, 2)}"


REPORT = Report("bench", ("length", "pass", "mechanism", "status"), report)
