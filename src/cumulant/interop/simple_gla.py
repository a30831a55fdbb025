"""flash-linear-attention's `SimpleGatedLinearAttention`: one data-dependent decay for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.checks import check_count, check_counts, count_kv_heads, size_of_head
from ..nn.decay import GatedDecay
from ..nn.projection import project
from ..ops.linear import linear_attention
from ..ops.state import LinearState
from .gated_mixer import (
    Activation,
    GatedMixer,
    GatedNorm,
    SiluConvolution,
    choose_options,
    find_activation,
    read_taps,
)
from .weights import Weights

PACKAGE = "flash-linear-attention"


class SimpleGatedLinearAttention(GatedMixer):
    """Linear attention with gated decays, short convolutions, and a norm with a gate at its output.

    ``q, k, v = φ(silu(conv(W_q x))), φ(silu(conv(W_k x))), silu(conv(W_v x))``, for each head

    ``S_t = γ_t S_{t-1} + k_t v_tᵀ``, ``log γ_t = logsigmoid(w_h · x_t + b_h) / divisor`` and
    ``o_t = S_tᵀ q_t / sqrt(K)``,

    and the output is ``W_o (RMSNorm(o) ⊙ a(W_g x))``. There is no normaliser.

    It is causal and has the protocol of `cumulant.nn`; its state is a `KernelAttentionState` with
    sums of all query heads, as each of them has its own decay.

    Args:
        dim: model dim D.
        num_heads: query heads H, each with a decay.
        num_kv_heads: key/value heads G, which divide H; by default H.
        head_dim: query/key dim K of a head, by default ``dim / num_heads``.
        value_dim: value dim V of a head, by default ``dim / num_heads``.
        feature_map: the elementwise function φ: None for none; ``"relu"``, ``"sigmoid"``,
            ``"logsigmoid"``, ``"silu"`` (or ``"swish"``), ``"sqrelu"``, ``"gelu"``; or a function.
        conv_size: taps of the convolutions of q, k and v; 0 for none, and no silu.
        conv_bias: biases of the convolutions.
        gate_fn: the function a of the output's gate, likewise.
        norm_affine: the output's norm has weights ``[V]``.
        norm_eps: its epsilon.
        divisor: divides the log decays (`gate_logit_normalizer`).
        impl: as in `cumulant.linear_attention`.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers", with a decay for each head.
    """

    first_proj = "q_proj"

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: Activation | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_fn: Activation = "swish",
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
        divisor: float = 16.0,
        impl: str = "auto",
    ):
        super().__init__(dim)
        check_counts(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check_counts(head_dim=head_dim, value_dim=value_dim)
        check_count("conv_size", conv_size, 0)
        groups = count_kv_heads(num_kv_heads, num_heads)
        self.num_heads, self.num_kv_heads, self.impl = num_heads, groups, impl
        self.head_dim = size_of_head("head_dim", head_dim, dim, num_heads)
        self.value_dim = size_of_head("value_dim", value_dim, dim, num_heads)
        self.feature_map = (
            None if feature_map is None else find_activation("feature_map", feature_map)
        )
        queries, keys = num_heads * self.head_dim, groups * self.head_dim
        values, outputs = groups * self.value_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(dim, queries, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, outputs, bias=False)
        channels = queries + keys + values
        self.conv = SiluConvolution(channels, conv_size, bias=conv_bias) if conv_size else None
        self.decay = GatedDecay(dim, num_heads, divisor=divisor)
        self.norm = GatedNorm(self.value_dim, eps=norm_eps, affine=norm_affine, activation=gate_fn)
        self.out_proj = nn.Linear(outputs, dim, bias=False)

    def mix(
        self, x: Tensor, local: dict[str, Tensor | None], rows: dict[str, Any]
    ) -> tuple[Tensor, LinearState | None, Tensor | None]:
        """See `GatedMixer.mix`."""
        q, k, v = project(self.q_proj, x), project(self.k_proj, x), project(self.v_proj, x)
        tail = None
        if self.conv is not None:
            q, k, v, tail = self.conv(q, k, v, **local)
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        attended = linear_attention(
            self._split_heads(q, self.num_heads),
            self._split_heads(k, self.num_kv_heads),
            self._split_heads(v, self.num_kv_heads),
            "identity",
            is_causal=True,
            scale=self.head_dim**-0.5,
            normalize=False,
            log_decay=self.decay(x),
            impl=self.impl,
            **rows,
        )
        out, sums = attended if isinstance(attended, tuple) else (attended, None)
        y = self.norm(out.transpose(1, 2).flatten(2), project(self.g_proj, x))
        return project(self.out_proj, y), sums, tail

    def _split_heads(self, x: Tensor, heads: int) -> Tensor:
        """``[B, T, heads · K]`` -> ``[B, H, T, K]``: one for each decay."""
        split: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        shared = self.num_heads // heads
        return split if shared == 1 else split.repeat_interleave(shared, 1)


def from_simple_gla(
    source: nn.Module | Mapping[str, Tensor],
    *,
    feature_map: Activation | None = None,
    gate_fn: Activation | None = None,
    norm_eps: float | None = None,
    gate_logit_normalizer: float | None = None,
) -> SimpleGatedLinearAttention:
    """Our module with the weights of flash-linear-attention's `SimpleGatedLinearAttention`.

    Outputs agree to rounding, except where the package's depend on masked tokens
    (`docs/migrating.md`). The package runs on GPUs; the result runs everywhere.

    Args:
        source: the layer, or its state dict. The options below are for a state dict only, since
            its weights do not determine them: a layer knows them. Left out, they take the
            package's defaults.
        feature_map: of queries and keys, a name (``"relu"``, ``"silu"``, ...) or a function; by
            default none.
        gate_fn: of the output's gate, by default ``"swish"``.
        norm_eps: of the output's norm, by default 1e-5.
        gate_logit_normalizer: divides the log decays, by default 16.

    Raises:
        ValueError: a weight is missing, left over or of another shape, or an option is given that
            the layer knows.
    """
    given = {
        "feature_map": feature_map,
        "gate_fn": gate_fn,
        "norm_eps": norm_eps,
        "gate_logit_normalizer": gate_logit_normalizer,
    }
    weights = Weights(source, PACKAGE)
    options = choose_options(source, given, _layer_options)
    loaded = {
        f"{ours}.weight": weights.pop_weight(f"{theirs}.weight")
        for theirs, ours in (
            ("q_proj", "q_proj"),
            ("k_proj", "k_proj"),
            ("v_proj", "v_proj"),
            ("g_proj", "g_proj"),
            ("o_proj", "out_proj"),
            ("gk_proj", "decay"),
        )
    }
    loaded["decay.bias"] = weights.pop_weight("gk_proj.bias")
    size, biased = _read_convolutions(weights, loaded)
    for norm in ("g_norm_swish_gate.weight", "g_norm.weight"):
        if norm in weights:
            loaded["norm.weight"] = weights.pop_weight(norm)
            break
    module = SimpleGatedLinearAttention(
        **_sizes(loaded),
        conv_size=size,
        conv_bias=biased,
        norm_affine="norm.weight" in loaded,
        divisor=options.pop("gate_logit_normalizer", 16.0),
        **options,
    )
    weights.load(module, loaded, source)
    return module


def _sizes(loaded: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes of a layer, as its weights determine them."""
    heads, dim = loaded["decay.weight"].shape
    queries, keys = len(loaded["q_proj.weight"]), len(loaded["k_proj.weight"])
    outputs = len(loaded["g_proj.weight"])
    groups = keys * heads // queries if queries else 0
    if queries % heads or outputs % heads or not groups or keys * heads != groups * queries:
        raise ValueError(
            f"source: {heads} gates do not fit {queries} query, {keys} key and {outputs} output"
            " channels"
        )
    return {
        "dim": dim,
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": queries // heads,
        "value_dim": outputs // heads,
    }


