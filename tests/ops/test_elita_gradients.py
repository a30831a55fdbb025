"""Gradients of ELiTA attention at large logits, in every dtype, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm
from cumulant.kernels.native import library

from .cases import IMPLEMENTATIONS
from .walking import walk

NAMES = ("key_logit", "query_logit", "self_logit", "value", "log_weight", "mean")
CALLS = ("plain", "grouped", "state", "masked", "packed", "packed states", "one token")
LARGE = {"all": (1, 1, 1), "keys": (1, 0, 0), "queries": (0, 1, 0), "own": (0, 0, 1)}
ROUNDING = {
    torch.float32: 6e-8,
    torch.bfloat16: 2e-3,
    torch.float16: 2e-4,
}  # of one rounding, on average
# Multiples of the reference's own error. It computes in fp64, so that in half precision both are
# errors of rounding the inputs' gradients; in fp32 the others add up in fp32.
MULTIPLE = {torch.float32: 10, torch.bfloat16: 1.2, torch.float16: 1.2}
FLOOR = 1e-8  # below, gradients are what is left of sums near 1 in the fp64 reference too
B, T, V, SEEDS = 2, 45, 9, 3
BOUNDS = torch.tensor([0, 1, 20, 41])


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    walk(monkeypatch, elita_chunk=4, elita_span=8)


def draw(
    call: str, large: str, size: float, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and the state before them, rounded to `dtype` and in fp64; options."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    packed = call.startswith("packed")
    rows, length, groups = (
        1 if packed else B,
        1 if call == "one token" else T,
        3 if call == "grouped" else 1,
    )
    heads = (2, 2 * groups, 2 * groups)
    sizes = [size if is_large else 1.0 for is_large in LARGE[large]]
    given = {n: (s * randn(rows, h, length)).to(dtype) for n, s, h in zip(NAMES, sizes, heads)}
    given["value"] = randn(rows, 2, length, V).to(dtype)
    options: dict[str, Any] = {}
    if call in ("state", "one token", "packed states"):
        rows = len(BOUNDS) - 1 if packed else B
        given |= {"log_weight": sizes[0] * randn(rows, 2), "mean": randn(rows, 2, V)}
    if call == "masked":
        options["key_mask"] = torch.rand(rows, length, generator=make) > 0.3
    if packed:
        options["cu_seqlens"] = BOUNDS
    return given, options


def gradients(
    given: dict[str, Tensor], options: dict[str, Any], impl: str, seed: int
) -> list[Tensor]:
    """Of all inputs, through output and state."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in given.items()}
    rest = dict(options)
    if "mean" in leaves:
        position = torch.ones(leaves["mean"].shape[0], dtype=torch.long)
        rest["state"] = cm.ElitaState(leaves["log_weight"], leaves["mean"], position)
    wanted = (
        "state" in rest or "cu_seqlens" not in rest
    )  # packed sequences take another path with states
    made = cm.elita_attention(
        *(leaves[n] for n in NAMES[:4]), **rest, return_state=wanted, impl=impl
    )
    outs = [made[0], made[1].log_weight, made[1].mean] if wanted else [made]
    make = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=make, dtype=torch.float64) for x in outs]
    return list(
        torch.autograd.grad(
            sum((x.double() * w).sum() for x, w in zip(outs, weights)), list(leaves.values())
        )
    )


def errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    return torch.stack([(a.double() - b).norm() / (b.norm() + FLOOR) for a, b in zip(found, exact)])


@pytest.mark.parametrize("impl", [x for x in IMPLEMENTATIONS if x != "reference"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("large", LARGE)
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0, 1000.0])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_gradients_at_large_logits(
    dtype: torch.dtype, size: float, large: str, call: str, impl: str
):
    found, own = torch.zeros(1), torch.zeros(1)
    for seed in range(SEEDS):
        given, options = draw(call, large, size, dtype, seed)
        exact = gradients({n: x.double() for n, x in given.items()}, options, "reference", seed)
        found = found + errors(gradients(given, options, impl, seed), exact) ** 2 / SEEDS
        own = own + errors(gradients(given, options, "reference", seed), exact) ** 2 / SEEDS
    assert (found.sqrt() <= MULTIPLE[dtype] * own.sqrt().clamp(min=ROUNDING[dtype])).all()


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("starts", [[], [0, 5, 200]], ids=["one sequence", "packed"])
def test_gradients_of_a_sequence_in_parts(size: float, starts: list[int], monkeypatch):
    """Gradients cross the borders of three threads' parts, and of a state before them."""
    monkeypatch.setattr(library, "GRAIN", 1)
    walk(monkeypatch, elita_span=64)
    torch.manual_seed(0)
    given = {n: size * torch.randn(1, 1, 300, dtype=torch.float64) for n in NAMES[:3]}
    given |= {"value": torch.randn(1, 1, 300, V, dtype=torch.float64)}
    given |= {
        "log_weight": torch.randn(1, 1, dtype=torch.float64),
        "mean": torch.randn(1, 1, V, dtype=torch.float64),
    }
    options = {"cu_seqlens": torch.tensor([*starts, 290])} if starts else {}
    if starts:
        given |= {
            n: given[n].repeat(len(starts), *(1 for _ in given[n].shape[1:])) for n in NAMES[4:]
        }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = gradients(given, options, "native", 0)
    finally:
        torch.set_num_threads(threads)
    # the reference itself leaves 1e-16 of sums near 1 in gradients of 1e-4 and less
    assert (errors(found, gradients(given, options, "reference", 0)) < 1e-10).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_of_gradients_are_right_or_refused(impl: str):
    """`torch.autograd` raises an error for each input, and never gives zero."""
    given, _ = draw("plain", "all", 1.0, torch.float64, 0)
    for name in NAMES[:4]:
        leaves = {n: x.clone().requires_grad_(n == name) for n, x in given.items()}
        out = cm.elita_attention(*leaves.values(), impl=impl)
        (first,) = torch.autograd.grad(out.square().sum(), [leaves[name]], create_graph=True)
        if impl == "reference":
            assert torch.autograd.grad(first.square().sum(), [leaves[name]])[0].abs().sum() > 0
            continue
        with pytest.raises((RuntimeError, NotImplementedError), match="backward|gradient"):
            torch.autograd.grad(first.square().sum(), [leaves[name]])
