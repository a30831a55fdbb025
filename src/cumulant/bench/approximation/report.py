"""The page of `cumulant bench approximation`, from its rows."""

from __future__ import annotations

import statistics

from rich.console import Console

from ..reports.folder import Folder, Row
from ..reports.page import Page, Picture, Report, Table, write_page
from .cases import LENGTH, SIZES, Case, order_name
from .plots import draw_error, draw_exponential


def read_cases(rows: list[Row]) -> list[Case]:
    return [Case(**{name: value for name, value in row.items() if name != "model"}) for row in rows]


def median_errors(cases: list[Case]) -> dict[str, dict[int, float]]:
    """The rows of the table: a setting, and the error of each order."""
    orders = sorted({c.order for c in cases})

    def errors(chosen: list[Case]) -> dict[int, float]:
        return {
            order: statistics.median([c.error for c in chosen if c.order == order])
            for order in orders
        }

    random = [c for c in cases if c.kind == "random" and c.head_dim == 16]
    rows = {}
    for i, size in enumerate(SIZES):  # the cases are in the order of SIZES
        rows[f"random, size {size:g}"] = errors(random[len(orders) * i : len(orders) * (i + 1)])
    for dim in (16, 64):
        for alpha in (1.0, 3.0):
            chosen = [
                c
                for c in cases
                if c.kind == "normalised" and c.head_dim == dim and c.alpha == alpha
            ]
            rows[f"LayerNorm, K={dim}, α={alpha:g}"] = errors(chosen)
    trained = [c for c in cases if c.kind == "trained"]
    for name in dict.fromkeys((c.where or "").rpartition(" head ")[0] for c in trained):
        chosen = [c for c in trained if (c.where or "").startswith(f"{name} head")]
        size = statistics.median([c.size for c in chosen])
        rows[f"{name}, size {size:.2g}"] = errors(chosen)
    return rows


def as_percent(error: float) -> str:
    """The error with three digits; above 1000% only that."""
    return f"{100 * error:.3g}%" if error < 10 else "> 1000%"


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    cases = read_cases(folder.rows(REPORT.fields))
    rows = median_errors(cases)
    one, two = rows["random, size 1"], rows["random, size 2"]
    page = Page(
        "How near Taylor attention comes to softmax attention",
        [
            f"Taylor attention of order 2 is {as_percent(one[2])} from softmax attention at scores"
            f" of size 1 and {as_percent(two[2])} at 2; order 4 is {as_percent(one[4])} and"
            f" {as_percent(two[4])}."
        ],
        [
            Table(
                "Error",
                ("q and k, size of scores", *map(order_name, one)),
                [(name, *map(as_percent, errors.values())) for name, errors in rows.items()],
            )
        ],
        [
            Picture(draw_exponential(folder.path), "The exponential and its Taylor expansions"),
            Picture(
                draw_error(cases, folder.path), "Error of the output against softmax attention"
            ),
        ],
        [
            (
                "The error is ||taylor - softmax|| / ||softmax|| over the outputs of causal"
                f" attention on {LENGTH} tokens, with values independent of the keys. The size is"
                " the root mean square of the scores. Averaging is the mean of the values so far,"
                " which an approximation must beat. Figures of trained models are medians over the"
                " heads of a layer."
            ),
        ],
    )
    write_page(folder, page, console)
    return page


REPORT = Report("bench approximation", ("kind", "order", "head_dim", "size", "error"), report)
