"""Standard output and error, whose reader may be gone, and whose terminal may lack characters."""

from __future__ import annotations

import os
import sys


def silence(stream: object) -> None:
    """Send what a stream still holds to nowhere: its reader is gone."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # not a file: nothing to redirect
        return


def prepare_streams() -> None:
    """Standard output and error that take any text, also where they are closed or have few
    characters.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
