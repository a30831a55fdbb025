"""Taylor attention as a module."""

from __future__ import annotations

from torch import Tensor

from ..ops.state import LinearState
from ..ops.taylor import feature_count, taylor_attention
from .kernel_attention import KernelAttention


class TaylorAttention(KernelAttention):
    """Multi-head Taylor attention (`cumulant.taylor_attention`): softmax attention with the exponential expanded to
    `order`, in linear time, with a state of ``G · F · (V + 1)`` numbers.

    Args:
        dim: model dim D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, dividing H (1: multi-query); by default H.
        head_dim: query/key dim K of a head. Features grow as K²/2 at order 2: 16 gives 153.
        value_dim: value dim V of a head, by default ``dim / num_heads``.
        order: degree of the expansion; even orders have positive weights.
        scale: factor of q·k, by default ``1 / sqrt(K)``.
        constant_term: keep the term of degree 0.
        is_causal: token t sees tokens up to t.
        rotary: rotate queries and keys by their position.
        rotary_base: see `RotaryEmbedding`.
        gate_values: multiply each head's output by ``sigmoid(w_h · x_t)``.
        shift_tokens: take half of the input channels from the token before.
        conv_size: taps of a causal depthwise convolution over q, k and v; 0 for none.
        impl: as in `cumulant.taylor_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int = 16,
        value_dim: int | None = None,
        order: int = 2,
        scale: float | None = None,
        constant_term: bool = True,
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
            head_dim=head_dim,
            value_dim=value_dim,
            is_causal=is_causal,
            rotary=rotary,
            rotary_base=rotary_base,
            gate_values=gate_values,
            shift_tokens=shift_tokens,
            conv_size=conv_size,
        )
        feature_count(head_dim, order)  # refuses an order below 1
        self.order, self.scale, self.constant_term, self.impl = order, scale, constant_term, impl

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
        return taylor_attention(
            query,
            key,
            value,
            self.order,
            is_causal=self.is_causal,
            scale=self.scale,
            constant_term=self.constant_term,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            impl=self.impl,
        )
