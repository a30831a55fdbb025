"""taylor-series-linear-attention (Phil Wang): its attention, its channel-first form and its ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ChannelFirst, TaylorAttention
from .weights import Weights

PACKAGE = "taylor-series-linear-attention"


def from_taylor_series(
    source: nn.Module | Mapping[str, Tensor],
    *,
    heads: int | None = None,
    causal: bool | None = None,
    shift_tokens: bool | None = None,
    patch_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Our module with the weights of this package's attention or `ViT`.

    A `TaylorSeriesLinearAttn` becomes a `TaylorAttention`, a `ChannelFirstTaylorSeriesLinearAttn` a
    `ChannelFirst` of one, and a `ViT` a `TaylorViT`.

    Outputs agree to rounding; `docs/migrating.md` lists intended differences.
    `remove_even_power_dups` needs no counterpart: our features are always the symmetric ones, with
    the same inner products.

    Args:
        source: the module, or its state dict. Names that begin with "attn." are a channel-first
            module's. The options below are for a state dict only: a module knows them.
        heads: number of query heads; may be left out if value gates or one key/value head determine
            it.
        causal: whether the original was built with ``causal=True``; required for attention.
        shift_tokens: whether it was built with ``shift_tokens=True``; required for attention.
        patch_size: of a `ViT`; required for one.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or an option is missing that
            the weights do not determine.
    """
    given: dict[str, Any] = {
        "heads": heads,
        "causal": causal,
        "shift_tokens": shift_tokens,
        "patch_size": patch_size,
    }
    if isinstance(source, nn.Module):
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"{extra[0]}: read off the module; give it only with a state dict")
        given = _module_options(source)
    weights = Weights(source, PACKAGE)
    if "to_patch_embedding.1.weight" in weights:
        return _read_vit(weights, source, given)
    for name in ("causal", "shift_tokens"):
        if given[name] is None:
            raise ValueError(f"{name}: the weights do not tell it; give {name}=True or False")
    prefix = "attn." if "attn.to_q.0.weight" in weights else ""
    module, loaded = _read_attention(weights, prefix, given)
    weights.load(module, loaded, source)
    return ChannelFirst(module) if prefix else module


def _module_options(source: Any) -> dict[str, Any]:
    """The options of a module, which its weights do not determine."""
    if hasattr(source, "to_patch_embedding"):
        patch = dict(source.to_patch_embedding[0].axes_lengths)
        layers = [_module_options(layer[1]) for layer in source.transformer.layers]
        first = layers[0] if layers else {}
        if (
            any(layer != first for layer in layers)
            or first.get("causal")
            or first.get("shift_tokens")
        ):
            raise ValueError(
                "source: the layers of the ViT differ, are causal or shift tokens; TaylorViT's do"
                " not"
            )
        return {
            **first,
            "patch_size": (patch["p1"], patch["p2"]),
            "embedding_dropout": source.dropout.p,
        }
    attention = (
        source.attn if type(source).__name__ == "ChannelFirstTaylorSeriesLinearAttn" else source
    )
    if not hasattr(attention, "to_kv"):
        raise TypeError(f"source: expected a module of {PACKAGE}, got {type(source).__name__}")
    combined = isinstance(attention.to_out, nn.Sequential)
    return {
        "heads": attention.heads,
        "causal": attention.causal,
        "shift_tokens": attention.shift_tokens,
        "dropout": attention.to_out[1].p if combined else 0.0,
    }


