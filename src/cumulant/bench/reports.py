"""Reports by the command that measured them: all that is needed to draw one again."""

from __future__ import annotations

from rich.console import Console

from .folder import Folder
from .page import Page


def draw(path: str, console: Console) -> Page:
    """The plots and the page of a folder, from its rows."""
    folder = Folder.open(path)
    if not folder.rows():
        raise ValueError(f"folder: {path} has no rows yet")
    if folder.kind == "recall":
        from .recall import report
    else:
        raise ValueError(f"folder: {path} was written by 'cumulant {folder.kind}', which this version does not know")
    return report(folder, console)
