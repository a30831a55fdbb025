"""A vision transformer with linear-time attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import LinearAttention, SoftmaxAttention, TaylorAttention
from ..nn.checks import check_dtype, check_tensor

MIXERS = ("taylor", "linear", "softmax", "none")


def sincos_2d(
    height: int, width: int, dim: int, *, device: torch.device, base: float = 10000.0
) -> Tensor:
    """Fixed embeddings of positions ``[height · width, dim]``.

    They are sines and cosines of the column, then of the row, at ``dim / 4`` frequencies from 1 to
    1 / base in equal ratios.

    Source: Beyer et al. 2022, "Better plain ViT baselines".
    """
    frequency = base ** -(torch.arange(dim // 4, device=device) / (dim // 4 - 1))
    row, column = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    x, y = column.flatten()[:, None] * frequency, row.flatten()[:, None] * frequency
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1)


class ConvFeedForward(nn.Module):
    """``W_out h(W_mid conv(h(W_in x)))`` with h = hardswish and a depthwise 2-D convolution.

    Args:
        dim: channels D.
        hidden: hidden channels.
        kernel_size: size of the convolution, odd; 1 mixes no positions.
        dropout: dropout after the second activation and of the output.
    """

    def __init__(self, dim: int, hidden: int, *, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.in_proj = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.mid_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``x [B, N, D]`` -> ``[B, N, D]`` for the N patches of an image, row by row.

        grid: the number of patches in height and width.
        """
        h = F.hardswish(self.in_proj(x))
        # these are views: in memory h stays tokens by channels
        h = self.conv(h.mT.unflatten(2, grid)).flatten(2).mT
        h = self.dropout(F.hardswish(self.mid_proj(h)))
        y: Tensor = self.dropout(self.out_proj(h))
        return y


def build_attention(
    mixer: str, dim: int, num_heads: int, head_dim: int, order: int, dropout: float
) -> nn.Module | None:
    """The attention of a block by the name of its mixer, one of `MIXERS`; None for "none"."""
    if mixer == "none":
        return None
    if mixer == "softmax":
        attention = SoftmaxAttention(dim, num_heads, head_dim=head_dim, is_causal=False)
        return nn.Sequential(attention, nn.Dropout(dropout))
    options: dict[str, Any] = {
        "head_dim": head_dim,
        "value_dim": head_dim,
        "is_causal": False,
        "dropout": dropout,
    }
    if mixer == "linear":
        return LinearAttention(dim, num_heads, **options)
    return TaylorAttention(dim, num_heads, order=order, **options)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, dim: int, attention: nn.Module | None, feed_forward: ConvFeedForward):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim) if attention is not None else None
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.attention is not None and self.attention_norm is not None:
            x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x), grid)
        return y


class TaylorViT(nn.Module):
    """Vision transformer with bidirectional Taylor attention, an image classifier.

    Patches get 2-D sine-cosine positions, pass through blocks of attention and a convolutional
    feed-forward, and are averaged for the logits. Time and memory are linear in the number of
    patches. Images may have any size that is a multiple of the patch size.

    The architecture is that of `ViT` in taylor-series-linear-attention.
    `cumulant.interop.from_taylor_series` loads its weights.

    Args:
        patch_size: height and width of a patch, a number or a pair.
        num_classes: number of logits.
        dim: model dim D, a multiple of 4, at least 8.
        depth: number of blocks.
        num_heads: attention heads H.
        head_dim: dim of queries, keys and values of a head.
        channels: channels of the images.
        patch_norm: LayerNorm over a patch's numbers, which hides its brightness; use False for
            patches of few pixels.
        ff_mult: hidden dim of the feed-forward over D.
        kernel_size: size of the feed-forward's depthwise convolution; 1 mixes no positions.
        dropout: dropout of attention outputs and in the feed-forward.
        embedding_dropout: dropout of the embedded patches.
        order: order of the Taylor attention.
        mixer: "taylor"; for comparison "linear" (elu + 1), "softmax", or "none".
    """

    def __init__(
        self,
        *,
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        num_heads: int = 8,
        head_dim: int = 8,
        channels: int = 3,
        patch_norm: bool = True,
        ff_mult: float = 4,
        kernel_size: int = 3,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        order: int = 2,
        mixer: str = "taylor",
    ):
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {mixer!r}")
        if dim < 8 or dim % 4:
            raise ValueError(f"dim: expected a multiple of 4, at least 8, got {dim}")
        self.patch_size = (
            (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        )
        if len(self.patch_size) != 2 or min(self.patch_size) < 1:
            raise ValueError(
                f"patch_size: expected a positive number or a pair of them, got {patch_size}"
            )
        self.channels = channels
        size = self.patch_size[0] * self.patch_size[1] * channels
        if patch_norm and size == 1:
            raise ValueError(
                "patch_norm: normalising a patch of one number leaves nothing of it; use"
                " patch_norm=False"
            )
        norm = nn.LayerNorm(size) if patch_norm else nn.Identity()
        self.embed = nn.Sequential(norm, nn.Linear(size, dim), nn.LayerNorm(dim))
        self.dropout = nn.Dropout(embedding_dropout)
        self.layers = nn.ModuleList(
            Block(
                dim,
                build_attention(mixer, dim, num_heads, head_dim, order, dropout),
                ConvFeedForward(
                    dim, round(dim * ff_mult), kernel_size=kernel_size, dropout=dropout
                ),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """``images [B, channels, H, W]`` -> logits ``[B, num_classes]``."""
        ph, pw = self.patch_size
        letters = f"[B, {self.channels}, H, W]"
        check_tensor(images, letters, "images")
        if (
            images.dim() != 4
            or images.shape[1] != self.channels
            or images.shape[2] % ph
            or images.shape[3] % pw
            or not all(images.shape[2:])
        ):
            raise ValueError(
                f"images: expected {letters} with H a multiple of {ph} and W of {pw}, got"
                f" {list(images.shape)}"
            )
        check_dtype(images, self.embed[1], letters, "images")
        patches = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # [B, c, h, ph, w, pw]
        grid = patches.shape[2], patches.shape[4]
        x = self.embed(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        x = self.dropout(x + sincos_2d(*grid, x.shape[-1], device=x.device).to(x.dtype))
        for layer in self.layers:
            x = layer(x, grid)
        logits: Tensor = self.head(self.norm(x.mean(1)))
        return logits
