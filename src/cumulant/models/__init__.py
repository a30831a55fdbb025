"""Models: a vision transformer, and a language model for Hugging Face.

`TaylorViT` needs only torch. Importing this package registers the language model with transformers'
`AutoConfig` and `AutoModel` classes.
"""

from importlib.util import find_spec

from .vit import TaylorViT

if find_spec("transformers") is not None:
    import transformers
    from transformers.models.auto import modeling_auto

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
    from .quantization import QuantizationConfig, quantize

    transformers.AutoConfig.register("cumulant", CumulantConfig, exist_ok=True)
    for _auto, _name in CLASSES.items():
        if _auto != "AutoConfig":
            getattr(transformers, _auto).register(CumulantConfig, globals()[_name], exist_ok=True)
    # Trainer looks up here which models need shifted labels for label smoothing, and pipelines
    # which models they can run
    for _task in (
        "CAUSAL_LM",
        "MASKED_LM",
        "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLASSIFICATION",
        "QUESTION_ANSWERING",
    ):
        _auto = "AutoModelFor" + _task.title().replace("_", "").replace("Lm", "LM")
        getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")["cumulant"] = CLASSES[_auto]
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ModuleNotFoundError(
                f"cumulant.models.{name} needs transformers: pip install 'cumulant[text]'"
            )
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
    "QuantizationConfig",
    "TaylorViT",
    "cache_bytes",
    "export_state",
    "from_preset",
    "import_state",
    "quantize",
]
