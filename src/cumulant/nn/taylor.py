"""Taylor attention as a module."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..ops.state import LinearState
from ..ops.taylor import check_order, taylor_attention
from .kernel_attention import KernelAttention
from .step import known_to_programs


@known_to_programs
class TaylorAttention(KernelAttention):
    """Multi-head Taylor attention (`cumulant.taylor_attention`).

    It is softmax attention with the exponential expanded to degree `order`. It runs in linear time,
    and its state holds ``G · F · (V + 1)`` numbers. `__init__` documents the arguments that it
    shares with `LinearAttention`.

    With ``qk_norm=True, constant_term=False`` it is Mercat's higher order linear transformer (arXiv
    2010.14816). Normalised queries and keys keep scores within ``sqrt(K) / alpha``, where the
    expansion is close to the exponential.

    Args:
        head_dim: query/key dim K of a head. Features grow as K²/2 at order 2: 16 gives 153.
        order: degree of the expansion; even orders have positive weights.
        scale: factor of q·k, by default ``1 / (alpha · sqrt(K))``.
        alpha: see `scale`; by default 3 with `qk_norm`, else 1.
        constant_term: keep the term of degree 0. Without it, weights can be negative and
            denominators zero.
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
        context_dim: int | None = None,
        order: int = 2,
        scale: float | None = None,
        alpha: float | None = None,
        constant_term: bool = True,
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
        check_order(order)
        if alpha is not None and scale is not None:
            raise ValueError(
                "alpha: given beside scale; leave one out, as scale = 1 / (alpha · sqrt(K))"
            )
        if alpha is None:
            alpha = 3.0 if qk_norm else 1.0
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha: expected a positive number, got {alpha}")
        self.order, self.constant_term, self.impl = order, constant_term, impl
        self.scale = 1 / (alpha * head_dim**0.5) if scale is None else scale

    def extra_repr(self) -> str:
        return f"order={self.order}, scale={self.scale:.4g}, is_causal={self.is_causal}"

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
        return taylor_attention(
            query,
            key,
            value,
            self.order,
            is_causal=self.is_causal,
            scale=self.scale,
            constant_term=self.constant_term,
            log_decay=log_decay,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            impl=self.impl,
        )

    def step_options(self) -> dict[str, Any] | None:
        if self.impl not in ("auto", "native"):
            return None
        return {
            "order": self.order,
            "constant_term": self.constant_term,
            "activation": "identity",
            "scale": self.scale,
            "normalize": True,
        }
