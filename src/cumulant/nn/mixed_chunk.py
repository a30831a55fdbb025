"""The FLASH layer: a gated unit over mixed chunk attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.checks import check_group_size
from ..ops.mixed_chunk import mixed_chunk_attention
from ..ops.state import MixedChunkState, State, register_state
from ..ops.step import Unsuitable, Vector
from .checks import check_input, check_state, check_state_tensor
from .gated_unit import GatedUnit
from .padding import token_positions
from .step import StepBuilder, known_to_programs, step_alone
from .token_shift import token_shift


@dataclass(frozen=True)
class MixedChunkAttentionState(State):
    """The state of `MixedChunkAttention`.

    groups: the state of the operation. shift: ``[B, 1, D/2]``, the last token's channels for token
    shift, or None.
    """

    groups: MixedChunkState
    shift: Tensor | None

    @property
    def position(self) -> Tensor:
        return self.groups.position


register_state(MixedChunkAttentionState)


@known_to_programs
class MixedChunkAttention(GatedUnit):
    """FLASH: gated attention with one head, quadratic inside groups and linear across them.

    ``y = W_o (silu(W_g h) ⊙ mixed_chunk_attention(q, k, r, s, silu(W_v h))) + x`` with h =
    shift(norm(x)). q, k, r and s are four copies of ``silu(W_z h)``, scaled, offset and rotated.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 3.

    Args:
        dim: model dim D.
        group_size: g, tokens in a group.
        query_key_dim: K of all four queries and keys.
        expansion_factor: value dim over D.
        is_causal: token t sees tokens up to t.
        activation: "relu2" or "laplace".
        norm: "layernorm", "rmsnorm", "scalenorm" or None.
        residual: add x to the output.
        shift_tokens: take the first half of the channels of norm(x) from the token before.
        relative_bias: add T5's relative position bias to quadratic scores, times sqrt(K).
        rotary_dim: number of dimensions of queries and keys to rotate, even; by default 32, or K if
            that is smaller; 0 for none.
        rotary_base: see `RotaryEmbedding`.
        dropout: dropout of quadratic weights.
        out_dropout: dropout of the output, before x is added.
        reduce_group_non_causal_attn: without `is_causal`, sum the linear term over all groups;
            False: over each group alone.
        count_padding: count masked tokens in positions, groups and the divisor, as FLASH-pytorch
            does. Their keys are hidden, but their outputs are not set to zero.
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
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`."""
        stepped = step_alone(self, x, state, return_state, key_mask, cu_seqlens)
        if stepped is not None:
            return stepped  # type: ignore[no-any-return]
        check_input(
            x, self.qk_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        self._check_states(x, state, return_state)
        inner = self._prepare_rows(x, key_mask, cu_seqlens, in_order=True)
        h = inner.x if self.norm is None else self.norm(inner.x)
        shift = None if state is None else state.shift
        if self.shift_tokens:
            h, shift = token_shift(
                h, tail=shift, offset=inner.offset, padding=inner.padding, first_half=True
            )
        position = token_positions(
            h.shape[1], None if state is None else state.position, cu_seqlens, h.device
        )
        quad_query, lin_query, quad_key, lin_key = self._queries_and_keys(h, position)
        value, mask = self._project_values(h), None if inner.rows is None else inner.rows.mask
        if self.count_padding and key_mask is not None:
            hidden = ~key_mask[:, None, :, None]
            lin_key, value = lin_key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        own_bias = self.relative_bias
        bias = None if own_bias is None else own_bias(self.group_size, device=h.device)
        attended = mixed_chunk_attention(
            quad_query,
            quad_key,
            lin_query,
            lin_key,
            value,
            group_size=self.group_size,
            is_causal=self.is_causal,
            activation=self.activation,
            bias=bias,
            reduce_group_non_causal_attn=self.reduce_group_non_causal_attn,
            dropout_p=self._active_dropout,
            key_mask=mask,
            cu_seqlens=cu_seqlens,
            state=None if state is None else state.groups,
            return_state=return_state,
        )
        if isinstance(attended, tuple):
            y = self._gate_and_project(attended[0], h, inner)
            return y, MixedChunkAttentionState(attended[1], shift)
        return self._gate_and_project(attended, h, inner)

    def _check_states(
        self, x: Tensor, state: MixedChunkAttentionState | None, return_state: bool
    ) -> None:
        check_state(state, MixedChunkAttentionState, x)
        if state is not None:
            shape = (x.shape[0], 1, (self.dim + 1) // 2) if self.shift_tokens else None
            check_state_tensor(state.shift, "shift", "[B, 1, D / 2]", shape, x)
        if not self.is_causal and (state is not None or return_state):
            raise ValueError(
                "state: only causal attention carries a state from call to call; build with"
                " is_causal=True"
            )

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        builder.rely_on(self.offset_scale)
        builder.require_no_dropout(self.out_dropout)
        if not self.is_causal or self.residual or self._active_dropout > 0:
            raise Unsuitable
        program = builder.program
        h = x if self.norm is None else builder.emit_norm(self.norm, x)
        h = program.shift(h, first_half=True) if self.shift_tokens else h
        z = program.activate("silu", builder.emit_projection(self.qk_proj, h))
        copies = program.copies(z, self.offset_scale.gamma, self.offset_scale.beta)
        if self.rotary is not None:
            builder.rely_on(self.rotary)
            program.rotate(copies, self.query_key_dim, self.rotary.base, self.rotary.dim)
        value = program.activate("silu", builder.emit_projection(self.value_proj, h))
        bias = None
        if self.relative_bias is not None:
            builder.rely_on(self.relative_bias)
            builder.rely_on(self.relative_bias.embedding, nn.Embedding)
            buckets = self.relative_bias.buckets(-torch.arange(self.group_size))
            bias = self.relative_bias.embedding.weight, buckets, self.relative_bias.scale
        y = program.attend_chunks(copies, value, self.group_size, self.activation, bias)
        y = program.activate("swiglu", builder.emit_projection(self.gate_proj, h), y)
        return builder.emit_projection(self.out_proj, y, residual, add=residual is not None)

    def state_tensors(self, state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`, or [] for another mixer's state."""
        if not isinstance(state, MixedChunkAttentionState):
            return []
        if not isinstance(state.groups, MixedChunkState) or self.shift_tokens != (
            state.shift is not None
        ):
            return []
        s = state.groups
        shift = [state.shift] if self.shift_tokens else []
        return [*shift, s.numerator, s.quad_key, s.lin_key, s.value]

    def state_from_tensors(
        self, tensors: list[Tensor], position: Tensor
    ) -> MixedChunkAttentionState:
        """The state that consists of these tensors."""
        shift = tensors.pop(0) if self.shift_tokens else None
        numerator, quad_key, lin_key, value = tensors
        groups = MixedChunkState(numerator, quad_key, lin_key, value, position)
        return MixedChunkAttentionState(groups, shift)
