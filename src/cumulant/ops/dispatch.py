"""The choice of the implementation that runs a call.

An explicit `impl` runs, or the call is an error. "auto" takes the first implementation in the table
that can run the call.

An operation plans its call and then runs it. `explain` calls the operation with a marked `impl`.
Planning then stops the call, and reports its choice before anything runs.

The environment variable CUMULANT_IMPL replaces "auto". It names an implementation for every call
that names none, and such a call fails where that implementation cannot run it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..kernels.backends import BACKENDS, load_implementation
from ..kernels.guarded import failures
from ..kernels.native import library
from ..kernels.transforms import needs_formula, transformed

VARIABLE = "CUMULANT_IMPL"
# Every call reads this variable. Reading an unset variable from os.environ takes as long as a small
# layer, so the dict behind os.environ is read instead.
_environment: Any = getattr(os.environ, "_data", os.environ)
_key: Any = os.environ.encodekey(VARIABLE) if hasattr(os.environ, "encodekey") else VARIABLE


@dataclass(frozen=True)
class Choice:
    """The implementation of one call and why it was chosen."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


def implementation_variable() -> Any:
    """CUMULANT_IMPL as the environment holds it, None if it is not set; read in no time."""
    return _environment.get(_key)


def default_implementation() -> str:
    """The implementation that "auto" stands for: CUMULANT_IMPL if set, else "auto".

    An export to ONNX uses "reference", unless CUMULANT_IMPL names another one.
    """
    name = os.environ[VARIABLE] if implementation_variable() else "auto"
    if name not in ("auto", *BACKENDS, "reference"):
        raise ValueError(
            f"{VARIABLE}: expected {_quote_names('auto', *BACKENDS, 'reference')}, got {name!r}"
        )
    return "reference" if name == "auto" and exports_to_onnx() else name


# This is what torch.compiler.assume_constant_result does; calling it would import all of
# torch.compile with this file.
default_implementation._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exports_to_onnx() -> bool:
    """Whether `torch.onnx.export` is tracing; only PyTorch's own operators may run then."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _quote_names(*names: str) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def resolve_implementation(impl: str, obstacles: Mapping[str, str]) -> str:
    """The implementation that `impl` or CUMULANT_IMPL names, or an error if it cannot run.

    obstacles: why each implementation cannot run; empty for those that can.
    """
    name = "impl"
    if impl == "auto":
        name, impl = VARIABLE, default_implementation()
    if impl in BACKENDS and exports_to_onnx():
        raise ValueError(
            f"{name}: {impl!r} runs operators that ONNX does not know; use 'auto' or 'reference'"
        )
    if impl not in (*BACKENDS, "reference"):
        choices = _quote_names("auto", "reference", *reversed(BACKENDS))
        raise ValueError(f"{name}: expected {choices}, got {impl!r}")
    obstacle = obstacles.get(impl, "is not part of this version of cumulant")
    if not obstacle:
        return str(impl)
    reason = f"cannot run this call: {obstacle}" if impl in obstacles else obstacle
    working = ", ".join(repr(each) for each, other in obstacles.items() if not other)
    raise ValueError(f"{name}: {impl!r} {reason}; these work: {working}")


Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Plan(Generic[Spec]):
    """The implementation and the specification of one call.

    The implementation is "auto" for Triton's kernels that no call asked for (`kernels/guarded.py`).
    """

    impl: str
    spec: Spec


def make_plan(operation: str, impl: str, inputs: Any, spec: Spec) -> Plan[Spec]:
    """Plan one call of an operation, which implementations have in the module `operation`."""
    if impl == "auto" and default_implementation() == "auto":
        chosen = _fastest_implementation(operation, inputs, spec)
    else:
        chosen = resolve_implementation(impl, _find_obstacles(operation, inputs, spec))
    module = None if chosen == "reference" else load_implementation(chosen, operation)
    guarded = chosen == "triton" and impl == "auto" and default_implementation() == "auto"
    plan = Plan(
        "auto" if guarded else chosen, spec if module is None else module.prepared(inputs, spec)
    )
    if type(impl) is _PlanRequest:
        work = (
            "the quadratic form, T x S weights"
            if module is None
            else module.describe(inputs, plan.spec)
        )
        raise _PlannedChoice(Choice(chosen, f"{_choice_reason(impl, operation)}: {work}"))
    return plan


def _fastest_implementation(operation: str, inputs: Any, spec: Any) -> str:
    """The first implementation that can run the call and knows of no faster one."""
    for name in BACKENDS:
        module = load_implementation(name, operation)
        if module is None or module.obstacle(inputs, spec):
            continue
        if name == "triton" and operation in failures:
            continue
        if not hasattr(module, "slower") or not module.slower(inputs, spec):
            return name
    return "reference"


def _find_obstacles(operation: str, inputs: Any, spec: Any) -> dict[str, str]:
    """Why each implementation cannot run the call; empty for those that can."""
    found = {}
    for name in BACKENDS:
        module = load_implementation(name, operation)
        if module is None:
            found[name] = f"this operation has no {name} kernels"
            continue
        found[name] = module.obstacle(inputs, spec)
    found["reference"] = ""
    return found


def _choice_reason(impl: str, operation: str) -> str:
    if impl != "auto":
        return "asked for"
    if default_implementation() != "auto":
        return f"asked for by {VARIABLE}"
    if operation in failures:
        return f"the fastest that works here (the Triton kernels do not: {failures[operation]})"
    return "the fastest available here"


class _PlanRequest(str):
    """An `impl` that asks for the plan of a call instead of its result."""


class _PlannedChoice(Exception):
    """Carries the choice of a planned call to `explain`."""

    def __init__(self, choice: Choice):
        self.choice = choice


Operation = TypeVar("Operation", bound=Callable[..., Any])


def operation(op: Operation) -> Operation:
    """Mark a function that makes a plan before it computes anything, so `explain` can call it."""
    op.is_operation = True  # type: ignore[attr-defined]
    return op


def no_transform_active() -> bool:
    """Whether no transform is active: no `torch.func`, no mapping, no forward-mode derivatives.

    Kernels without rules for transforms may then run, and results may be cached for later calls.
    """
    return not transformed() and not needs_formula()


def native_by_default(x: Tensor) -> bool:
    """Whether native kernels may run where no call names an implementation.

    These are pointwise operations and the steps of decoding.
    """
    return default_implementation() in ("auto", "native") and not native_obstacle(x)


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
    bound.arguments["impl"] = _PlanRequest(impl) if isinstance(impl, str) else impl
    try:
        op(*bound.args, **bound.kwargs)
    except _PlannedChoice as planned:
        impl, reason = planned.choice.impl, planned.choice.reason
        return Choice(impl, f"{reason}; {_describe_sizes(bound.arguments)}")
    raise AssertionError(f"{op!r} ran without a plan")


def _describe_sizes(arguments: dict[str, Any]) -> str:
    """The sizes of the query; they show when heads and tokens were swapped."""
    name = next(name for name in ("query", "quad_query", "query_logit") if name in arguments)
    B, H, T = arguments[name].shape[:3]
    return f"{name} read as B = {B} rows, H = {H} heads, T = {T} tokens"
