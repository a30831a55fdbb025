"""Which modules PEFT adapts when it is not told: queries and values, as in its entries for other
models.
"""

from __future__ import annotations

import sys

QUERIES_VALUES = ["q_proj", "v_proj", "qk_proj", "value_proj", "logit_proj", "in_proj"]
KEYS_VALUES = ["k_proj", "v_proj", "qk_proj", "value_proj", "in_proj"]
FEED_FORWARD = ["feed_forward.out_proj"]
OWN = {
    "IA3_TARGET": [*KEYS_VALUES, *FEED_FORWARD],
    "IA3_FEEDFORWARD": FEED_FORWARD,
    "LNTUNING_TARGET": ["mixer_norm", "feed_forward_norm", "norm"],
}


def register_targets() -> None:
    """Add these models to PEFT's tables, if PEFT is imported; entries of the user's stay."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
        if (
            len(name) - len(method) == len("TRANSFORMERS_MODELS_TO__MODULES_MAPPING")
            and "llama" in table
        ):
            table.setdefault("cumulant", OWN.get(method, QUERIES_VALUES))
