"""Log decays in the native kernels: threads, sums for the gradient, rounding, rows of heads."""

from __future__ import annotations

import math

import pytest
import torch

import cumulant as cm
from cumulant.kernels.native import library

from .cases import assert_close, error, inputs
from .native_calls import gradients
from .test_decay import OPERATIONS, attend, by_operation, random_decays
from .walking import walk

pytestmark = pytest.mark.usefixtures("small_grains")


def compare(name, shape, decays, dtype=torch.float64, **kwargs):
    """Outputs, states and gradients of native kernels, and of PyTorch's operations in float64."""
    results = []
    for impl, made in (("native", dtype), ("torch", torch.float64)):
        leaves = [x.to(dtype).to(made).requires_grad_() for x in inputs(*shape[:5], G=shape[5])]
        leaves.append(decays.to(dtype).to(made).detach().requires_grad_())
        start = None
        if "state" in kwargs:
            sums = [x.to(made).requires_grad_() for x in (kwargs["state"].numerator,)]
            if kwargs["state"].denominator is not None:
                sums.append(kwargs["state"].denominator.to(made).requires_grad_())
            start = cm.LinearState(*(*sums, None)[:2], kwargs["state"].position)
            leaves += sums
        given = {**kwargs, "impl": impl, "return_state": True, "state": start}
        out, state = attend(name, *leaves[:4], **given)
        outs = [x for x in (out, state.numerator, state.denominator) if x is not None]
        results.append([*outs, *gradients(outs, leaves)])
    return zip(*results)


def start_state(name, B, G, K, V):
    x = inputs(B, G, 9, K, V, G=G, seed=5)
    return OPERATIONS[name](*x, is_causal=True, return_state=True)[1]


@pytest.mark.usefixtures("kept_threads")
@by_operation
@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("least", [-0.05, -8.0])
def test_parts_of_sequences_on_threads(name, threads, heads, least, monkeypatch):
    """Parts that begin with sums of others, and an initial state, with all gradients."""
    walk(monkeypatch, span=32)
    torch.set_num_threads(threads)
    H, G = heads
    decays = random_decays((1, G, 333), least, dtype=torch.float64)
    mask = torch.rand(1, 333, generator=torch.Generator().manual_seed(0)) > 0.2
    state = start_state(name, 1, G, 5, 40)
    for actual, wanted in compare(name, (1, H, 333, 5, 40, G), decays, key_mask=mask, state=state):
        assert_close(actual, wanted, 1000)


@pytest.mark.usefixtures("kept_threads")
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("bounds", [[0, 700, 700, 703, 2700], [0, 2500]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_over_many_chunks_of_packed_sequences(threads, bounds, dtype):
    """More chunks than lie between two that keep their sums."""
    torch.set_num_threads(threads)
    decays = random_decays((1, 1, 2700), -2.0, dtype=torch.float64)
    decays[..., 2200] = -math.inf
    bounds = torch.tensor(bounds)
    for actual, wanted in compare(
        "taylor", (1, 2, 2700, 4, 8, 1), decays, dtype, cu_seqlens=bounds
    ):
        assert error(actual, wanted) < (1e-11 if dtype is torch.float64 else 3e-6)


@pytest.mark.usefixtures("kept_threads")
def test_a_last_part_of_one_chunk(monkeypatch):
    """Its sums are kept for the gradient, although no query comes after it."""
    walk(monkeypatch, span=1, chunk=16)
    torch.set_num_threads(40)
    logs = random_decays((1, 1, 300), -0.1, dtype=torch.float64).requires_grad_()
    x, bounds = inputs(1, 1, 300, 4, 8, G=1), torch.tensor([0, 263])
    found = [
        torch.autograd.grad(attend("taylor", *x, logs, cu_seqlens=bounds, impl=impl).sum(), logs)[0]
        for impl in ("native", "native", "torch")
    ]
    assert_close(found[0], found[2], 1000)
    assert_close(found[1], found[2], 1000)


@pytest.mark.parametrize("least", [-1e-6, -1e-3, -1.0, -20.0])
@by_operation
def test_gradients_of_decays_over_many_chunks(name, least):
    decays = random_decays((1, 2, 5000), least)
    for actual, wanted in compare(name, (1, 4, 5000, 4, 8, 2), decays, torch.float32):
        assert error(actual, wanted) < 5e-6


@pytest.mark.parametrize("decay", [-1e-3, -1e-2, -0.1])
@pytest.mark.parametrize("name", ["taylor", "elu"])
def test_sums_near_their_limit_are_not_rounded_in_one_direction(decay, name):
    """Equal tokens: every chunk adds the same. Rounded each time, sums were off by 5e-6."""
    x = [torch.full((1, 1, 50_000, n), 0.1) for n in (4, 4, 16)]
    logs = torch.full((1, 1, 50_000), decay)
    wide = [y.double() for y in x]
    out, state = attend(name, *x, logs, impl="native", return_state=True)
    exact, end = attend(name, *wide, logs.double(), impl="torch", return_state=True)
    assert error(out, exact) < 1e-6
    assert error(state.numerator, end.numerator) < 1e-6
    assert error(state.denominator, end.denominator) < 1e-6


@pytest.mark.parametrize("isa", library.INSTRUCTIONS)
@by_operation
def test_instruction_sets(name, isa, monkeypatch):
    """Blocks of tokens are as long as vectors."""
    if not library.loaded_library().cumulant_supports(library.INSTRUCTIONS.index(isa)):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(library, "instruction_set_name", lambda: isa)
    for dtype in (torch.float32, torch.float64):
        decays = random_decays((2, 1, 150), -5.0, dtype=torch.float64)
        for actual, wanted in compare(name, (2, 2, 150, 5, 19, 1), decays, dtype):
            assert error(actual, wanted) < (1e-12 if dtype is torch.float64 else 5e-6)


def test_decays_of_heads_are_read_where_they_lie():
    """A row for each token, as a projection writes them, and one number for all tokens."""
    q, k, v = inputs(2, 4, 100, G=2, dtype=torch.float32)
    by_token = -torch.rand(2, 100, 2)
    fixed = torch.tensor([-0.01, -0.1])[:, None]
    for logs in (by_token.mT, fixed.expand(2, 2, 100), by_token.double().mT):
        actual = attend("elu", q, k, v, logs, impl="native")
        assert torch.equal(actual, attend("elu", q, k, v, logs.contiguous(), impl="native"))


def test_steps_decay_in_place_of_copies():
    """One token onto a state, on every instruction a kernel of its own."""
    q, k, v = inputs(2, 4, 60, 5, 19, G=2, dtype=torch.float32)
    logs = random_decays((2, 2, 60), -3.0)
    logs[..., 30] = -math.inf
    whole, end = attend("taylor", q, k, v, logs, impl="native", return_state=True)
    state, outs = None, []
    for t in range(60):
        token = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = attend(
            "taylor", *token, logs[:, :, t : t + 1], impl="native", state=state, return_state=True
        )
        outs.append(out)
    assert_close(torch.cat(outs, 2), whole)
    assert_close(state.numerator, end.numerator)
