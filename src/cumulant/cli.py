"""The command line: `cumulant train`, `evaluate`, `generate`, `quantize`, `export` and others."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from .bench.commands import bench, compare, recall, report, silence_libraries, silence_warnings
from .bench.console import Console, expand_home, print_table
from .bench.parsing import StrictCommand
from .serve import serve
from .streams import silence
from .text.options import TrainingOptions
from .text.recipes import RECIPES, from_recipe
from .text.runs import STARTED, finite

RUN_LENGTH = {"data", "steps", "batch", "accumulate", "evaluate_every", "learning_rate", "warmup"}

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .info import show_version

        show_version()
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Linear-time language models: train, evaluate and generate."""


def say(line: str) -> None:
    """Write a line on standard output, above the progress bar if there is one.

    Work continues after the reader of the output is gone.
    """
    from tqdm import tqdm

    try:
        tqdm.write(line)
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)


def _from_fields(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the fields of a dataclass to the options of a command."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints, own = get_type_hints(kind), get_type_hints(command, include_extras=True)
        declared = inspect.signature(command).parameters.values()
        parameters = [
            p.replace(annotation=own[p.name]) for p in declared if p.kind is not p.VAR_KEYWORD
        ]
        parameters += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=Annotated[
                    _option_type(hints[f.name]), typer.Option(help=f.metadata["help"])
                ],
            )
            for f in fields(kind)
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _option_type(hint: Any) -> Any:
    """The option's type for a field: an option that takes a list may be repeated."""
    return list[str] | None if list[str] in get_args(hint) else hint


@app.command(cls=StrictCommand)
@_from_fields(TrainingOptions)
def train(
    call: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"options by name, any of them overridden: {', '.join(RECIPES)}"),
    ] = None,
    **options: Any,
) -> None:
    """Train a language model on a text.

    Without --data it learns Python from the standard library. Watch the losses with: tensorboard
    --logdir OUTPUT. Several processes: torchrun --nproc_per_node N -m cumulant train ...
    """
    sources = {name: call.get_parameter_source(name) for name in options}
    given = {
        name for name, source in sources.items() if source is not None and source.name != "DEFAULT"
    }
    if recipe is None:
        checked = TrainingOptions(**options)
    else:
        checked = from_recipe(
            recipe, **{name: value for name, value in options.items() if name in given}
        )
        # a resumed run must agree with the recipe's model, and keeps its own length
        given |= set(RECIPES[recipe]) - (RUN_LENGTH if checked.resume else set())
    silence_libraries()
    from .text.processes import leave_processes
    from .text.train import train as run

    try:
        run(checked, given=given, say=say)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted; {_resume_advice(checked.output)}", file=sys.stderr)
        raise
    leave_processes()
    if os.environ.get("RANK", "0") == "0":
        say(f"model: {checked.output}; next: cumulant generate {checked.output} --prompt ...")


def _resume_advice(output: str) -> str:
    if (Path(output) / STARTED).is_file():
        return f"continue with: cumulant train --output {shlex.quote(output)} --resume"
    return "training had not begun; the same command starts it"


Checkpoint = Annotated[str, typer.Argument(help="folder of a trained model", callback=expand_home)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
JsonLine = Annotated[bool, typer.Option("--json", help="one JSON line instead of a table")]
ScoredText = Annotated[
    list[str] | None,
    typer.Option(help="text to score, whole; may be repeated; default: the run's held-out text"),
]
Encoding = Annotated[str | None, typer.Option(help="encoding of the files, if it is not UTF-8")]
Windows = Annotated[list[int] | None, typer.Option(help="window in tokens; may be repeated")]
TextColumn = Annotated[str, typer.Option(help="column of a dataset that holds the text")]
Prompt = Annotated[
    str | None, typer.Option(help="text to continue; default: standard input, if piped")
]
TopP = Annotated[float, typer.Option(help="only the likeliest tokens that hold this probability")]
SavedState = Annotated[
    str | None, typer.Option(help="write the state to this file", callback=expand_home)
]
LoadedState = Annotated[
    str | None, typer.Option(help="continue from the state in this file", callback=expand_home)
]


@app.command(cls=StrictCommand)
def evaluate(
    checkpoint: Checkpoint,
    data: ScoredText = None,
    encoding: Encoding = None,
    context: Windows = None,
    whole: Annotated[
        bool, typer.Option(help="also carry the state over each whole document")
    ] = True,
    batch: Annotated[int, typer.Option(help="windows at a time")] = 16,
    text_column: TextColumn = "text",
    device: Device = "auto",
    json_line: JsonLine = False,
) -> None:
    """Bits per byte of a text under a model, in windows and over whole documents.

    Over a whole document the model carries its state from the first token to the last.
    """
    for name, least in (("context", min(context or [256])), ("batch", batch)):
        if least < 1:
            raise ValueError(f"{name}: expected at least 1, got {least}")
    silence_libraries()
    from .text.chat import chat_renderer
    from .text.checkpoint import load_checkpoint
    from .text.corpus import load_documents
    from .text.evaluate import evaluate_whole, evaluate_windowed, notice_of_cost
    from .text.tokens import read_tokens, tokenize

    model, tokenizer = load_checkpoint(checkpoint, device)
    if data:
        chat = chat_renderer(tokenizer)
        documents = load_documents(data, text_column=text_column, encoding=encoding, chat=chat)
        text = tokenize(documents, tokenizer, control_tokens=documents.is_chat)
    elif (Path(checkpoint) / "tokens" / "tokens.json").is_file():
        text = read_tokens(Path(checkpoint) / "tokens")[1]
    else:
        raise ValueError(f"data: {checkpoint} keeps no held-out text; pass --data")
    scores = {
        f"windows of {n} tokens": evaluate_windowed(model, text, n, batch_size=batch)
        for n in context or [256]
    }
    if whole:
        if notice := notice_of_cost(model, text):
            print(notice, file=sys.stderr)
        scores["whole documents"] = evaluate_whole(model, text)
    if json_line:
        print(
            json.dumps(
                finite({name: score.as_dict() for name, score in scores.items()}), allow_nan=False
            )
        )
        return
    rows = [
        (name, f"{s.bits_per_byte:.4f}", f"{s.loss:.4f}", f"{s.tokens:,}", f"{s.text_bytes:,}")
        for name, s in scores.items()
    ]
    print_table(Console(), ("context", "bits per byte", "nats per token", "tokens", "bytes"), rows)
    if note := next(iter(scores.values())).note:
        print(note)


@app.command(cls=StrictCommand)
def generate(
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="only the k likeliest tokens; 0: all")] = 0,
    top_p: TopP = 0.95,
    seed: Annotated[int | None, typer.Option(help="the same text each time")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="the prompt is a message: answer it, by the chat template"),
    ] = False,
    save_state: SavedState = None,
    load_state: LoadedState = None,
    stats: Annotated[
        bool, typer.Option(help="tokens/s, state bytes and peak memory, to standard error")
    ] = False,
    device: Device = "auto",
) -> None:
    """Generate text, streaming it to standard output, with a state of constant size."""
    silence_libraries()
    from .ops.state import check_writable
    from .text.checkpoint import load_checkpoint
    from .text.generate import SamplingOptions
    from .text.generate import generate as run

    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed)
    if save_state is not None:
        check_writable(save_state)
    model, tokenizer = load_checkpoint(checkpoint, device)
    if prompt is None:
        prompt = _piped_text()
    try:
        result = run(
            model,
            tokenizer,
            prompt,
            options,
            load=load_state,
            save=save_state,
            stream=True,
            chat=chat,
        )
    except (KeyboardInterrupt, BrokenPipeError):
        if save_state is not None:
            print(f"cumulant: stopped; continue with: --load-state {save_state}", file=sys.stderr)
        raise
    if stats:
        prompt_tokens = result.context - result.new_tokens
        print(
            f"{result.new_tokens} tokens at {result.tokens_per_second:.1f} tokens/s after"
            f" {prompt_tokens:,} of context (read in {result.prompt_seconds:.2f} s); state"
            f" {result.state_bytes:,} bytes; peak memory {result.peak_bytes / 2**20:,.0f} MiB",
            file=sys.stderr,
        )


