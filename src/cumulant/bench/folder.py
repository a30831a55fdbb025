"""A measurement's folder: a JSON line for what was asked and on which machine, then one for each row that came of it.

Rows are written as they come, so that an interruption loses none, and everything else in the folder (plots, the page)
can be drawn again from them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..text.runs import LOCK, lock_folder

Row = dict[str, Any]
LINES = "rows.jsonl"
# what every row of a command has
FIELDS = {
    "bench": ("length", "pass", "mechanism", "status"),
    "bench accuracy": ("operation", "length", "dtype", "implementation", "error"),
    "recall": ("mechanism", "conv", "width", "learning_rate", "seed", "accuracy"),
    "compare": ("row",),
}


@dataclass(frozen=True)
class Folder:
    """kind: the command that fills it. settings: what it was asked. environment: see `environment`.

    lock: a started folder's, held for as long as this lives.
    """

    path: Path
    kind: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    lock: FileLock | None = field(default=None, compare=False, repr=False)

    @classmethod
    def start(
        cls, path: str, kind: str, settings: dict[str, Any], *, force: bool = False, extends: tuple[str, ...] = ()
    ) -> Folder:
        """A folder for the command: a new one, or one that the same command with the same settings began, whose rows
        count; `extends` names settings that may have become more. Another report with rows is refused; with `force`
        any report loses its rows. What is no report is always refused, and so is what another process is filling.
        """
        folder = Path(path)
        settings = json.loads(json.dumps(settings))  # as they will be read
        if folder.exists():
            foreign = not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir())
            if foreign and not (folder / LINES).is_file():
                raise ValueError(f"output: {path} holds something else; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        if (folder / LINES).is_file() and not force:
            begun = replace(cls.open(path), lock=lock)
            if begun.kind == kind and begun._is_part_of(settings, extends):
                return begun._with(settings).went_on()
            if begun.rows():
                raise ValueError(
                    f"output: {path} holds the report of another measurement ({begun.kind}, or the same with other "
                    "settings); name another folder, or pass --force to replace it"
                )
        new = cls(folder, kind, settings, environment(), lock)
        new._write("")
        for name in ("report.html", "report.md"):  # they were drawn from other rows
            (folder / name).unlink(missing_ok=True)
        return new

    def _write(self, rows: str) -> None:
        header = {"kind": self.kind, "settings": self.settings, "environment": self.environment}
        temporary = self.path / f"{LINES}.tmp"
        temporary.write_text(json.dumps(header) + "\n" + rows, encoding="utf-8")
        temporary.replace(self.path / LINES)

    def _is_part_of(self, settings: dict[str, Any], extends: tuple[str, ...]) -> bool:
        def is_part(name: str) -> bool:
            old, new = self.settings.get(name), settings.get(name)
            if name not in extends or old is None or new is None:
                return bool(old == new)
            return set(old) <= set(new) if isinstance(new, list) else bool(old <= new)

        return all(map(is_part, self.settings.keys() | settings.keys()))

    def _with(self, settings: dict[str, Any]) -> Folder:
        if settings == self.settings:
            return self
        more = replace(self, settings=settings)
        more._write((self.path / LINES).read_text(encoding="utf-8").partition("\n")[2])
        return more

    def went_on(self) -> Folder:
        """Note what has changed since the last rows were written: versions, revision, machine."""
        now = environment()
        if any(now[name] != value for name, value in self.environments()[-1].items() if name != "time" and name in now):
            self.append({"environment": now})
        return self

    def environments(self) -> list[dict[str, Any]]:
        """All that rows were made in, one after another."""
        return [self.environment, *(row["environment"] for row in self._read() if row.keys() == {"environment"})]

    @classmethod
    def open(cls, path: str) -> Folder:
        """A folder that a command has filled."""
        try:
            with (Path(path) / LINES).open(encoding="utf-8") as lines:
                header = json.loads(lines.readline())
            kind, settings, environment = header["kind"], header["settings"], header["environment"]
            if not (isinstance(kind, str) and isinstance(settings, dict) and isinstance(environment, dict)):
                raise TypeError("the first line is not what a command writes")
            return cls(Path(path), kind, settings, environment)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"folder: {path} is not the folder of a report: no readable {LINES} in it") from error

    def rows(self) -> list[Row]:
        """A line that was cut short is left out.

        Raises:
            ValueError: a line that is none of this kind's rows.
        """
        found = []
        for number, row in self._lines():
            missing = [name for name in FIELDS.get(self.kind, ()) if name not in row]
            if row.keys() == {"environment"}:
                continue
            if missing:
                raise ValueError(f"{self._place(number)} is no row of 'cumulant {self.kind}': it has no {missing[0]!r}")
            found.append(row)
        return found

    def _place(self, number: int) -> str:
        return f"folder: {self.path / LINES}: line {number}"

    def _read(self) -> Iterator[Row]:
        return (row for _, row in self._lines())

    def _lines(self) -> Iterator[tuple[int, Row]]:
        """The rows behind the first line, with their numbers."""
        with (self.path / LINES).open(encoding="utf-8") as lines:
            next(lines, None)
            for number, line in enumerate(lines, 2):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if not isinstance(row, dict):
                    raise ValueError(f"{self._place(number)} is no row: {line.strip()[:40]}")
                yield number, row

    def append(self, *rows: Row) -> None:
        """All of them, or after a crash none; on the disk when this returns."""
        path = self.path / LINES
        with path.open("rb+") as lines:  # a line that was cut short must not swallow this one
            lines.seek(0, os.SEEK_END)
            if lines.tell():
                lines.seek(-1, os.SEEK_END)
                cut = lines.read(1) != b"\n"
                lines.write(b"\n" if cut else b"")
            lines.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            lines.flush()
            os.fsync(lines.fileno())


def environment() -> dict[str, Any]:
    """Versions, hardware, threads, the state of the source, and the time."""
    from .. import __version__

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cumulant": __version__,
        "revision": revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def revision() -> str | None:
    """The commit that the package was run from, with a "+" if its files have changed since; None outside a checkout."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", "bench"):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def memory() -> int | None:
    """Bytes of main memory."""
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
