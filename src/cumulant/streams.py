"""Standard output and error that work without a reader, or without all characters."""

from __future__ import annotations

import os
import sys


def silence(stream: object) -> None:
    """Discard the rest of a stream whose reader is gone."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # not a file: nothing to redirect
        return


def prepare_streams() -> None:
    """Let standard output and error take any text, also if closed or short of characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
