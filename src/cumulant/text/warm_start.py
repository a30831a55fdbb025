"""Starting a run from a trained model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..models import CumulantConfig, CumulantForCausalLM
from ..models.quantization import QuantizationConfig, untrainable
from .checkpoint import checkpoint_folder, load_weights
from .options import TrainingOptions

# options of the trained model, and their fields in its configuration
SETTLED = {
    "preset": "preset",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
}


def inherited_configuration(
    options: TrainingOptions, folder: Path, given: Collection[str] = ()
) -> CumulantConfig:
    """The trained model's configuration, with this run's changes.

    They are its dropout, its feed-forward over the logits and its model options. Options `given`
    for a size of the trained model must agree with it.
    """
    config = CumulantConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        why = untrainable(QuantizationConfig.from_dict(quantization))
        raise ValueError(f"init_from: {why}")
    for name, field in SETTLED.items():
        there = getattr(config, field)
        if name in given and getattr(options, name) != there:
            raise ValueError(
                f"{name}: the model in {folder} has {there!r}, and a trained model keeps its own"
            )
    changes = {"dropout": options.dropout, **options.overrides()}
    if options.logit_ffn is not None:
        changes["logit_ffn"] = options.logit_ffn
    unknown = [name for name in changes if name not in CumulantConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"{unknown[0]}: not a field of CumulantConfig")
    changed: CumulantConfig = CumulantConfig.from_dict({**config.to_dict(), **changes})
    return changed


def inherited_model(options: TrainingOptions, config: CumulantConfig) -> CumulantForCausalLM:
    """The trained model under `config`; only a feed-forward over the logits may be new."""
    assert options.init_from is not None
    return load_weights(checkpoint_folder(options.init_from), config, new=("logit_ffn.",))


def freeze_backbone(model: CumulantForCausalLM) -> None:
    """Train nothing except the feed-forward over the logits."""
    for part in (model.model, model.lm_head):
        part.requires_grad_(False)
