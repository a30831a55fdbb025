"""The base of `GatedAttentionUnit` and `MixedChunkAttention`: all but the attention itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.checks import check_activation
from .checks import check_counts, check_probability
from .norms import make_norm
from .offset_scale import OffsetScale
from .padding import (
    Rows,
    compact_rows,
    packed_positions,
    restore_rows,
    zero_after_packed,
    zero_masked,
)
from .projection import project
from .relative_bias import T5RelativePositionBias
from .rotary import RotaryEmbedding


class PreparedRows(NamedTuple):
    """The input of a unit, after padding has been zeroed or moved.

    rows: how to undo that. padding: ``[B]`` padding tokens at the end of each row. offset: ``[T]``
    index of each token in its packed sequence.
    """

    x: Tensor
    rows: Rows | None
    padding: Tensor | None
    offset: Tensor | None
    cu_seqlens: Tensor | None


class GatedUnit(nn.Module):
    """``y = W_o (silu(W_g h) ⊙ attend(...)) (+ x)`` with h = norm(x).

    Values are ``silu(W_v h)`` with ``expansion · D`` channels. Queries and keys are scaled and
    offset copies of one ``silu(W_z h)`` with K channels. A subclass sets the number of copies
    (`uses`) and attends with them.
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

    def _prepare_rows(
        self, x: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *, in_order: bool
    ) -> PreparedRows:
        """Set masked tokens to zero; with `in_order` also move them to the end of their rows."""
        if key_mask is not None and not self.count_padding:
            x, rows = (compact_rows if in_order else zero_masked)(x, key_mask)
            return PreparedRows(x, rows, x.shape[1] - rows.tokens, None, None)
        if cu_seqlens is not None:
            return PreparedRows(
                zero_after_packed(x, cu_seqlens),
                None,
                None,
                packed_positions(x.shape[1], cu_seqlens),
                cu_seqlens,
            )
        return PreparedRows(x, None, None, None, None)

    def _queries_and_keys(self, h: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """One ``[B, 1, T, K]`` for each use, rotated to ``position [T]`` or ``[B, T]``."""
        z = self.offset_scale(F.silu(project(self.qk_proj, h)))
        if self.rotary is not None:
            d = self.rotary.dim
            rotated = self.rotary(z[..., :d], position)
            z = torch.cat((rotated, z[..., d:]), -1) if d < z.shape[-1] else rotated
        copies: tuple[Tensor, ...] = z.split(1, 1)
        return copies

    def _project_values(self, h: Tensor) -> Tensor:
        """The values ``[B, 1, T, E]``."""
        return F.silu(project(self.value_proj, h))[:, None]

    def _gate_and_project(self, attended: Tensor, h: Tensor, inner: PreparedRows) -> Tensor:
        y: Tensor = self.out_dropout(
            project(self.out_proj, F.silu(project(self.gate_proj, h)) * attended[:, 0])
        )
        if inner.cu_seqlens is not None:
            y = zero_after_packed(y, inner.cu_seqlens)
        return restore_rows(y + inner.x if self.residual else y, inner.rows)

    @property
    def _active_dropout(self) -> float:
        return self.dropout if self.training else 0.0
