"""Bad input of modules beside the mixers: errors name the argument as its caller knows it."""

import pytest
import torch

from cumulant import nn
from cumulant.models import TaylorViT

IMAGE, CONTEXT, HEADS = torch.randn(1, 3, 8, 8), torch.randn(2, 5, 16), torch.randn(1, 2, 3, 8)
NUMBERS = "in fp16, bf16, fp32 or fp64, got torch"


def encode(context):
    return nn.LinearAttention(16, num_heads=2, is_causal=False).encode_context(context)


def classify(images):
    return TaylorViT(patch_size=4, num_classes=3, dim=16, depth=1, num_heads=2)(images)


def mix_image(x, **options):
    return nn.ChannelFirst(nn.LinearAttention(16, num_heads=2, is_causal=False))(x, **options)


CASES = [
    (encode, CONTEXT.long(), TypeError, rf"context: expected \[B, S, D\] {NUMBERS}.int64"),
    (
        encode,
        CONTEXT.half(),
        TypeError,
        r"context: expected torch.float32, .* convert with context.to\(torch.float32",
    ),
    (encode, [1], TypeError, r"context: expected a tensor \[B, S, D\], got list"),
    (encode, CONTEXT[0], ValueError, r"context: expected \[B, S, D\] with D=16, got \[5, 16\]"),
    (
        encode,
        CONTEXT[..., 1:],
        ValueError,
        r"context: expected \[B, S, D\] with D=16, got \[2, 5, 15\]",
    ),
    (classify, IMAGE.byte(), TypeError, rf"images: expected \[B, 3, H, W\] {NUMBERS}.uint8"),
    (
        classify,
        IMAGE.half(),
        TypeError,
        r"images: expected torch.float32, .* convert with images.to\(torch.float32",
    ),
    (classify, IMAGE.tolist(), TypeError, r"images: expected a tensor \[B, 3, H, W\], got list"),
    (classify, None, TypeError, r"images: expected a tensor \[B, 3, H, W\], got NoneType"),
    (classify, IMAGE[0], ValueError, r"images: expected \[B, 3, H, W\] with H a multiple of 4"),
    (mix_image, [1], TypeError, r"x: expected a tensor \[B, D, ...\], got list"),
    (
        nn.HedgehogFeatureMap(2, 8),
        HEADS.long(),
        TypeError,
        rf"x: expected \[B, H, T, K\] {NUMBERS}.int64",
    ),
    (
        nn.HedgehogFeatureMap(2, 8),
        HEADS.half(),
        TypeError,
        "x: expected torch.float32, as the module's weights",
    ),
    (
        nn.RebasedFeatureMap(2, 8),
        HEADS.long(),
        TypeError,
        rf"x: expected \[B, H, T, K\] {NUMBERS}.int64",
    ),
    (nn.RebasedFeatureMap(2, 8), [1], TypeError, r"x: expected a tensor \[B, H, T, K\], got list"),
    (
        nn.OffsetScale(4, 2),
        torch.ones(1, 3, 4).long(),
        TypeError,
        rf"x: expected \[B, T, K\] {NUMBERS}.int64",
    ),
    (
        nn.OffsetScale(4, 2),
        torch.ones(1, 3, 5),
        ValueError,
        r"x: expected \[B, T, K\] with K=4, got \[1, 3, 5\]",
    ),
    (
        nn.ScaleNorm(4),
        torch.ones(1, 3, 5),
        ValueError,
        r"x: expected \[..., D\] with D=4, got \[1, 3, 5\]",
    ),
    (
        nn.ShortConvolution(16),
        CONTEXT[..., 1:],
        ValueError,
        r"x: expected \[B, T, D\] with D=16 in all, got \[\[2, 5,",
    ),
    (
        nn.ShortConvolution(16),
        CONTEXT[0],
        ValueError,
        r"x: expected \[B, T, D\] with D=16 in all, got \[\[5, 16\]\]",
    ),
    (
        lambda x: nn.RotaryEmbedding(6)(x, torch.arange(3)),
        HEADS,
        ValueError,
        r"x: expected .* dim=6, got \[1, 2, 3, 8",
    ),
]


@pytest.mark.parametrize(("module", "x", "kind", "message"), CASES)
def test_inputs_of_parts(module, x, kind, message):
    with pytest.raises(kind, match=message):
        module(x)


def test_masks_of_images():
    x = torch.randn(2, 16, 4, 4)
    with pytest.raises(TypeError, match=r"key_mask: expected a tensor \[B, ...\], got list"):
        mix_image(x, key_mask=[1])
    with pytest.raises(
        TypeError, match=r"key_mask: expected a boolean tensor .*; try key_mask.bool\(\)"
    ):
        mix_image(x, key_mask=torch.ones(2, 4, 4))
