"""What `cumulant compare` trains: mechanisms under one budget, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..models import CumulantConfig, CumulantForCausalLM, from_preset

TOLERANCE = 0.02  # of the parameters


@dataclass(frozen=True)
class Mechanism:
    """A preset, with fields of its configuration in their place. The feed-forward's width is fitted to the budget."""

    name: str
    preset: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Mechanisms in the same trunk, on the same tokens in the same order, with the same optimizer.

    vocabulary: tokens of the byte-level BPE that is trained on the text. parameters: of every model, within 2%.
    baseline: the mechanism that others are held
    against. Learning rate, schedule, betas: see `TrainingOptions`.
    """

    mechanisms: tuple[Mechanism, ...]
    baseline: str
    vocabulary: int
    width: int
    depth: int
    heads: int
    parameters: int
    context: int
    batch: int
    epochs: float
    learning_rate: float
    schedule: str
    adam_beta2: float
    weight_decay: float
    seeds: int
    shared: dict[str, Any] = field(default_factory=dict)

    def chosen(self, names: list[str]) -> Comparison:
        """Only the mechanisms named, and the baseline."""
        known = [m.name for m in self.mechanisms]
        for name in names:
            if name not in known:
                raise ValueError(f"mechanism: expected one of {', '.join(known)}, got {name!r}")
        kept = tuple(m for m in self.mechanisms if not names or m.name in (*names, self.baseline))
        return replace(self, mechanisms=kept)


RECIPES = {
    # ELiTA's README, 2023: fewer than 300K parameters, sequences of 256, 128 a step, Adam with min(1e-3, 1e-2 /
    # sqrt(step)) and betas 0.9 and 0.99, one epoch of WikiText, against a transformer with rotary positions and SwiGLU.
    # Sizes, vocabulary, initial weights and seeds are not stated there: these are ours.
    "elita-wikitext": Comparison(
        mechanisms=(
            Mechanism("softmax", "softmax"),
            Mechanism("elita", "elita"),
            Mechanism("elita without Q", "elita", {"query_logit": False}),
            Mechanism("elita, 3 wraps", "elita", {"wraps": 3}),
            Mechanism("taylor", "taylor"),
            Mechanism("linear", "linear"),
        ),
        baseline="softmax",
        vocabulary=2048,
        width=64,
        depth=3,
        heads=4,
        parameters=275_000,
        context=256,
        batch=128,
        epochs=1,
        learning_rate=1e-3,
        schedule="capped_inverse_sqrt",
        adam_beta2=0.99,
        weight_decay=0.0,
        seeds=3,
        shared={"initializer_range": 0.08},
    ),
}


def configuration(recipe: Comparison, mechanism: Mechanism, vocab_size: int) -> CumulantConfig:
    """The mechanism's model, its feed-forward as wide as the recipe's parameters allow.

    Raises:
        ValueError: no width comes within 2% of them.
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
    one, two = (_parameters(from_preset(mechanism.preset, **fields, intermediate_size=n)) for n in (1, 2))
    width = max(1 + round((recipe.parameters - one) / (two - one)), 1) if two > one else 1
    config = from_preset(mechanism.preset, **fields, intermediate_size=width)
    found = _parameters(config)
    if abs(found / recipe.parameters - 1) > TOLERANCE:
        raise ValueError(
            f"{mechanism.name}: has {found:,} parameters at the nearest width of its feed-forward, {width}, not "
            f"{recipe.parameters:,} within {TOLERANCE:.0%}; change the recipe's width or depth"
        )
    return config


def _parameters(config: CumulantConfig) -> int:
    with torch.device("meta"):
        count: int = CumulantForCausalLM(config).num_parameters()
    return count
