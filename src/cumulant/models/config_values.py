"""Checks of the configuration's values. Each error names the field and the values that it takes."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from ..nn.checks import check_probability
from ..nn.decay import DECAYS, check_divisor, check_spans
from ..nn.norms import NORMS
from ..ops.checks import ACTIVATIONS
from ..ops.feature_maps import LEARNED, NAMES

MIXERS = (
    "softmax",
    "sliding_window",
    "linear",
    "taylor",
    "short_convolution",
    "flash",
    "gau",
    "elita",
)
CAUSAL_MIXERS = ("sliding_window", "short_convolution", "elita")  # they have no other form
CHOICES = {
    "feed_forward": ("swiglu", "gelu", "elita", "none"),
    "position_embedding": ("none", "scaled_sinusoidal"),
    "norm": NORMS,
    "final_norm": NORMS,
    "gated_activation": ACTIVATIONS,
    "decay": DECAYS,
}
COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "sliding_window",
    "group_size",
    "query_key_dim",
    "position_features",
    "horizon",
    "feed_forward_factor",
    "wraps",
    "max_position_embeddings",
)
TYPES = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


def check_types(config: Any, fields: Container[str]) -> None:
    """Every one of these fields has the type that it is declared with."""
    for name, declared in type(config).__annotations__.items():
        value = getattr(config, name, None)
        if name not in fields or name.endswith("_token_id"):
            continue
        if not any(_is_of_type(value, kind) for kind in str(declared).split(" | ")):
            raise ValueError(f"{name}: expected {declared}, got {value!r}")


def _is_of_type(value: Any, declared: str) -> bool:
    """Whether a value has a declared type. A bool is an int to Python, but not here."""
    return isinstance(value, TYPES.get(declared, (list,))) and (declared == "bool") == isinstance(
        value, bool
    )


def check_values(config: Any) -> None:
    """Every field has a value that the model can be built with."""
    unknown = [name for name in config.mixers or () if name not in MIXERS]
    if unknown or not config.mixers:
        raise ValueError(
            f"mixers: expected a list of {', '.join(MIXERS)}, got {unknown or config.mixers}"
        )
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name}: expected one of {', '.join(allowed)}, got {getattr(config, name)!r}"
            )
    _check_encoder(config)
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    _check_heads(config)
    if config.feature_map not in (*NAMES, *LEARNED):
        raise ValueError(
            f"feature_map: expected one of {', '.join((*NAMES, *LEARNED))}, got"
            f" {config.feature_map!r}"
        )
    _check_decay(config)
    _check_numbers(config)


def _check_encoder(config: Any) -> None:
    """An encoder has no mixer or convolution that sees earlier tokens only."""
    causal = [name for name in config.mixers if name in CAUSAL_MIXERS]
    if config.is_causal:
        return
    if causal:
        field = f"mixers: {causal[0]}"
    elif config.decay != "none":
        field = f"decay: {config.decay!r}"
    elif config.conv_size:
        field = f"conv_size: {config.conv_size}"
    else:
        return
    raise ValueError(f"{field} looks backwards only; an encoder (is_causal=False) needs others")


def _check_heads(config: Any) -> None:
    if config.head_dim is None and not set(config.mixers) <= {"flash", "gau"}:
        raise ValueError(
            f"num_attention_heads: {config.num_attention_heads} must divide"
            f" hidden_size={config.hidden_size}, or head_dim must be given"
        )
    if config.num_attention_heads % (config.num_key_value_heads or 1):
        raise ValueError(
            f"num_key_value_heads: {config.num_key_value_heads} must divide num_attention_heads="
            f"{config.num_attention_heads}"
        )


def _check_decay(config: Any) -> None:
    """The options of decays fit the decay, and the mixers that have it."""
    spans, divisor = config.decay_spans, config.decay_divisor
    if config.decay != "none" and not {"linear", "taylor"} & set(config.mixers):
        raise ValueError(
            f"decay: {config.decay!r} needs a linear or Taylor mixer, got mixers {config.mixers}"
        )
    check_divisor("decay_divisor", divisor)
    if spans is not None:
        if config.decay == "none":
            raise ValueError(
                f"decay_spans: needs a decay, 'fixed', 'gated' or 'mamba2'; got {spans}"
            )
        trained = config.decay != "fixed"
        check_spans("decay_spans", spans, config.num_key_value_heads, trained=trained)
    if divisor != 1 and config.decay != "gated":
        raise ValueError(
            f"decay_divisor: needs decay='gated', got {divisor} with decay={config.decay!r}"
        )
    if config.decay != "none" and config.feature_map == "softmax" and "linear" in config.mixers:
        raise ValueError(
            "decay: feature_map 'softmax' divides by sums over keys that do not decay; use another"
            " feature map"
        )


def _check_numbers(config: Any) -> None:
    """Numbers are in their ranges, and fit each other."""
    if config.position_embedding != "none" and config.hidden_size % 2:
        raise ValueError(
            "hidden_size: sinusoidal positions need an even number of channels, got"
            f" {config.hidden_size}"
        )
    for name in ("length_scale", "taylor_alpha"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if not math.isfinite(config.horizon_time):
        raise ValueError(f"horizon_time: expected a finite number, got {config.horizon_time}")
    if config.logit_ffn is not None and config.logit_ffn < 1:
        raise ValueError(
            f"logit_ffn: expected a width of at least 1, or None for none, got {config.logit_ffn}"
        )
    if not config.norm_affine and "scalenorm" in (config.norm, config.final_norm):
        raise ValueError(
            "norm_affine: a scalenorm is its learned scale; choose layernorm or rmsnorm"
        )
    if config.taylor_order < 1:
        raise ValueError(f"taylor_order: expected at least 1, got {config.taylor_order}")
    check_probability("dropout", config.dropout)
    check_probability("gated_dropout", config.gated_dropout)
