"""The commands that measure: `cumulant bench`, `recall`, `compare`, `report`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console()
Output = Annotated[str, typer.Option(help="folder for the rows, the plots and the page")]
Force = Annotated[bool, typer.Option("--force", help="replace another report in that folder")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")]


def recall(
    output: Output = "runs/recall",
    quick: Annotated[bool, typer.Option("--quick", help="three mechanisms on the setting that separates them")] = False,
    mechanism: Annotated[list[str] | None, typer.Option(help="only this one; give it several times")] = None,
    width: Annotated[list[int] | None, typer.Option(help="channels; give it several times")] = None,
    learning_rate: Annotated[list[float] | None, typer.Option(help="peak rate; give it several times")] = None,
    seeds: Annotated[int | None, typer.Option(help="seeds of weights and data")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of 32 sequences, at most")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a sequence")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="tokens in the vocabulary; Zoology's is 8192")] = None,
    pairs: Annotated[list[int] | None, typer.Option(help="pairs in a sequence; give it several times")] = None,
    conv: Annotated[
        bool | None, typer.Option("--conv/--no-conv", help="the first layer a short convolution; default: both ways")
    ] = None,
    workers: Annotated[int, typer.Option(help="runs at a time, a thread each; 0: as many as there are cores")] = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Multi-query associative recall: which mechanisms find what they have read, and how much state it takes.

    Learning rates are swept and the best one reported. The same command again goes on where it stopped.
    """
    import os
    from dataclasses import replace

    from ..text.options import choose_device
    from .recall import FULL, QUICK, run

    given = {
        "mechanisms": mechanism, "widths": width, "learning_rates": learning_rate, "pairs": pairs, "seeds": seeds,
        "steps": steps, "length": length, "vocabulary": vocabulary, "conv": None if conv is None else [conv],
    }  # fmt: skip
    chosen = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    sweep = replace(QUICK if quick else FULL, **chosen)
    place = choose_device(device)
    if workers == 0:
        workers = 1 if place == "cuda" else os.cpu_count() or 1
    run(sweep, output, workers=workers, device=place, force=force, console=console)


def report(
    folder: Annotated[str, typer.Argument(help="what recall, bench or compare has left")],
) -> None:
    """Draw a report's plots and page again from its rows, without measuring anything."""
    from .reports import draw

    draw(folder, console)
