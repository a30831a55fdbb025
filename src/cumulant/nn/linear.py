"""Linear attention as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.feature_maps import ELEMENTWISE, FeatureMap, check_feature_map
from ..ops.linear import linear_attention
from ..ops.state import LinearState
from .feature_maps import HedgehogFeatureMap, RebasedFeatureMap
from .kernel_attention import KernelAttention
from .step import known_to_programs

LEARNED = {"hedgehog": HedgehogFeatureMap, "rebased": RebasedFeatureMap}


@known_to_programs
class LinearAttention(KernelAttention):
    """Multi-head linear attention (`cumulant.linear_attention`).

    Its state holds ``G · F · (V + 1)`` numbers. `__init__` documents the arguments that it shares
    with `TaylorAttention`.

    Args:
        head_dim: query/key dim K of a head, by default ``dim / num_heads``.
        feature_map: ``"elu"``, ``"relu"``, ``"softmax"``, ``"identity"``; a learned one,
            ``"hedgehog"`` or ``"rebased"``; a callable; a module, which is trained too; or a pair,
            for queries and for keys. Keys of a causal ``"softmax"`` map must be within -87 to 88;
            it takes no decay.
        normalize: divide by the sum of weights.
        scale: factor of the query before its feature map, by default 1.
        impl: as in `cumulant.linear_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        feature_map: FeatureMap | nn.Module | tuple[nn.Module, nn.Module] = "elu",
        normalize: bool = True,
        scale: float | None = None,
        is_causal: bool = True,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        prenorm: bool = False,
        qk_norm: bool = False,
        gate_values: bool = False,
        combine_heads: bool = True,
        shift_tokens: bool = False,
        conv_size: int = 0,
        bias: bool = False,
        dropout: float = 0.0,
        decay: str | nn.Module = "none",
        impl: str = "auto",
    ):
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            context_dim=context_dim,
            is_causal=is_causal,
            rotary=rotary,
            rotary_base=rotary_base,
            prenorm=prenorm,
            qk_norm=qk_norm,
            gate_values=gate_values,
            combine_heads=combine_heads,
            shift_tokens=shift_tokens,
            conv_size=conv_size,
            bias=bias,
            dropout=dropout,
            decay=decay,
        )
        if isinstance(feature_map, str) and feature_map in LEARNED:
            learned = LEARNED[feature_map]
            feature_map = (
                learned(num_heads, self.head_dim),
                learned(self.num_kv_heads, self.head_dim),
            )
        check_feature_map(feature_map, None if self.decay is None else "decay")
        # a pair needs two names, so that its modules are registered
        pair = feature_map if isinstance(feature_map, tuple) else (None, None)
        self.query_map: Any = pair[0]
        self.key_map: Any = pair[1]
        self.feature_map: Any = None if isinstance(feature_map, tuple) else feature_map
        self.normalize, self.scale, self.impl = normalize, scale, impl

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        log_decay: Tensor | None,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LinearState | None,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, LinearState]:
        return linear_attention(
            query,
            key,
            value,
            (self.query_map, self.key_map) if self.feature_map is None else self.feature_map,
            is_causal=self.is_causal,
            scale=self.scale,
            normalize=self.normalize,
            log_decay=log_decay,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            impl=self.impl,
        )

    def step_options(self) -> dict[str, Any] | None:
        elementwise = isinstance(self.feature_map, str) and self.feature_map in ELEMENTWISE
        if self.impl not in ("auto", "native") or not elementwise:
            return None
        return {
            "order": 0,
            "constant_term": True,
            "activation": self.feature_map,
            "scale": 1.0 if self.scale is None else self.scale,
            "normalize": self.normalize,
        }
