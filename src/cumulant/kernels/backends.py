"""The table of implementations, the fastest first.

Each implementation is a folder with one module for every operation that it has. Such a module has
these functions:

- `obstacle`: why it cannot run a call, or an empty string.
- `slower` (optional): why another implementation is faster for a call, or an empty string.
- `prepared`: the specification with the implementation's own options, such as chunk lengths.
- `describe`: how it would compute the call, in words.
- `forward`, `backward`: see `operators/operator.py`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import native, triton
from . import torch as pytorch
from .guarded import Guarded

BACKENDS = {"triton": triton, "native": native, "torch": pytorch}
_sought: set[tuple[str, str]] = set()
_guarded: dict[str, Guarded] = {}


def load_implementation(impl: str, operation: str) -> Any:
    """An implementation's module for an operation, imported on first use; None if it has none.

    "auto" stands for Triton's kernels where no call asked for them.
    """
    if impl == "auto":
        if operation not in _guarded:
            modules = (load_implementation(name, operation) for name in ("triton", "torch"))
            _guarded[operation] = Guarded(operation, *modules)
        return _guarded[operation]
    _import_once(impl, operation)
    return getattr(BACKENDS[impl], operation, None)


def _import_once(impl: str, operation: str) -> None:
    if (impl, operation) not in _sought:
        name = f"{BACKENDS[impl].__name__}.{operation}"
        if find_spec(name) is not None:
            import_module(name)
        _sought.add((impl, operation))


# This is what torch.compiler.assume_constant_result does; calling it would import all of
# torch.compile with this file.
_import_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
