"""Linear-time attention for PyTorch: one API for training, prefill and generation."""

import sys as _sys
from itertools import pairwise as _pairwise
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ElitaState",
    "KeyValueState",
    "LinearState",
    "MixedChunkState",
    "State",
    "__version__",
    "elita_attention",
    "explain",
    "feature_count",
    "gated_attention",
    "linear_attention",
    "load_state",
    "mixed_chunk_attention",
    "save_state",
    "taylor_attention",
]


def _is_command() -> bool:
    """Whether this process is ``cumulant ...`` or ``python -m cumulant ...``.

    Importing torch takes seconds, and the command's help and error messages do not need it.
    """
    started = _sys.orig_argv
    program = (_sys.argv[:1] or [""])[0].replace("\\", "/").rpartition("/")[2]
    return program in ("cumulant", "cumulant.exe") or ("-m", "cumulant") in _pairwise(started)


if _TYPE_CHECKING or not _is_command():
    from .ops.dispatch import explain
    from .ops.elita import elita_attention
    from .ops.gated import gated_attention
    from .ops.linear import linear_attention
    from .ops.mixed_chunk import mixed_chunk_attention
    from .ops.state import (
        ElitaState,
        KeyValueState,
        LinearState,
        MixedChunkState,
        State,
        load_state,
        save_state,
    )
    from .ops.taylor import feature_count, taylor_attention
else:

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used."""
        from importlib import import_module

        if name in __all__:
            for module in (
                "dispatch",
                "elita",
                "gated",
                "linear",
                "mixed_chunk",
                "state",
                "taylor",
            ):
                found = vars(import_module(f".ops.{module}", __name__))
                if name in found:
                    return found[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
