"""`cumulant report`: draws the plots and the page of a folder again from its rows."""

from __future__ import annotations

from rich.console import Console

from .reports.folder import Folder
from .reports.page import Page, Report


def reports() -> dict[str, Report]:
    """All reports, by the command whose rows they draw."""
    from .accuracy.report import REPORT as ACCURACY
    from .approximation.report import REPORT as APPROXIMATION
    from .compare.report import REPORT as COMPARE
    from .recall.report import REPORT as RECALL
    from .speed.report import REPORT as SPEED

    return {report.command: report for report in (SPEED, ACCURACY, APPROXIMATION, RECALL, COMPARE)}


def redraw(path: str, console: Console) -> Page:
    """Draw the plots and the page of a folder from its rows.

    Raises:
        ValueError: the folder has no rows, or rows that its command does not write.
    """
    folder = Folder.open(path)
    report = reports().get(folder.kind)
    if not folder.rows(report.fields if report else ()):
        raise ValueError(f"folder: {path} has no rows yet")
    if report is None:
        raise ValueError(
            f"folder: {path} was written by 'cumulant {folder.kind}', which this version does not"
            " know"
        )
    try:
        return report.draw(folder, console)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"folder: {path} cannot be drawn: its rows are not what 'cumulant {folder.kind}' writes"
            f" ({type(error).__name__}: {error})"
        ) from error
