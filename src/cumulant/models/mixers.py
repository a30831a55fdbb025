"""Token mixers of the language model, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import (
    ElitaAttention,
    GatedAttentionUnit,
    GatedShortConvolution,
    LinearAttention,
    MixedChunkAttention,
    SlidingWindowAttention,
    SoftmaxAttention,
    TaylorAttention,
)
from ..nn.decay import make_decay
from .config import CumulantConfig


def build_mixer(config: CumulantConfig, layer: int) -> nn.Module:
    """The token mixer of a layer."""
    name, dim, heads = config.mixer(layer), config.hidden_size, config.num_attention_heads
    if name == "short_convolution":
        return GatedShortConvolution(dim, size=config.conv_size or 4)
    if name in ("flash", "gau", "elita"):
        return _build_elita(config) if name == "elita" else _build_gated_unit(config, name)
    shared: dict[str, Any] = {
        "num_kv_heads": config.num_key_value_heads,
        "rotary": config.rotary,
        "rotary_base": config.rotary_base,
    }
    if name == "softmax":
        return SoftmaxAttention(
            dim, heads, head_dim=config.head_dim, is_causal=config.is_causal, **shared
        )
    if name == "sliding_window":
        return SlidingWindowAttention(
            dim, heads, head_dim=config.head_dim, window=config.sliding_window, **shared
        )
    shared |= {
        "is_causal": config.is_causal,
        "value_dim": config.head_dim,
        "conv_size": config.conv_size,
        "shift_tokens": config.token_shift,
        "gate_values": config.gate_values,
        "qk_norm": config.qk_norm,
        "decay": _build_decay(config),
    }
    if name == "linear":
        return LinearAttention(
            dim, heads, head_dim=config.head_dim, feature_map=config.feature_map, **shared
        )
    return TaylorAttention(
        dim,
        heads,
        head_dim=config.taylor_head_dim,
        order=config.taylor_order,
        alpha=config.taylor_alpha,
        constant_term=config.taylor_constant_term,
        **shared,
    )


def _build_decay(config: CumulantConfig) -> str | nn.Module:
    assert config.num_key_value_heads is not None
    made = make_decay(
        config.decay,
        config.hidden_size,
        config.num_key_value_heads,
        spans=config.decay_spans,
        divisor=config.decay_divisor,
    )
    return "none" if made is None else made


def _build_elita(config: CumulantConfig) -> nn.Module:
    return ElitaAttention(
        config.hidden_size,
        config.num_attention_heads,
        head_dim=config.head_dim,
        features=config.position_features,
        horizon=config.horizon,
        time=config.horizon_time,
        query_logit=config.query_logit,
    )


def _build_gated_unit(config: CumulantConfig, name: str) -> nn.Module:
    """FLASH or GAU without norm and residual, which the block has."""
    shared: dict[str, Any] = {
        "query_key_dim": config.query_key_dim,
        "expansion_factor": config.expansion_factor,
        "is_causal": config.is_causal,
        "activation": config.gated_activation,
        "dropout": config.gated_dropout,
        "count_padding": config.count_padding,
        "norm": None,
        "residual": False,
        "rotary_dim": min(32, config.query_key_dim) // 2 * 2 if config.rotary else 0,
        "rotary_base": config.rotary_base,
    }
    if name == "gau":
        return GatedAttentionUnit(config.hidden_size, length_scale=config.length_scale, **shared)
    return MixedChunkAttention(
        config.hidden_size,
        group_size=config.group_size,
        shift_tokens=config.token_shift,
        reduce_group_non_causal_attn=config.reduce_group_non_causal_attn,
        **shared,
    )
