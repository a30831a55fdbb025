"""Published training settings by name."""

from __future__ import annotations

from typing import Any

from .options import TrainingOptions

RECIPES: dict[str, dict[str, Any]] = {
    # FLASH-pytorch's train.py: 8 layers of 512, sequences of 1024 bytes, 16 a step, 100,000 steps
    # at 2e-4. Ours warms up and follows a cosine, with Adam's second beta at 0.95, starts positions
    # smaller (1/sqrt(D), as the paper), and scores the whole held-out text instead of one batch.
    "flash-enwik8": {
        "data": "enwik8",
        "preset": "flash",
        "width": 512,
        "depth": 8,
        "model_option": [
            "group_size=256",
            "gated_activation=laplace",
            "token_shift=true",
            "tie_word_embeddings=false",
            "logits_bias=true",
        ],
        "context": 1024,
        "batch": 4,
        "accumulate": 4,
        "steps": 100_000,
        "learning_rate": 2e-4,
        "warmup": 0.01,
        "weight_decay": 0.0,
        "clip": 0.5,
        "evaluate_every": 5000,
    },
}


def from_recipe(name: str, **options: Any) -> TrainingOptions:
    """A recipe's options, overridden by `options`; `model_option` adds to the recipe's."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    more = options.pop("model_option", None) or []
    if "steps" in options and "evaluate_every" not in options:
        options["evaluate_every"] = min(recipe.get("evaluate_every", 0), options["steps"])
    return TrainingOptions(
        **{**recipe, **options, "model_option": [*recipe.get("model_option", []), *more]}
    )
