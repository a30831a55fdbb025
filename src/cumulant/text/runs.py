"""A run's folder: the options it was started with, its checkpoints, and its lock."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

WHOLE = "whole.json"  # the mark of a complete checkpoint, written last
STARTED = "options.json"
LOCK = ".lock"


def write_json(path: Path, content: object) -> None:
    """Write atomically; numbers that are not finite become null, since JSON has no NaN."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(
            json.dumps(finite(content), indent=2, allow_nan=False), encoding="utf-8"
        )
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def finite(content: Any) -> Any:
    """The same content, with None for every number that is not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} cannot be read: expected a JSON object, got {type(content).__name__}"
        )
    return content


def checkpoints(output: Path) -> list[Path]:
    """All checkpoints, oldest first, including incomplete ones."""
    found = [
        p
        for p in output.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def whole_checkpoints(output: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return [p for p in checkpoints(output) if (p / WHOLE).is_file()]


def mark_whole(folder: Path, step: int) -> None:
    """Mark a checkpoint as complete, with the size and digest of each file."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    noted = {
        name: {"bytes": p.stat().st_size, "sha256": _digest(p)}
        for name, p in files.items()
        if name != WHOLE
    }
    write_json(folder / WHOLE, {"step": step, "files": noted})


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_damage(folder: Path) -> str | None:
    """How a checkpoint differs from its mark, in words; None if it does not.

    The mark of an earlier version names no files; then only the trainer's state is checked.
    """
    try:
        files = read_object(folder / WHOLE).get("files", {})
        for name, noted in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != noted["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {noted['bytes']:,}"
            if _digest(path) != noted["sha256"]:
                return f"{name} is not what was written"
        step = read_object(folder / "trainer_state.json").get("global_step")
    except (ValueError, OSError) as error:
        return str(error)
    except (AttributeError, KeyError, TypeError):
        return f"{WHOLE} is not a mark"
    return None if isinstance(step, int) else "trainer_state.json names no step"


def newest_intact(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last complete checkpoint that is undamaged, and the damaged ones after it."""
    damaged: dict[Path, str] = {}
    for folder in reversed(whole_checkpoints(output)):
        damage = find_damage(folder)
        if damage is None:
            return folder, damaged
        damaged[folder] = damage
    return None, damaged


def check_unused(output: Path) -> None:
    """Refuse the folder of another run for a new one."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, not a folder")
    if (
        checkpoints(output)
        or (output / "result.json").exists()
        or list(output.glob("model*.safetensors"))
    ):
        raise ValueError(
            f"output: {output} holds a run already; continue it with --resume, or name another"
            " folder with --output"
        )


def lock_folder(folder: Path) -> FileLock | None:
    """The lock that keeps other processes out; None if the file system has no locks."""
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"output: another run is filling {folder}; wait for it, or name another folder"
        ) from error
    except NotImplementedError:
        return None
    return lock


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create and lock a run's folder; remove it again if nothing was written to it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file, not a folder")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: cannot make the folder {folder}: {error.strerror}") from error
    lock = lock_folder(folder)
    try:
        yield
    finally:
        if made and {path.name for path in folder.iterdir()} <= {LOCK}:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()
