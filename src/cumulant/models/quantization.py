"""Models whose weights have 8 or 4 bits.

`quantize` replaces the layers of a model. Its folder names the format in ``config.json``, and
`from_pretrained` loads it like any other. Given a `QuantizationConfig`, `from_pretrained` also
quantises the weights of a folder that has fp32 ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import QuantizedEmbedding, QuantizedLinear
from ..ops.quantized import check_bits, check_weight

METHOD = "cumulant"
# Matrices with fewer rows stay as they are: logits and gates of heads, which weigh nothing.
FEWEST_ROWS = 32


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Weights of linear layers and embeddings in 8 or 4 bits; see `cumulant.nn.QuantizedLinear`.

    Args:
        bits: 8 or 4.
        original: the name of the model whose weights were quantised.
    """

    def __init__(self, bits: int = 8, original: str | None = None, quant_method: str = METHOD):
        self.quant_method = quant_method
        self.bits, self.original = check_bits(bits), original


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained` and `save_pretrained` ask about quantised models."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """fp32, as norms, scales and arithmetic are."""
        return torch.float32

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.pre_quantized:
            _replace_layers(model, self.quantization_config.bits, filled=False)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if not self.pre_quantized:
            config = self.quantization_config
            config.original = config.original or model.config.name_or_path or None
            _replace_layers(model, config.bits, filled=True)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """`Trainer` asks this first. It gets an error that says what to train instead."""
        raise ValueError(f"model: {untrainable(self.quantization_config)}")


def untrainable(config: QuantizationConfig) -> str:
    """Why a quantised model cannot be trained, and what can."""
    original = f"the original, {config.original}," if config.original else "the original"
    return (
        f"weights of {config.bits} bits cannot be trained; train {original} and quantise the result"
    )


def check_trainable(model: PreTrainedModel) -> None:
    """An error for a quantised model that is being trained."""
    quantization = getattr(model.config, "quantization_config", None)
    if model.training and torch.is_grad_enabled() and isinstance(quantization, QuantizationConfig):
        raise ValueError(f"model: {untrainable(quantization)}")


def quantize(model: PreTrainedModel, bits: int, *, original: str | None = None) -> PreTrainedModel:
    """Quantise a model's linear layers and embeddings, in place, and return it.

    Codes and scales have the least squared error of each group of 64 weights. Norms, convolutions,
    decays and matrices of fewer than 32 rows stay in fp32. The model can be saved and loaded, and
    cannot be trained.

    Args:
        bits: 8 or 4.
        original: the model's name in errors; by default that it was loaded by.

    Raises:
        ValueError: unknown `bits`, weights that are not finite, or a model that is quantised.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("model: its weights are quantised already; quantise the original")
    for name, weight in model.named_parameters():  # before anything is replaced
        check_weight(weight, name)
    config = QuantizationConfig(bits, original or getattr(model.config, "name_or_path", "") or None)
    model.float()
    model.hf_quantizer = Quantizer(config)
    _replace_layers(model, config.bits, filled=True)
    model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config = config
    return model


def _replace_layers(model: PreTrainedModel, bits: int, *, filled: bool) -> None:
    """Replace layers by quantised ones, with their weights if `filled`.

    Layers that share a weight share codes and scales.
    """
    found: dict[int, QuantizedEmbedding] = {}
    for kind in (nn.Embedding, nn.Linear):  # the embedding first: the head has its weights
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is not kind or layer.weight.shape[0] < FEWEST_ROWS:
                    continue
                made = _quantized(layer, bits, filled, found.get(id(layer.weight)))
                if isinstance(made, QuantizedEmbedding):
                    found[id(layer.weight)] = made
                setattr(parent, name, made.train(layer.training))
    for owner in model.modules():
        if isinstance(owner, PreTrainedModel):
            _tie_scales(owner)


def _quantized(
    layer: nn.Module, bits: int, filled: bool, tied: QuantizedEmbedding | None
) -> nn.Module:
    made: Any
    if isinstance(layer, nn.Embedding):
        if filled:
            return QuantizedEmbedding.from_embedding(layer, bits)
        with torch.device(layer.weight.device):
            return QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, bits=bits)
    assert isinstance(layer, nn.Linear)
    if filled and tied is None:
        return QuantizedLinear.from_linear(layer, bits)
    with torch.device("meta" if filled else layer.weight.device):
        made = QuantizedLinear(
            layer.in_features, layer.out_features, bits=bits, bias=layer.bias is not None
        )
    if filled and tied is not None:
        made.weight, made.scales, made.bias = tied.weight, tied.scales, layer.bias
    return made  # type: ignore[no-any-return]


def _tie_scales(model: PreTrainedModel) -> None:
    """Tie the scales of layers whose weights are tied."""
    tied = dict(model._tied_weights_keys or {})
    if not tied:
        return
    for name, source in list(tied.items()):
        tied[name.removesuffix("weight") + "scales"] = source.removesuffix("weight") + "scales"
    model._tied_weights_keys = tied
    if model.config.tie_word_embeddings:
        model._keys_to_ignore_on_save = list(tied)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
