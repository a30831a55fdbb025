"""One-token steps in one native call: they equal the ordinary path, or leave calls to it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from cumulant.models import PRESETS, CumulantForCausalLM, from_preset
from cumulant.nn import TaylorAttention
from cumulant.nn import step as steps
from cumulant.ops import step as rule

from .stepping import MIXERS, build, start

MODELS = {
    **{name: (name, {}) for name in PRESETS},
    "gelu": ("linear", {"feed_forward": "gelu", "norm": "layernorm"}),
    "bare": ("taylor", {"feed_forward": "none", "norm": "scalenorm", "norm_affine": True}),
    "logit feed-forward": ("elita", {"logit_ffn": 7, "num_attention_heads": 2}),
    "wrapped": (
        "taylor",
        {"wraps": 2, "norm_affine": False, "token_shift": True, "gate_values": True},
    ),
}


@pytest.mark.parametrize("rows", [1, 3, rule.MOST_ROWS])
@pytest.mark.parametrize("kind", MIXERS)
def test_steps_equal_the_whole(kind, rows, runs):
    mixer = build(kind)
    x = torch.randn(rows, 12, mixer.dim)
    exact, final = copy.deepcopy(mixer).double()(x.double(), return_state=True)
    state = start(mixer, x[:, :4])
    with torch.no_grad():
        for t in range(4, 12):
            y, state = mixer(x[:, t : t + 1], state=state, return_state=True)
            torch.testing.assert_close(y[:, 0].double(), exact[:, t], rtol=2e-5, atol=2e-5)
    assert len(runs) == 8
    found, expected = state.tensors(), final.tensors()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MIXERS)
def test_half_precision(kind, dtype, runs):
    """As exact as the ordinary path, which rounds after every operation."""
    mixer = build(kind).to(dtype)
    x = torch.randn(2, 12, mixer.dim).to(dtype)
    exact = copy.deepcopy(mixer).double()(x.double())
    errors = []
    for most in (rule.MOST_ROWS, 0):
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(rule, "MOST_ROWS", most)
            state = start(mixer, x[:, :4])
            dtypes = {name: value.dtype for name, value in state.tensors().items()}
            error = 0.0
            for t in range(4, 12):
                y, state = mixer(x[:, t : t + 1], state=state, return_state=True)
                assert y.dtype == dtype
                error = max(error, float((y[:, 0].double() - exact[:, t]).abs().max()))
            assert {name: value.dtype for name, value in state.tensors().items()} == dtypes
            errors.append(error)
    assert len(runs) == 8
    assert errors[0] <= 1.5 * errors[1] + 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_models_step_as_they_run_whole(name, runs):
    preset, options = MODELS[name]
    torch.manual_seed(0)
    config = from_preset(
        preset, vocab_size=50, hidden_size=32, num_hidden_layers=3, initializer_range=0.2,
        horizon=8, **options
    )  # fmt: skip
    model = CumulantForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # away from zeros, at which some start
            p.add_(torch.randn_like(p) * 0.1)
    ids = torch.randint(50, (2, 20))
    exact = copy.deepcopy(model).double()(input_ids=ids).logits
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=ids[:, :5], past_key_values=cache)
        for t in range(5, 20):
            logits = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(logits.double(), exact[:, t], rtol=1e-4, atol=1e-4)
    # one program for the whole model, or one for each block of wrapped layers
    assert len(runs) == 15 * {"wrapped": 6}.get(name, 1)


def test_rows_at_their_own_places(runs):
    """Rows of a state may have seen texts of unequal length."""
    mixer = build("everything")
    x = torch.randn(3, 10, 24)
    mask = torch.arange(10) < torch.tensor([10, 4, 7])[:, None]
    with torch.no_grad():
        state = mixer(x, key_mask=mask, return_state=True)[1]
        y, after = mixer(x[:, :1], state=state, return_state=True)
        for i, n in enumerate((10, 4, 7)):
            alone = start(mixer, x[i : i + 1, :n])
            expected, one = mixer(x[i : i + 1, :1], state=alone, return_state=True)
            torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-5)
            assert int(after.position[i]) == int(one.position) == n + 1
    assert len(runs) == 4


def test_states_are_not_written_to(runs):
    mixer = build("everything")
    x = torch.randn(2, 5, 24)
    state = start(mixer, x[:, :4])
    kept = state.clone()
    with torch.no_grad():
        first = mixer(x[:, 4:], state=state, return_state=True)[0]
        again = mixer(x[:, 4:], state=state, return_state=True)[0]
    assert torch.equal(first, again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.tensors().values(), kept.tensors().values(), strict=True)
    )
    assert len(runs) == 2


def test_a_mistake_is_not_stepped_over():
    mixer, x = build("taylor"), torch.randn(1, 5, 24)
    state = start(mixer, x[:, :3])
    mask = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        with pytest.raises(ValueError, match="context"):
            mixer(x[:, 3:4], state=state, return_state=True, context_mask=mask)
        mixer.k_proj = nn.Linear(24, 12)
        with pytest.raises(ValueError, match="key"):
            mixer(x[:, 3:4], state=state, return_state=True)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_decay_that_is_no_number_is_named(rows, runs):
    """As by a call of several tokens, and not as a lack of memory."""
    mixer, x = build("gated"), torch.randn(rows, 5, 24)
    state = start(mixer, x[:, :3])
    x[-1, 3] = torch.nan
    with torch.no_grad():
        for tokens in (slice(3, 5), slice(3, 4)):
            with pytest.raises(ValueError, match="log_decay: expected .* NaN"):
                mixer(x[:, tokens], state=state, return_state=True)
    assert len(runs) == 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_without_weights_are_named(wrong, runs):
    """ELiTA's, as by a call of several tokens; the state is as before."""
    mixer, x = build("elita"), torch.randn(2, 5, 24)
    state = start(mixer, x[:, :3])
    x[-1, 3] = wrong
    with torch.no_grad():
        for tokens in (slice(3, 5), slice(3, 4)):
            with pytest.raises(ValueError, match="logit.* expected .* an earlier layer may have"):
                mixer(x[:, tokens], state=state, return_state=True)
    assert len(runs) == 1


