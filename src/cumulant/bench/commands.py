"""The commands that measure: `cumulant bench`, `recall`, `compare`, `report`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import Console, expand_home
from .parsing import StrictCommand, StrictGroup

console = Console()
Output = Annotated[
    str | None,
    typer.Option(
        help=(
            "folder for the rows, the plots and the page; default: runs/ and the measurement's name"
        ),
        callback=expand_home,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="replace another report in that folder")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto: a GPU if there is one")]
Only = Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")]
Lengths = Annotated[list[int] | None, typer.Option(help="tokens; may be repeated")]
InputSeed = Annotated[
    int, typer.Option(help="seed of queries, keys and values", min=0, max=2**63 - 1)
]
TrainingText = Annotated[
    str | None,
    typer.Option(
        help="file, folder, glob or dataset to train on, as for train; default: the recipe's"
    ),
]
HeldoutShare = Annotated[
    float | None,
    typer.Option(
        help="share of the text held out for evaluation; enwik8 and datasets have their own"
    ),
]
LearningRates = Annotated[
    list[float] | None,
    typer.Option(help="peak rate; the best of several is used; may be repeated"),
]


def silence_warnings() -> None:
    """Silence the warnings of the libraries underneath, also while they are imported."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def silence_libraries() -> None:
    """Silence the libraries' warnings, and their progress bars for loading and saving."""
    silence_warnings()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _given_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; a repeated option becomes a tuple."""
    named = {name: value for name, value in given.items() if value is not None}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in named.items()
    }


def _output_folder(output: str | None, name: str, quick: bool = False) -> str:
    """The folder that was named, or the default one of the measurement."""
    return output or f"runs/{name}{'-quick' if quick else ''}"


bench = typer.Typer(
    cls=StrictGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)


@bench.callback()
def speed(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Option(
            help=(
                "fair; implementations: auto against PyTorch's operations; blog: a published"
                " experiment"
            )
        ),
    ] = "fair",
    output: Output = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="few lengths and runs, as many as fit in half a minute; under a minute"
        ),
    ] = False,
    mechanism: Only = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", help="forward, training or decode; may be repeated"),
    ] = None,
    length: Lengths = None,
    batch: Annotated[int | None, typer.Option(help="sequences")] = None,
    heads: Annotated[int | None, typer.Option(help="heads")] = None,
    dim: Annotated[int | None, typer.Option(help="numbers in the value of a head")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or fp64")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="the most that a single run may take")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as PyTorch takes")] = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Time and memory of every mechanism by length, on this machine.

    Without a subcommand it measures speed.
    """
    if context.invoked_subcommand is not None:
        return
    silence_libraries()
    from dataclasses import replace

    from ..text.options import choose_device
    from .speed.measure import run
    from .speed.recipes import RECIPES

    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    given = {
        "mechanisms": mechanism, "passes": passes, "lengths": length,
        "batch": batch, "heads": heads, "dim": dim, "dtype": dtype, "seconds": seconds,
    }  # fmt: skip
    chosen = replace(RECIPES[recipe].quick() if quick else RECIPES[recipe], **_given_options(given))
    folder = _output_folder(output, "bench" if recipe == "fair" else recipe, quick)
    device = choose_device(device)
    if mechanism is None:  # one that was named is refused
        for name, needed in chosen.obstacles(device).items():
            console.print(f"{name}: not measured; it needs {needed}")
        chosen = chosen.possible(device)
    run(chosen, folder, device=device, threads=threads, force=force, console=console)


