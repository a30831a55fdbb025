"""Triton's interpreter, which runs the kernels on the CPU, without its slowest habit.

It replaces Triton's language by functions of its own before a kernel runs, and again in every call
of a function inside the kernel, which takes most of the time. Once for each module is enough.
"""

from __future__ import annotations

import builtins
import os
import random
import sys
from importlib.util import find_spec
from typing import Any

HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def speed_up() -> None:
    """Replace the language once for each module."""
    from triton.runtime import interpreter

    replaced = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(self.fn.__module__)
        if not hasattr(self, "rewritten"):
            self.rewritten = self.rewrite()
        return self.rewritten(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def run_in_any_order(monkeypatch: Any, seed: int | None) -> None:
    """The programs of a launch run in a random order, or one after another for None."""
    from triton.runtime import interpreter

    shuffled = random.Random(seed)

    def in_any_order(*bounds):
        found = list(builtins.range(*bounds))
        if seed is not None and sys._getframe(1).f_code.co_name == "__call__":
            shuffled.shuffle(found)
        return found

    monkeypatch.setattr(interpreter, "range", in_any_order, raising=False)


# The interpreter takes seconds for what compiled kernels do in microseconds. `make test` has these
# tests of the matrix with these cases; all others with Triton are slow. test_triton.py has more.
QUICK = {
    "test_equals_the_formula": (
        "taylor-2",
        "taylor-2-decay",
        "linear-elu",
        "linear-identity",
        "elita-own",
        "mixed-laplace",
    ),
    "test_gradients_equal_the_reference": (
        "taylor-2",
        "linear-elu-decay",
        "elita-own",
        "mixed-bias",
    ),
    "test_packed_is_separate": ("taylor-2-decay",),
}


def is_slow(test: str, parameters: dict[str, Any]) -> bool:
    """Whether a test with these parameters is left out of `make test`."""
    if parameters.get("impl") != "triton":
        return False
    case = parameters.get("case")
    return case is None or case.name not in QUICK.get(test, ())
