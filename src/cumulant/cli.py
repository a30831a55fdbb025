"""The command line: `cumulant train`, `evaluate`, `generate`, `compare`, `bench`, `info`."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from .bench.commands import bench, compare, quiet, recall, report
from .text.options import TrainingOptions
from .text.recipes import RECIPES, from_recipe

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Linear-time language models: train, evaluate and generate.",
)
console = Console()
notes = Console(stderr=True)


def say(line: str) -> None:
    """A line on standard output, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line)


def _from_fields(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as its options, after its own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints, own = get_type_hints(kind), get_type_hints(command, include_extras=True)
        declared = inspect.signature(command).parameters.values()
        parameters = [p.replace(annotation=own[p.name]) for p in declared if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=Annotated[hints[f.name], typer.Option(help=f.metadata["help"])],
            )
            for f in fields(kind)
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


@app.command()
@_from_fields(TrainingOptions)
def train(
    call: typer.Context,
    recipe: Annotated[
        str | None, typer.Option(help=f"options by name, any of them overridden: {', '.join(RECIPES)}")
    ] = None,
    **options: Any,
) -> None:
    """Train a language model on a text.

    Without --data it learns Python from the standard library. Watch the losses with: tensorboard --logdir OUTPUT.
    Several processes: torchrun --nproc_per_node N -m cumulant train ...
    """
    if recipe is None:
        checked = TrainingOptions(**options)
    else:
        sources = {name: call.get_parameter_source(name) for name in options}
        given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
        checked = from_recipe(recipe, **{name: value for name, value in options.items() if name in given})
    from .text.train import train as run

    quiet()
    try:
        run(checked, say=say)
    except KeyboardInterrupt:
        print(
            f"interrupted; go on with: cumulant train --output {checked.output} --resume and the same options",
            file=sys.stderr,
        )
        raise
    if os.environ.get("RANK", "0") == "0":
        say(f"model: {checked.output}; next: cumulant generate {checked.output} --prompt ...")


Checkpoint = Annotated[str, typer.Argument(help="folder of a trained model")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="text to score, whole; default: the run's held-out text")] = None,
    context: Annotated[list[int] | None, typer.Option(help="window in tokens; give it several times")] = None,
    whole: Annotated[bool, typer.Option(help="also carry the state over each whole document")] = True,
    batch: Annotated[int, typer.Option(help="windows at a time")] = 16,
    text_column: Annotated[str, typer.Option(help="column of a dataset that holds the text")] = "text",
    device: Device = "auto",
    json_line: Annotated[bool, typer.Option("--json", help="one JSON line instead of a table")] = False,
) -> None:
    """Bits per byte of a text under a model: in windows, and with the state carried over each whole document."""
    from pathlib import Path

    from .text.checkpoint import load_checkpoint
    from .text.corpus import load_documents
    from .text.evaluate import evaluate_whole, evaluate_windowed
    from .text.tokens import read_tokens, tokenize

    quiet()
    model, tokenizer = load_checkpoint(checkpoint, device)
    if data is not None:
        text = tokenize(load_documents(data, text_column=text_column), tokenizer)
    elif (Path(checkpoint) / "tokens" / "tokens.json").is_file():
        text = read_tokens(Path(checkpoint) / "tokens")[1]
    else:
        raise ValueError(f"data: {checkpoint} keeps no held-out text; pass --data")
    scores = {f"windows of {n} tokens": evaluate_windowed(model, text, n, batch_size=batch) for n in context or [256]}
    if whole:
        scores["whole documents"] = evaluate_whole(model, text)
    if json_line:
        print(json.dumps({name: score.as_dict() for name, score in scores.items()}))
        return
    table = Table("context", "bits per byte", "nats per token", "tokens", "bytes")
    for name, s in scores.items():
        table.add_row(name, f"{s.bits_per_byte:.4f}", f"{s.loss:.4f}", f"{s.tokens:,}", f"{s.text_bytes:,}")
    console.print(table)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="text to continue; default: standard input, if piped")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="only the k likeliest tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="only the likeliest tokens that hold this probability")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="the same text each time")] = None,
    save_state: Annotated[str | None, typer.Option(help="leave the state in this file")] = None,
    load_state: Annotated[str | None, typer.Option(help="go on from the state in this file")] = None,
    stats: Annotated[bool, typer.Option(help="tokens/s, state bytes and peak memory, to standard error")] = False,
    device: Device = "auto",
) -> None:
    """Generate text, streaming it to standard output, with a state of constant size."""
    from .text.checkpoint import load_checkpoint
    from .text.generate import SamplingOptions
    from .text.generate import generate as run

    quiet()
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed)
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    model, tokenizer = load_checkpoint(checkpoint, device)
    result = run(model, tokenizer, prompt, options, load=load_state, save=save_state, stream=True)
    if stats:
        prompt_tokens = result.context - result.new_tokens
        notes.print(
            f"{result.new_tokens} tokens at {result.tokens_per_second:.1f} tokens/s after {prompt_tokens:,} of context "
            f"(read in {result.prompt_seconds:.2f} s); state {result.state_bytes:,} bytes; "
            f"peak memory {result.peak_bytes / 2**20:,.0f} MiB",
            highlight=False,
            soft_wrap=True,
        )


app.add_typer(bench, name="bench")
for command in (compare, recall, report):
    app.command()(command)


@app.command()
def info() -> None:
    """Versions, devices and the implementations that work here."""
    import platform

    import torch
    import transformers

    from . import __version__
    from .kernels.native.library import instructions, missing

    table = Table(show_header=False)
    table.add_row("cumulant", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("transformers", transformers.__version__)
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("CUDA device", cuda)
    table.add_row("impl reference", "works: quadratic, for checking")
    table.add_row("impl torch", "works: chunk-parallel PyTorch, any device")
    obstacle = missing()
    table.add_row(
        "impl native", f"does not work here: {obstacle}" if obstacle else f"works: C++ on the CPU, {instructions()}"
    )
    table.add_row("impl triton", "not part of this version")
    console.print(table)


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2.

    CUMULANT_DEBUG=1 shows the traceback instead.
    """
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, TypeError, OSError, ModuleNotFoundError, typer.TyperException) as error:
        if os.environ.get("CUMULANT_DEBUG"):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        print(f"cumulant: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
