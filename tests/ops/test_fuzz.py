"""Random calls of every operation on every implementation, against dense float64 forms.

The longer run: ``pytest -m slow tests/ops/test_fuzz.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cumulant as cm

from . import dense
from .cases import GRADIENT_TOLERANCE, ROUNDING

OPERATIONS = {
    "linear": cm.linear_attention,
    "taylor": cm.taylor_attention,
    "elita": cm.elita_attention,
    "gated": cm.gated_attention,
    "mixed_chunk": cm.mixed_chunk_attention,
}


@dataclass(frozen=True)
class Call:
    """One call, and how its inputs are drawn, laid out and divided."""

    name: str
    options: dict[str, Any]
    sizes: tuple[int, ...]  # B, G, heads a group, T, S, K, V
    dtype: torch.dtype
    layout: str
    is_causal: bool
    masked: float  # share of the keys
    bounds: tuple[int, ...] | None  # of packed sequences
    lengths: tuple[int, ...]  # of the parts in which a sequence comes
    seed: int


OPTIONS = {
    "linear": st.fixed_dictionaries(
        {
            "feature_map": st.sampled_from(["elu", "relu", "softmax", "identity"]),
            "scale": st.sampled_from([1.0, 0.3]),
            "normalize": st.booleans(),
        }
    ),
    "taylor": st.fixed_dictionaries(
        {
            "order": st.integers(1, 4),
            "scale": st.sampled_from([None, 0.2]),
            "constant_term": st.booleans(),
        }
    ),
    "elita": st.just({}),
    "gated": st.fixed_dictionaries(
        {
            "activation": st.sampled_from(["relu2", "laplace"]),
            "length_scale": st.sampled_from([None, 5.0]),
        }
    ),
    "mixed_chunk": st.fixed_dictionaries(
        {
            "group_size": st.integers(1, 70),
            "activation": st.sampled_from(["relu2", "laplace"]),
            "reduce_group_non_causal_attn": st.booleans(),
        }
    ),
}


@st.composite
def calls(draw: Any) -> Call:
    name = draw(st.sampled_from(list(OPERATIONS)))
    options = draw(OPTIONS[name])
    B, G, R = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T = draw(st.one_of(st.integers(1, 20), st.integers(1, 200)))
    is_causal = name == "elita" or draw(st.booleans())
    packed = draw(st.sampled_from([False, False, True]))
    whole = draw(st.booleans())
    bounds, lengths, S = None, (T,), T
    if packed:
        B, cuts = 1, draw(st.lists(st.integers(0, T), min_size=1, max_size=4))
        bounds = (0, *sorted(cuts))
    elif is_causal and not whole:
        cuts = sorted(draw(st.lists(st.integers(0, T), max_size=4)))
        lengths = tuple(b - a for a, b in pairwise([0, *cuts, T]))
    elif not is_causal and name != "mixed_chunk":
        S = draw(st.integers(1, 200))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    layout = draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
    masked = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    K, V = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    return Call(
        name,
        options,
        (B, G, R, T, S, K, V),
        dtype,
        layout,
        is_causal,
        masked,
        bounds,
        lengths,
        draw(st.integers(0, 2**20)),
    )


def draw_inputs(call: Call) -> list[Tensor]:
    """Numbers of the call's dtype, in fp64.

    Where weights have both signs, all numbers are positive, so that no denominator vanishes. Where
    features may be zero, the others are not tiny: a query that sees one small key only gives it a
    gradient of 0, of terms as large as 1 / key that cancel.
    """
    B, G, R, T, S, K, V = call.sizes
    generator = torch.Generator().manual_seed(call.seed)
    shapes = {
        "elita": [(B, G, T), (B, G * R, T), (B, G * R, T), (B, G, T, V)],
        "mixed_chunk": [
            (B, G * R, T, K),
            (B, G, T, K),
            (B, G * R, T, K + 1),
            (B, G, T, K + 1),
            (B, G, T, V),
        ],
    }.get(call.name, [(B, G * R, T, K), (B, G, S, K), (B, G, S, V)])
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    signed = call.name == "taylor" and (
        call.options["order"] % 2 == 1 or not call.options["constant_term"]
    )
    if signed or call.options.get("feature_map") == "identity":
        found[:2] = [x.abs() + 0.1 for x in found[:2]]
    if call.options.get("feature_map") == "relu":
        found[:2] = [torch.where(x > 0, x + 0.1, x) for x in found[:2]]
    if call.name == "elita":
        found[:3] = [x * 3 for x in found[:3]]
    return [x.to(call.dtype).double() for x in found]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides."""
    if layout == "transposed" and x.dim() == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(-2)[..., ::2]
    return x


