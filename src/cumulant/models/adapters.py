"""The modules that PEFT adapts by default: queries and values, as in its other models."""

from __future__ import annotations

import sys

QUERIES_VALUES = ["q_proj", "v_proj", "qk_proj", "value_proj", "logit_proj", "in_proj"]
KEYS_VALUES = ["k_proj", "v_proj", "qk_proj", "value_proj", "in_proj"]
FEED_FORWARD = ["feed_forward.out_proj"]
OTHER_METHODS = {
    "IA3_TARGET": [*KEYS_VALUES, *FEED_FORWARD],
    "IA3_FEEDFORWARD": FEED_FORWARD,
    "LNTUNING_TARGET": ["mixer_norm", "feed_forward_norm", "norm"],
}


def register_targets() -> None:
    """Add these models to PEFT's tables, if PEFT is imported. The user's entries stay."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
        if (
            len(name) - len(method) == len("TRANSFORMERS_MODELS_TO__MODULES_MAPPING")
            and "llama" in table
        ):
            table.setdefault("cumulant", OTHER_METHODS.get(method, QUERIES_VALUES))
