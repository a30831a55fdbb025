"""Models. `TaylorViT` needs only torch. The language model is a Hugging Face model: importing this package registers it
with transformers' `AutoConfig` and `AutoModel` classes."""

from importlib.util import find_spec

from .vit import TaylorViT

if find_spec("transformers") is not None:
    import transformers

    from .cache import ModelState, cache_bytes, export_state, import_state
    from .config import CumulantConfig
    from .folder import CLASSES
    from .heads import (
        CumulantForQuestionAnswering,
        CumulantForSequenceClassification,
        CumulantForTokenClassification,
    )
    from .language_model import CumulantForCausalLM, CumulantModel
    from .masked_lm import CumulantForMaskedLM
    from .presets import PRESETS, from_preset

    transformers.AutoConfig.register("cumulant", CumulantConfig, exist_ok=True)
    for _auto, _name in CLASSES.items():
        if _auto != "AutoConfig":
            getattr(transformers, _auto).register(CumulantConfig, globals()[_name], exist_ok=True)
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ModuleNotFoundError(f"cumulant.models.{name} needs transformers: pip install 'cumulant[text]'")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PRESETS",
    "CumulantConfig",
    "CumulantForCausalLM",
    "CumulantForMaskedLM",
    "CumulantForQuestionAnswering",
    "CumulantForSequenceClassification",
    "CumulantForTokenClassification",
    "CumulantModel",
    "ModelState",
    "TaylorViT",
    "cache_bytes",
    "export_state",
    "from_preset",
    "import_state",
]
