"""The page of `cumulant recall`, from its rows."""

from __future__ import annotations

from rich.console import Console

from ..reports.folder import Folder
from ..reports.page import Page, Picture, Report, Table, write_page
from .best import Best, best_rates
from .plots import FORMS, draw_pairs, draw_state


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    found = best_rates(folder.rows(REPORT.fields))
    pairs = list(found[0].accuracy)
    page = Page(
        "Recall test: accuracy and state of each mechanism",
        _answer(found, pairs[-1]),
        [_table(found, conv) for conv in (True, False) if any(b.conv == conv for b in found)],
        [
            Picture(
                draw_state(found, folder.path), f"Accuracy at {pairs[-1]} pairs by bytes of state"
            ),
            Picture(
                draw_pairs(found, folder.path),
                "Accuracy by number of pairs, each mechanism at its best width",
            ),
        ],
        [
            (
                "The test is multi-query associative recall as in Zoology (Arora et al. 2023). A"
                " context states pairs of a key and its value. Then each key is repeated, and the"
                " model predicts its value. A guess among the n values of the context is right"
                " once in n times. Models have two layers without feed-forwards; based has"
                " a third layer, its sliding window."
            ),
            (
                "Each line shows the mechanism's best learning rate; ± is the standard deviation"
                " over seeds. State is the size of all layers' caches after"
                f" {folder.settings['length']} tokens. Softmax's grows with every token; the"
                " others' does not."
            ),
        ],
    )
    write_page(folder, page, console)
    return page


def _answer(found: list[Best], most: str) -> list[str]:
    """Accuracy of each mechanism at its best width, the best first."""
    top: dict[str, Best] = {}
    for b in found:
        if b.mechanism not in top or b.hardest_accuracy > top[b.mechanism].hardest_accuracy:
            top[b.mechanism] = b
    ranked = sorted(top.values(), key=lambda b: -b.hardest_accuracy)
    both = len({b.conv for b in found}) > 1
    states = [
        f"{b.state_bytes / 1000:,.0f} kB{', alone' if both and not b.conv else ''}" for b in ranked
    ]
    said = ", ".join(
        f"{b.mechanism} {b.hardest_accuracy:.0%} ({state})" for b, state in zip(ranked, states)
    )
    return [f"Accuracy on {most} pairs in one context, and the size of the state: {said}."]


def _table(found: list[Best], conv: bool) -> Table:
    pairs = list(found[0].accuracy)
    headings = (
        "mechanism",
        "width",
        *(f"{n} pairs" for n in pairs),
        "rate",
        "seeds",
        "state, kB",
        "parameters",
        "seconds",
    )
    rows = []
    for b in found:
        if b.conv == conv:
            each = (
                f"{mean:.1%} ± {deviation:.1%}" if b.seeds > 1 else f"{mean:.1%}"
                for mean, deviation in b.accuracy.values()
            )
            rows.append(
                (b.mechanism, str(b.width), *each, f"{b.learning_rate:g}", str(b.seeds),
                f"{b.state_bytes / 1000:,.1f}",
                 f"{b.parameters:,}", f"{b.seconds:.0f}")
            )  # fmt: skip
    return Table(FORMS[conv], headings, rows)


REPORT = Report(
    "recall", ("mechanism", "conv", "width", "learning_rate", "seed", "accuracy"), report
)
