"""Where a measurement was made: versions, hardware, threads, and the state of the source."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[2]


def environment() -> dict[str, Any]:
    """Versions, hardware, threads, the state of the source, and the time."""
    from ... import __version__

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cumulant": __version__,
        "revision": revision(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    """The version of an optional package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def revision() -> str | None:
    """The commit that the package was run from; None outside a checkout.

    It ends with "+" if files of the package have changed since.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", "bench"):
            return None
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The processor's name, or the architecture if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Bytes of main memory."""
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
