"""Lists and other bad input of small modules give the messages that the operations give."""

import re

import numpy as np
import pytest
import torch

from cumulant import nn

HEADS, TOKENS, PLACES = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8), torch.arange(3)

# what takes a tensor, the argument's name, and a tensor that it takes
TENSORS = {
    "sinusoidal": (nn.ScaledSinusoidalEmbedding(8), "position", PLACES),
    "logits": (nn.SinusoidalLogits(2), "position", PLACES),
    "rotary": (lambda x: nn.RotaryEmbedding(8)(x, PLACES), "x", HEADS),
    "rotary at": (lambda p: nn.RotaryEmbedding(8)(HEADS, p), "position", PLACES),
    "rotary keys": (lambda x: nn.RotaryEmbedding(8).both(HEADS, x, PLACES), "key", HEADS),
    "buckets": (nn.T5RelativePositionBias().buckets, "distance", PLACES),
    "bias at": (lambda p: nn.T5RelativePositionBias().at(p, p), "query_position", PLACES[None]),
    "convolution": (nn.ShortConvolution(8), "x", TOKENS),
    "several": (lambda x: nn.ShortConvolution(16)(TOKENS, x), "x", TOKENS),
    "shift": (nn.token_shift, "x", TOKENS),
    "scale norm": (nn.ScaleNorm(8), "x", TOKENS),
    "offset scale": (nn.OffsetScale(8, 2), "x", TOKENS),
    "hedgehog": (nn.HedgehogFeatureMap(2, 8), "x", HEADS),
    "fixed decay": (nn.FixedDecay(2), "x", TOKENS),
    "gated decay": (nn.GatedDecay(8, 2), "x", TOKENS),
    "Mamba-2's decay": (nn.Mamba2Decay(8, 2), "x", TOKENS),
    "feed-forward": (nn.ElitaFeedForward(8), "x", TOKENS),
    "images": (
        nn.ChannelFirst(nn.LinearAttention(8, 2, is_causal=False)),
        "x",
        torch.randn(1, 8, 4, 4),
    ),
}


@pytest.mark.parametrize(
    "wrong", [[0, 1], None, 3, "x", np.zeros(3)], ids=lambda wrong: type(wrong).__name__
)
@pytest.mark.parametrize("name", TENSORS)
def test_no_tensor(name, wrong):
    call, argument, _ = TENSORS[name]
    with pytest.raises(
        TypeError, match=rf"^{argument}: expected a tensor \[.*\], got {type(wrong).__name__}"
    ):
        call(wrong)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_truth_values(name):
    call, argument, right = TENSORS[name]
    call(right)
    with pytest.raises(TypeError, match=rf"^{argument}: expected .*, got torch.bool"):
        call(right > 0)


