"""The folder of a measurement: a file of JSON lines, from which plots and page are drawn.

The first line holds the settings and the environment. Each other line is a row of results. Rows
are written one by one, so an interruption loses none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...text.runs import LOCK, lock_folder
from .environment import environment

Row = dict[str, Any]
ROWS_FILE = "rows.jsonl"


@dataclass(frozen=True)
class Folder:
    """A folder that a command fills, or has filled.

    kind: the command, such as "bench accuracy". settings: its options. environment: see
        `environment`.
    lock: held by the process that started the folder, for as long as this object lives.
    """

    path: Path
    kind: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    lock: FileLock | None = field(default=None, compare=False, repr=False)

    @classmethod
    def start(
        cls,
        path: str,
        kind: str,
        settings: dict[str, Any],
        *,
        force: bool = False,
        extends: tuple[str, ...] = (),
    ) -> Folder:
        """A folder for the command `kind`, new or begun before.

        Rows of the same command with the same settings are kept. `extends` names settings that may
        have grown since (more seeds, rates, mechanisms). With `force` the rows of any report are
        dropped.

        Raises:
            ValueError: the folder holds other files, the rows of another measurement, or is in use.
        """
        folder = Path(path)
        settings = json.loads(json.dumps(settings))  # as they will be read
        if folder.exists():
            foreign = not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir())
            if foreign and not (folder / ROWS_FILE).is_file():
                raise ValueError(f"output: {path} holds something else; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        if (folder / ROWS_FILE).is_file() and not force:
            begun = replace(cls.open(path), lock=lock)
            if begun.kind == kind and begun._can_grow_to(settings, extends):
                return begun._with_settings(settings).note_environment()
            if begun.rows():
                raise ValueError(
                    f"output: {path} holds the report of another measurement ({begun.kind}, or the"
                    " same with other settings); name another folder, or pass --force to"
                    " replace it"
                )
        new = cls(folder, kind, settings, environment(), lock)
        new._write("")
        for name in ("report.html", "report.md"):  # they were drawn from other rows
            (folder / name).unlink(missing_ok=True)
        return new

    def _write(self, rows: str) -> None:
        header = {"kind": self.kind, "settings": self.settings, "environment": self.environment}
        temporary = self.path / f"{ROWS_FILE}.tmp"
        temporary.write_text(json.dumps(header) + "\n" + rows, encoding="utf-8")
        temporary.replace(self.path / ROWS_FILE)

    def _can_grow_to(self, settings: dict[str, Any], extends: tuple[str, ...]) -> bool:
        def is_part(name: str) -> bool:
            old, new = self.settings.get(name), settings.get(name)
            if name not in extends or old is None or new is None:
                return bool(old == new)
            return all(x in new for x in old) if isinstance(new, list) else bool(old <= new)

        return all(map(is_part, self.settings.keys() | settings.keys()))

    def _with_settings(self, settings: dict[str, Any]) -> Folder:
        if settings == self.settings:
            return self
        more = replace(self, settings=settings)
        more._write((self.path / ROWS_FILE).read_text(encoding="utf-8").partition("\n")[2])
        return more

    def note_environment(self) -> Folder:
        """Add a line if versions, revision or machine have changed since the last rows."""
        now = environment()
        if any(
            now[name] != value
            for name, value in self.environments()[-1].items()
            if name != "time" and name in now
        ):
            self.append({"environment": now})
        return self

    def environments(self) -> list[dict[str, Any]]:
        """The environments of all rows, in the order of the rows."""
        return [
            self.environment,
            *(row["environment"] for _, row in self._lines() if _is_environment(row)),
        ]

    @classmethod
    def open(cls, path: str) -> Folder:
        """A folder that a command has filled.

        Raises:
            ValueError: it has no file of rows, or the file's first line is not what a command
                writes.
        """
        try:
            with (Path(path) / ROWS_FILE).open(encoding="utf-8") as lines:
                header = json.loads(lines.readline())
            kind, settings, environment = header["kind"], header["settings"], header["environment"]
            if not (
                isinstance(kind, str)
                and isinstance(settings, dict)
                and isinstance(environment, dict)
            ):
                raise TypeError("the first line is not what a command writes")
            return cls(Path(path), kind, settings, environment)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"folder: {path} is not the folder of a report: no readable {ROWS_FILE} in it"
            ) from error

    def rows(self, required: Sequence[str] = ()) -> list[Row]:
        """All rows except a line that was cut short. required: fields that each row must have.

        Raises:
            ValueError: a line is not a row, or lacks a required field.
        """
        found = []
        for number, row in self._lines():
            if _is_environment(row):
                continue
            missing = [name for name in required if name not in row]
            if missing:
                raise ValueError(
                    f"{self._line_name(number)} is no row of 'cumulant {self.kind}': it has no"
                    f" {missing[0]!r}"
                )
            found.append(row)
        return found

    def _line_name(self, number: int) -> str:
        return f"folder: {self.path / ROWS_FILE}: line {number}"

    def _lines(self) -> Iterator[tuple[int, Row]]:
        """The lines after the first one, with their numbers."""
        with (self.path / ROWS_FILE).open(encoding="utf-8") as lines:
            next(lines, None)
            for number, line in enumerate(lines, 2):
                try:
                    row = json.loads(line)
                except ValueError:  # it was cut short
                    continue
                if not isinstance(row, dict):
                    raise ValueError(f"{self._line_name(number)} is no row: {line.strip()[:40]}")
                yield number, row

    def append(self, *rows: Row) -> None:
        """Write rows to the disk; after a crash either all of them are there or none."""
        path = self.path / ROWS_FILE
        with path.open("rb+") as lines:  # a line that was cut short must not swallow this one
            lines.seek(0, os.SEEK_END)
            if lines.tell():
                lines.seek(-1, os.SEEK_END)
                cut = lines.read(1) != b"\n"
                lines.write(b"\n" if cut else b"")
            lines.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            lines.flush()
            os.fsync(lines.fileno())


def _is_environment(row: Row) -> bool:
    return row.keys() == {"environment"}
