"""The FLASH layer: a gated unit over mixed chunk attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.checks import check_group_size
from ..ops.mixed_chunk import mixed_chunk_attention
from ..ops.state import MixedChunkState, State, register
from .checks import check_input, check_part, check_state
from .gated_unit import GatedUnit
from .padding import positions
from .token_shift import token_shift


@dataclass(frozen=True)
class MixedChunkAttentionState(State):
    """groups: the attention's own state. shift: ``[B, 1, D/2]`` or None."""

    groups: MixedChunkState
    shift: Tensor | None

    @property
    def position(self) -> Tensor:
        return self.groups.position


register(MixedChunkAttentionState)


class MixedChunkAttention(GatedUnit):
    """FLASH (Hua et al. 2022, section 3): quadratic inside groups, linear across them, gated. One
    head.

    ``y = W_o (silu(W_g h) ⊙ mixed_chunk_attention(q, k, r, s, silu(W_v h))) + x`` with h =
    shift(norm(x)) and q, k, r, s four scaled and offset, then rotated, copies of ``silu(W_z h)``.

    Args:
        dim: model dim D.
        group_size: g, tokens in a group.
        query_key_dim: K of all four queries and keys.
        expansion_factor: value dim over D.
        is_causal: token t sees tokens up to t.
        activation: "relu2" or "laplace".
        norm: "layernorm", "rmsnorm", "scalenorm" or None.
        residual: add x.
        shift_tokens: the first half of the channels of norm(x) comes from the token before.
        relative_bias: T5's bias on quadratic scores, times sqrt(K).
        rotary_dim: rotate so many dimensions of queries and keys, an even number; by default 32, or
            what K has of them; 0 for none.
        rotary_base: see `RotaryEmbedding`.
        dropout: of quadratic weights.
        out_dropout: of the output, before x is added.
        reduce_group_non_causal_attn: False, when not causal: the linear sum, too, stays inside the
            group.
        count_padding: masked tokens keep their places in groups and neighbourhoods and count in the
            divisor, as in FLASH-pytorch; only their keys are hidden, and their outputs are left as
            they come.
    """

    def __init__(
        self,
        dim: int,
        *,
        group_size: int = 256,
        query_key_dim: int = 128,
        expansion_factor: float = 2.0,
        is_causal: bool = True,
        activation: str = "relu2",
        norm: str | None = "scalenorm",
        residual: bool = True,
        shift_tokens: bool = False,
        relative_bias: bool = True,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        reduce_group_non_causal_attn: bool = True,
        count_padding: bool = False,
    ):
        super().__init__(
            dim,
            uses=4,
            query_key_dim=query_key_dim,
            expansion_factor=expansion_factor,
            is_causal=is_causal,
            activation=activation,
            norm=norm,
            relative_bias=relative_bias,
            relative_bias_scale=query_key_dim**0.5,
            rotary_dim=min(32, query_key_dim) // 2 * 2 if rotary_dim is None else rotary_dim,
            rotary_base=rotary_base,
            residual=residual,
            dropout=dropout,
            out_dropout=out_dropout,
            count_padding=count_padding,
        )
        check_group_size(group_size)
        self.group_size, self.shift_tokens = group_size, shift_tokens
        self.reduce_group_non_causal_attn = reduce_group_non_causal_attn

    def extra_repr(self) -> str:
        return (
            f"group_size={self.group_size}, {super().extra_repr()},"
            f" shift_tokens={self.shift_tokens}"
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: MixedChunkAttentionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixedChunkAttentionState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, with `return_state` also the state; see `cumulant.nn`
        for the protocol.
        """
        check_input(
            x, self.qk_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        check_state(state, MixedChunkAttentionState, x)
        if state is not None:
            shape = (x.shape[0], 1, (self.dim + 1) // 2) if self.shift_tokens else None
            check_part(state.shift, "shift", "[B, 1, D / 2]", shape, x)
        if not self.is_causal and (state is not None or return_state):
            raise ValueError(
                "state: only causal attention carries a state from call to call; build with"
                " is_causal=True"
            )
        inner = self._prepare(x, key_mask, cu_seqlens, in_order=True)
        h = inner.x if self.norm is None else self.norm(inner.x)
        shift = None if state is None else state.shift
        if self.shift_tokens:
            h, shift = token_shift(
                h, tail=shift, offset=inner.offset, padding=inner.padding, first_half=True
            )
        position = positions(
            h.shape[1], None if state is None else state.position, cu_seqlens, h.device
        )
        quad_query, lin_query, quad_key, lin_key = self._copies(h, position)
        value, mask = self._value(h), None if inner.rows is None else inner.rows.mask
        if self.count_padding and key_mask is not None:
            hidden = ~key_mask[:, None, :, None]
            lin_key, value = lin_key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        attended = mixed_chunk_attention(
            quad_query,
            quad_key,
            lin_query,
            lin_key,
            value,
            group_size=self.group_size,
            is_causal=self.is_causal,
            activation=self.activation,
            bias=(
                None
                if self.relative_bias is None
                else self.relative_bias(self.group_size, device=h.device)
            ),
            reduce_group_non_causal_attn=self.reduce_group_non_causal_attn,
            dropout_p=self._dropout_p,
            key_mask=mask,
            cu_seqlens=cu_seqlens,
            state=None if state is None else state.groups,
            return_state=return_state,
        )
        if isinstance(attended, tuple):
            return self._finish(attended[0], h, inner), MixedChunkAttentionState(attended[1], shift)
        return self._finish(attended, h, inner)
