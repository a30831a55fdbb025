"""Kernelised linear attention as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.feature_maps import FeatureMap, check_feature_map
from ..ops.linear import linear_attention
from ..ops.state import LinearState
from .kernel_attention import KernelAttention


class LinearAttention(KernelAttention):
    """Multi-head kernelised linear attention (`cumulant.linear_attention`), state ``G · F · (V + 1)`` numbers.

    Args:
        dim: model dim D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, dividing H (1: multi-query); by default H.
        head_dim: query/key dim K of a head, by default ``dim / num_heads``.
        value_dim: value dim V of a head, by default ``dim / num_heads``.
        feature_map: ``"elu"``, ``"relu"``, ``"softmax"``, ``"identity"``, a callable or a module (then trained along).
        normalize: divide by the sum of weights.
        scale: factor of the query before its feature map, by default 1.
        is_causal: token t sees tokens up to t.
        rotary: rotate queries and keys by their position, before the feature map, so that weights stay positive.
        rotary_base: see `RotaryEmbedding`.
        gate_values: multiply each head's output by ``sigmoid(w_h · x_t)``.
        shift_tokens: take half of the input channels from the token before.
        conv_size: taps of a causal depthwise convolution over q, k and v; 0 for none.
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
        feature_map: FeatureMap | nn.Module = "elu",
        normalize: bool = True,
        scale: float | None = None,
        is_causal: bool = True,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        gate_values: bool = False,
        shift_tokens: bool = False,
        conv_size: int = 0,
        impl: str = "auto",
    ):
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim // num_heads if head_dim is None else head_dim,
            value_dim=value_dim,
            is_causal=is_causal,
            rotary=rotary,
            rotary_base=rotary_base,
            gate_values=gate_values,
            shift_tokens=shift_tokens,
            conv_size=conv_size,
        )
        check_feature_map(feature_map)
        self.feature_map, self.normalize, self.scale, self.impl = feature_map, normalize, scale, impl

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LinearState | None,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, LinearState]:
        return linear_attention(
            query,
            key,
            value,
            self.feature_map,
            is_causal=self.is_causal,
            scale=self.scale,
            normalize=self.normalize,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            impl=self.impl,
        )
