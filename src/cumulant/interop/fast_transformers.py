"""pytorch-fast-transformers (Katharopoulos et al.): its linear attention layers, and Mercat's higher order layer."""

from __future__ import annotations

from collections.abc import Mapping
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
    alpha: float = 3.0,
) -> KernelAttention:
    """Our module with the weights of an `AttentionLayer` or a `RecurrentAttentionLayer` (self or cross attention): a
    `LinearAttention`, or a `TaylorAttention` for the higher order layer.

    Outputs agree to rounding, but for the original's epsilon of 1e-6 in denominators, which we leave out; those of the
    higher order layer agree with its paper, not with its code (`docs/migrating.md`). Weights are copied; a feature map
    of the layer's own is shared, and random features stay as last drawn.

    Args:
        source: the layer, or its state dict.
        heads: number of heads; for a state dict only, as a layer knows.
        attention: "linear", "causal-linear" or "linear-softmax" (the higher order layer); for a state dict only. A
            recurrent layer is "causal-linear".
        feature_map: for a state dict of linear attention, by default elu + 1.
        alpha: of the higher order layer; for a state dict only.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or an option is that the weights do not tell.
    """
    if isinstance(source, nn.Module):
        if heads is not None or attention is not None or feature_map is not None:
            raise ValueError("heads, attention, feature_map: read off the layer; give them only with a state dict")
        heads, attention, feature_map, alpha = _options(source)
    if heads is None:
        raise ValueError("heads: the weights do not tell the number of heads; give heads=...")
    if attention not in CAUSAL:
        raise ValueError(f"attention: expected one of {', '.join(CAUSAL)}, got {attention!r}")
    weights = Weights(source, PACKAGE)
    loaded = {}
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        for part in ("weight", "bias"):
            loaded[f"{ours}_proj.{part}"] = weights.take(f"{theirs}_projection.{part}")
    for name in [n for n in weights.left if n.startswith("inner_attention.")]:
        weights.take(name)  # the feature map's own
    queries, dim = loaded["q_proj.weight"].shape
    values = len(loaded["v_proj.weight"])
    if queries % heads or values % heads:
        raise ValueError(f"heads: {heads} must divide the {queries} query and {values} value channels")
    options: dict[str, Any] = {
        "head_dim": queries // heads,
        "value_dim": values // heads,
        "is_causal": CAUSAL[attention],
        "bias": True,
    }
    module: KernelAttention
    if attention == "linear-softmax":
        module = TaylorAttention(dim, heads, qk_norm=True, alpha=alpha, constant_term=False, **options)
    else:
        module = LinearAttention(dim, heads, feature_map=feature_map or "elu", **options)
    weights.load(module, loaded, source)
    return module


class _Part(nn.Module):
    """One side of a feature map of theirs, whose queries and keys may differ."""

    def __init__(self, feature_map: nn.Module, side: str):
        super().__init__()
        self.feature_map, self.side = feature_map, side

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.feature_map, f"forward_{self.side}")(x)
        return y


def _options(source: Any) -> tuple[int, str, FeatureMap | None, float]:
    """Heads, kind of attention, feature map (None: elu + 1) and alpha of a layer."""
    inner = getattr(source, "inner_attention", None)
    names = [kind.__name__ for kind in type(inner).__mro__]
    kind = next((CLASSES[name] for name in names if name in CLASSES), None)
    if kind is None or not hasattr(source, "n_heads"):
        got = type(source).__name__ + (f" of {type(inner).__name__}" if inner is not None else "")
        raise TypeError(f"source: expected a layer of {PACKAGE} around one of {', '.join(CLASSES)}, got {got}")
    theirs: Any = getattr(inner, "feature_map", None)
    feature_map: FeatureMap | None = None
    if theirs is not None and hasattr(theirs, "forward_queries"):
        feature_map = _Part(theirs, "queries"), _Part(theirs, "keys")
    elif theirs is not None:
        feature_map = theirs
    if feature_map is not None and _is_elu(feature_map, source):
        feature_map = None
    return source.n_heads, kind, feature_map, float(getattr(inner, "alpha", 3.0))


def _is_elu(feature_map: Any, source: Any) -> bool:
    """Whether it is elu + 1, by what it does."""
    weight = source.query_projection.weight
    x = torch.linspace(-4, 4, len(weight) // source.n_heads, device=weight.device, dtype=weight.dtype)
    maps = feature_map if isinstance(feature_map, tuple) else (feature_map,)
    with torch.no_grad():
        found = [m(x[None, None, None]) for m in maps]
    expected = torch.nn.functional.elu(x) + 1
    return all(y.shape[-1:] == x.shape and torch.equal(y.flatten(), expected) for y in found)
