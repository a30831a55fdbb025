"""Named configurations."""

from __future__ import annotations

from typing import Any

from .config import CumulantConfig

PRESETS: dict[str, dict[str, Any]] = {
    "softmax": {"mixers": ["softmax"]},
    "linear": {"mixers": ["linear"], "conv_size": 4},
    "taylor": {"mixers": ["taylor"], "conv_size": 4},
    "higher_order": {"mixers": ["taylor"], "conv_size": 4, "qk_norm": True},
    "based": {"mixers": ["short_convolution", "taylor", "sliding_window"]},
    "flash": {
        "mixers": ["flash"],
        "feed_forward": "none",
        "norm": "scalenorm",
        "final_norm": "layernorm",
        "norm_eps": 1e-5,
        "position_embedding": "scaled_sinusoidal",
        "token_shift": True,
    },
    "elita": {
        "mixers": ["elita"],
        "feed_forward": "elita",
        "norm": "layernorm",
        "norm_affine": False,
    },
    "gated_linear": {"mixers": ["linear"], "conv_size": 4, "decay": "gated"},
    "gated_taylor": {"mixers": ["taylor"], "conv_size": 4, "decay": "gated"},
    "gated_based": {
        "mixers": ["short_convolution", "taylor", "sliding_window"],
        "decay": "gated",
    },
}


def from_preset(name: str, **overrides: Any) -> CumulantConfig:
    """The configuration of one of `PRESETS`. Keyword arguments replace its fields.

    >>> from_preset("based", hidden_size=512, num_hidden_layers=6).mixers
    ['short_convolution', 'taylor', 'sliding_window']
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return CumulantConfig(**{**PRESETS[name], "preset": name, **overrides})
