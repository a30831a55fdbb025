"""The page of `cumulant recall`, from its rows."""

from __future__ import annotations

from rich.console import Console

from ..reports.folder import Folder
from ..reports.page import Page, Picture, Report, Table, write_page
from .best import Best, best_rates
from .frontier import owners
from .plots import FORMS, draw_frontier, draw_pairs, draw_state


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    found = best_rates(folder.rows(REPORT.fields))
    pairs = list(found[0].accuracy)
    forms = {conv: [b for b in found if b.conv == conv] for conv in (True, False)}
    page = Page(
        "Recall test: accuracy and state of each mechanism",
        [*_answer(found, pairs[-1]), *_owner_line(found, pairs[-1])],
        [
            *(_table(found, conv) for conv, own in forms.items() if own),
            *(_owner_table(own, conv, pairs[-1]) for conv, own in forms.items() if owners(own)),
        ],
        [
            Picture(
                draw_state(found, folder.path), f"Accuracy at {pairs[-1]} pairs by bytes of state"
            ),
            Picture(
                draw_frontier(found, folder.path),
                f"The best accuracy at {pairs[-1]} pairs in a state of limited size; bands: 95%"
                " over the seeds, where there are several",
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


def _owner_line(found: list[Best], most: str) -> list[str]:
    """The best mechanism of each size of the state, in the form of models that comes first."""
    conv = max(b.conv for b in found)
    each = [
        f"{owner.budget} kB {owner.best.mechanism} ({owner.best.hardest_accuracy:.0%})"
        for owner in owners([b for b in found if b.conv == conv])
    ]
    if not each:
        return []
    return [f"Best at {most} pairs by size of the state, {FORMS[conv]}: up to {', '.join(each)}."]


def _owner_table(found: list[Best], conv: bool, most: str) -> Table:
    headings = (
        "state, at most",
        "best",
        "width",
        f"{most} pairs",
        "state, kB",
        "next",
        "not told apart",
    )
    rows: list[tuple[str, ...]] = []
    for owner in owners(found):
        best, second, alike = owner.best, owner.second, owner.alike
        low_high = best.interval
        accuracy = f"{best.hardest_accuracy:.1%}"
        if low_high is not None:
            accuracy += f" ({low_high[0]:.1%} to {low_high[1]:.1%})"
        rows.append(
            (f"{owner.budget} kB", best.mechanism, str(best.width), accuracy,
             f"{best.state_bytes / 1000:,.1f}",
             f"{second.mechanism} {second.hardest_accuracy:.1%}" if second else "",
             "one seed" if alike is None else ", ".join(b.mechanism for b in alike) or "none")
        )  # fmt: skip
    return Table(f"Who is best at each size of the state: {FORMS[conv]}", headings, rows)


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
