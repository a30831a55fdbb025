"""What every mixer obeys: the law, masks, packing, gradients, and the protocol."""

import pytest
import torch

from cumulant import nn
from cumulant.nn.kernel_attention import KernelAttention

from ..quick import slow_but
from .common import MIXERS, D, lowered


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def grads(loss, module, x):
    return torch.autograd.grad(loss, (x, *module.parameters()))


def weight(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)


@pytest.mark.parametrize("cuts", [[1] * 19, [7, 1, 11], [18, 1], [0, 19]], ids=str)
def test_any_split_is_the_whole(mixer, cuts):
    """Outputs, states and all gradients agree, those of the parameters included."""
    results = []
    for lengths in ([19], cuts):
        x = torch.randn(
            2,
            19,
            D,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
            requires_grad=True,
        )
        state, outs = None, []
        for piece in x.split(lengths, 1):
            y, state = mixer(piece, state=state, return_state=True)
            outs.append(y)
        y = torch.cat(outs, 1)
        assert state.position.tolist() == [19, 19]
        results.append([y, *state.tensors().values(), *grads((y * weight(y)).sum(), mixer, x)])
    for actual, exact in zip(*results):
        assert torch.allclose(actual, exact, rtol=1e-9, atol=1e-10)


def test_a_call_without_state_is_the_same(mixer):
    x = torch.randn(2, 19, D, dtype=torch.float64)
    assert torch.allclose(mixer(x), mixer(x, return_state=True)[0], atol=1e-12)


def test_outputs_do_not_depend_on_later_tokens(mixer):
    x = torch.randn(2, 19, D, dtype=torch.float64)
    y = mixer(x)
    for t in (1, 6, 12):
        changed = x.clone()
        changed[:, t:] = 9
        assert torch.allclose(mixer(changed)[:, :t], y[:, :t], atol=1e-13)


@pytest.mark.parametrize("junk", [float("nan"), 50.0])
def test_masked_tokens_do_not_exist(mixer, junk):
    """Padding anywhere, over two calls, leaves outputs, states and gradients of each row alone."""
    T = 22
    x = torch.randn(4, T, D, dtype=torch.float64)
    mask = torch.rand(4, T) > 0.4
    mask[0], mask[1], mask[2] = True, True, True
    mask[0, :13], mask[1, 4:], mask[2, 10:] = False, False, False
    x[~mask] = junk
    x.requires_grad_()
    state, outs = None, []
    for piece, kept in zip(x.split([9, 13], 1), mask.split([9, 13], 1)):
        y, state = mixer(piece, key_mask=kept, state=state, return_state=True)
        outs.append(y)
    y = torch.cat(outs, 1)
    more = torch.randn(4, 3, D, dtype=torch.float64)
    after = mixer(more, state=state, return_state=True)[0]
    assert state.position.tolist() == mask.sum(1).tolist()
    assert not y[~mask].any()
    found = grads((y * weight(y)).sum() + after.sum(), mixer, x)
    assert all(torch.isfinite(g).all() for g in found)
    assert not found[0][~mask].any()
    total = [torch.zeros_like(p) for p in mixer.parameters()]
    for b in range(4):
        alone = torch.cat((x[b][mask[b]], more[b]))[None].detach().requires_grad_()
        expected = mixer(alone)
        n = int(mask[b].sum())
        assert torch.allclose(y[b][mask[b]], expected[0, :n], atol=1e-10)
        assert torch.allclose(after[b], expected[0, n:], atol=1e-10)
        loss = (expected[0, :n] * weight(y)[b][mask[b]]).sum() + expected[0, n:].sum()
        gradient, *parameters = grads(loss, mixer, alone)
        assert torch.allclose(found[0][b][mask[b]], gradient[0, :n], atol=1e-9)
        total = [a + g for a, g in zip(total, parameters)]
    for actual, exact in zip(found[1:], total):
        assert torch.allclose(actual, exact, rtol=1e-8, atol=1e-8)


def test_packed_is_separate(mixer):
    """One sequence is empty, and NaN in the slack after the last one reaches no weight."""
    bounds = [0, 6, 6, 15, 17]
    x = torch.randn(1, 20, D, dtype=torch.float64)
    x[:, 17:] = float("nan")
    x.requires_grad_()
    y = mixer(x, cu_seqlens=torch.tensor(bounds))
    found = grads((y[:, :17] * weight(y)[:, :17]).sum(), mixer, x)
    assert all(torch.isfinite(g).all() for g in found)
    total = [torch.zeros_like(p) for p in mixer.parameters()]
    for a, b in zip(bounds, bounds[1:]):
        if a == b:
            continue
        alone = x[:, a:b].detach().requires_grad_()
        expected = mixer(alone)
        assert torch.allclose(y[:, a:b], expected, atol=1e-12)
        gradient, *parameters = grads((expected * weight(y)[:, a:b]).sum(), mixer, alone)
        assert torch.allclose(found[0][:, a:b], gradient, atol=1e-10)
        total = [s + g for s, g in zip(total, parameters)]
    for actual, exact in zip(found[1:], total):
        assert torch.allclose(actual, exact, rtol=1e-8, atol=1e-9)


