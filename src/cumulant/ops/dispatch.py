"""Which implementation runs. An explicit `impl` is honoured or refused; "auto" takes the first that
nothing hinders.

An operation makes a plan of its call and then runs it. `explain` calls the operation with an `impl`
that only asks, and is handed the plan's choice before anything runs.

The environment variable CUMULANT_IMPL says what "auto" means: the name of an implementation stands
for every call that names none, and is honoured or refused in the same way.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..kernels.backends import BACKENDS, implementation
from ..kernels.native import library
from ..kernels.transforms import needs_formula, transformed

PLANNED = ("triton",)  # names that a later version will know
VARIABLE = "CUMULANT_IMPL"
# Every call asks, and os.environ takes as long as a small layer where a variable is not set: ask
# the dict behind it.
_environment: Any = getattr(os.environ, "_data", os.environ)
_key: Any = os.environ.encodekey(VARIABLE) if hasattr(os.environ, "encodekey") else VARIABLE


@dataclass(frozen=True)
class Choice:
    """The implementation of one call and why it was chosen."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


def automatic() -> str:
    """What "auto" means: CUMULANT_IMPL, or else "reference" in an export to ONNX and "auto"
    anywhere else.
    """
    name = os.environ[VARIABLE] if _environment.get(_key) else "auto"
    if name not in ("auto", *BACKENDS, "reference"):
        raise ValueError(
            f"{VARIABLE}: expected {_listed('auto', *BACKENDS, 'reference')}, got {name!r}"
        )
    return "reference" if name == "auto" and exports_to_onnx() else name


# What torch.compiler.assume_constant_result does, which would import all of torch.compile with this
# file.
automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exports_to_onnx() -> bool:
    """Whether `torch.onnx.export` is tracing: ONNX knows none of our operators, so that only
    PyTorch's own may run.
    """
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _listed(*names: str) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def resolve(impl: str, obstacles: Mapping[str, str]) -> str:
    """The implementation that `impl`, or CUMULANT_IMPL, names, or an error if it cannot run.
    obstacles: what stands in the way of each implementation; empty where nothing does."""
    name = "impl"
    if impl == "auto":
        name, impl = VARIABLE, automatic()
    if impl in BACKENDS and exports_to_onnx():
        raise ValueError(
            f"{name}: {impl!r} runs operators of its own, which ONNX has not; use 'auto' or"
            " 'reference'"
        )
    if impl not in (*BACKENDS, "reference", *PLANNED):
        raise ValueError(
            f"{name}: expected {_listed('auto', 'reference', *reversed(BACKENDS), *PLANNED)}, got"
            f" {impl!r}"
        )
    obstacle = obstacles.get(impl, "is not part of this version of cumulant")
    if not obstacle:
        return str(impl)
    reason = f"cannot run this call: {obstacle}" if impl in obstacles else obstacle
    working = ", ".join(repr(each) for each, other in obstacles.items() if not other)
    raise ValueError(f"{name}: {impl!r} {reason}; these work: {working}")


Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Plan(Generic[Spec]):
    """How one call will run: by which implementation, and with what specification."""

    impl: str
    spec: Spec


def make_plan(operation: str, impl: str, inputs: Any, spec: Spec) -> Plan[Spec]:
    """The plan for an operation's call. operation: the module that implementations have for it."""
    if impl == "auto" and automatic() == "auto":
        chosen = _fastest(operation, inputs, spec)
    else:
        chosen = resolve(impl, _obstacles(operation, inputs, spec))
    module = None if chosen == "reference" else implementation(chosen, operation)
    plan = Plan(chosen, spec if module is None else module.prepared(inputs, spec))
    if type(impl) is _Question:
        work = (
            "the quadratic form, T x S weights"
            if module is None
            else module.describe(inputs, plan.spec)
        )
        raise _Answer(Choice(chosen, f"{_wish(impl)}: {work}"))
    return plan


def _fastest(operation: str, inputs: Any, spec: Any) -> str:
    """The first implementation that can run the call and knows of no faster one."""
    for name in BACKENDS:
        module = implementation(name, operation)
        if module is None or module.obstacle(inputs, spec):
            continue
        if not hasattr(module, "slower") or not module.slower(inputs, spec):
            return name
    return "reference"


def _obstacles(operation: str, inputs: Any, spec: Any) -> dict[str, str]:
    """What stands in the way of each implementation."""
    found = {}
    for name in BACKENDS:
        module = implementation(name, operation)
        if module is None:
            found[name] = f"this operation has no {name} kernels"
            continue
        found[name] = module.obstacle(inputs, spec)
    found["reference"] = ""
    return found


def _wish(impl: str) -> str:
    if impl != "auto":
        return "asked for"
    return f"asked for by {VARIABLE}" if automatic() != "auto" else "the fastest available here"


class _Question(str):
    """An `impl` whose plan is wanted, and no run."""


class _Answer(Exception):
    def __init__(self, choice: Choice):
        self.choice = choice


Operation = TypeVar("Operation", bound=Callable[..., Any])


def operation(op: Operation) -> Operation:
    """A function that makes a plan before it computes anything, so that it can be explained."""
    op.is_operation = True  # type: ignore[attr-defined]
    return op


def plainly_called() -> bool:
    """Whether nothing differentiates forwards, maps or transforms, by `torch.func` or otherwise:
    kernels without such rules may run, and what is made may be kept for the next call."""
    return not transformed() and not needs_formula()


def native_by_default(x: Tensor) -> bool:
    """Whether native kernels may run where nobody names an implementation: beside attention, and in
    steps.
    """
    return automatic() in ("auto", "native") and not native_obstacle(x)


def native_obstacle(x: Tensor) -> str:
    """Why the native kernels cannot take tensors such as `x`; empty where they can."""
    return library.obstacle(x)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``op(*args, **kwargs)`` would run, and why, without running it.

    The arguments are checked as in the call itself, so a bad call raises the same error.

    >>> q, k, v = (torch.randn(1, 8, 1000, 16) for _ in range(3))
    >>> cm.explain(cm.taylor_attention, q, k, v, is_causal=True, impl="reference")
    Choice(impl='reference', reason='asked for: the quadratic form, T x S weights; query read as B =
    1 rows, H = 8 heads, T = 1000 tokens')
    """
    if not getattr(op, "is_operation", False):
        raise TypeError(f"op: expected an operation such as cumulant.taylor_attention, got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    impl = bound.arguments["impl"]
    bound.arguments["impl"] = _Question(impl) if isinstance(impl, str) else impl
    try:
        op(*bound.args, **bound.kwargs)
    except _Answer as answer:
        return Choice(answer.choice.impl, f"{answer.choice.reason}; {_as_read(bound.arguments)}")
    raise AssertionError(f"{op!r} ran without a plan")


def _as_read(arguments: dict[str, Any]) -> str:
    """The sizes by which heads and tokens that changed places are noticed."""
    name = next(name for name in ("query", "quad_query", "query_logit") if name in arguments)
    B, H, T = arguments[name].shape[:3]
    return f"{name} read as B = {B} rows, H = {H} heads, T = {T} tokens"
