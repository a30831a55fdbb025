"""A run's folder: the options it was started with, and its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

from .options import TrainingOptions

WHOLE = "whole.json"  # written into a checkpoint after everything else: without it the checkpoint is not used
STARTED = "options.json"
_FREE = {"output", "device", "resume", "evaluate_every", "save_every"}  # may differ when a run goes on


def write_json(path: Path, content: object) -> None:
    """Write atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, path)


def checkpoints(output: Path) -> list[Path]:
    """All checkpoints, oldest first, also those that were cut short."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def whole_checkpoints(output: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return [p for p in checkpoints(output) if (p / WHOLE).is_file()]


def note_options(options: TrainingOptions) -> None:
    write_json(Path(options.output) / STARTED, asdict(options))


def check_unused(output: Path) -> None:
    """A new run needs a folder without one."""
    if output.is_file():
        raise ValueError(f"output: {output} is a file, not a folder")
    if (output / STARTED).exists() or (output / "model.safetensors").exists() or checkpoints(output):
        raise ValueError(f"output: {output} holds a run already; go on with --resume or name another folder")


def resumed(options: TrainingOptions, say: Callable[[str], None]) -> tuple[TrainingOptions, Path | None]:
    """The options that the run in ``options.output`` was started with, and its last whole checkpoint.

    Options left at their defaults take the run's values; others must agree with them. Checkpoints that were cut short
    are removed.
    """
    output = Path(options.output)
    if not (output / STARTED).is_file():
        raise ValueError(f"resume: there is no run in {output}; start one without --resume")
    started = json.loads((output / STARTED).read_text())
    kept = {}
    for f in fields(TrainingOptions):
        given, past = getattr(options, f.name), started.get(f.name, f.default)
        if f.name in _FREE and given != f.default:
            continue
        if given not in (f.default, past):
            raise ValueError(f"resume: the run in {output} was started with {f.name}={past!r}, not {given!r}")
        kept[f.name] = past
    options = replace(options, **{**kept, "output": options.output, "resume": True})
    whole = whole_checkpoints(output)
    if int(os.environ.get("RANK", "0")) == 0:
        for path in checkpoints(output):
            if path not in whole:
                shutil.rmtree(path)
    say(f"resuming {output} from {whole[-1].name if whole else 'the beginning: it has no whole checkpoint yet'}")
    return options, whole[-1] if whole else None
