"""Layers of 8 and 4 bits, alone and inside modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cumulant.nn import QuantizedEmbedding, QuantizedLinear, TaylorAttention
from cumulant.nn.step import step

BITS = (8, 4)


def quantized(mixer, bits):
    for name, layer in list(mixer.named_children()):
        if type(layer) is nn.Linear:
            setattr(mixer, name, QuantizedLinear.from_linear(layer, bits))
    return mixer


def moved_by_rounding(x, weight):
    """The most by which outputs may move if inputs are integers up to 32,639 in groups of 64."""
    groups = nn.functional.pad(x.abs(), (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
    largest = groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2)[..., : x.shape[-1]]
    return nn.functional.linear(largest * (0.5 / 32639), weight.abs()) + 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_by_its_rounded_weights(isa, bits, bias):
    layer = nn.Linear(100, 30, bias=bias)
    made = QuantizedLinear.from_linear(layer, bits)
    rounded = made.matrix(100).dequantize()
    assert (rounded - layer.weight).norm() < (0.01 if bits == 8 else 0.12) * layer.weight.norm()
    for x in (torch.randn(2, 7, 100), torch.randn(100), torch.randn(3, 1, 100)):
        expected = nn.functional.linear(x, rounded, layer.bias)
        if isa == "avx512vnni":
            assert ((made(x) - expected).abs() <= moved_by_rounding(x, rounded)).all()
        else:
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():  # natively, one token on every instruction set
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert step(made, torch.randn(3, 1, 100)) is not None
    assert f"bits={bits}" in repr(made)
    assert not made.weight.requires_grad
    assert not made.scales.requires_grad


@pytest.mark.parametrize("bits", BITS)
def test_an_embedding_has_its_rounded_rows(bits):
    made = QuantizedEmbedding.from_embedding(nn.Embedding(40, 70), bits)
    rows, ids = made.matrix(70).dequantize(), torch.randint(40, (3, 5))
    assert torch.equal(made(ids), rows[ids])
    assert torch.equal(made(ids[:0]), rows[ids[:0]])
    with pytest.raises(IndexError):
        made(torch.tensor([40]))
    assert f"40, 70, bits={bits}" in repr(made)


@pytest.mark.parametrize("bits", BITS)
def test_a_mixer_steps_as_it_runs(bits):
    mixer = quantized(TaylorAttention(96, 4, conv_size=4, rotary=True), bits)
    x = torch.randn(2, 9, 96)
    with torch.no_grad():
        whole = mixer(x)
        y, state = mixer(x[:, :4], return_state=True)
        outs = [y]
        for t in range(4, 9):
            assert step(mixer, x[:, t : t + 1], mixer.state_tensors(state), state.position)
            y, state = mixer(x[:, t : t + 1], state=state, return_state=True)
            outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-3, atol=1e-4)


def test_a_changed_scale_is_seen_by_the_next_step():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8), 4)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        before = layer(x) - layer.bias
        layer.scales = nn.Parameter(layer.scales * 2, requires_grad=False)
        torch.testing.assert_close(layer(x) - layer.bias, before * 2, rtol=1e-3, atol=1e-4)
        layer.scales.mul_(0.5)
        torch.testing.assert_close(layer(x) - layer.bias, before, rtol=1e-3, atol=1e-4)


def test_state_dicts_restore_a_layer():
    made = QuantizedLinear.from_linear(nn.Linear(70, 9), 4)
    other = QuantizedLinear(70, 9, bits=4)
    other.load_state_dict(made.state_dict())
    x = torch.randn(4, 70)
    assert torch.equal(other(x), made(x))


def test_errors():
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 5"):
        QuantizedLinear(8, 8, bits=5)
    with pytest.raises(ValueError, match="in_features: expected at least 1, got 0"):
        QuantizedLinear(0, 8, bits=8)
    with pytest.raises(ValueError, match="num_embeddings: expected at least 1"):
        QuantizedEmbedding(0, 8, bits=8)
    with pytest.raises(ValueError, match=r"x: expected \[..., K\] with K=64, got \[2, 63\]"):
        QuantizedLinear(64, 8, bits=8)(torch.randn(2, 63))