@bench.command(cls=StrictCommand)
def accuracy(
    output: Output = None,
    length: Lengths = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, fp16 or fp64; may be repeated")
    ] = None,
    operation: Only = None,
    seed: InputSeed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Error against float64 of every implementation and dtype, by length up to a million tokens."""
    silence_libraries()
    from ..text.options import choose_device
    from .accuracy.measure import Settings, run

    given = {"lengths": length, "dtypes": dtype, "operations": operation}
    settings = Settings(**_given_options(given), seed=seed)
    folder = _output_folder(output, "accuracy")
    run(settings, folder, device=choose_device(device), force=force, console=console)


@bench.command(cls=StrictCommand)
def approximation(
    output: Output = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="a training run whose heads are measured as well; may be repeated"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="random queries and keys only: no model is trained")
    ] = False,
    seed: InputSeed = 0,
    force: Force = False,
) -> None:
    """How far Taylor attention is from softmax attention.

    The distance is measured by order, size of the scores, head dim and alpha. The heads of
    trained models are measured as well. Without --model it first trains a small softmax model and
    a small Taylor model on Python's standard library (about two minutes on two cores).
    """
    silence_libraries()
    from .approximation.measure import run

    folder = _output_folder(output, "approximation", quick)
    run(folder, model or [], quick=quick, seed=seed, force=force, console=console)


def compare(
    data: TrainingText = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=(
                "the comparison; 20m-tokens takes about seven hours on two cores, 20m-tokens-2048"
                " ten: long-context, 20m-tokens, 20m-tokens-2048, gates,"
                " flash-enwik8, flash-enwik8-small, elita-wikitext"
            )
        ),
    ] = "long-context",
    output: Output = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="two minutes: three mechanisms, 40 short steps; too little to compare them",
        ),
    ] = False,
    mechanism: Annotated[
        list[str] | None, typer.Option(help="only this one and the baseline; may be repeated")
    ] = None,
    learning_rate: LearningRates = None,
    seeds: Annotated[int | None, typer.Option(help="seeds of weights and order")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps of each run")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="passes over the text, instead of --steps")
    ] = None,
    heldout: HeldoutShare = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Train mechanisms on one text under one budget, and compare them.

    Options left out are the recipe's. The same command continues where it stopped. With more
    mechanisms, learning rates or seeds it adds those.
    """
    silence_libraries()
    from dataclasses import replace

    from .compare.recipes import find_recipe
    from .compare.work import SCORED, SCORED_QUICKLY, run

    if steps is not None and epochs is not None:
        raise ValueError("steps: pass either steps or epochs, not both")
    chosen = find_recipe(recipe)
    if quick:
        mechanism = mechanism or [m.name for m in chosen.mechanisms[:3]]
        chosen = chosen.quick()
    chosen = chosen.chosen(mechanism or [])
    steps = 0 if steps is None and epochs is not None else steps
    given = {
        "data": data, "learning_rates": learning_rate, "seeds": seeds,
        "steps": steps, "epochs": epochs, "heldout": heldout,
    }  # fmt: skip
    chosen = replace(chosen, **_given_options(given))
    scored = SCORED_QUICKLY if quick else SCORED
    folder = _output_folder(output, recipe, quick)
    run(recipe, chosen, folder, scored=scored, device=device, force=force, console=console)


def recall(
    output: Output = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="three mechanisms at one width: five minutes")
    ] = False,
    mechanism: Only = None,
    width: Annotated[list[int] | None, typer.Option(help="channels; may be repeated")] = None,
    learning_rate: LearningRates = None,
    seeds: Annotated[int | None, typer.Option(help="seeds of weights and data")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of 32 sequences, at most")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a sequence")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="tokens in the vocabulary; Zoology's is 8192")
    ] = None,
    pairs: Annotated[
        list[int] | None, typer.Option(help="pairs in a sequence; may be repeated")
    ] = None,
    conv: Annotated[
        bool | None,
        typer.Option(
            "--conv/--no-conv", help="the first layer a short convolution; default: both ways"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="runs at a time, a thread each; 0: as many as there are cores")
    ] = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Measure accuracy in multi-query associative recall, and the size of the state.

    Each mechanism is trained with several learning rates, and the best is reported. The same
    command continues where it stopped.
    """
    silence_libraries()
    import os
    from dataclasses import replace

    from ..text.options import choose_device
    from .recall.sweep import FULL, QUICK, run

    given = {
        "mechanisms": mechanism, "widths": width, "learning_rates": learning_rate,
        "pairs": pairs, "seeds": seeds, "steps": steps, "length": length, "vocabulary": vocabulary,
        "conv": None if conv is None else [conv],
    }  # fmt: skip
    sweep = replace(QUICK if quick else FULL, **_given_options(given))
    folder, device = _output_folder(output, "recall", quick), choose_device(device)
    if workers == 0:
        workers = 1 if device == "cuda" else os.cpu_count() or 1
    run(sweep, folder, workers=workers, device=device, force=force, console=console)


def report(
    folder: Annotated[
        str,
        typer.Argument(
            help="a folder that bench, recall or compare has filled", callback=expand_home
        ),
    ],
) -> None:
    """Draw the plots and the page of a folder again from its rows. It measures nothing."""
    silence_libraries()
    from .redraw import redraw

    redraw(folder, console)