def _layer_options(source: Any) -> dict[str, Any]:
    """The options of a layer, which its weights do not determine."""
    if not hasattr(source, "gk_proj") or not hasattr(source, "gate_logit_normalizer"):
        raise TypeError(
            f"source: expected a SimpleGatedLinearAttention of {PACKAGE}, got"
            f" {type(source).__name__}"
        )
    norm = getattr(source, "g_norm_swish_gate", None)
    return {
        "feature_map": source.feature_map_fn,
        "gate_fn": None if norm is not None else source.gate_fn,
        "norm_eps": (source.g_norm if norm is None else norm).eps,
        "gate_logit_normalizer": source.gate_logit_normalizer,
    }


def _read_convolutions(weights: Weights, loaded: dict[str, Tensor]) -> tuple[int, bool]:
    """Read the convolutions of q, k and v as one; their taps, 0 for none, and whether biased."""
    names = [f"{x}_conv1d" for x in "qkv"]
    if not any(f"{name}.weight" in weights for name in names):
        return 0, False
    taps = [read_taps(weights, f"{name}.weight") for name in names]
    if len({len(weight) for weight in taps}) > 1:
        raise ValueError(
            f"source: expected convolutions of one size, got {[len(weight) for weight in taps]}"
        )
    loaded["conv.weight"] = torch.cat(taps, -1)
    biased = f"{names[0]}.bias" in weights
    if biased:
        loaded["conv.bias"] = torch.cat([weights.pop_weight(f"{name}.bias") for name in names])
    return len(taps[0]), biased
