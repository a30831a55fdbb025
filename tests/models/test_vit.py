"""TaylorViT: its parts against their formulas, its arguments, and the digits example."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cumulant import nn
from cumulant.models import TaylorViT
from cumulant.models.vit import ConvFeedForward, sincos_2d

ROOT = Path(__file__).parents[2]
SMALL = {"patch_size": 2, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2}


def test_positions_are_sines_and_cosines_of_column_and_row():
    found = sincos_2d(3, 5, 16, device=torch.device("cpu"))
    for row in range(3):
        for column in range(5):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 3) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert torch.allclose(found[row * 5 + column], torch.tensor(expected), atol=1e-6)


def test_the_feed_forward_is_its_formula():
    torch.manual_seed(0)
    part = ConvFeedForward(8, 12).double()
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    h = (
        F.hardswish(x @ part.in_proj.weight.T + part.in_proj.bias)
        .transpose(1, 2)
        .reshape(2, 12, 3, 5)
    )
    h = (
        F.conv2d(F.pad(h, (1, 1, 1, 1)), part.conv.weight, part.conv.bias, groups=12)
        .flatten(2)
        .transpose(1, 2)
    )
    expected = part.out_proj(F.hardswish(part.mid_proj(h)))
    assert torch.allclose(part(x, (3, 5)), expected, atol=1e-12)


@pytest.mark.parametrize("mixer", ["taylor", "linear", "softmax", "none"])
def test_patches_are_read_in_place(mixer):
    """Without mixing, an output depends on its patch's position and pixels alone, at any size."""
    torch.manual_seed(0)
    model = TaylorViT(**SMALL, mixer=mixer, kernel_size=1).eval()
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    images = torch.randn(1, 3, 4, 10)
    logits = model(images)
    tokens = []
    for row in range(2):
        for column in range(5):
            patch = (
                images[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                .permute(1, 2, 0)
                .flatten()
            )
            tokens.append(
                model.embed(patch) + sincos_2d(2, 5, 16, device=patch.device)[row * 5 + column]
            )
    x = torch.stack(tokens)[None]
    for layer in model.layers:
        x = layer(x, (2, 5))
    assert torch.allclose(logits, model.head(model.norm(x.mean(1))), atol=1e-5)
    if mixer == "none":
        alone = torch.stack([t + 0 for t in tokens])[:, None]
        for layer in model.layers:
            alone = layer(alone, (1, 1))
        assert torch.allclose(logits, model.head(model.norm(alone.mean(0))), atol=1e-5)


def test_tall_patches():
    model = TaylorViT(**{**SMALL, "patch_size": (4, 2)})
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_training_and_dropout():
    torch.manual_seed(0)
    model = TaylorViT(**SMALL, dropout=0.1, embedding_dropout=0.1)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model(images).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 6, 2, 3, 4), (2, 6, 7)], ids=str)
def test_channel_first_is_the_module_on_tokens(shape):
    torch.manual_seed(0)
    mixer = nn.TaylorAttention(6, 2, head_dim=4, is_causal=False, rotary=True).double()
    images = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape[0], *shape[2:]) > 0.3
    tokens = images.flatten(2).transpose(1, 2)
    y = nn.ChannelFirst(mixer)(images, key_mask=mask)
    assert y.shape == images.shape
    assert torch.equal(y.flatten(2).transpose(1, 2), mixer(tokens, key_mask=mask.flatten(1)))
    cross = nn.LinearAttention(
        6, 2, context_dim=3, is_causal=False, combine_heads=False, value_dim=5
    ).double()
    context, seen = torch.randn(2, 9, 3, dtype=torch.float64), torch.rand(2, 9) > 0.3
    y = nn.ChannelFirst(cross)(images, context=context, context_mask=seen)
    assert y.shape == (2, 10, *shape[2:])
    assert torch.equal(
        y.flatten(2).transpose(1, 2), cross(tokens, context=context, context_mask=seen)
    )


def test_errors():
    with pytest.raises(
        ValueError, match="mixer: expected one of taylor, linear, softmax, none, got 'conv'"
    ):
        TaylorViT(**SMALL, mixer="conv")
    with pytest.raises(ValueError, match="dim: expected a multiple of 4, at least 8, got 18"):
        TaylorViT(**{**SMALL, "dim": 18})
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 2"):
        TaylorViT(**SMALL, kernel_size=2)
    for bad in (0, (2, 2, 2), (2, -1)):
        with pytest.raises(
            ValueError, match="patch_size: expected a positive number or a pair of them, got"
        ):
            TaylorViT(**{**SMALL, "patch_size": bad})
    with pytest.raises(
        ValueError, match="patch_norm: normalising a patch of one number leaves nothing of it"
    ):
        TaylorViT(**{**SMALL, "patch_size": 1}, channels=1)
    for bad in ((2, 1, 8, 8), (2, 3, 7, 8), (3, 8, 8), (2, 3, 0, 8)):
        with pytest.raises(
            ValueError,
            match=r"images: expected \[B, 3, H, W\] with H a multiple of 2 and W of 2, got",
        ):
            TaylorViT(**SMALL)(torch.randn(bad))
    first = nn.ChannelFirst(nn.TaylorAttention(6, 2, is_causal=False))
    with pytest.raises(
        ValueError, match=r"x: expected \[B, D, ...\] with at least one dimension of positions"
    ):
        first(torch.randn(2, 6))
    with pytest.raises(
        ValueError, match=r"key_mask: expected \[B, ...\] = \[2, 3, 5\], got \[2, 15\]"
    ):
        first(torch.randn(2, 6, 3, 5), key_mask=torch.ones(2, 15).bool())


def test_needs_only_torch():
    """Without transformers the vision model works, and the language model says what is missing."""
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n"
        "from cumulant.models import TaylorViT\n"
        "try:\n    from cumulant.models import CumulantConfig\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert (
        out.strip()
        == "cumulant.models.CumulantConfig needs transformers: pip install 'cumulant[text]'"
    )


@pytest.mark.slow
def test_the_digits_example():
    """It labels 96% of the test images correctly, and far more than without mixing of tokens."""
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    taylor, nothing = (digits.fit(name, epochs=25, seed=0) for name in ("taylor", "no mixing"))
    assert taylor["accuracy"] >= 0.96
    assert taylor["without attention"] < taylor["accuracy"] - 0.1  # the network leans on it
    assert nothing["accuracy"] < taylor["accuracy"] - 0.08
    assert nothing["moved"] < taylor["moved"] - 0.08
