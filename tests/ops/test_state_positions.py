"""Positions of a state that do not fit are refused before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm

from .cases import CASES, IMPLEMENTATIONS, Case

NAMES = (
    "taylor-2",
    "linear-elu",
    "linear-softmax",
    "linear-callable",
    "gated-relu2",
    "mixed-relu2",
    "elita-own",
)
STATEFUL = [c for c in CASES if c.name in NAMES]
by_case = pytest.mark.parametrize("case", STATEFUL, ids=lambda c: c.name)
by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
EXPECTED = r"state: expected position \[B\] int64 = \[2\] on cpu, got "
WRONG: dict[str, Any] = {
    "float": (
        Tensor.float,
        TypeError,
        EXPECTED + r"\[2\] float32; convert it with position.long\(\)",
    ),
    "double": (Tensor.double, TypeError, EXPECTED + r"\[2\] float64"),
    "int32": (Tensor.int, TypeError, EXPECTED + r"\[2\] int32"),
    "bool": (Tensor.bool, TypeError, EXPECTED + r"\[2\] bool"),
    "longer": (
        lambda p: torch.cat((p, p[:1])),
        ValueError,
        EXPECTED + r"\[3\]; choose rows with state.select",
    ),
    "shorter": (lambda p: p[:1], ValueError, EXPECTED + r"\[1\]"),
    "empty": (lambda p: p[:0], ValueError, EXPECTED + r"\[0\]"),
    "number": (lambda p: p[0], ValueError, EXPECTED + r"\[\]"),
    "matrix": (lambda p: p[:, None], ValueError, EXPECTED + r"\[2, 1\]"),
    "float, longer": (lambda p: torch.ones(3), TypeError, EXPECTED + r"\[3\] float32"),
    "elsewhere": (
        lambda p: p.to("meta"),
        TypeError,
        EXPECTED + r"one on meta; move it with state.to\(device\)",
    ),
    "int": (
        lambda p: 7,
        TypeError,
        EXPECTED + r"int; pass a state from return_state=True as it is",
    ),
    "list": (Tensor.tolist, TypeError, EXPECTED + r"list"),
    "nothing": (lambda p: None, TypeError, EXPECTED + r"NoneType"),
}


@by_impl
@by_case
@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("length", [1, 5])
def test_positions_are_checked(case: Case, impl: str, how: str, length: int):
    change, kind, message = WRONG[how]
    if impl not in case.implementations:
        impl = "auto"
    state = case(*case.inputs(T=4), is_causal=True, return_state=True)[1]
    wrong = replace(state, position=change(state.position))
    with pytest.raises(kind, match=message):
        case(*case.inputs(T=length), is_causal=True, state=wrong, impl=impl)


@by_impl
@pytest.mark.parametrize("case", [c for c in STATEFUL if c.packed_states], ids=lambda c: c.name)
def test_packed_sequences_have_a_position_each(case: Case, impl: str):
    """A state with one position for a row of three sequences is refused."""
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    q, k, v = case.inputs(1, T=8)
    state = case(q, k, v, is_causal=True, cu_seqlens=cu_seqlens, return_state=True, impl=impl)[1]
    assert state.position.tolist() == [3, 0, 5]
    wrong = replace(state, position=state.position[:1])
    with pytest.raises(
        ValueError, match=r"state: expected position \[B\] int64 = \[3\] on cpu, got \[1\]"
    ):
        case(q, k, v, is_causal=True, cu_seqlens=cu_seqlens, state=wrong, impl=impl)


@by_case
def test_values_of_positions_are_not_read(case: Case):
    """Only shapes and dtypes are read, so that graphs, export and vmap work."""
    state = case(*case.inputs(T=4), is_causal=True, return_state=True)[1]
    more = case.inputs(T=2, seed=3)

    def call(q, k, v, s):
        return case(q, k, v, is_causal=True, state=s, return_state=True)

    out, end = call(*more, state)
    compiled, compiled_end = torch.compile(call, backend="eager", fullgraph=True)(*more, state)
    assert torch.allclose(compiled, out)
    assert torch.equal(compiled_end.position, end.position)


@pytest.mark.parametrize("name", ["linear", "taylor"])
def test_denominators_have_their_numerators_dtype(name: str):
    case = next(c for c in STATEFUL if c.name.startswith(name))
    state = case(*case.inputs(T=4), is_causal=True, return_state=True)[1]
    wrong = replace(state, denominator=state.denominator.float())
    with pytest.raises(
        TypeError,
        match=r"state: expected denominator in torch.float64 on cpu, got torch.float32 on",
    ):
        case(*case.inputs(T=2), is_causal=True, state=wrong)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 4), torch.ones(2, 3).bool(), torch.ones(1, 4).bool()], ids=str
)
def test_masks_of_kept_keys(mask: Tensor):
    case = next(c for c in STATEFUL if c.op is cm.gated_attention)
    state = case(*case.inputs(T=4), is_causal=True, return_state=True)[1]
    with pytest.raises((TypeError, ValueError), match=r"state.mask: expected "):
        case(*case.inputs(T=2), is_causal=True, state=replace(state, mask=mask))
