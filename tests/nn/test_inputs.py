"""Bad input of modules gives the messages that the operations give."""

import pytest
import torch

from cumulant import nn

from .common import MIXERS

WRONG = {
    "integers": (
        lambda x: x.long(),
        TypeError,
        r"x: expected \[.*\] in fp16, bf16, fp32 or fp64, got torch.int64",
    ),
    "booleans": (
        lambda x: x > 0,
        TypeError,
        r"x: expected \[.*\] in fp16, bf16, fp32 or fp64, got torch.bool",
    ),
    "half": (
        torch.Tensor.half,
        TypeError,
        r"x: expected torch.float32, as the module's weights, got torch.float16",
    ),
    "double": (
        torch.Tensor.double,
        TypeError,
        r"x: expected torch.float32, .*; convert with x.to\(torch.float32\)",
    ),
    "a list": (torch.Tensor.tolist, TypeError, r"x: expected a tensor \[.*D\], got list"),
    "nothing": (lambda x: None, TypeError, r"x: expected a tensor \[.*D\], got NoneType"),
    "an array": (torch.Tensor.numpy, TypeError, r"x: expected a tensor \[.*D\], got ndarray"),
    "a channel less": (
        lambda x: x[..., 1:],
        ValueError,
        r"x: expected \[.*D\] with D=\d+, got \[2, 6, \d+\]",
    ),
}
RANKS = {"one row": lambda x: x[0], "four dims": lambda x: x[None], "a number": lambda x: x.sum()}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", MIXERS)
def test_inputs_of_mixers(name, how):
    mixer, (change, kind, message) = MIXERS[name](), WRONG[how]
    with pytest.raises(kind, match=message):
        mixer(change(torch.randn(2, 6, mixer.dim)))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", MIXERS)
def test_ranks(name, rank):
    mixer = MIXERS[name]()
    with pytest.raises(ValueError, match=r"x: expected \[B, T, D\] with D=\d+, got \["):
        mixer(RANKS[rank](torch.randn(2, 6, mixer.dim)))


@pytest.mark.parametrize("how", WRONG)
def test_inputs_of_a_feed_forward(how):
    change, kind, message = WRONG[how]
    with pytest.raises(kind, match=message):
        nn.ElitaFeedForward(8)(change(torch.randn(2, 6, 8)))


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # of rms_norm: a slower way
@pytest.mark.parametrize("name", MIXERS)
def test_autocast_takes_any_floats(name):
    mixer = MIXERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer(torch.randn(2, 6, mixer.dim).bfloat16()).shape == (2, 6, mixer.dim)