def run(call: Call, impl: str, inputs: list[Tensor], key_mask: Tensor | None) -> Tensor:
    options = (
        {**call.options, "impl": impl}
        if call.name == "elita"
        else {**call.options, "is_causal": call.is_causal, "impl": impl}
    )
    if call.bounds is not None:
        return OPERATIONS[call.name](
            *inputs, key_mask=key_mask, cu_seqlens=torch.tensor(call.bounds), **options
        )
    if call.lengths == (call.sizes[3],):
        return OPERATIONS[call.name](*inputs, key_mask=key_mask, **options)
    state, outs, at = None, [], 0
    for n in call.lengths:
        mask = None if key_mask is None else key_mask[:, at : at + n]
        part = [x[:, :, at : at + n] for x in inputs]
        out, state = OPERATIONS[call.name](
            *part, key_mask=mask, state=state, return_state=True, **options
        )
        outs.append(out)
        at += n
    return torch.cat(outs, 2)


def run_dense(call: Call, inputs: list[Tensor], key_mask: Tensor | None) -> Tensor:
    B, _, _, T, S = call.sizes[:5]
    cu_seqlens = None if call.bounds is None else torch.tensor(call.bounds)
    seen = dense.visible(B, T, S, call.is_causal, key_mask, cu_seqlens)
    options = dict(call.options)
    if call.name == "mixed_chunk":
        options |= {"is_causal": call.is_causal, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    out = dense.FORMS[call.name](*inputs, seen, **options)
    if cu_seqlens is not None:
        out = out * (torch.arange(T) < cu_seqlens[-1])[:, None]
    return out


def differentiate(out: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad((out.double() * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def check(call: Call) -> None:
    B, S = call.sizes[0], call.sizes[4]
    given_numbers = draw_inputs(call)
    if call.layout == "expanded":
        given_numbers = [x[:1].expand_as(x) for x in given_numbers]
    generator = torch.Generator().manual_seed(call.seed)
    key_mask = torch.rand(B, S, generator=generator) >= call.masked if call.masked else None
    exact_leaves = [x.clone().requires_grad_() for x in given_numbers]
    exact = run_dense(call, exact_leaves, key_mask)
    weight = (
        torch.randn(exact.shape, generator=generator, dtype=torch.float64).to(call.dtype).double()
    )
    expected = [exact.detach(), *differentiate(exact, weight, exact_leaves)]
    # what a sum of T products in the dtype of sums may lose, where nothing but the rounding of its
    # terms is left
    precision = 1e-15 if call.dtype == torch.float64 else 5e-7
    size = (
        float(weight.abs().max())
        * math.prod(1 + float(x.abs().max()) for x in given_numbers[-1:])
        * exact.numel() ** 0.5
    )
    for impl in ("reference", "torch", "native")[: 2 if call.name == "gated" else 3]:
        leaves = [
            lay_out(x.to(call.dtype), call.layout).detach().requires_grad_() for x in given_numbers
        ]
        out = run(call, impl, leaves, key_mask)
        assert out.dtype == call.dtype
        found = [out.detach(), *differentiate(out, weight, leaves)]
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.isfinite().all(), (impl, i)
            difference = float((a.double() - b).norm())
            relative = (
                1e-13
                if call.dtype == torch.float64
                else GRADIENT_TOLERANCE[call.dtype] * 2 * ROUNDING[call.dtype]
            )
            bound = relative * float(b.norm()) + 10 * precision * size
            assert difference <= bound, (impl, i, difference, float(b.norm()), bound)


relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(relaxed, max_examples=300)
@given(calls())
def test_random_calls(call: Call):
    check(call)


@pytest.mark.slow
@settings(relaxed, max_examples=7500)
@given(calls())
def test_many_random_calls(call: Call):
    check(call)