COUNTS = {
    "dim of rotary": (nn.RotaryEmbedding, "dim"),
    "dim of sines": (nn.ScaledSinusoidalEmbedding, "dim"),
    "heads of logits": (nn.SinusoidalLogits, "num_heads"),
    "sines": (lambda n: nn.SinusoidalLogits(2, n), "features"),
    "heads of a bias": (nn.T5RelativePositionBias, "num_heads"),
    "buckets": (lambda n: nn.T5RelativePositionBias(num_buckets=n), "num_buckets"),
    "dim of a convolution": (nn.ShortConvolution, "dim"),
    "taps": (lambda n: nn.ShortConvolution(8, n), "size"),
    "taps of a mixer": (lambda n: nn.GatedShortConvolution(8, size=n), "size"),
    "uses": (lambda n: nn.OffsetScale(8, n), "uses"),
    "dim of a norm": (nn.ScaleNorm, "dim"),
    "dim": (lambda n: nn.SoftmaxAttention(n, 2), "dim"),
    "heads": (lambda n: nn.LinearAttention(8, n), "num_heads"),
    "groups": (lambda n: nn.TaylorAttention(8, 4, num_kv_heads=n), "num_kv_heads"),
    "head dim": (lambda n: nn.TaylorAttention(8, 2, head_dim=n), "head_dim"),
    "value dim": (lambda n: nn.LinearAttention(8, 2, value_dim=n), "value_dim"),
    "heads of softmax": (lambda n: nn.SoftmaxAttention(8, n), "num_heads"),
    "window": (lambda n: nn.SlidingWindowAttention(8, 2, window=n), "window"),
    "heads of ELiTA": (lambda n: nn.ElitaAttention(8, n), "num_heads"),
    "channels": (lambda n: nn.ElitaFeedForward(8, factor=n), "factor"),
    "query key dim": (lambda n: nn.GatedAttentionUnit(8, query_key_dim=n), "query_key_dim"),
    "heads of a decay": (nn.FixedDecay, "num_kv_heads"),
    "heads of gates": (lambda n: nn.GatedDecay(8, n), "num_kv_heads"),
    "dim of gates": (lambda n: nn.Mamba2Decay(n, 2), "dim"),
    "features": (lambda n: nn.HedgehogFeatureMap(2, n), "head_dim"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    build, argument = COUNTS[name]
    build(np.int64(4))
    for wrong in ([2], "2", 2.0, True, torch.ones(2)):
        shown = type(wrong).__name__ if isinstance(wrong, (list, torch.Tensor)) else repr(wrong)
        with pytest.raises(
            TypeError,
            match=re.escape(f"{argument}: expected an integer of at least ") + rf".*{shown}",
        ):
            build(wrong)
    with pytest.raises(ValueError, match=rf"^{argument}: expected at least "):
        build(0)


LINEAR = nn.ChannelFirst(nn.LinearAttention(8, 2, is_causal=False))
SHAPES = [
    (
        lambda: nn.RotaryEmbedding(8)(HEADS, PLACES[1:]),
        ValueError,
        r"position: expected .*\[3\] or \[1, 3\] for x \[1",
    ),
    (
        lambda: nn.RotaryEmbedding(8)(HEADS[0], PLACES),
        ValueError,
        r"x: expected \[B, H, T, dim\] with dim=8, got \[2,",
    ),
    (
        lambda: nn.T5RelativePositionBias().at(PLACES, PLACES),
        ValueError,
        r"query_position: expected \[B, T\], got \[3",
    ),
    (
        lambda: nn.SinusoidalLogits(2)(PLACES, [1]),
        ValueError,
        r"horizon: expected a number .* above 0, got \[1\]",
    ),
    (
        lambda: nn.ShortConvolution(8)(TOKENS, tail=[1]),
        ValueError,
        r"tail: expected \[B, size - 1, D\] = \[1, 3, 8\]",
    ),
    (
        lambda: nn.ShortConvolution(8)(TOKENS, tail=TOKENS[:, 1:]),
        ValueError,
        r"tail: expected .*, got \[1, 2, 8\]",
    ),
    (
        lambda: nn.ShortConvolution(16)(TOKENS, TOKENS[:, 1:]),
        ValueError,
        "x: expected tensors with the same B, T and",
    ),
    (lambda: nn.token_shift(TOKENS[0]), ValueError, r"x: expected \[B, T, D\], got \[3, 8\]"),
    (
        lambda: nn.token_shift(TOKENS, tail=TOKENS),
        ValueError,
        r"tail: expected \[B, 1, D/2\] = \[1, 1, 4\], got \[1, 3",
    ),
    (
        lambda: nn.ChannelFirst("x"),
        TypeError,
        "module: expected a mixer, a torch.nn.Module, got str",
    ),
    (
        lambda: LINEAR(torch.randn(1, 6, 4, 4)),
        ValueError,
        r"x: expected \[B, D, ...\] with D=8, got \[1, 6, 4, 4\]$",
    ),
    (
        lambda: LINEAR(torch.randn(1, 4, 4, 8)),
        ValueError,
        r"got \[1, 4, 4, 8\]; channels come second, try x.movedim",
    ),
    (
        lambda: LINEAR(torch.ones(1, 8, 4, dtype=int)),
        TypeError,
        r"x: expected \[B, D, ...\] in fp16, bf16, fp32 or",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), SHAPES)
def test_shapes(call, kind, message):
    with pytest.raises(kind, match=f"^{message}" if message[0] in "xpqhtm" else message):
        call()


def test_lengths_of_a_bias():
    bias = nn.T5RelativePositionBias()
    assert bias(0).shape == (1, 0, 0)
    for wrong, kind in ((-1, ValueError), (2.0, TypeError), (PLACES, TypeError), (None, TypeError)):
        with pytest.raises(kind, match="^queries: expected .*at least 0, got"):
            bias(wrong)
    with pytest.raises(TypeError, match="^keys: expected an integer of at least 0, got '2'"):
        bias(2, "2")


def test_options_that_a_mixer_on_images_takes_not():
    softmax = nn.ChannelFirst(nn.SoftmaxAttention(8, 2, is_causal=False))
    with pytest.raises(TypeError, match="^context: SoftmaxAttention takes none; leave it out"):
        softmax(torch.randn(1, 8, 4, 4), context=torch.randn(1, 3, 8))
    with pytest.raises(
        TypeError,
        match=r"^key_mask: expected a boolean tensor \[B, ...\], .*; try key_mask.bool\(\)",
    ):
        softmax(torch.randn(1, 8, 4, 4), key_mask=torch.ones(1, 4, 4))
