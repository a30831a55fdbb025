"""A step sees every change of its module: weights, hooks, classes, methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cumulant import LinearState
from cumulant.nn import FixedDecay, TaylorAttention
from cumulant.nn.kernel_attention import KernelAttention
from cumulant.ops import step as rule

from .stepping import build, start


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(out, state):
    return 2 * out, state


def plain_weight(linear):
    weight = linear.weight.detach().clone()
    if "weight" in linear._parameters:
        del linear.weight
    linear.weight = weight
    linear.weight.data = torch.randn_like(weight)


CHANGES = {
    "replaced weight": lambda m: setattr(
        m.q_proj, "weight", nn.Parameter(torch.randn_like(m.q_proj.weight))
    ),
    "replaced data": lambda m: setattr(m.v_proj.weight, "data", torch.randn_like(m.v_proj.weight)),
    "written weight": lambda m: nn.init.normal_(m.out_proj.weight),
    "loaded weights": lambda m: m.load_state_dict(
        {n: torch.randn_like(p) for n, p in m.state_dict().items()}
    ),
    "a bias": lambda m: setattr(m.k_proj, "bias", nn.Parameter(torch.randn(m.k_proj.out_features))),
    "another layer": lambda m: setattr(m, "q_proj", nn.Linear(24, m.q_proj.out_features)),
    "a layer of another kind": lambda m: setattr(m, "q_proj", Twice(24, m.q_proj.out_features)),
    "a forward of its own": lambda m: setattr(m.out_proj, "forward", lambda x: x[..., :24] * 0 + 1),
    "an attention of its own": lambda m: setattr(
        m, "attend", lambda *a, **k: doubled(*type(m).attend(m, *a, **k))
    ),
    "another class": lambda m: setattr(m.q_proj, "__class__", Twice),
    "turned data": lambda m: setattr(
        m.out_proj.weight, "data", m.out_proj.weight.data.T.contiguous().T
    ),
    "a square turned": lambda m: setattr(
        m.v_proj.weight, "data", torch.randn(10, 24).T.contiguous().T
    ),
    "a weight that is no parameter": lambda m: plain_weight(m.q_proj),
    "an array": lambda m: setattr(m, "stats", np.zeros(3)),
    "a wrong width": lambda m: setattr(m, "gate_proj", nn.Linear(24, 4)),
    "scale": lambda m: setattr(m, "scale", 1.0),
    "a decay": lambda m: setattr(m, "decay", FixedDecay(m.num_kv_heads)),
    "implementation": lambda m: setattr(m, "impl", "torch"),
    "a hook": lambda m: m.v_proj.register_forward_hook(lambda module, x, y: y * 2),
    "a hook before": lambda m: m.v_proj.register_forward_pre_hook(lambda module, x: (x[0] * 2,)),
    "an attribute": lambda m: setattr(m, "kept", torch.randn(3)),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.q_proj),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules(change, monkeypatch):
    """The step after a change equals the ordinary path."""
    mixer = build("everything")
    x = torch.randn(1, 6, 24)
    with torch.no_grad():
        mixer(x[:, 3:4], state=start(mixer, x[:, :3]), return_state=True)
    for again in (False, True):
        if not again or change != "weight norm":
            CHANGES[change](mixer)
        state = start(mixer, x[:, :3])
        with torch.no_grad():
            y = mixer(x[:, 3:4], state=state, return_state=True)[0]
            with monkeypatch.context() as ordinary:
                ordinary.setattr(rule, "MOST_ROWS", 0)
                expected = mixer(x[:, 3:4], state=state, return_state=True)[0]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "method"), [(nn.Linear, "forward"), (TaylorAttention, "attend")])
def test_patched_classes(kind, method, when, monkeypatch):
    """A method may be set on a class before a module's first step or after it."""
    mixer, x = build("taylor"), torch.randn(1, 4, 24)
    original = getattr(kind, method)

    def patched(self, *arguments, **options):
        out = original(self, *arguments, **options)
        return doubled(*out) if isinstance(out, tuple) else 2 * out

    state = start(mixer, x[:, :3])
    with torch.no_grad():
        if when == "after":
            mixer(x[:, 3:], state=state, return_state=True)
        monkeypatch.setattr(kind, method, patched)
        y = mixer(x[:, 3:], state=state, return_state=True)[0]
        monkeypatch.setattr(rule, "MOST_ROWS", 0)
        assert torch.equal(y, mixer(x[:, 3:], state=state, return_state=True)[0])


def test_hooks_run(runs):
    mixer, seen = build("everything"), []
    x = torch.randn(1, 4, 24)
    state = start(mixer, x[:, :3])
    handles = [
        mixer.conv.register_forward_hook(lambda *_: seen.append("conv")),
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any")),
    ]
    try:
        with torch.no_grad():
            mixer(x[:, 3:], state=state, return_state=True)
            handles.pop(0).remove()
            mixer(x[:, 3:], state=state, return_state=True)
    finally:
        for handle in handles:
            handle.remove()
    assert "conv" in seen
    assert not runs
    with torch.no_grad():
        mixer(x[:, 3:], state=state, return_state=True)
    assert len(runs) == 1


def test_subclasses_with_an_attention_of_their_own(runs):
    class Averaging(KernelAttention):
        def attend(self, query, key, value, **options):
            sums = LinearState(
                value.cumsum(2)[:, :, -1:], None, torch.ones(len(value), dtype=torch.int64)
            )
            return value.cumsum(2), sums

    mixer = Averaging(
        24,
        2,
        head_dim=6,
        **dict.fromkeys(("num_kv_heads", "value_dim", "context_dim")),
        is_causal=True,
        combine_heads=True,
        rotary_base=1.0,
        conv_size=0,
        dropout=0.0,
        decay="none",
        **dict.fromkeys(
            ("rotary", "prenorm", "qk_norm", "gate_values", "shift_tokens", "bias"), False
        ),
    )
    x = torch.randn(1, 2, 24)
    with torch.no_grad():
        mixer(x[:, 1:], state=mixer(x[:, :1], return_state=True)[1], return_state=True)
    assert not runs


def test_subclasses_do_as_they_say(runs):
    class Louder(TaylorAttention):
        def attend(self, *arguments, **options):
            out, state = super().attend(*arguments, **options)
            return out * 2, state

    torch.manual_seed(0)
    louder, plain = Louder(24, 3, head_dim=6), TaylorAttention(24, 3, head_dim=6)
    plain.load_state_dict(louder.state_dict())
    x = torch.randn(1, 4, 24)
    state = start(plain, x[:, :3])
    with torch.no_grad():
        loud = louder(x[:, 3:], state=state, return_state=True)[0]
        assert not runs
        torch.testing.assert_close(loud, 2 * plain(x[:, 3:], state=state, return_state=True)[0])
    assert len(runs) == 1
