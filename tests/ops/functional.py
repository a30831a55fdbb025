"""Operations as functions of all that gradients flow through, for torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm

from .cases import CASES, Case, assert_close, sums_of

NAMES = (
    "taylor-2", "taylor-3", "linear-elu", "linear-identity", "linear-softmax", "linear-pair",
    "gated-relu2",
    "gated-bias", "mixed-bias", "mixed-unreduced", "mixed-wide", "elita-own", "elita-partly-own",
)  # fmt: skip
SOME = [c for c in CASES if c.name in NAMES]
FEW = [
    c
    for c in CASES
    if c.name in ("taylor-2", "linear-softmax", "gated-bias", "mixed-bias", "elita-partly-own")
]
FORMS = ("causal", "bidirectional", "masked", "packed", "stateful", "one token")
by_case = pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
by_few = pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
by_form = pytest.mark.parametrize("form", FORMS)
Function = Callable[..., tuple[Tensor, ...]]

# torch.func's first jvp compiles decompositions with torch.jit.script, which warns, and its
# linearize warns about constants
ignore_warnings = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script.:DeprecationWarning",
    "ignore:Attempted to insert a get_attr Node:UserWarning",
)


def as_function(
    case: Case, form: str, impl: str, T: int = 11, sizes: tuple[int, ...] = (4, 3, 2)
) -> Any:
    """A case as a function of all that gradients flow through, its inputs, and their tangents."""
    if form == "bidirectional" and not case.bidirectional:
        pytest.skip("causal only")
    if form == "packed" and case.op is cm.gated_attention and case.biased:
        pytest.skip("a bias for each sequence's own length")
    H, K, V = sizes
    B, T = 1 if form == "packed" else 2, 1 if form == "one token" else T
    x = case.inputs(B, H, T, K, V, G=max(H // 2, 1))
    tangents = case.inputs(B, H, T, K, V, G=max(H // 2, 1), seed=1)
    options: dict[str, Any] = {"impl": impl}
    if form == "masked":
        options["key_mask"] = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) > 0.4
    if form == "packed":
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 9])
    start = None
    if form in ("stateful", "one token"):
        start = case.run(
            *case.inputs(B, H, 6, K, V, G=max(H // 2, 1), seed=2), True, impl="reference"
        )[1]
    parts = sums_of(start)

    def run(q: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        given = iter(sums)
        state = (
            None
            if start is None
            else start.map(lambda x: next(given) if x.is_floating_point() else x)
        )
        out, end = case.run(q, k, v, form != "bidirectional", state=state, **options)
        return (out, *(x.masked_fill(x == -torch.inf, 0) for x in sums_of(end)))

    generator = torch.Generator().manual_seed(3)
    more = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in parts]
    return run, (*x, *parts), (*tangents, *more)


def loss_of(run: Function) -> Callable[..., Tensor]:
    """The same function, with its outputs summed to one number."""

    def loss(*x: Tensor) -> Tensor:
        outs = run(*x)
        return sum(
            (y.sin() * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outs
        )  # type: ignore[return-value]

    return loss


def compare(actual: Any, exact: Any, factor: float = 1000) -> None:
    """Results are close, and not because all of them are zero."""
    actual, exact = (x if isinstance(x, tuple) else (x,) for x in (actual, exact))
    assert any(x.any() for x in exact)
    for a, b in zip(actual, exact, strict=True):
        if isinstance(a, tuple):
            compare(a, b, factor)
        else:
            assert_close(a, b, factor)
