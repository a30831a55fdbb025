"""The page of `cumulant compare`, from its rows."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..reports.folder import Folder, Row
from ..reports.page import Page, Picture, Report, Table, write_page
from .plots import draw_contexts, draw_copying, draw_curves, draw_passing, draw_sweep
from .results import Result, results, swept_steps


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    rows, settings = folder.rows(REPORT.fields), folder.settings
    found = results(rows, settings["baseline"])
    if not found:
        raise ValueError(f"folder: {folder.path} has no finished run yet")
    text = next(row for row in rows if row["row"] == "text")
    context = settings["context"]
    pictures = [
        Picture(
            draw_curves(found, settings, folder.path),
            "Held-out loss during training, by step and by time",
        ),
        Picture(draw_sweep(found, folder.path), _sweep_caption(settings, text)),
    ]
    tables = [_final_table(found, settings)]
    in_context, copied = [r for r in found if r.contexts], [r for r in found if r.copying]
    if in_context:
        caption = f"Loss on the same tokens in longer windows; trained on windows of {context:,}"
        pictures.append(Picture(draw_contexts(in_context, context, folder.path), caption))
        tables.append(_context_table([(r.mechanism, r.contexts) for r in in_context]))
    passed, steps = [r for r in found if r.passing], settings.get("passing_steps", 0)
    if passed:
        after = f"after {steps:,} steps with states passed on"
        caption = f"Loss on the same tokens in longer windows, {after}"
        pictures.append(Picture(draw_passing(passed, context, folder.path), caption))
        tables.append(_context_table([(r.mechanism, r.passing) for r in passed], f", {after}"))
    if copied:
        caption = (
            "Loss on spans of 128 bytes that are repeated in the window, relative to spans that"
            " are not"
        )
        pictures.append(Picture(draw_copying(copied, context, folder.path), caption))
        tables.append(_copying_table(copied))
    answer = [
        *_answer_lines(found, settings, text),
        *_longer_context_lines([(r.mechanism, r.contexts) for r in in_context], context),
        *_longer_context_lines(
            [(r.mechanism, r.passing) for r in passed],
            context,
            f" after {steps:,} steps with states passed on",
        ),
        *_copying_lines(copied, context),
    ]
    title = f"Mechanisms on one text: {settings['recipe']}, on {settings['data']}"
    page = Page(title, answer, tables, pictures, _notes(found, settings, text))
    write_page(folder, page, console)
    return page


def _shorter_sweep(settings: dict[str, Any], text: Row) -> str:
    """How many steps the sweep's trainings took, if they were shorter ones."""
    share = settings.get("sweep", 1)
    return "" if share == 1 else f"{swept_steps(text['steps'], share):,} steps"


def _sweep_caption(settings: dict[str, Any], text: Row) -> str:
    shorter = _shorter_sweep(settings, text)
    when = f"after trainings of {shorter}" if shorter else "at the end"
    return f"Held-out loss {when} by learning rate, from the first seed"


def _notes(found: list[Result], settings: dict[str, Any], text: Row) -> list[str]:
    differ = [
        f"{r.mechanism}:"
        f" {', '.join(f'{name} {value}' for name, value in r.cost['differs'].items())}"
        for r in found
        if r.cost["differs"]
    ]
    shorter = _shorter_sweep(settings, text)
    return [
        (
            f"Models are trained on {text['bytes']:,} bytes of {settings['data']}, and scored on"
            f" {text['heldout_bytes']:,} others. They take {text['steps']:,} steps of"
            f" {_step_tokens(settings):,} tokens in the same order. Numbers of parameters agree"
            " within 2%. Each mechanism has its best learning rate of the sweep, by the first"
            " seed's loss on the same held-out text"
            f"{f' in trainings of {shorter}' if shorter else ''}. ± is the standard error of the"
            " mean over seeds."
        ),
        (
            "Each mechanism keeps the convolutions, norms and feed-forwards of its preset. Models"
            f" differ from {settings['baseline']}'s in: {'; '.join(differ)}."
        ),
        (
            "Time is the median of training steps; mechanisms take turns, so that other programs"
            " slow all of them alike. Kept is the memory that a step keeps for its backward pass."
            f" State is the memory of one sequence after {settings['context']:,} tokens; softmax's"
            " grows with every token."
        ),
    ]


def _step_tokens(settings: dict[str, Any]) -> int:
    tokens: int = settings["context"] * settings["batch"] * settings["accumulate"]
    return tokens


