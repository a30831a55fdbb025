"""Hugging Face models. Importing this package registers them with `AutoConfig` and `AutoModelForCausalLM`."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import ModelState, cache_bytes, export_state, import_state
from .config import CumulantConfig
from .language_model import CumulantForCausalLM, CumulantModel
from .presets import PRESETS, from_preset

AutoConfig.register("cumulant", CumulantConfig, exist_ok=True)
AutoModelForCausalLM.register(CumulantConfig, CumulantForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "CumulantConfig",
    "CumulantForCausalLM",
    "CumulantModel",
    "ModelState",
    "cache_bytes",
    "export_state",
    "from_preset",
    "import_state",
]
