"""`cumulant bench approximation`: how far Taylor attention is from softmax attention.

It measures by order, size of the scores, head dim and alpha, and in trained models.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict

from rich.console import Console

from ..reports.folder import Folder
from ..reports.plots import pyplot
from .cases import random_cases
from .report import REPORT, report
from .trained import load_model, train_small_model, trained_cases, weights_digest

TRAINED = ("softmax", "taylor")  # presets of the models that it trains


def run(
    output: str, models: list[str], *, quick: bool, seed: int, force: bool, console: Console
) -> Folder:
    """Measure the cases that the folder lacks, and draw the report. models: training runs."""
    pyplot()  # refuses before anything is measured
    for given in models:  # so do models that cannot be measured
        load_model(given, 1)
    wanted = models or ([] if quick else list(TRAINED))
    digests = [weights_digest(model) for model in models]
    settings = {"models": wanted, "digests": digests, "seed": seed}
    folder = Folder.start(output, REPORT.command, settings, force=force)
    done = {row["model"] for row in folder.rows(REPORT.fields)}
    if not done:
        shutil.rmtree(folder.path / "models", ignore_errors=True)

    def say(line: str) -> None:
        console.print(line, style="dim", soft_wrap=True)

    try:
        for model in (None, *wanted):
            if model not in done:
                if model is None:
                    cases = random_cases(seed)
                elif models:
                    cases = trained_cases(model, model, seed)
                else:
                    trained = train_small_model(folder.path, model, say)
                    cases = trained_cases(trained, model, seed)
                folder.append(*({"model": model, **asdict(case)} for case in cases))
    finally:
        if folder.rows():
            report(folder, console)
    return folder