def _answer_lines(found: list[Result], settings: dict[str, Any], text: Row) -> list[str]:
    ranked = sorted(found, key=lambda result: result.final.value)
    said = ", ".join(f"{result.mechanism} {result.final.text()}" for result in ranked)
    tokens = text["steps"] * _step_tokens(settings)
    lines = [f"Bits per byte of {settings['data']} after {tokens:,} tokens: {said}."]
    others = [
        (r.mechanism, r.difference)
        for r in ranked
        if r.difference is not None and r.difference.count > 1
    ]
    if others:
        apart = [
            f"{name} ({difference.value:+.4f})"
            for name, difference in others
            if difference.differs_from_zero()
        ]
        lines.append(
            f"Different from {settings['baseline']} at 95% over the seeds:"
            f" {', '.join(apart) or 'none'}."
        )
    edge = [f"{result.mechanism} ({result.rate:g})" for result in found if result.at_edge]
    if edge:
        lines.append(
            "The best rate is at the end of the sweep, so a rate beyond it may be better:"
            f" {', '.join(edge)}."
        )
    return lines


Contexts = list[tuple[str, list[tuple[int, int, float]]]]  # of each mechanism


def _longer_context_lines(tested: Contexts, context: int, after: str = "") -> list[str]:
    """The change of the loss from training windows to longer ones, same tokens.

    The longest windows are the last line, and each line before has a fourth of the next one's.
    """
    lasts = [last for _, last, _ in tested[0][1]] if tested else []
    if context not in lasts[:-1]:
        return []
    at = lasts.index(context)
    lines = []
    for longer in reversed(range(len(lasts) - 1, at, -2)):
        each = ", ".join(
            f"{name} {losses[longer][2] - losses[at][2]:+.3f}" for name, losses in tested
        )
        lines.append(
            f"Change of the loss on the same tokens{after}, from windows of {context:,} tokens as"
            f" in training to {lasts[longer]:,}: {each}."
        )
    return lines


def _copying_lines(tested: list[Result], context: int) -> list[str]:
    """The relative loss on repeated spans, at the greatest distance within the training length."""
    inside = (
        [i for i, c in enumerate(tested[0].copying) if c[0] + 2 * c[3] <= context] if tested else []
    )
    if not inside:
        return []
    at = inside[-1]
    each = ", ".join(f"{r.mechanism} {r.copying[at][1] / r.copying[at][2]:.0%}" for r in tested)
    between = tested[0].copying[at][0]
    return [
        f"Loss on a span that is repeated after {between:,} tokens, relative to one that is not:"
        f" {each}."
    ]


def _final_table(found: list[Result], settings: dict[str, Any]) -> Table:
    headings = (
        "mechanism",
        "bits per byte",
        f"less {settings['baseline']}",
        "rate",
        "seeds",
        "tokens/s",
        "kept, MiB",
        "state, kB",
        "parameters",
    )
    first = next((r.cost for r in found if r.mechanism == settings["baseline"]), found[0].cost)
    micro = settings["batch"] * settings["context"]
    rows: list[tuple[str, ...]] = []
    for r in found:
        kept, seconds = r.cost["kept_bytes"], r.cost["seconds"]
        rows.append(
            (
                r.mechanism,
                r.final.text(),
                r.difference.text(sign=True) if r.difference else "",
                f"{r.rate:g}" + (" (end of the sweep)" if r.at_edge else ""),
                str(r.final.count),
                f"{micro / seconds:,.0f} ({first['seconds'] / seconds:.2f}x)",
                f"{kept / 2**20:,.0f} ({kept / first['kept_bytes']:.2f}x)",
                f"{r.cost['state_bytes'] / 1000:,.1f}",
                f"{r.parameters:,}",
            )
        )
    return Table("At the end of training", headings, rows)


def _context_table(tested: Contexts, after: str = "") -> Table:
    headings = ("mechanism", *(f"{a:,}–{b:,}" for a, b, _ in tested[0][1]))
    rows = [(name, *(f"{x:.3f}" for _, _, x in losses)) for name, losses in tested]
    title = f"Bits per byte of the same tokens{after}, by number of tokens before them"
    return Table(title, headings, rows)


def _copying_table(tested: list[Result]) -> Table:
    headings = ("mechanism", *(f"{distance:,} between" for distance, *_ in tested[0].copying))
    rows = [(r.mechanism, *(f"{x:.3f} of {y:.3f}" for _, x, y, _ in r.copying)) for r in tested]
    span = tested[0].copying[0][3]
    title = (
        f"Bits per byte of repeated spans of {span} tokens and of the same, not repeated, by tokens"
        " between"
    )
    return Table(title, headings, rows)


REPORT = Report("compare", ("row",), report)
