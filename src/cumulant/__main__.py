"""The entry point of ``cumulant``, ``python -m cumulant`` and ``torchrun -m cumulant``.

This module needs only Python, so that it can report any missing package or error in one line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from .malloc import keep_freed_memory
from .streams import prepare_streams, silence

TRAINING = ("train", "compare")  # the commands that train
EXTRA = "pip install 'cumulant[text]', or in a checkout: pip install -e '.[text]'"
# the exceptions of this package's messages
MISTAKES = (ValueError, TypeError, OSError, ModuleNotFoundError)
# the exceptions of the libraries underneath, whose messages are printed as they are
FAILURES = (*MISTAKES, RuntimeError, MemoryError, ArithmeticError, EOFError, ImportError)


def main() -> None:
    """Run the command line; an error is one line on standard error.

    The exit code is then 2, or 1 for a fault of this package. CUMULANT_DEBUG=1 shows the traceback
    instead.
    """
    prepare_streams()
    arguments = sys.argv[1:] or ["--help"]
    if arguments[0] in TRAINING:
        keep_freed_memory()
    try:
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has what it wanted
        silence(sys.stdout)
        code = 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        if os.environ.get("CUMULANT_DEBUG"):
            raise
        code = 2 if _is_expected(error) else 1
        if _should_report(error):
            print(f"cumulant: {describe(error, arguments)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # perhaps the error itself; Python would try again at its end, and complain
            silence(sys.stdout)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command; without the extra packages, only those commands that need torch alone."""
    try:
        from .cli import run_command
    except ModuleNotFoundError as error:
        from .info import show_info, show_version

        if error.name is None or error.name.startswith("cumulant"):
            raise
        if list(arguments) == ["--version"]:
            show_version()
        elif list(arguments) in (["info"], ["info", "--json"]):
            show_info(as_json="--json" in arguments)
        else:
            raise
        return 0
    return run_command(arguments)


def describe(error: Exception, arguments: Sequence[str] = ()) -> str:
    """The error in one line, with an option's name as the user typed it."""
    if hasattr(error, "format_message"):  # typer's
        message = str(error.format_message())
    elif isinstance(error, ModuleNotFoundError) and error.name is not None:
        message = f"{error.name} is not installed, which this needs ({EXTRA})"
    elif isinstance(error, OSError) and error.strerror:
        message = (
            error.strerror
            if error.filename is None
            else f"{os.fspath(error.filename)}: {error.strerror}"
        )
    elif isinstance(error, MemoryError):
        message = f"out of memory {error}"
    else:
        message = str(error)
    message = " ".join(message.split())
    if not _is_expected(error) or not message:
        message = (
            f"{type(error).__name__}: {message} (a fault of cumulant; CUMULANT_DEBUG=1 shows where)"
        )
    name, colon, rest = message.partition(": ")
    option = f"--{name.replace('_', '-')}"
    typed = any(argument == option or argument.startswith(f"{option}=") for argument in arguments)
    return f"{option}{colon}{rest}" if typed else message


def _is_expected(error: Exception) -> bool:
    return (
        isinstance(error, FAILURES)
        or hasattr(error, "format_message")
        or _comes_from(error, "safetensors")
    )


def _comes_from(error: Exception, package: str) -> bool:
    return type(error).__module__.partition(".")[0] in (package, f"{package}_rust")


def _should_report(error: Exception) -> bool:
    """Whether this process reports the error.

    Under torchrun all processes meet the same mistake, and the first one reports it. Another
    process reports only errors of its own, except the loss of its connection to one that failed.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return True
    echo = any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "tcpstore"))
    return not (isinstance(error, MISTAKES) or hasattr(error, "format_message") or echo)


if __name__ == "__main__":
    main()
