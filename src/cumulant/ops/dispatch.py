"""Which implementation runs. An explicit `impl` is honoured or refused; "auto" chooses by device, dtype and shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

IMPLEMENTATIONS = ("reference", "torch", "native", "triton")


@dataclass(frozen=True)
class Choice:
    """The implementation of one call and why it was chosen."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


def resolve(impl: str, obstacle: str = "this operation has no native kernels") -> str:
    """The implementation to run for a request; `obstacle`: why the native kernels cannot, empty where they can."""
    if impl in ("torch", "reference"):
        return impl
    if impl == "auto":
        return "torch" if obstacle else "native"
    if impl == "native" and not obstacle:
        return impl
    if impl in IMPLEMENTATIONS:
        reason = f"cannot run this call: {obstacle}" if impl == "native" else "is not part of this version of cumulant"
        working = "'torch', 'reference'" if obstacle else "'native', 'torch', 'reference'"
        raise ValueError(f"impl: {impl!r} {reason}; these work: {working}")
    raise ValueError(f"impl: expected 'auto', 'reference', 'torch', 'native' or 'triton', got {impl!r}")


def native_obstacle(x: Tensor) -> str:
    """Why the native kernels cannot take tensors such as `x`; empty where they can."""
    if x.device.type != "cpu":
        return f"its kernels are for the CPU, and the inputs are on {x.device}"
    return _missing()


def _missing() -> str:
    from ..kernels.native.library import missing

    return missing()


# What torch.compiler.assume_constant_result does, which would import all of torch.compile with this file.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reasons(impl: str, work: str, obstacle: str = "this operation has no native kernels") -> Choice:
    """`resolve`, and why; `work`: what the chosen implementation does, unless it is the reference."""
    chosen = resolve(impl, obstacle)
    if chosen == "reference":
        return Choice(chosen, "asked for: the quadratic form, T x S weights")
    return Choice(chosen, f"{'asked for' if impl == chosen else 'the fastest available here'}: {work}")


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``op(*args, **kwargs)`` would run, and why, without running it.

    The arguments are checked as in the call itself, so a bad call raises the same error.

    >>> cm.explain(cm.taylor_attention, q, k, v, is_causal=True)
    Choice(impl='native', reason='the fastest available here: chunks of 64 tokens, 153 features')
    """
    plan = getattr(op, "plan", None)
    if plan is None:
        raise TypeError(f"op: expected an operation such as cumulant.taylor_attention, got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    choice: Choice = plan(**bound.arguments)
    return choice
