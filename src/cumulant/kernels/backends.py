"""The implementations, the fastest first: a folder each, with a module for every operation that it
has.

Such a module says what stands in the way of a call (`obstacle`), perhaps also why another
implementation is the faster (`slower`), fills in what is its own business in a specification
(`prepared`), tells what it would do (`describe`), and does it (`forward`, `backward`; see
`operators/operator.py`).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import native
from . import torch as pytorch

BACKENDS = {"native": native, "torch": pytorch}
_sought: set[tuple[str, str]] = set()


def implementation(impl: str, operation: str) -> Any:
    """The module, imported when it is first asked for; None where an implementation does not have
    the operation.
    """
    _import(impl, operation)
    return getattr(BACKENDS[impl], operation, None)


def _import(impl: str, operation: str) -> None:
    if (impl, operation) not in _sought:
        name = f"{BACKENDS[impl].__name__}.{operation}"
        if find_spec(name) is not None:
            import_module(name)
        _sought.add((impl, operation))


# What torch.compiler.assume_constant_result does, which would import all of torch.compile with this
# file.
_import._dynamo_marked_constant = True  # type: ignore[attr-defined]
