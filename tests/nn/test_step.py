"""One-token steps in one native call: they agree with the ordinary path, and give way to it where
they must.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from cumulant import LinearState
from cumulant.models import PRESETS, CumulantForCausalLM, from_preset
from cumulant.nn import GatedShortConvolution, LinearAttention, TaylorAttention
from cumulant.nn import step as steps
from cumulant.nn.kernel_attention import KernelAttention
from cumulant.ops import step as rule
from cumulant.ops.step import Program

MIXERS = {
    "taylor": lambda: TaylorAttention(24, 3, head_dim=6),
    "everything": lambda: TaylorAttention(
        24, 4, num_kv_heads=2, head_dim=6, value_dim=5, order=2, rotary=True, prenorm=True,
        qk_norm=True,
        gate_values=True, shift_tokens=True, conv_size=4, bias=True,
    ),
    "odd": lambda: TaylorAttention(25, 1, head_dim=7, value_dim=3, order=1, shift_tokens=True,
    conv_size=1),
    "elu": lambda: LinearAttention(24, 4, rotary=True, conv_size=3),
    "relu": lambda: LinearAttention(24, 4, num_kv_heads=1, feature_map="relu", scale=0.5),
    "identity": lambda: LinearAttention(24, 4, feature_map="identity", normalize=False, bias=True),
    "convolution": lambda: GatedShortConvolution(24, size=4),
}  # fmt: skip
MODELS = {
    **{name: (name, {}) for name in PRESETS},
    "gelu": ("linear", {"feed_forward": "gelu", "norm": "layernorm"}),
    "bare": ("taylor", {"feed_forward": "none", "norm": "scalenorm", "norm_affine": True}),
    "wrapped": (
        "taylor",
        {"wraps": 2, "norm_affine": False, "token_shift": True, "gate_values": True},
    ),
}


@pytest.fixture
def runs(monkeypatch):
    """How often a program ran: a list that grows."""
    found, run = [], Program.run

    def counted(self, *arguments):
        found.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(Program, "run", counted)
    return found


def build(kind):
    torch.manual_seed(0)
    mixer = MIXERS[kind]()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return mixer


def start(mixer, x):
    with torch.no_grad():
        return mixer(x, return_state=True)[1]


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


@pytest.mark.parametrize("name", MODELS)
def test_models_step_as_they_run_whole(name, runs):
    preset, options = MODELS[name]
    torch.manual_seed(0)
    config = from_preset(
        preset, vocab_size=50, hidden_size=32, num_hidden_layers=3, initializer_range=0.2, **options
    )
    model = CumulantForCausalLM(config).eval()
    ids = torch.randint(50, (2, 20))
    exact = copy.deepcopy(model).double()(input_ids=ids).logits
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=ids[:, :5], past_key_values=cache)
        for t in range(5, 20):
            logits = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(logits.double(), exact[:, t], rtol=1e-4, atol=1e-4)
    each = {"flash": 0, "elita": 0, "wrapped": 6}.get(
        name, 3
    )  # FLASH has no feed-forward, and ELiTA its own
    assert len(runs) == 15 * each


def test_rows_at_their_own_places(runs):
    """States of texts of unequal length, side by side."""
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
    "implementation": lambda m: setattr(m, "impl", "torch"),
    "a hook": lambda m: m.v_proj.register_forward_hook(lambda module, x, y: y * 2),
    "a hook before": lambda m: m.v_proj.register_forward_pre_hook(lambda module, x: (x[0] * 2,)),
    "an attribute": lambda m: setattr(m, "kept", torch.randn(3)),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.q_proj),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules(change, monkeypatch):
    """Whatever is done to a module after its first step, the next one knows."""
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
    """A method set on a class, before a module's first step or after it."""
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


def test_the_ordinary_path(runs):
    """Gradients, dtypes, autocast, dropout in training, and many rows."""
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
        half = copy.deepcopy(mixer).bfloat16()
        half(x[:, 3:].bfloat16(), state=start(half, x[:, :3].bfloat16()), return_state=True)
        many = torch.randn(rule.MOST_ROWS + 1, 4, 24)
        mixer(many[:, 3:], state=start(mixer, many[:, :3]), return_state=True)
        dropping = TaylorAttention(24, 3, head_dim=6, dropout=0.5)
        dropping(x[:, 3:], state=start(dropping, x[:, :3]), return_state=True)
        assert not runs
        dropping.eval()(x[:, 3:], state=start(dropping, x[:, :3]), return_state=True)
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
    """Nothing of a program is in a module: it can be copied, pickled, saved, and forgotten."""
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