def test_states_elsewhere_are_left_to_the_ordinary_path(runs):
    mixer, x = build("taylor"), torch.randn(1, 4, 24)
    state = start(mixer, x[:, :3])
    away = replace(state, sums=replace(state.sums, position=state.sums.position.to("meta")))
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match="state: expected position .* got one on meta"),
    ):
        mixer(x[:, 3:], state=away, return_state=True)
    assert not runs


def test_tangents_are_not_lost(runs):
    mixer, x = build("convolution"), torch.randn(1, 4, 24)
    state = start(mixer, x[:, :3])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[:, 3:], torch.ones(1, 1, 24))
        y = mixer(dual, state=state, return_state=True)[0]
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert not runs


def test_the_ordinary_path(runs):
    """Gradients, fp64, autocast, dropout in training and many rows need it."""
    mixer = build("taylor")
    x = torch.randn(1, 4, 24)
    state = start(mixer, x[:, :3])
    y = mixer(x[:, 3:], state=state, return_state=True)[0]
    y.sum().backward()
    assert mixer.q_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            mixer(x[:, 3:], state=state, return_state=True)
        double = copy.deepcopy(mixer).double()
        double(x[:, 3:].double(), state=start(double, x[:, :3].double()), return_state=True)
        many = torch.randn(rule.MOST_ROWS + 1, 4, 24)
        mixer(many[:, 3:], state=start(mixer, many[:, :3]), return_state=True)
        dropping = TaylorAttention(24, 3, head_dim=6, dropout=0.5)
        dropping(x[:, 3:], state=start(dropping, x[:, :3]), return_state=True)
        assert not runs
        dropping.eval()(x[:, 3:], state=start(dropping, x[:, :3]), return_state=True)
        assert len(runs) == 1


def test_a_wrong_width_first(runs):
    mixer, x = build("taylor"), torch.randn(1, 4, 24)
    state = start(mixer, x[:, :3])
    with torch.no_grad():
        with pytest.raises(ValueError, match="x: expected"):
            mixer(x[:, 3:, :20], state=state, return_state=True)
        mixer(x[:, 3:], state=state, return_state=True)
    assert len(runs) == 1


def test_bad_input_is_told_as_ever():
    mixer = build("everything")
    x = torch.randn(2, 4, 24)
    state = start(mixer, x[:, :3])
    with torch.no_grad():
        with pytest.raises(ValueError, match="state: expected 1 rows"):
            mixer(x[:1, 3:], state=state, return_state=True)
        with pytest.raises(ValueError, match="x: expected"):
            mixer(x[:, 3:, :20], state=state, return_state=True)
        with pytest.raises(TypeError, match="state: expected a KernelAttentionState"):
            mixer(x[:, 3:], state=state.sums, return_state=True)
        other = start(TaylorAttention(24, 4, num_kv_heads=2, head_dim=5, value_dim=5), x[:, :3])
        with pytest.raises(ValueError, match="state"):
            mixer(x[:, 3:], state=other, return_state=True)


def test_copies_and_files(tmp_path, runs):
    """A module holds nothing of its program: it can be copied, pickled, saved and freed."""
    mixer = build("everything")
    x = torch.randn(1, 4, 24)
    state = start(mixer, x[:, :3])
    with torch.no_grad():
        expected = mixer(x[:, 3:], state=state, return_state=True)[0]
        torch.save(mixer, tmp_path / "mixer.pt")
        for other in (copy.deepcopy(mixer), torch.load(tmp_path / "mixer.pt", weights_only=False)):
            assert other.state_dict().keys() == mixer.state_dict().keys()
            assert torch.equal(other(x[:, 3:], state=state, return_state=True)[0], expected)
    assert len(runs) == 3
    mixer.owner, mixer.conv.callback = [mixer], mixer.extra_repr
    mixer(x[:, 3:], state=state, return_state=True)
    before, gone = len(steps._compiled), weakref.ref(mixer)
    del mixer
    gc.collect()
    assert gone() is None
    assert len(steps._compiled) < before


def test_two_threads_with_one_model():
    mixer = build("everything")
    x = torch.randn(2, 1, 60, 24)
    expected = [mixer(each)[:, 4:].detach() for each in x]
    found = [None, None]

    def decode(i):
        with torch.no_grad():
            state, rows = start(mixer, x[i, :, :4]), []
            for t in range(4, 60):
                y, state = mixer(x[i, :, t : t + 1], state=state, return_state=True)
                rows.append(y)
            found[i] = torch.cat(rows, 1)

    workers = [threading.Thread(target=decode, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