def _read_attention(
    weights: Weights, prefix: str, options: dict[str, Any]
) -> tuple[TaylorAttention, dict[str, Tensor]]:
    """A `TaylorAttention` for the weights under `prefix`, and these under its names."""
    query, pair = (
        weights.pop_weight(f"{prefix}to_q.0.weight"),
        weights.pop_weight(f"{prefix}to_kv.0.weight"),
    )
    key, value = pair.chunk(2)
    loaded = {"q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value}
    for theirs, ours in (
        ("to_out.0.weight", "out_proj.weight"),
        ("to_v_gates.0.weight", "gate_proj.weight"),
        ("norm.gamma", "norm.weight"),
    ):
        if prefix + theirs in weights:
            loaded[ours] = weights.pop_weight(prefix + theirs)
    rotary = (
        weights.pop_weight(f"{prefix}rotary_emb.freqs")
        if f"{prefix}rotary_emb.freqs" in weights
        else None
    )
    heads = options.get("heads")
    if heads is None and "gate_proj.weight" in loaded:
        heads = len(loaded["gate_proj.weight"])
    if heads is None and len(key) != len(query):
        heads = len(query) // len(key)
    if not heads:
        raise ValueError("heads: the weights do not tell the number of heads; give heads=...")
    if (
        len(query) % heads
        or len(key) % (len(query) // heads)
        or heads % (len(key) * heads // len(query))
    ):
        raise ValueError(
            f"heads: {heads} do not fit the {len(query)} channels of queries and {len(key)} of keys"
        )
    head_dim = len(query) // heads
    module = TaylorAttention(
        query.shape[1],
        heads,
        num_kv_heads=len(key) // head_dim,
        head_dim=head_dim,
        value_dim=head_dim,
        is_causal=bool(options.get("causal")),
        rotary=rotary is not None,
        prenorm="norm.weight" in loaded,
        gate_values="gate_proj.weight" in loaded,
        combine_heads="out_proj.weight" in loaded,
        shift_tokens=bool(options.get("shift_tokens")),
        dropout=options.get("dropout", 0.0),
    )
    if module.norm is not None:
        module.norm.eps = 1e-12  # theirs divides by the norm itself
    if rotary is not None:
        expected = 10000.0 ** (-torch.arange(0, head_dim, 2, device=rotary.device) / head_dim)
        if rotary.shape != expected.shape or not torch.allclose(
            rotary.float(), expected, rtol=1e-3
        ):
            raise ValueError("source: its rotary frequencies are not those of base 10,000")
    return module, loaded


def _read_vit(weights: Weights, source: object, options: dict[str, Any]) -> nn.Module:
    from ..models.vit import TaylorViT

    loaded = {}
    for i in (0, 1, 2):
        for part in ("weight", "bias"):
            loaded[f"embed.{i}.{part}"] = weights.pop_weight(f"to_patch_embedding.{i + 1}.{part}")
    dim, size = loaded["embed.1.weight"].shape
    patch = options.get("patch_size")
    if patch is None:
        raise ValueError("patch_size: the weights do not tell it; give patch_size=...")
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if size % (patch[0] * patch[1]):
        raise ValueError(
            f"patch_size: {patch[0]} x {patch[1]} must divide the {size} numbers of a patch"
        )
    layers, depth = "transformer.layers", 0
    attention: TaylorAttention | None = None
    while f"{layers}.{depth}.0.weight" in weights:
        theirs, ours = f"{layers}.{depth}", f"layers.{depth}"
        attention, inner = _read_attention(weights, f"{theirs}.1.", options)
        loaded |= {f"{ours}.attention.{name}": x for name, x in inner.items()}
        for part in ("weight", "bias"):
            loaded[f"{ours}.attention_norm.{part}"] = weights.pop_weight(f"{theirs}.0.{part}")
            loaded[f"{ours}.feed_forward_norm.{part}"] = weights.pop_weight(f"{theirs}.2.{part}")
            for name, at in (
                ("in_proj", "0"),
                ("conv", "2.0"),
                ("mid_proj", "2.1"),
                ("out_proj", "5"),
            ):
                x = weights.pop_weight(f"{theirs}.3.net.{at}.{part}")
                if part == "weight" and name != "conv":
                    x = x[:, :, 0, 0]  # a convolution of one position is a matrix
                loaded[f"{ours}.feed_forward.{name}.{part}"] = x
        depth += 1
    for part in ("weight", "bias"):
        loaded[f"norm.{part}"] = weights.pop_weight(f"mlp_head.1.{part}")
        loaded[f"head.{part}"] = weights.pop_weight(f"mlp_head.2.{part}")
    module = TaylorViT(
        patch_size=patch,
        num_classes=len(loaded["head.weight"]),
        dim=dim,
        depth=depth,
        num_heads=1 if attention is None else attention.num_heads,
        head_dim=8 if attention is None else attention.head_dim,
        channels=size // (patch[0] * patch[1]),
        ff_mult=len(loaded["layers.0.feed_forward.in_proj.weight"]) / dim if depth else 4,
        dropout=options.get("dropout", 0.0),
        embedding_dropout=options.get("embedding_dropout", 0.0),
    )
    weights.load(module, loaded, source)
    return module
