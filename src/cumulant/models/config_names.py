"""The names of configuration fields, and the likely name behind one that is not a field."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from transformers import GenerationConfig

# names that every configuration of transformers takes besides its fields
COMMON = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "classifier_dropout",
        "experts_implementation",
        "finetuning_task",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "task_specific_params",
        "tie_last_hidden_states",
        "token_classification_bias",
        "tokenizer_class",
        "torch_dtype",
        "transformers_weights",
    )
)
# our fields, and the names that other models use for them
SYNONYMS = {
    "hidden_size": ("d_model", "n_embd", "dim", "width"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "depth"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "heads"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "feed_forward": ("hidden_act", "activation_function"),
    "dropout": ("attention_dropout", "hidden_dropout", "resid_pdrop"),
    "rotary_base": ("rope_theta",),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("n_positions",),
}


def check_names(given: Iterable[str], fields: Iterable[str]) -> None:
    """Raise a ValueError for the first name that is no field, with the likely field."""
    unknown = next((name for name in given if name not in COMMON), None)
    if unknown is None:
        return
    if unknown in GenerationConfig().to_dict():
        raise ValueError(
            f"{unknown}: not a field of CumulantConfig; it belongs to generate() or"
            " model.generation_config"
        )
    synonyms = [field for field, others in SYNONYMS.items() if unknown in others]
    likely = synonyms or difflib.get_close_matches(unknown, fields, 1)
    hint = f"; did you mean {likely[0]}?" if likely else ""
    raise ValueError(f"{unknown}: not a field of CumulantConfig{hint}")
