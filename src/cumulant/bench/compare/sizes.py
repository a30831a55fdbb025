"""The models of a comparison: of one size, and how they differ."""

from __future__ import annotations

from typing import Any

import torch

from ...models import CumulantConfig, CumulantForCausalLM, from_preset
from .recipes import Comparison, Mechanism

TOLERANCE = 0.02  # relative, of the number of parameters


def configuration(recipe: Comparison, mechanism: Mechanism, vocab_size: int) -> CumulantConfig:
    """The mechanism's model, with a feed-forward that brings it to the recipe's parameters.

    Raises:
        ValueError: no width comes within 2% of that number.
    """
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.depth,
        "num_attention_heads": recipe.heads,
        "horizon": recipe.context,
        **recipe.shared,
        **mechanism.fields,
    }
    one, two = (
        _parameter_count(from_preset(mechanism.preset, **fields, intermediate_size=n))
        for n in (1, 2)
    )
    width = max(1 + round((recipe.parameters - one) / (two - one)), 1) if two > one else 1
    # Mechanisms that differ by some hundred parameters get one width, so that the weights that they
    # share start alike. They then differ by less than two seeds do.
    rounded = max(16 * round(width / 16), 16)
    if abs((one + (rounded - 1) * (two - one)) / recipe.parameters - 1) <= TOLERANCE / 2:
        width = rounded
    config = from_preset(mechanism.preset, **fields, intermediate_size=width)
    found = _parameter_count(config)
    if abs(found / recipe.parameters - 1) > TOLERANCE:
        raise ValueError(
            f"{mechanism.name}: has {found:,} parameters at the nearest width of its feed-forward,"
            f" {width}, not {recipe.parameters:,} within {TOLERANCE:.0%}; change the recipe's width"
            " or depth"
        )
    return config


def differences(config: CumulantConfig, baseline: CumulantConfig) -> dict[str, Any]:
    """The fields that differ from the baseline's, except the width of the feed-forward."""
    own, other = config.to_diff_dict(), baseline.to_diff_dict()
    ignored = {"preset", "intermediate_size", "layer_types"}
    return {
        name: getattr(config, name)
        for name in sorted(own.keys() | other.keys())
        if name not in ignored and getattr(config, name) != getattr(baseline, name)
    }


def _parameter_count(config: CumulantConfig) -> int:
    with torch.device("meta"):
        count: int = CumulantForCausalLM(config).num_parameters()
    return count
