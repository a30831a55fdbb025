"""Triton's kernels of ELiTA's and of mixed chunk attention, in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm

from ..quick import slow_but
from .cases import TOLERANCE, error
from .interpreter import HAS_TRITON, run_in_any_order
from .walking import walk

if HAS_TRITON:
    import triton
    import triton.language as tl

    from cumulant.kernels.triton.activations import erfc

    @triton.jit
    def run_erfc(x, y, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(y + at, erfc(tl.load(x + at), False))


pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.usefixtures("short_chunks"),
]

T, BOUNDS = 45, torch.tensor([0, 1, 20, 20, 41])


def results(found: list[Tensor], leaves: list[Tensor], draw: torch.Generator) -> list[Tensor]:
    """Outputs and states, and the gradients of a loss of them all."""
    weights = (torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in found)
    loss = sum((x * weight).sum() for x, weight in zip(found, weights))
    return [x.detach() for x in (*found, *torch.autograd.grad(loss, leaves))]


def elita(
    impl: str, *, V: int = 5, heads: tuple[int, int] = (2, 1), form: str = ""
) -> list[Tensor]:
    draw, (H, G), B = torch.Generator().manual_seed(0), heads, 1 if form == "packed" else 2
    leaves = [3 * torch.randn(B, h, T, generator=draw, dtype=torch.float64) for h in (G, H, H)]
    leaves.append(torch.randn(B, G, T, V, generator=draw, dtype=torch.float64))
    options: dict[str, Any] = {"impl": impl}
    if form == "packed":
        options["cu_seqlens"] = BOUNDS
    else:
        leaves += [torch.randn(B, G, dtype=torch.float64, generator=draw)]
        leaves += [torch.randn(B, G, V, dtype=torch.float64, generator=draw)]
        options["state"] = cm.ElitaState(
            *(x.requires_grad_() for x in leaves[4:]), torch.ones(B).long()
        )
        options["return_state"] = True
    found = cm.elita_attention(*(x.requires_grad_() for x in leaves[:4]), **options)
    if form == "packed":
        return results([found], leaves, draw)
    out, state = found
    return results([out, state.log_weight, state.mean], leaves, draw)


def mixed(
    impl: str, *, sizes: tuple[int, int, int] = (3, 7, 5), heads: tuple[int, int] = (2, 1),
    form: str = "state", g: int = 20,
) -> list[Tensor]:  # fmt: skip
    draw, (H, G), (K, L, V) = torch.Generator().manual_seed(0), heads, sizes
    B, N = (1, 4) if "packed" in form else (2, 2)

    def take(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    leaves = [take(B, h, T, D) for h, D in ((H, K), (G, K), (H, L), (G, L), (G, V))]
    leaves.append(take(H, g, g))
    causal = "both" not in form
    options: dict[str, Any] = {"impl": impl, "group_size": g, "is_causal": causal}
    options |= {"activation": "laplace", "return_state": causal, "bias": leaves[-1]}
    if "packed" in form:
        options["cu_seqlens"] = BOUNDS
    if "masked" in form:
        options["key_mask"] = torch.rand(B, T, generator=draw) > 0.3
    if "state" in form:
        position = torch.tensor([3, 27, 40, 0][:N])
        filled = (torch.arange(g) < (position % g)[:, None])[:, None, :, None]
        past = [take(N, G, L, V), *((take(N, G, g, D) * filled) for D in (K, L, V))]
        past = [x.detach().requires_grad_() for x in past]
        options["state"] = cm.MixedChunkState(*past, position)
        leaves += past
    found = cm.mixed_chunk_attention(*leaves[:5], **options)
    if not causal:
        return results([found], leaves, draw)
    out, state = found
    return results([out, state.numerator, state.quad_key, state.lin_key, state.value], leaves, draw)


CALLS = {
    "elita": elita,
    "elita packed": lambda impl: elita(impl, form="packed"),
    "mixed": mixed,
    "mixed packed": lambda impl: mixed(impl, form="packed state masked"),
    "mixed both": lambda impl: mixed(impl, form="both masked"),
}
by_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def assert_equal_reference(call, **options: Any) -> None:
    for actual, exact in zip(call("triton", **options), call("reference", **options), strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64] * 100


@pytest.mark.parametrize("V", [1, 16, 70, 130])
@pytest.mark.parametrize("form", ["", "packed"])
def test_values_of_elita(V: int, form: str):
    """One block of values, several blocks, and blocks that are not full."""
    assert_equal_reference(elita, V=V, form=form, heads=(2, 2) if V == 16 else (3, 1))


@pytest.mark.parametrize(
    ("sizes", "g"), [((1, 1, 1), 16), ((16, 16, 16), 5), ((70, 16, 5), 40), ((5, 70, 70), 64)]
)
@pytest.mark.parametrize("form", ["state", "both"])
def test_sizes_of_mixed_chunks(sizes: tuple[int, int, int], g: int, form: str):
    assert_equal_reference(mixed, sizes=sizes, g=g, form=form, heads=(2, 2))


@pytest.mark.parametrize("V", [1, 70, 150])
def test_steps_of_elita(V: int):
    """One token onto a state, with one block of values or three."""
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 1, dtype=torch.float64) for _ in range(3)]
    v = torch.randn(2, 3, 1, V, dtype=torch.float64)
    past = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, V, dtype=torch.float64)
    state = cm.ElitaState(*past, torch.tensor([4, 4]))
    (y, end), (exact, last) = (
        cm.elita_attention(*logits, v, state=state, return_state=True, impl=impl)
        for impl in ("triton", "reference")
    )
    for a, b in ((y, exact), (end.mean, last.mean), (end.log_weight, last.log_weight)):
        assert error(a, b) <= TOLERANCE[torch.float64]


@by_call
@pytest.mark.parametrize("processors", [1, 1000], ids=["whole", "split"])
def test_nothing_unwritten_is_read(call, processors: int, monkeypatch, unwritten_is_nan):
    walk(monkeypatch, triton_processors=processors, elita_span=16)
    assert_equal_reference(call)


@pytest.mark.parametrize("name", slow_but(("elita", "mixed packed"), CALLS))
def test_programs_of_a_launch_do_not_depend_on_each_other(name: str, monkeypatch):
    """The interpreter runs them one after another; here in two other orders."""

    def run(seed: int | None) -> list[Tensor]:
        run_in_any_order(monkeypatch, seed)
        return CALLS[name]("triton")

    usual = run(None)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(run(seed), usual, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exactness_of_elita(dtype: torch.dtype):
    """Half precision loses no more than the rounding of outputs: products have the rests too."""
    torch.manual_seed(0)
    logits = [2 * torch.randn(1, 2, 300) for _ in range(3)]
    v = torch.randn(1, 2, 300, 16).to(dtype)
    _, state = cm.elita_attention(*logits, v, return_state=True, impl="triton")
    wide = [x.double() for x in (*logits, v)]
    exact, end = cm.elita_attention(*wide, return_state=True, impl="reference")
    assert error(state.mean, end.mean) <= 1e-6
    out = cm.elita_attention(*logits, v, impl="triton")
    assert error(out, exact) <= max(1.01 * error(exact.to(dtype), exact), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_erfc(dtype: torch.dtype):
    """The Laplace function's own erfc, to the last digits where it is small too."""
    x = torch.linspace(-6, 6, 4096, dtype=dtype)
    y = torch.empty_like(x)
    run_erfc[(1,)](x, y, 4096)
    exact = torch.tensor([math.erfc(z) for z in x.double().tolist()], dtype=torch.float64)
    assert float((y.double() / exact - 1).abs().max()) < (1e-14 if dtype == torch.float64 else 8e-6)
    near = x.abs() < 2
    assert float((y.double() / exact - 1)[near].abs().max()) < (
        2e-15 if dtype == torch.float64 else 1e-6
    )
