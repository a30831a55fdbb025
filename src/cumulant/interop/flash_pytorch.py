"""FLASH-pytorch (Phil Wang): gated attention unit, FLASH layer and FLASH transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import GatedAttentionUnit, MixedChunkAttention
from .weights import Weights

PACKAGE = "FLASH-pytorch"


def from_flash_pytorch(
    source: nn.Module | Mapping[str, Tensor],
    *,
    compatible: bool = False,
    length_scale: float | None = None,
    causal: bool | None = None,
    group_size: int | None = None,
    laplace_attn_fn: bool | None = None,
    shift_tokens: bool | None = None,
    reduce_group_non_causal_attn: bool | None = None,
    add_residual: bool | None = None,
) -> nn.Module:
    """Our module with the weights of a `GAU`, `FLASH` or `FLASHTransformer`.

    They become a `GatedAttentionUnit`, a `MixedChunkAttention`, or a `CumulantForCausalLM`
    (`CumulantForMaskedLM` if not causal).

    Outputs agree to rounding, except where the package's depend on masked or future tokens;
    `docs/migrating.md` lists these cases.

    Args:
        source: the module, or its state dict.
        compatible: keep the package's behaviour in these cases too. Masked tokens then count in
            groups, in neighbourhoods and in the divisor. A causal GAU divides by the length of its
            input, and has no state.
        length_scale: divisor of a causal GAU's scores, the length it was trained at; needed unless
            `compatible`.
        causal, group_size: options of the original, for a state dict only, since its weights do not
            determine them: a module knows them. `causal` must be given, and `group_size` unless
            the weights are a GAU's.
        laplace_attn_fn, shift_tokens, reduce_group_non_causal_attn, add_residual: likewise; left
            out, they take the package's defaults.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or an option is missing that
            the weights do not determine.
    """
    given: dict[str, Any] = {
        "causal": causal,
        "group_size": group_size,
        "laplace_attn_fn": laplace_attn_fn,
        "shift_tokens": shift_tokens,
        "reduce_group_non_causal_attn": reduce_group_non_causal_attn,
        "add_residual": add_residual,
    }
    weights = Weights(source, PACKAGE)
    if isinstance(source, nn.Module):
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"{extra[0]}: read off the module; give it only with a state dict")
        given = _module_options(source)
    unit = "offsetscale.gamma" in weights
    for name in ("causal",) if unit else ("causal", "group_size"):
        if given[name] is None:
            raise ValueError(f"{name}: the weights do not tell it; give {name}=...")
    foreign = (
        ("group_size", "shift_tokens", "reduce_group_non_causal_attn")
        if unit
        else ("add_residual",)
    )
    for name in foreign:
        if not isinstance(source, nn.Module) and given[name] is not None:
            raise ValueError(
                f"{name}: these are weights of a {'GAU' if unit else 'FLASH layer'}, which has no"
                " such option"
            )
    if length_scale is not None and (compatible or not (unit and given["causal"])):
        raise ValueError("length_scale: only for a causal GAU, and not with compatible=True")
    if unit:
        return _gated_unit(weights, source, given, compatible, length_scale)
    if "token_emb.weight" in weights:
        return _language_model(weights, source, given, compatible)
    loaded, shape = _read_layer(weights, "", uses="qk_offset_scale", out="to_out")
    module = MixedChunkAttention(**shape, **_layer_options(given, compatible))
    _copy_epsilon(module.norm, source)
    weights.load(module, loaded, source)
    return module


def _module_options(source: Any) -> dict[str, Any]:
    """The options of a module, which its weights do not determine."""
    layers = list(source.layers) if hasattr(source, "token_emb") else [source]
    if not layers or not all(
        hasattr(layer, "attn_fn") and hasattr(layer, "to_hidden") for layer in layers
    ):
        raise TypeError(
            f"source: expected a GAU, FLASH or FLASHTransformer of {PACKAGE}, got"
            f" {type(source).__name__}"
        )
    layer = layers[0]
    return {
        "causal": layer.causal,
        "group_size": getattr(layer, "group_size", None),
        "laplace_attn_fn": type(layer.attn_fn).__name__ == "LaplacianAttnFn",
        "shift_tokens": getattr(layer, "shift_tokens", False),
        "reduce_group_non_causal_attn": getattr(layer, "reduce_group_non_causal_attn", True),
        "add_residual": getattr(layer, "add_residual", True),
        "dropout": layer.dropout.p,
    }


def _read_layer(
    weights: Weights, prefix: str, *, uses: str, out: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One layer's weights under our names, and its options as the weights determine them."""
    value, gate = weights.pop_weight(f"{prefix}to_hidden.0.weight").chunk(2)
    value_bias, gate_bias = weights.pop_weight(f"{prefix}to_hidden.0.bias").chunk(2)
    loaded = {
        "value_proj.weight": value,
        "value_proj.bias": value_bias,
        "gate_proj.weight": gate,
        "gate_proj.bias": gate_bias,
        "qk_proj.weight": weights.pop_weight(f"{prefix}to_qk.0.weight"),
        "qk_proj.bias": weights.pop_weight(f"{prefix}to_qk.0.bias"),
        "offset_scale.gamma": weights.pop_weight(f"{prefix}{uses}.gamma"),
        "offset_scale.beta": weights.pop_weight(f"{prefix}{uses}.beta"),
        "out_proj.weight": weights.pop_weight(f"{prefix}{out}.weight"),
        "out_proj.bias": weights.pop_weight(f"{prefix}{out}.bias"),
        "relative_bias.embedding.weight": weights.pop_weight(
            f"{prefix}rel_pos_bias.relative_attention_bias.weight"
        ),
    }
    if f"{prefix}norm.g" in weights:
        norm, loaded["norm.weight"] = "scalenorm", weights.pop_weight(f"{prefix}norm.g")
    else:
        norm = "layernorm" if f"{prefix}norm.bias" in weights else "rmsnorm"
        loaded |= {f"norm.{name}": x for name, x in weights.pop_below(f"{prefix}norm.").items()}
    frequencies = (
        weights.pop_weight(f"{prefix}rotary_pos_emb.freqs")
        if f"{prefix}rotary_pos_emb.freqs" in weights
        else None
    )
    if frequencies is not None:
        if len(loaded["qk_proj.weight"]) % 2 and len(loaded["qk_proj.weight"]) < 32:
            raise ValueError(
                "source: rotation over an odd query_key_dim, which uses other angles, has no"
                " counterpart"
            )
        check_frequencies(frequencies)
    hidden, dim = value.shape
    return loaded, {
        "dim": dim,
        "query_key_dim": len(loaded["qk_proj.weight"]),
        "expansion_factor": (hidden + 0.5) / dim,  # rounds down to `hidden` again
        "norm": norm,
        "rotary_dim": 0 if frequencies is None else 2 * len(frequencies),
    }