@app.command(cls=StrictCommand)
def quantize(
    checkpoint: Checkpoint,
    bits: Annotated[int, typer.Option(help="of each weight: 8 or 4")] = 8,
    output: Annotated[
        str | None,
        typer.Option(
            help="new folder for the model; default: the checkpoint's name and the bits",
            callback=expand_home,
        ),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option(help="measure the loss on the run's held-out text, before and after")
    ] = True,
    device: Device = "auto",
) -> None:
    """Write a model's weights in 8 or 4 bits, to be generated with and evaluated."""
    silence_libraries()
    from .ops.quantized import check_bits
    from .text.quantize import quantize_checkpoint

    check_bits(bits)
    source = Path(checkpoint)
    source = source.resolve() if source.name in ("", "..") else source
    folder = output or f"{source}-{bits}bit"
    sizes = quantize_checkpoint(checkpoint, bits, folder, evaluate=evaluate, device=device)
    rows = [
        (
            f"{size.bits} bits",
            f"{size.weight_bytes / 2**20:,.1f} MiB",
            "" if size.bits_per_byte is None else f"{size.bits_per_byte:.4f}",
        )
        for size in sizes
    ]
    print_table(Console(), ("weights", "on the disk", "held-out bits per byte"), rows)
    print(f"generate with: cumulant generate {shlex.quote(folder)}")


@app.command(cls=StrictCommand)
def export(
    checkpoint: Checkpoint,
    format: Annotated[str, typer.Option(help="onnx")] = "onnx",
    output: Annotated[
        str | None,
        typer.Option(
            help="new folder; default: the checkpoint's name and the format", callback=expand_home
        ),
    ] = None,
    operators: Annotated[
        str,
        typer.Option(help="standard: ONNX's alone; onnxruntime: its own LinearAttention, faster"),
    ] = "standard",
) -> None:
    """Write a model for other programs: ONNX graphs of a prompt and of a step, with states."""
    silence_libraries()
    from .export.checkpoint import export_checkpoint

    folder = f"{checkpoint.rstrip('/')}-{format}" if output is None else output
    written = export_checkpoint(checkpoint, folder, format=format, operators=operators)
    print(f"{folder}: {written.weight_bytes / 2**20:,.1f} MiB of weights")
    if written.difference is None:
        print("not compared with PyTorch, as onnxruntime is not installed")
    else:
        print(f"logits of onnxruntime are within {written.difference:.1e} of PyTorch's")


def _piped_text() -> str:
    """All of standard input; empty if it is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            "prompt: expected UTF-8 text on standard input, got the byte"
            f" 0x{error.object[error.start]:02x} at byte {error.start}"
        ) from error


app.add_typer(bench, name="bench")
for command in (serve, compare, recall, report):
    app.command(cls=StrictCommand)(command)


@app.command(cls=StrictCommand)
def info(json_line: Annotated[bool, typer.Option("--json", help="one JSON line")] = False) -> None:
    """Versions, devices and the implementations that work here."""
    from .info import show_info

    show_info(as_json=json_line)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    silence_warnings()
    try:
        return int(app(list(arguments), standalone_mode=False) or 0)
    except typer.Abort:
        return 130
    except SystemExit as end:  # typer's answer to a closed pipe
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        raise
