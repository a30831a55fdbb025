"""Reports by the command that measured them: all that is needed to draw one again."""

from __future__ import annotations

from importlib import import_module

from rich.console import Console

from .folder import Folder
from .page import Page

# the command, and the module whose `report` draws what it left
KINDS = {
    "bench": "speed",
    "bench accuracy": "accuracy",
    "bench approximation": "approximation",
    "recall": "recall",
    "compare": "compare_report",
}


def draw(path: str, console: Console) -> Page:
    """The plots and the page of a folder, from its rows."""
    folder = Folder.open(path)
    if not folder.rows():
        raise ValueError(f"folder: {path} has no rows yet")
    if folder.kind not in KINDS:
        raise ValueError(f"folder: {path} was written by 'cumulant {folder.kind}', which this version does not know")
    report = import_module(f".{KINDS[folder.kind]}", __package__).report
    try:
        page: Page = report(folder, console)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"folder: {path} cannot be drawn: its rows are not what 'cumulant {folder.kind}' writes "
            f"({type(error).__name__}: {error})"
        ) from error
    return page
