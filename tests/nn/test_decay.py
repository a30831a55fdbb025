"""Decays of linear and Taylor attention as modules: formulas, initial values, precision, errors.

The matrices of tests/nn have splits, masks, packing, autocast, compiling and exporting.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import cumulant as cm
from cumulant import nn
from cumulant.nn.decay import DECAYS

from .common import D, forgetful

MIXERS = {
    "taylor": lambda **options: nn.TaylorAttention(D, 4, num_kv_heads=2, head_dim=6, **options),
    "linear": lambda **options: nn.LinearAttention(D, 4, num_kv_heads=2, **options),
}
by_mixer = pytest.mark.parametrize("kind", MIXERS)
GATES = {"gated": nn.GatedDecay, "mamba2": nn.Mamba2Decay}


def tokens(length=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, D, dtype=torch.float64, generator=generator)


def decays_by_formula(decay, x):
    """Log decays ``[B, G, T]``, written one head at a time."""
    if isinstance(decay, nn.FixedDecay):
        gamma = 1 - 2.0 ** -torch.tensor([5.0, 6.0], dtype=torch.float64)
        return gamma.log().view(1, 2, 1).expand(x.shape[0], 2, x.shape[1])
    heads = []
    for g in range(2):
        score = (x * decay.weight[g]).sum(-1)
        if isinstance(decay, nn.GatedDecay):
            heads.append((1 / (1 + (-score - decay.bias[g]).exp())).log() / decay.divisor)
        else:
            step = (1 + (score + decay.dt_bias[g]).exp()).log()
            heads.append(-decay.A_log[g].exp() * step)
    return torch.stack(heads, 1)


@by_mixer
@pytest.mark.parametrize("name", ["fixed", "gated", "divided", "mamba2"])
def test_the_mixer_is_the_operation_with_these_decays(kind, name):
    decay = nn.GatedDecay(D, 2, divisor=16) if name == "divided" else name
    mixer = MIXERS[kind](decay=decay, prenorm=True).double()
    if name != "fixed":
        forgetful(mixer)
    x = tokens()
    h = mixer.norm(x)
    log_decay = decays_by_formula(mixer.decay, h)
    assert float(log_decay.detach().exp().min()) < 0.99
    q = mixer.q_proj(h).unflatten(-1, (4, -1)).transpose(1, 2)
    k, v = (p(h).unflatten(-1, (2, -1)).transpose(1, 2) for p in (mixer.k_proj, mixer.v_proj))
    attend = cm.taylor_attention if kind == "taylor" else cm.linear_attention
    out = attend(q, k, v, is_causal=True, log_decay=log_decay, impl="reference")
    expected = mixer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 8])
def test_gates_start_near_one(heads):
    """γ is 0.999 in every head, for any token and divisor."""
    for divisor in (1, 16):
        decay = nn.GatedDecay(D, heads, divisor=divisor)
        gamma = decay(100 * tokens()).exp()
        torch.testing.assert_close(gamma, torch.full_like(gamma, 0.999), rtol=0, atol=1e-8)


def test_mamba2_starts_as_published():
    """Rates from 1 to 16, and steps from 0.001 to 0.1, log-uniformly."""
    torch.manual_seed(0)
    decay = nn.Mamba2Decay(D, 4000)
    rate = decay.A_log.detach().exp()
    step = torch.nn.functional.softplus(decay.dt_bias.detach())
    for values, least, most in ((rate, 1, 16), (step.log(), math.log(0.001), math.log(0.1))):
        assert least - 1e-4 < float(values.min()) < least + 0.1
        assert most - 0.1 < float(values.max()) < most + 1e-4
        assert abs(float(values.mean()) - (least + most) / 2) < 0.3
    assert not torch.allclose(rate, nn.Mamba2Decay(D, 4000).A_log.exp())
    expected = (-rate * step).view(1, -1, 1).expand(2, -1, 5)
    torch.testing.assert_close(decay(tokens(5).float()), expected)


@pytest.mark.parametrize("kind", ["fixed", *GATES])
def test_spans_are_where_weights_fall_to_one_eth(kind):
    spans = (0.5, 16.0, 1024.0, 16384.0)
    decay = nn.FixedDecay(4, spans) if kind == "fixed" else GATES[kind](D, 4, spans)
    log_decay = decay(tokens())
    assert log_decay.shape == (2, 4, 19)
    expected = torch.tensor([-1 / s for s in spans], dtype=torch.float64).view(1, 4, 1)
    torch.testing.assert_close(log_decay, expected.expand(2, 4, 19), rtol=3e-6, atol=0)


def test_an_infinite_span_forgets_nothing():
    with_decay = MIXERS["taylor"](decay=nn.FixedDecay(2, (math.inf, math.inf))).double()
    without = MIXERS["taylor"]().double()
    without.load_state_dict(with_decay.state_dict())
    torch.testing.assert_close(with_decay(tokens()), without(tokens()), rtol=0, atol=1e-14)


def test_fixed_decays_are_no_weights():
    decay = nn.FixedDecay(2)
    assert not decay.state_dict()
    assert not list(decay.parameters())
    plain, fixed = MIXERS["taylor"](), MIXERS["taylor"](decay="fixed")
    assert plain.state_dict().keys() == fixed.state_dict().keys()


@by_mixer
@pytest.mark.parametrize("name", GATES)
def test_gradients_reach_gates_at_their_start(kind, name):
    """From the initial values each weight of the gates gets a gradient, and it is the slope."""
    torch.manual_seed(0)
    mixer = MIXERS[kind](decay=name).double()
    x, direction = tokens(), tokens(seed=1)
    (mixer(x) * direction).sum().backward()
    for weight in mixer.decay.parameters():
        assert weight.grad.abs().min() > 0
        step = torch.randn_like(weight)
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(mixer)
            with torch.no_grad():
                own = next(
                    p
                    for (n, p), q in zip(moved.named_parameters(), mixer.parameters(), strict=True)
                    if q is weight
                )
                own.add_(step, alpha=sign * 1e-5)
                ends.append((moved(x) * direction).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(slope, (weight.grad * step).sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fixed", *GATES])
def test_small_log_decays_survive_half_precision(name, dtype):
    """Rounding of weights alone moves log decays of 1e-3; nothing else does."""
    spans = (1000.0, 5000.0)
    decay = nn.FixedDecay(2, spans) if name == "fixed" else GATES[name](D, 2, spans)
    if name != "fixed":
        torch.nn.init.normal_(decay.weight, std=0.1)
    x = tokens().to(dtype)
    decay.to(dtype)
    found = decay(x)
    assert found.dtype == torch.float32
    exact = copy.deepcopy(decay).double()(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["fixed", *GATES])
def test_autocast_leaves_log_decays_alone(name):
    decay = nn.FixedDecay(2) if name == "fixed" else GATES[name](D, 2)
    if name != "fixed":
        torch.nn.init.normal_(decay.weight)
    x = tokens().float()
    plain = decay(x)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = decay(x)
    assert lowered.dtype == torch.float32
    assert torch.equal(lowered, plain)


@by_mixer
@pytest.mark.parametrize("name", DECAYS)
def test_weights_are_saved_and_loaded(kind, name):
    torch.manual_seed(0)
    mixer = MIXERS[kind](decay=name)
    if name in GATES:
        forgetful(mixer)
    other = MIXERS[kind](decay=name)
    other.load_state_dict(mixer.state_dict())
    x = tokens().float()
    assert torch.equal(other(x), mixer(x))


@pytest.mark.parametrize("decay", ["fixed", "gated", "mamba2"])
def test_steps_are_programs(decay, runs):
    mixer = MIXERS["taylor"](decay=decay)
    mixer = mixer if decay == "fixed" else forgetful(mixer)
    x = tokens().float()
    with torch.no_grad():
        y = mixer(x)
        state = mixer(x[:, :5], return_state=True)[1]
        for t in range(5, 19):
            out, state = mixer(x[:, t : t + 1], state=state, return_state=True)
            torch.testing.assert_close(out[:, 0], y[:, t], rtol=1e-4, atol=1e-5)
    assert len(runs) == 14


def test_parameters_are_reset_in_place():
    decay = nn.Mamba2Decay(8, 2, spans=(3, 30)).bfloat16()
    before = dict(decay.named_parameters())
    with torch.no_grad():
        for p in before.values():
            p.fill_(7)
    decay.weight.requires_grad_(False)
    decay.reset_parameters()
    for name, p in decay.named_parameters():
        assert p is before[name]
        assert p.dtype == torch.bfloat16
        assert (p != 7).all()
    assert not decay.weight.requires_grad


def test_a_module_of_ones_own():
    """Any module of log decays: here, every third token begins a document."""

    class Borders(torch.nn.Module):
        def forward(self, x):
            border = torch.arange(x.shape[1]) % 3 == 0
            return torch.zeros(x.shape[:2]).masked_fill(border, -math.inf)[:, None].repeat(1, 2, 1)

    mixer = MIXERS["taylor"](decay=Borders()).double()
    alone = MIXERS["taylor"]().double()
    alone.load_state_dict(mixer.state_dict())
    x = tokens(18)
    expected = torch.cat([alone(part) for part in x.split(3, 1)], 1)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-12)


@by_mixer
def test_errors_of_mixers(kind):
    with pytest.raises(
        ValueError, match="decay: expected one of none, fixed, gated, mamba2 or a module .*'gate'"
    ):
        MIXERS[kind](decay="gate")
    with pytest.raises(ValueError, match="decay: expected one of none, .* got None"):
        MIXERS[kind](decay=None)
    for decay in ("fixed", nn.GatedDecay(D, 2)):
        with pytest.raises(
            ValueError, match="decay: decays follow time, so they need is_causal=True"
        ):
            MIXERS[kind](decay=decay, is_causal=False)
    with pytest.raises(ValueError, match="decay: expected .* for 2 key/value heads, got one for 4"):
        MIXERS[kind](decay=nn.GatedDecay(D, 4))
    with pytest.raises(ValueError, match="decay: expected a module for D=24, got one for D=16"):
        MIXERS[kind](decay=nn.GatedDecay(16, 2))
    mixer = MIXERS[kind](decay="gated").double()
    with pytest.raises(ValueError, match="context: causal attention is over x itself"):
        mixer(tokens(), context=tokens())
    with pytest.raises(ValueError, match=r"log_decay: expected \[B, G, S\] = \[2, 2, 19\]"):
        MIXERS[kind](decay=torch.nn.Flatten()).double()(tokens())
    nothing = torch.nn.Identity()
    nothing.forward = lambda x: None
    with pytest.raises(TypeError, match=r"log decays \[B, G, T\] from Identity, got NoneType"):
        MIXERS[kind](decay=nothing).double()(tokens())


def test_errors_of_decays():
    with pytest.raises(ValueError, match="decay: feature_map 'softmax' divides by sums over keys"):
        nn.LinearAttention(D, 4, feature_map="softmax", decay="fixed")
    with pytest.raises(ValueError, match=r"x: expected \[B, T, D\] with D=24, got \[2, 19, 23\]"):
        nn.GatedDecay(D, 2)(tokens()[..., 1:])
    with pytest.raises(ValueError, match=r"x: expected \[B, T, D\], got \[19, 24\]"):
        nn.FixedDecay(2)(tokens()[0])
    with pytest.raises(
        ValueError, match="spans: expected 2 numbers, one for each key/value head, got 3"
    ):
        nn.FixedDecay(2, (1, 2, 3))
    for bad in (0, -1.5, math.nan, "8", True):
        with pytest.raises(ValueError, match=f"spans: expected numbers of tokens above 0, .*{bad}"):
            nn.GatedDecay(D, 2, (64, bad))
    with pytest.raises(TypeError, match="spans: expected a sequence of numbers of tokens, got int"):
        nn.Mamba2Decay(D, 2, 64)
    for kind in GATES.values():
        with pytest.raises(ValueError, match="spans: gates start at finite spans"):
            kind(D, 2, (64, math.inf))
    for bad in (0, -16, math.inf, math.nan, "16", True):
        with pytest.raises(ValueError, match=f"divisor: expected a finite number above 0, .*{bad}"):
            nn.GatedDecay(D, 2, divisor=bad)
