"""Which implementation runs. An explicit `impl` is honoured or refused; "auto" chooses by device, dtype and shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

IMPLEMENTATIONS = ("reference", "torch", "native", "triton")


@dataclass(frozen=True)
class Choice:
    """The implementation of one call and why it was chosen."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


def resolve(impl: str) -> str:
    """The implementation to run for a request."""
    if impl in ("torch", "reference"):
        return impl
    if impl == "auto":
        return "torch"
    if impl in IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} is not part of this version of cumulant; these work: 'torch', 'reference'")
    raise ValueError(f"impl: expected 'auto', 'reference', 'torch', 'native' or 'triton', got {impl!r}")


def reasons(impl: str, work: str) -> Choice:
    """`resolve`, and why; `work`: what the fast implementations do."""
    chosen = resolve(impl)
    if chosen == "reference":
        return Choice(chosen, "asked for: the quadratic form, T x S weights")
    return Choice(chosen, f"{'asked for' if impl == 'torch' else 'the fastest available here'}: {work}")


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``op(*args, **kwargs)`` would run, and why, without running it.

    The arguments are checked as in the call itself, so a bad call raises the same error.

    >>> cm.explain(cm.taylor_attention, q, k, v, is_causal=True)
    Choice(impl='torch', reason='the fastest available here: chunks of 128 tokens, 153 features')
    """
    plan = getattr(op, "plan", None)
    if plan is None:
        raise TypeError(f"op: expected an operation such as cumulant.taylor_attention, got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    choice: Choice = plan(**bound.arguments)
    return choice