def check_frequencies(frequencies: Tensor) -> None:
    dim = 2 * len(frequencies)
    expected = 10000.0 ** (-torch.arange(0, dim, 2, device=frequencies.device) / dim)
    rtol = max(1e-3, 2 * torch.finfo(frequencies.dtype).eps)
    if not torch.allclose(frequencies.float(), expected, rtol=rtol, atol=0):
        raise ValueError("source: its rotary frequencies are not those of base 10,000")


def _layer_options(given: dict[str, Any], compatible: bool) -> dict[str, Any]:
    reduced = given["reduce_group_non_causal_attn"]
    return {
        "group_size": given["group_size"],
        "is_causal": given["causal"],
        "activation": "laplace" if given["laplace_attn_fn"] else "relu2",
        "shift_tokens": bool(given["shift_tokens"]),
        "dropout": given.get("dropout", 0.0),
        "reduce_group_non_causal_attn": True if reduced is None else reduced,
        "count_padding": compatible,
    }


def _copy_epsilon(norm: Any, source: Any) -> None:
    """Copy the epsilon of a module's norm; a state dict keeps the default."""
    if hasattr(getattr(source, "norm", None), "eps"):
        norm.eps = source.norm.eps


def _gated_unit(
    weights: Weights,
    source: Any,
    given: dict[str, Any],
    compatible: bool,
    length_scale: float | None,
) -> GatedAttentionUnit:
    if given["causal"] and not compatible and length_scale is None:
        raise ValueError(
            "length_scale: a causal GAU of this package divides by the length of its input, so that"
            " its outputs change as the sequence grows; give length_scale=<the length it was"
            " trained at>, or compatible=True for the same"
        )
    loaded, shape = _read_layer(weights, "", uses="offsetscale", out="to_out.0")
    dropout = given.get("dropout", 0.0)
    module = GatedAttentionUnit(
        **shape,
        is_causal=given["causal"],
        activation="laplace" if given["laplace_attn_fn"] else "relu2",
        length_scale="total" if compatible else length_scale,
        scale_bias=True,
        residual=given["add_residual"] is not False,
        dropout=dropout,
        out_dropout=dropout,
        count_padding=compatible,
    )
    _copy_epsilon(module.norm, source)
    weights.load(module, loaded, source)
    return module


def _language_model(
    weights: Weights, source: Any, given: dict[str, Any], compatible: bool
) -> nn.Module:
    from ..models import CumulantForCausalLM, CumulantForMaskedLM, from_preset

    loaded = {
        "model.embed_tokens.weight": weights.pop_weight("token_emb.weight"),
        "model.position.scale": weights.pop_weight("abs_pos_emb.scale"),
        "model.norm.weight": weights.pop_weight("to_logits.0.weight"),
        "model.norm.bias": weights.pop_weight("to_logits.0.bias"),
        "lm_head.weight": weights.pop_weight("to_logits.1.weight"),
        "lm_head.bias": weights.pop_weight("to_logits.1.bias"),
    }
    check_frequencies(weights.pop_weight("abs_pos_emb.inv_freq"))
    depth, shape = 0, dict[str, Any]()
    while f"layers.{depth}.to_out.weight" in weights:
        layer, shape = _read_layer(
            weights, f"layers.{depth}.", uses="qk_offset_scale", out="to_out"
        )
        for name, x in layer.items():
            ours = f"mixer_{name}" if name.startswith("norm.") else f"mixer.{name}"
            loaded[f"model.layers.{depth}.{ours}"] = x
        depth += 1
    if not depth:
        raise ValueError("source: a FLASHTransformer without layers")
    options = _layer_options(given, compatible)
    vocab, dim = loaded["model.embed_tokens.weight"].shape
    config = from_preset(
        "flash",
        vocab_size=vocab,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=1,
        query_key_dim=shape["query_key_dim"],
        expansion_factor=shape["expansion_factor"],
        norm=shape["norm"],
        is_causal=options["is_causal"],
        group_size=options["group_size"],
        gated_activation=options["activation"],
        gated_dropout=options["dropout"],
        token_shift=True if given["shift_tokens"] is None else options["shift_tokens"],
        reduce_group_non_causal_attn=options["reduce_group_non_causal_attn"],
        count_padding=compatible,
        tie_word_embeddings=False,
        logits_bias=True,
    )
    module = CumulantForCausalLM(config) if config.is_causal else CumulantForMaskedLM(config)
    weights.load(module, loaded, source)
    return module
