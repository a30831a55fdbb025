"""Writes the site's formulas as MathML.

MathML needs no script, so a browser shows the formulas without a network.
mkdocs runs this file as a hook (mkdocs.yml). The pages hold LaTeX between
dollar signs, which the extension `pymdownx.arithmatex` marks.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(
    r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with its formulas as MathML."""
    return MARKED.sub(_written, content)


def _written(match: re.Match[str]) -> str:
    element, bracket, latex = match.groups()
    display = "block" if bracket == "[" else "inline"
    mathematics = convert(html.unescape(latex).strip(), display=display)
    return f'<{element} class="formula">{mathematics}</{element}>'
