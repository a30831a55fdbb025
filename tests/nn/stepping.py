"""Mixers whose one-token steps run as programs, and states to step from."""

from __future__ import annotations

import torch

from cumulant.nn import (
    ElitaAttention,
    GatedDecay,
    GatedShortConvolution,
    LinearAttention,
    MixedChunkAttention,
    SlidingWindowAttention,
    SoftmaxAttention,
    TaylorAttention,
)

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
    "fixed": lambda: LinearAttention(24, 4, num_kv_heads=2, decay="fixed"),
    "gated": lambda: TaylorAttention(
        24, 3, head_dim=6, decay=GatedDecay(24, 3, spans=(2, 9, 99), divisor=4)
    ),
    "gated everything": lambda: TaylorAttention(
        24, 4, num_kv_heads=2, head_dim=6, rotary=True, prenorm=True, gate_values=True,
        shift_tokens=True, conv_size=4, decay="gated",
    ),
    "mamba2": lambda: LinearAttention(24, 4, feature_map="relu", prenorm=True, decay="mamba2"),
    "flash": lambda: MixedChunkAttention(24, group_size=5, query_key_dim=12, residual=False),
    "flash, laplace": lambda: MixedChunkAttention(
        25, group_size=70, query_key_dim=7, residual=False, activation="laplace", norm=None,
        shift_tokens=True, rotary_dim=4, expansion_factor=1.5,
    ),
    "flash, bare": lambda: MixedChunkAttention(
        24, group_size=4, query_key_dim=8, residual=False, relative_bias=False, rotary_dim=0,
        norm="layernorm",
    ),
    "elita": lambda: ElitaAttention(24, 3, features=5, horizon=10, time=2.0),
    "elita, clipped": lambda: ElitaAttention(
        25, 2, head_dim=7, features=3, horizon=6, query_logit=False, clip=0.5
    ),
    "softmax": lambda: SoftmaxAttention(24, 3),
    "grouped softmax": lambda: SoftmaxAttention(
        24, 6, num_kv_heads=2, head_dim=34, rotary=True, rotary_base=500.0
    ),
    "window": lambda: SlidingWindowAttention(24, 4, window=5, num_kv_heads=2, rotary=True),
    "wide window": lambda: SlidingWindowAttention(24, 2, window=10),
    "convolution": lambda: GatedShortConvolution(24, size=4),
}  # fmt: skip


def build(kind):
    """A mixer of this kind, with every parameter away from where it starts."""
    torch.manual_seed(0)
    mixer = MIXERS[kind]()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return mixer


def start(mixer, x):
    """The state after tokens x."""
    with torch.no_grad():
        return mixer(x, return_state=True)[1]