def test_states_are_values_and_can_be_selected(mixer):
    x, more = torch.randn(3, 9, D, dtype=torch.float64), torch.randn(3, 2, D, dtype=torch.float64)
    _, state = mixer(x, return_state=True)
    before = state.clone()
    mixer(more, state=state, return_state=True)
    for a, b in zip(state.tensors().values(), before.tensors().values()):
        assert torch.equal(a, b)
    index = torch.tensor([2, 2, 0])
    picked = mixer(more, state=state.select(index), return_state=True)[0]
    expected = mixer(torch.cat((x[index], more), 1))[:, 9:]
    assert torch.allclose(picked, expected, atol=1e-11)


def test_states_hold_no_more_than_they_say(mixer):
    """A state is no view into the whole sequence: it keeps alive the bytes that it counts."""
    _, state = mixer(torch.randn(2, 60, D, dtype=torch.float64), return_state=True)
    held = sum(x.untyped_storage().nbytes() for x in state.tensors().values())
    assert held == state.nbytes


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_inputs(mixer, length):
    x = torch.randn(2, length, D, dtype=torch.float64)
    y, state = mixer(x, return_state=True)
    assert y.shape == x.shape
    more = torch.randn(2, 4, D, dtype=torch.float64)
    nothing, state = mixer(more[:, :0], state=state, return_state=True)
    assert nothing.shape == (2, 0, D)
    assert torch.allclose(
        mixer(more, state=state, return_state=True)[0],
        mixer(torch.cat((x, more), 1))[:, length:],
        atol=1e-11,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision(mixer, dtype):
    """Outputs are near float64's and gradients finite, under autocast and in bfloat16."""
    exact, y = lowered(mixer, dtype, torch.randn(2, 19, D, dtype=torch.float64))
    if getattr(mixer, "constant_term", True):
        assert float((y - exact).norm() / exact.norm()) < 0.015
    else:  # a few denominators pass close to zero and magnify any rounding
        errors = (y - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert float(errors.median()) < 0.05


@pytest.mark.parametrize(
    "mixer",
    slow_but(
        ("linear-everything", "taylor-everything", "taylor-gated", "flash", "elita", "window"),
        MIXERS,
    ),
    indirect=True,
)
@pytest.mark.filterwarnings("ignore")
def test_compile(mixer):
    """A module compiles to one graph, with and without a state."""
    torch._dynamo.reset()
    mixer = mixer.float()
    x = torch.randn(2, 12, D)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, state = mixer(x, return_state=True)
    assert torch.allclose(compiled(x), y, atol=1e-5)
    assert torch.allclose(
        compiled(x, state=state, return_state=True)[0],
        mixer(x, state=state, return_state=True)[0],
        atol=1e-5,
    )


@pytest.mark.filterwarnings("ignore")
def test_export(mixer):
    """One exported program takes any batch and length."""
    if isinstance(mixer, nn.SlidingWindowAttention):
        pytest.skip("its blocks depend on the length")
    mixer = mixer.float().eval()
    B, T = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(
        mixer, (torch.randn(2, 20, D),), dynamic_shapes={"x": {0: B, 1: T}}
    )
    x = torch.randn(3, 150, D)
    assert torch.allclose(program.module()(x), mixer(x), atol=1e-4, rtol=1e-4)


def test_errors(mixer):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, D\] with D=24, got \[2, 5, 25\]"):
        mixer(torch.randn(2, 5, 25))
    with pytest.raises(ValueError, match=r"key_mask: expected \[B, S\] = \[2, 5\], got \[2, 4\]"):
        mixer(x, key_mask=torch.ones(2, 4).bool())
    with pytest.raises(TypeError, match=r"key_mask: expected a boolean tensor"):
        mixer(x, key_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"cu_seqlens: packed sequences need B = 1"):
        mixer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(
        ValueError, match=r"cu_seqlens: cannot be combined with key_mask, state or return_state"
    ):
        mixer(x[:1], cu_seqlens=torch.tensor([0, 5]), return_state=True)
    with pytest.raises(TypeError, match="unexpected keyword"):
        mixer(x, mask=None)
    _, state = mixer(x, return_state=True)
    with pytest.raises(
        ValueError, match=r"state: expected 1 rows, as x has, got 2; choose rows with state.select"
    ):
        mixer(x[:1], state=state)
    with pytest.raises(
        TypeError, match=r"state: expected a \w+State from return_state=True, got tuple"
    ):
        mixer(x, state=(1, 2))


def test_every_mixer_is_in_the_matrix():
    kinds = {type(make()) for make in MIXERS.values()}
    exported = {getattr(nn, name) for name in nn.__all__}
    mixers = {k for k in exported if isinstance(k, type) and issubclass(k, torch.nn.Module)}
    parts = {nn.ChannelFirst, nn.RotaryEmbedding, nn.ShortConvolution}
    parts |= {nn.HedgehogFeatureMap, nn.RebasedFeatureMap, nn.OffsetScale, nn.ScaleNorm}
    parts |= {
        nn.ScaledSinusoidalEmbedding,
        nn.T5RelativePositionBias,
        nn.ElitaFeedForward,
        nn.SinusoidalLogits,
        nn.FixedDecay,
        nn.GatedDecay,
        nn.Mamba2Decay,
        nn.QuantizedEmbedding,
        nn.QuantizedLinear,
    }
    assert mixers - kinds == parts
    assert issubclass(nn.TaylorAttention, KernelAttention)
