"""Calls like an earlier one skip checks and planning, and nothing else about them differs."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cumulant as cm
from cumulant.ops import repeated
from cumulant.ops.state import LinearState

linear = cm.linear_attention
taylor = cm.taylor_attention
both = pytest.mark.parametrize("op", [linear, taylor])


@pytest.fixture
def hits(monkeypatch):
    """Counts calls that find an earlier one."""
    found, recall = [], repeated.recall

    def counted(signature):
        result = recall(signature)
        found.append(result is not None)
        return result

    for module in ("linear", "taylor"):
        monkeypatch.setattr(f"cumulant.ops.{module}.recall", counted)
    return found


def heads(T: int = 5, K: int = 4, V: int = 16, *, B: int = 2, H: int = 4, G: int = 2, **options):
    return [torch.randn(B, n, T, D, **options) for n, D in ((H, K), (G, K), (G, V))]


def decays(T: int = 5, B: int = 2, G: int = 2) -> Tensor:
    return -torch.rand(B, G, T)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 64, 150])
@pytest.mark.parametrize("decaying", [False, True])
def test_other_numbers_give_their_own_results(op, dtype, T, decaying, hits):
    state = {"native": None, "torch": None}
    for turn in range(3):
        x = heads(T, dtype=dtype)
        options = {"log_decay": decays(T)} if decaying else {}
        outs = {}
        for impl, past in state.items():
            outs[impl], state[impl] = op(
                *x, is_causal=True, state=past, return_state=True, impl=impl, **options
            )
        sums = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        close = {} if dtype == torch.bfloat16 else sums
        torch.testing.assert_close(outs["native"], outs["torch"], **close)
        assert state["native"].position.tolist() == 2 * [(turn + 1) * T]
        for name, tensor in state["native"].tensors().items():
            other = state["torch"].tensors()[name]
            torch.testing.assert_close(tensor, other, **sums)
    # the first call with a state is new, and the next one like it
    assert hits == [False, False, False, False, True, False]


@both
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(op, is_causal, hits):
    for _ in range(2):
        x = [y.requires_grad_() for y in heads()]
        state = LinearState(
            *(y.requires_grad_() for y in (torch.randn(2, 2, 15, 16), torch.rand(2, 2, 15) + 20)),
            torch.tensor([3, 3]),
        )
        if op is linear:
            state = replace(
                state,
                numerator=torch.randn(2, 2, 4, 16, requires_grad=True),
                denominator=(torch.rand(2, 2, 4) + 20).requires_grad_(),
            )
        decay = decays().requires_grad_() if is_causal else None
        leaves = [*x, state.numerator, state.denominator, *([] if decay is None else [decay])]
        results = []
        for impl in ("native", "torch"):
            out, end = op(
                *x,
                is_causal=is_causal,
                state=state,
                log_decay=decay,
                return_state=True,
                impl=impl,
            )
            total = out.sin().sum() + end.numerator.cos().sum() + end.denominator.sin().sum()
            results.append(torch.autograd.grad(total, leaves))
        for ours, other in zip(*results, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    assert hits == [False, False, True, False]


@both
def test_layouts_are_told_apart(op, hits):
    """The same shapes lie otherwise in memory: heads side by side, steps, expanded."""
    plain = heads(H=2)
    for change in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack((x, x), 3)[:, :, :, 0],
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x[:1].expand_as(x),
    ):
        for _ in range(2):
            x = [change(y) for y in plain]
            torch.testing.assert_close(
                op(*x, is_causal=True), op(*x, is_causal=True, impl="reference")
            )
    assert sum(hits) == 4  # all but rows whose numbers do not follow one another


@both
def test_sums_that_lie_otherwise(op):
    x = heads(1)
    _, state = op(*x, is_causal=True, return_state=True)
    expected = op(*x, is_causal=True, state=state, return_state=True)[0]
    turned = replace(state, numerator=state.numerator.mT.contiguous().mT)
    assert not turned.numerator.is_contiguous()
    for _ in range(2):
        found = op(*x, is_causal=True, state=turned, return_state=True)[0]
        torch.testing.assert_close(found, expected)


@both
def test_bad_input_is_refused_all_the_same(op):
    x, decay = heads(), decays()
    _, state = op(*x, is_causal=True, return_state=True)
    for _ in range(2):
        op(*x, is_causal=True, log_decay=decay, state=state)
    for value in (0.5, math.nan):
        with pytest.raises(ValueError, match="log_decay: expected logarithms of decays, at most 0"):
            op(*x, is_causal=True, log_decay=decay.index_fill(2, torch.tensor(3), value))
        with pytest.raises(ValueError, match="log_decay: expected logarithms of decays, at most 0"):
            op(*x, is_causal=True, log_decay=torch.full_like(decay, value), state=state)
    q, k, v = x
    for bad, message in (
        ((q, k, v[:, :, :4]), "value"),
        ((q.double(), k, v), "key"),
        ((q.tolist(), k, v), "query"),
        ((q.to_sparse(), k, v), "query: expected a dense tensor"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            op(*bad, is_causal=True, state=state)
    with pytest.raises(ValueError, match="state: expected numerator"):
        op(*x, is_causal=True, state=state.select(torch.tensor([0])))
    with pytest.raises(TypeError, match="state"):
        op(*x, is_causal=True, state=replace(state, numerator=state.numerator.double()))
    with pytest.raises(ValueError, match="impl"):
        op(*x, is_causal=True, state=state, impl="cuda")


def test_an_order_is_an_integer():
    x = heads()
    for _ in range(2):
        taylor(*x, 1, is_causal=True)
    for bad in (True, 1.0):
        with pytest.raises(ValueError, match="order"):
            taylor(*x, bad, is_causal=True)


@both
def test_what_else_decides_is_noticed(op, monkeypatch, kept_threads, hits):
    """Threads, CUMULANT_IMPL, options, and requests for a plan."""
    x = heads(300)
    for _ in range(2):
        op(*x, is_causal=True)
    assert cm.explain(op, *x, is_causal=True).impl == "native"
    op(*x, is_causal=True, scale=torch.tensor(0.5))
    torch.set_num_threads(2)
    op(*x, is_causal=True)
    monkeypatch.setenv("CUMULANT_IMPL", "torch")
    op(*x, is_causal=True)
    assert cm.explain(op, *x, is_causal=True).impl == "torch"
    assert hits == [False, True, False, False, False, False, False]


@both
def test_only_plain_calls_are_remembered(op):
    """Others run as before beside remembered ones: mapped, traced, fake, other kinds of tensors."""
    x = heads(B=1)
    expected = op(*x, is_causal=True)
    for _ in range(2):
        op(*x, is_causal=True)
    known = len(repeated._remembered)

    def run(*x):
        return op(*x, is_causal=True)

    several = [torch.stack((y, y)) for y in x]
    torch.testing.assert_close(torch.func.vmap(run)(*several)[1], expected)
    tangents = [torch.randn_like(y) for y in x]
    assert torch.func.jvp(run, tuple(x), tuple(tangents))[1].shape == expected.shape
    negative = [torch.complex(y, -y).conj().imag for y in x]
    assert all(y.is_neg() for y in negative)
    torch.testing.assert_close(run(*negative), expected)
    with torch.device("meta"):
        torch.testing.assert_close(run(*x), expected)
    assert run(*(y.to("meta") for y in x)).device.type == "meta"
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert run(*(mode.from_tensor(y) for y in x)).shape == expected.shape
    masked = op(*x, is_causal=True, key_mask=torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(masked, expected)
    assert len(repeated._remembered) == known


@both
def test_states_stay_values(op, tmp_path):
    """What is noted on a state is no field, and a copy or a change of one is read anew."""
    x = heads(1)
    _, state = op(*x, is_causal=True, return_state=True)
    _, state = op(*x, is_causal=True, state=state, return_state=True)
    expected = op(*x, is_causal=True, state=state)
    cm.save_state(tmp_path / "state.safetensors", state)
    copies = [
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        cm.load_state(tmp_path / "state.safetensors"),
        state.detach(),
        replace(state),
        state.select(torch.tensor([0, 1])),
    ]
    for other in copies:
        assert list(other.tensors()) == ["numerator", "denominator", "position"]
        assert torch.equal(op(*x, is_causal=True, state=other), expected)
    before = state.clone()
    op(*x, is_causal=True, state=state, return_state=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.tensors().values(), before.tensors().values(), strict=True)
    )


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 4)
    for T in range(1, 12):
        linear(*heads(T), is_causal=True)
        assert len(repeated._remembered) <= 4


def test_results_are_not_shared():
    x = heads()
    first = linear(*x, is_causal=True)
    kept = first.clone()
    linear(*heads(), is_causal=True)
    assert torch.equal(first, kept)


def test_inference_mode_and_training_take_turns():
    x = heads()
    with torch.inference_mode():
        linear(*x, is_causal=True)
    y = [z.requires_grad_() for z in heads()]
    linear(*y, is_causal=True).sum().backward()
    assert all(z.grad is not None for z in y)
    with torch.no_grad():
        assert not linear(*y, is_causal=True).requires_grad


@both
def test_checkpoints_recompute_a_first_call(op):
    """The first call with a signature saves as much for the backward pass as the next one."""
    from torch.utils.checkpoint import checkpoint

    x = [y.requires_grad_() for y in heads()]
    decay = decays().requires_grad_()

    def run(decay, *x):
        return op(*x, is_causal=True, log_decay=decay)

    checkpoint(run, decay, *x, use_reentrant=False).sum().backward()
    found = [y.grad for y in (decay, *x)]
    expected = torch.autograd.grad(run(decay, *x).sum(), (decay, *x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
