"""Which implementation runs. An explicit `impl` is honoured or refused; "auto" chooses by device, dtype and shape.

The environment variable CUMULANT_IMPL says what "auto" means: the name of an implementation stands for every call that
names none, and is honoured or refused in the same way.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.transforms import needs_formula, transformed

IMPLEMENTATIONS = ("reference", "torch", "native", "triton")
VARIABLE = "CUMULANT_IMPL"
# Every call asks, and os.environ takes as long as a small layer where a variable is not set: ask the dict behind it.
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
    """What "auto" means: CUMULANT_IMPL, or else "reference" in an export to ONNX and "auto" anywhere else."""
    name = os.environ[VARIABLE] if _environment.get(_key) else "auto"
    if name not in ("auto", "native", "torch", "reference"):
        raise ValueError(f"{VARIABLE}: expected 'auto', 'native', 'torch' or 'reference', got {name!r}")
    return "reference" if name == "auto" and exports_to_onnx() else name


# What torch.compiler.assume_constant_result does, which would import all of torch.compile with this file.
automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exports_to_onnx() -> bool:
    """Whether `torch.onnx.export` is tracing: ONNX knows none of our operators, so that only PyTorch's own may run."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(impl: str, obstacle: str = "this operation has no native kernels") -> str:
    """The implementation to run for a request; `obstacle`: why the native kernels cannot, empty where they can."""
    name = "impl"
    if impl == "auto":
        name, impl = VARIABLE, automatic()
        if impl == "auto":
            return "torch" if obstacle else "native"
    if impl in ("torch", "native") and exports_to_onnx():
        raise ValueError(f"{name}: {impl!r} runs operators of its own, which ONNX has not; use 'auto' or 'reference'")
    if impl in ("torch", "reference"):
        return impl
    if impl == "native" and not obstacle:
        return impl
    if impl in IMPLEMENTATIONS:
        reason = f"cannot run this call: {obstacle}" if impl == "native" else "is not part of this version of cumulant"
        working = "'torch', 'reference'" if obstacle else "'native', 'torch', 'reference'"
        raise ValueError(f"{name}: {impl!r} {reason}; these work: {working}")
    raise ValueError(f"{name}: expected 'auto', 'reference', 'torch', 'native' or 'triton', got {impl!r}")


def plainly_called() -> bool:
    """Whether nothing differentiates forwards, maps or transforms, by `torch.func` or otherwise: kernels without such
    rules may run, and what is made may be kept for the next call."""
    return not transformed() and not needs_formula()


def native_by_default(x: Tensor) -> bool:
    """Whether native kernels may run where nobody names an implementation: beside attention, and in steps."""
    return automatic() in ("auto", "native") and not native_obstacle(x)


def native_obstacle(x: Tensor) -> str:
    """Why the native kernels cannot take tensors such as `x`; empty where they can."""
    if x.device.type != "cpu":
        return f"its kernels are for the CPU, and the inputs are on {x.device}"
    return _missing()


def _missing() -> str:
    from ..kernels.native.library import missing

    return missing()


_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reasons(impl: str, work: str, obstacle: str = "this operation has no native kernels") -> Choice:
    """`resolve`, and why; `work`: what the chosen implementation does, unless it is the reference."""
    chosen = resolve(impl, obstacle)
    asked = "the fastest available here"
    if impl != "auto":
        asked = "asked for"
    elif automatic() != "auto":
        asked = f"asked for by {VARIABLE}"
    return Choice(chosen, f"{asked}: {'the quadratic form, T x S weights' if chosen == 'reference' else work}")


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``op(*args, **kwargs)`` would run, and why, without running it.

    The arguments are checked as in the call itself, so a bad call raises the same error.

    >>> q, k, v = (torch.randn(1, 8, 1000, 16) for _ in range(3))
    >>> cm.explain(cm.taylor_attention, q, k, v, is_causal=True, impl="reference")
    Choice(impl='reference', reason='asked for: the quadratic form, T x S weights; query read as B = 1
    rows, H = 8 heads, T = 1000 tokens')
    """
    plan = getattr(op, "plan", None)
    if plan is None:
        raise TypeError(f"op: expected an operation such as cumulant.taylor_attention, got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    choice: Choice = plan(**bound.arguments)
    return Choice(choice.impl, f"{choice.reason}; {_as_read(bound.arguments)}")


def _as_read(arguments: dict[str, Any]) -> str:
    """The sizes by which heads and tokens that changed places are noticed."""
    name = next(name for name in ("query", "quad_query", "query_logit") if name in arguments)
    B, H, T = arguments[name].shape[:3]
    return f"{name} read as B = {B} rows, H = {H} heads, T = {T} tokens"
