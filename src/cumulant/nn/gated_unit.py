"""What `GatedAttentionUnit` and `MixedChunkAttention` share: norm, projections, positions, gate and
residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.checks import check_activation
from .checks import check_counts, check_probability
from .norms import make_norm
from .offset_scale import OffsetScale
from .padding import Rows, clear_slack, compact, hide, offsets, restore
from .projection import project
from .relative_bias import T5RelativePositionBias
from .rotary import RotaryEmbedding


class Prepared(NamedTuple):
    """x with its tokens in order, where they stood, and how local mixing reads them."""

    x: Tensor
    rows: Rows | None
    padding: Tensor | None
    offset: Tensor | None
    cu_seqlens: Tensor | None


class GatedUnit(nn.Module):
    """``out = W_o (silu(W_g h) ⊙ attend(...)) (+ x)`` with h = norm(x), values ``silu(W_v h)`` of
    ``expansion · D`` channels, and queries and keys that are scaled and offset copies of one
    ``silu(W_z h)`` of K channels.

    Subclasses say how many copies there are, and attend with them.
    """

    def __init__(
        self,
        dim: int,
        *,
        uses: int,
        query_key_dim: int,
        expansion_factor: float,
        is_causal: bool,
        activation: str,
        norm: str | None,
        relative_bias: bool,
        relative_bias_scale: float,
        rotary_dim: int,
        rotary_base: float,
        residual: bool,
        dropout: float,
        out_dropout: float,
        count_padding: bool,
    ):
        super().__init__()
        check_counts(dim=dim, query_key_dim=query_key_dim)
        if (
            not isinstance(rotary_dim, int)
            or rotary_dim % 2
            or not 0 <= rotary_dim <= query_key_dim
        ):
            raise ValueError(
                f"rotary_dim: expected an even number from 0 to query_key_dim={query_key_dim}, got"
                f" {rotary_dim}"
            )
        hidden = int(expansion_factor * dim)
        if hidden < 1:
            raise ValueError(
                f"expansion_factor: expected at least 1 / dim = 1 / {dim}, got {expansion_factor}"
            )
        check_probability("dropout", dropout)
        check_probability("out_dropout", out_dropout)
        check_activation(activation)
        self.dim, self.query_key_dim, self.hidden_dim = dim, query_key_dim, hidden
        self.is_causal, self.activation, self.residual = is_causal, activation, residual
        self.dropout, self.count_padding = dropout, count_padding
        self.norm = None if norm is None else make_norm(norm, dim)
        self.value_proj = nn.Linear(dim, hidden)
        self.gate_proj = nn.Linear(dim, hidden)
        self.qk_proj = nn.Linear(dim, query_key_dim)
        self.offset_scale = OffsetScale(query_key_dim, uses)
        self.out_proj = nn.Linear(hidden, dim)
        self.out_dropout = nn.Dropout(out_dropout)
        self.rotary = RotaryEmbedding(rotary_dim, rotary_base) if rotary_dim else None
        self.relative_bias = (
            T5RelativePositionBias(is_causal=is_causal, scale=relative_bias_scale)
            if relative_bias
            else None
        )

    def extra_repr(self) -> str:
        return (
            f"is_causal={self.is_causal}, activation={self.activation!r}, residual={self.residual}"
        )

    def _prepare(
        self, x: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *, in_order: bool
    ) -> Prepared:
        """Masked tokens hidden, or with `in_order` moved out of the way."""
        if key_mask is not None and not self.count_padding:
            x, rows = (compact if in_order else hide)(x, key_mask)
            return Prepared(x, rows, x.shape[1] - rows.tokens, None, None)
        if cu_seqlens is not None:
            return Prepared(
                clear_slack(x, cu_seqlens), None, None, offsets(x.shape[1], cu_seqlens), cu_seqlens
            )
        return Prepared(x, None, None, None, None)

    def _copies(self, h: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys ``[B, 1, T, K]``, one for each use, rotated to ``position [T]`` or
        ``[B, T]``.
        """
        z = self.offset_scale(F.silu(project(self.qk_proj, h)))
        if self.rotary is not None:
            d = self.rotary.dim
            turned = self.rotary(z[..., :d], position)
            z = torch.cat((turned, z[..., d:]), -1) if d < z.shape[-1] else turned
        copies: tuple[Tensor, ...] = z.split(1, 1)
        return copies

    def _value(self, h: Tensor) -> Tensor:
        """``[B, 1, T, E]``."""
        return F.silu(project(self.value_proj, h))[:, None]

    def _finish(self, attended: Tensor, h: Tensor, inner: Prepared) -> Tensor:
        y: Tensor = self.out_dropout(
            project(self.out_proj, F.silu(project(self.gate_proj, h)) * attended[:, 0])
        )
        if inner.cu_seqlens is not None:
            y = clear_slack(y, inner.cu_seqlens)
        return restore(y + inner.x if self.residual else y, inner.rows)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0
