"""pytorch-fast-transformers (Katharopoulos et al.), with Mercat's higher order layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LinearAttention, TaylorAttention
from ..nn.kernel_attention import KernelAttention
from ..ops.feature_maps import FeatureMap
from .weights import Weights

PACKAGE = "pytorch-fast-transformers"
CAUSAL = {
    "linear": False,
    "causal-linear": True,
    "linear-softmax": False,  # Mercat's name for the higher order layer
}
CLASSES = {
    "LinearAttention": "linear",
    "CausalLinearAttention": "causal-linear",
    "RecurrentLinearAttention": "causal-linear",
    "RecurrentCrossLinearAttention": "linear",
    "LinearSoftmaxAttention": "linear-softmax",
}


def from_fast_transformers(
    source: nn.Module | Mapping[str, Tensor],
    *,
    heads: int | None = None,
    attention: str | None = None,
    feature_map: FeatureMap | None = None,
    alpha: float | None = None,
) -> KernelAttention:
    """Our module with the weights of a linear or higher order attention layer.

    The source is an `AttentionLayer` or a `RecurrentAttentionLayer` (self or cross attention). The
    result is a `LinearAttention`, or a `TaylorAttention` for the higher order layer.

    Outputs agree to rounding, except for the original's epsilon of 1e-6 in denominators, which we
    leave out. Those of the higher order layer agree with its paper, not with its code
    (`docs/migrating.md`). Everything is copied; random features stay as the layer last drew them.

    Args:
        source: the layer (of an encoder: ``encoder.layers[i].attention``), or its state dict. The
            options below are for a state dict only: a layer knows them.
        heads: number of heads.
        attention: "linear", "causal-linear" (also of a recurrent layer) or "linear-softmax" (the
            higher order layer).
        feature_map: of linear attention, by default elu + 1. A module takes the feature map's
            weights from the dict.
        alpha: of the higher order layer, by default 3.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or an option is missing that
            the weights do not determine.
    """
    if isinstance(source, nn.Module):
        if any(option is not None for option in (heads, attention, feature_map, alpha)):
            raise ValueError(
                "heads, attention, feature_map, alpha: read off the layer; give them only with a"
                " state dict"
            )
        heads, attention, feature_map, alpha = _layer_options(source)
    if heads is None:
        raise ValueError("heads: the weights do not tell the number of heads; give heads=...")
    if attention not in CAUSAL:
        raise ValueError(f"attention: expected one of {', '.join(CAUSAL)}, got {attention!r}")
    higher_order = attention == "linear-softmax"
    for name, given, fits in (
        ("alpha", alpha, higher_order),
        ("feature_map", feature_map, not higher_order),
    ):
        if given is not None and not fits:
            raise ValueError(f"{name}: attention {attention!r} has none; leave it out")
    weights = Weights(source, PACKAGE)
    loaded = {}
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        for part in ("weight", "bias"):
            loaded[f"{ours}_proj.{part}"] = weights.pop_weight(f"{theirs}_projection.{part}")
    _load_map(
        feature_map,
        weights.pop_below("inner_attention.feature_map."),
        copied=isinstance(source, nn.Module),
    )
    queries, dim = loaded["q_proj.weight"].shape
    values = len(loaded["v_proj.weight"])
    if queries % heads or values % heads:
        raise ValueError(
            f"heads: {heads} must divide the {queries} query and {values} value channels"
        )
    options: dict[str, Any] = {
        "head_dim": queries // heads,
        "value_dim": values // heads,
        "is_causal": CAUSAL[attention],
        "bias": True,
    }
    module: KernelAttention
    if higher_order:
        module = TaylorAttention(
            dim, heads, qk_norm=True, alpha=alpha, constant_term=False, **options
        )
    else:
        module = LinearAttention(dim, heads, feature_map=feature_map or "elu", **options)
    weights.load(module, loaded, source)
    return module


def _load_map(feature_map: FeatureMap | None, weights: dict[str, Tensor], *, copied: bool) -> None:
    """Load a feature map's own weights into the given module.

    The map of a layer was copied with its weights.
    """
    if not weights or copied:
        return
    if not isinstance(feature_map, nn.Module):
        raise ValueError(
            f"feature_map: the state dict holds weights of one ({sorted(weights)[0]}); give the"
            " module that they are of"
        )
    feature_map.load_state_dict(weights)


class _PackageMap(nn.Module):
    """A feature map of the package, on ``[N, L, H, E]``; queries and keys may differ."""

    def __init__(self, feature_map: Callable[[Tensor], Tensor], side: str):
        super().__init__()
        self.feature_map, self.side = feature_map, side

    def forward(self, x: Tensor) -> Tensor:
        apply = getattr(self.feature_map, f"forward_{self.side}", self.feature_map)
        y: Tensor = apply(x.transpose(1, 2)).transpose(1, 2)
        return y


def _layer_options(source: Any) -> tuple[int, str, FeatureMap | None, float | None]:
    """Heads, kind of attention, feature map (None: elu + 1) and alpha of a layer."""
    inner = getattr(source, "inner_attention", None)
    names = [kind.__name__ for kind in type(inner).__mro__]
    kind = next((CLASSES[name] for name in names if name in CLASSES), None)
    if kind is None or not hasattr(source, "n_heads"):
        got = type(source).__name__ + (f" of {type(inner).__name__}" if inner is not None else "")
        raise TypeError(
            f"source: expected a layer of {PACKAGE} around one of {', '.join(CLASSES)}, got {got}"
        )
    eps = getattr(inner, "eps", 0.0)
    if eps > 1e-5:
        raise ValueError(
            f"source: its epsilon of {eps:g} in denominators shapes its outputs; ours have none"
        )
    if kind == "linear-softmax":
        return source.n_heads, kind, None, getattr(inner, "alpha", None)
    theirs: Any = copy.deepcopy(getattr(inner, "feature_map", None))
    if theirs is None or _is_elu(theirs, source):
        return source.n_heads, kind, None, None
    omega = getattr(theirs, "omega", None)
    if isinstance(omega, Tensor) and not omega.any():
        raise ValueError("source: its random features were never drawn; call the layer once")
    return source.n_heads, kind, (_PackageMap(theirs, "queries"), _PackageMap(theirs, "keys")), None


def _is_elu(feature_map: Any, source: Any) -> bool:
    """Whether the map equals elu + 1 on queries and keys, by its values."""
    weight = source.query_projection.weight
    x = torch.linspace(-4, 4, len(weight), device=weight.device, dtype=weight.dtype).view(
        1, 1, source.n_heads, -1
    )
    expected = torch.nn.functional.elu(x) + 1
    with torch.no_grad():
        found = [
            getattr(feature_map, f"forward_{side}", feature_map)(x) for side in ("queries", "keys")
        ]
    return all(y.shape == x.shape and torch.equal(y, expected) for y in found)
