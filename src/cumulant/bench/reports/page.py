"""A report as one self-contained HTML page: answer, pictures, tables and environment."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from .folder import Folder


@dataclass(frozen=True)
class Table:
    """A table of text. Every row is as long as the headings."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A picture of the folder.

    name: of the SVG file, without its suffix. caption: a sentence below it.
    """

    name: str
    caption: str


@dataclass(frozen=True)
class Page:
    """The contents of a report.

    answer: the result in sentences, at the top. notes: how to read the tables, and their limits.
    """

    title: str
    answer: list[str]
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The report of a command.

    command: that fills the folder. fields: of each of its rows. draw: writes plots and page.
    """

    command: str
    fields: tuple[str, ...]
    draw: Callable[[Folder, Console | None], Page]


STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin-top: 2rem }
.answer { font-size: 1.1rem; border-left: .3rem solid #0072B2; padding-left: 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888 }
.pictures { display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem }
figure { margin: 1rem 0 } figure img { width: 100%; max-width: 34rem }
figcaption { color: #444; font-size: .9rem }
footer { margin-top: 2rem; color: #444; font-size: .85rem }
footer dt { font-weight: 600 } footer dd { margin: 0 0 .3rem }
"""


def write_page(folder: Folder, page: Page, console: Console | None = None) -> Path:
    """Write ``report.html``, and ``report.md``, the same without pictures; print the answer."""
    target = folder.path / "report.html"
    _write_file(target, _html(folder, page))
    _write_file(folder.path / "report.md", _markdown(page))
    if console is not None:
        console.print()
        for line in [*page.answer, f"{folder.path}: report.html, plots, rows.jsonl"]:
            console.print(line, highlight=False, soft_wrap=True)
    return target


def _html(folder: Folder, page: Page) -> str:
    text = html.escape
    parts = [
        f"<h1>{text(page.title)}</h1>",
        *(f'<p class="answer">{text(line)}</p>' for line in page.answer),
    ]
    parts.append('<div class="pictures">')
    for picture in page.pictures:
        caption, image = text(picture.caption), (folder.path / f"{picture.name}.svg").read_bytes()
        source = f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}"
        parts.append(
            f'<figure><img alt="{caption}"'
            f' src="{source}"><figcaption>{caption}</figcaption></figure>'
        )
    parts.append("</div>")
    for table in page.tables:
        head = "".join(f"<th>{text(cell)}</th>" for cell in table.headings)
        body = "".join(
            f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in table.rows
        )
        parts.append(
            f'<h2>{text(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    parts += [f"<p>{text(line)}</p>" for line in page.notes]
    environments = folder.environments()
    facts = {"command": f"cumulant {folder.kind}", **environments[0], **folder.settings}
    for before, now in pairwise(environments):
        changed = (
            f"{name} {value}"
            for name, value in now.items()
            if name != "time" and before.get(name) != value
        )
        facts[f"from {now['time']} on"] = ", ".join(changed)
    listed = "".join(
        f"<dt>{text(name)}</dt><dd>{text(_fact(value))}</dd>" for name, value in facts.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(page.title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}"
        f"<footer><h2>How it was made</h2><dl>{listed}</dl></footer></body></html>\n"
    )


def _fact(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _markdown(page: Page) -> str:
    lines = [f"# {page.title}", "", *page.answer, ""]
    for table in page.tables:
        lines += [
            f"## {table.title}",
            "",
            f"| {' | '.join(table.headings)} |",
            "|---" * len(table.headings) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        lines.append("")
    return "\n".join([*lines, *page.notes]).rstrip() + "\n"


def _write_file(path: Path, content: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
