"""The base of `LinearAttention` and `TaylorAttention`: all but the attention itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.state import LinearState, State, register_state
from ..ops.step import Unsuitable, Vector
from .checks import (
    check_count,
    check_counts,
    check_features,
    check_input,
    check_probability,
    check_state,
    check_state_tensor,
    count_kv_heads,
    size_of_head,
)
from .cross_attention import check_context_dim, is_cross_attention
from .decay import log_decays, make_decay
from .norms import RMSNorm
from .padding import (
    LocalRows,
    Rows,
    compact_rows,
    packed_positions,
    restore_rows,
    token_positions,
    zero_after_packed,
    zero_masked,
)
from .projection import project
from .rotary import RotaryEmbedding
from .short_convolution import ShortConvolution
from .step import StepBuilder, step_alone
from .token_shift import token_shift


@dataclass(frozen=True)
class KernelAttentionState(State):
    """The state of `LinearAttention` and `TaylorAttention`.

    sums: the state of the operation. shift: ``[B, 1, D/2]``, the last token's channels for token
    shift, or None. conv: ``[B, size - 1, E]``, the last inputs of the convolution, or None.
    """

    sums: LinearState
    shift: Tensor | None
    conv: Tensor | None

    @property
    def position(self) -> Tensor:
        return self.sums.position


register_state(KernelAttentionState)


class KernelAttention(nn.Module):
    """Multi-head attention by a linear-time operation, which subclasses call in `attend`.

    ``q, k, v = conv(W_q h, W_k h, W_v h)`` with h = norm(shift(x)). q and k are normalised, then
    rotated. The output is ``W_o (gate(shift(x)) ⊙ attend(q, k, v))``. In cross attention, k and v
    are ``W_k c, W_v c`` for a context c. All but the projections is optional.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        context_dim: int | None,
        is_causal: bool,
        rotary: bool,
        rotary_base: float,
        prenorm: bool,
        qk_norm: bool,
        gate_values: bool,
        combine_heads: bool,
        shift_tokens: bool,
        conv_size: int,
        bias: bool,
        dropout: float,
        decay: str | nn.Module,
    ):
        """The arguments that `LinearAttention` and `TaylorAttention` share.

        Args:
            dim: model dim D.
            num_heads: query heads H.
            num_kv_heads: key/value heads G, which divide H (1: multi-query); by default H.
            head_dim: query/key dim K of a head.
            value_dim: value dim V of a head, by default ``dim / num_heads``.
            context_dim: channels of the context in cross attention, by default `dim`.
            is_causal: token t sees tokens up to t. False: every token sees all, or those of a
                context.
            rotary: rotate queries and keys by their position, before any feature map (self
                attention only).
            rotary_base: see `RotaryEmbedding`.
            prenorm: RMSNorm of x (not of a context) before the projections.
            qk_norm: LayerNorm without parameters on each head's queries and keys.
            gate_values: multiply each head's output by ``sigmoid(w_h · x_t)``.
            combine_heads: project the heads' outputs to D; False leaves them side by side,
                ``[B, T, H·V]``.
            shift_tokens: take half of the input channels from the token before.
            conv_size: taps of a causal depthwise convolution over q, k and v; 0 for none.
            bias: biases in the projections of q, k, v and the output.
            dropout: dropout of the output.
            decay: how weights of earlier tokens decay, in causal attention: "none"; "fixed"
                (`FixedDecay`); "gated" (`GatedDecay`); "mamba2" (`Mamba2Decay`); or a module
                ``[B, T, D] -> [B, G, T]`` of log decays. Its input is norm(shift(x)).
        """
        super().__init__()
        check_counts(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        check_counts(value_dim=value_dim, context_dim=context_dim)
        check_count("conv_size", conv_size, 0)
        check_context_dim(context_dim, is_causal=is_causal, rotary=rotary)
        check_probability("dropout", dropout)
        if conv_size and not is_causal:
            raise ValueError(
                "conv_size: the short convolution looks backwards only; it needs is_causal=True"
            )
        head_dim = max(dim // num_heads, 1) if head_dim is None else head_dim
        groups = count_kv_heads(num_kv_heads, num_heads)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, groups
        self.head_dim = head_dim
        self.value_dim = size_of_head("value_dim", value_dim, dim, num_heads)
        self.context_dim = dim if context_dim is None else context_dim
        self.is_causal, self.qk_norm, self.shift_tokens = is_causal, qk_norm, shift_tokens
        self.norm = RMSNorm(dim, eps=1e-6) if prenorm else None
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(self.context_dim, groups * head_dim, bias=bias)
        self.v_proj = nn.Linear(self.context_dim, groups * self.value_dim, bias=bias)
        self.out_proj = (
            nn.Linear(num_heads * self.value_dim, dim, bias=bias) if combine_heads else None
        )
        self.gate_proj = nn.Linear(dim, num_heads, bias=False) if gate_values else None
        self.rotary = RotaryEmbedding(head_dim, rotary_base) if rotary else None
        self.conv = ShortConvolution(sum(self._qkv_sizes), conv_size) if conv_size else None
        self.dropout = nn.Dropout(dropout)
        self.decay = make_decay(decay, dim, groups, is_causal=is_causal)

    @property
    def _qkv_sizes(self) -> tuple[int, int, int]:
        keys = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, self.num_kv_heads * self.value_dim

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
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KernelAttentionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, KernelAttentionState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`.

        Without `combine_heads` the output is ``[B, T, H·V]``. In cross attention
        (``is_causal=False``) x attends to ``context [B, S, D_c]`` where ``context_mask [B, S]`` is
        True, and to the tokens summed in `state`. `encode_context` computes such a state once, for
        many x.
        """
        others = key_mask, cu_seqlens, context, context_mask
        stepped = step_alone(self, x, state, return_state, *others)
        if stepped is not None:
            return stepped  # type: ignore[no-any-return]
        check_input(
            x, self.q_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        check_state(state, KernelAttentionState, x)
        self._check_local_state(state, x)
        crossing = is_cross_attention(
            x,
            context,
            context_mask,
            cu_seqlens,
            has_state=state is not None,
            return_state=return_state,
            context_dim=self.context_dim,
            is_causal=self.is_causal,
            rotary=self.rotary is not None,
        )
        rows: Rows | None = None
        padding, offset = None, None
        if key_mask is not None:
            in_order = self.shift_tokens or self.conv is not None or self.rotary is not None
            x, rows = (compact_rows if in_order else zero_masked)(x, key_mask)
            padding = x.shape[1] - rows.tokens
        if cu_seqlens is not None:
            x, offset = zero_after_packed(x, cu_seqlens), packed_positions(x.shape[1], cu_seqlens)
        shift = None if state is None else state.shift
        if self.shift_tokens:
            x, shift = token_shift(x, tail=shift, offset=offset, padding=padding)
        h = x if self.norm is None else self.norm(x)
        conv = None
        if crossing:
            attended = self._attend_context(h, context, context_mask, state, return_state)
        else:
            local = LocalRows(padding, offset)
            attended, conv = self._attend_self(h, rows, local, cu_seqlens, state, return_state)
        out = attended[0] if isinstance(attended, tuple) else attended
        if self.gate_proj is not None:
            out = out * project(self.gate_proj, x).sigmoid().mT[..., None]
        y = out.transpose(1, 2).flatten(2)
        y = self.dropout(y if self.out_proj is None else project(self.out_proj, y))
        y = restore_rows(y, rows)
        if isinstance(attended, tuple):
            return y, KernelAttentionState(attended[1], shift, conv)
        return y

    def step_options(self) -> dict[str, Any] | None:
        """The options of `Program.attend`; None where it cannot do what `attend` does."""
        return None

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        program, options = builder.program, self.step_options()
        if options is None or not self.is_causal or self.out_proj is None:
            raise Unsuitable
        builder.require_no_dropout(self.dropout)
        x = program.shift(x) if self.shift_tokens else x
        h = x if self.norm is None else builder.emit_norm(self.norm, x)
        mixed = program.vector(sum(self._qkv_sizes))
        for projection, part in zip(
            (self.q_proj, self.k_proj, self.v_proj), mixed.split(*self._qkv_sizes), strict=True
        ):
            builder.emit_projection(projection, h, part)
        if self.conv is not None:
            builder.rely_on(self.conv)
            mixed = program.convolve(mixed, self.conv.weight)
        both, v = mixed.split(sum(self._qkv_sizes[:2]), self._qkv_sizes[2])
        if self.qk_norm:
            both = program.norm(both, "layernorm", 1e-5, heads=self.num_heads + self.num_kv_heads)
        if self.rotary is not None:
            builder.rely_on(self.rotary)
            program.rotate(both, self.head_dim, self.rotary.base)
        q, k = both.split(*self._qkv_sizes[:2])
        if self.decay is not None:
            options["log_decay"] = builder.emit_module(self.decay, h, None)
        y = program.attend(q, k, v, self.num_heads, self.num_kv_heads, **options)
        if self.gate_proj is not None:
            program.gate(y, builder.emit_projection(self.gate_proj, x))
        return builder.emit_projection(self.out_proj, y, residual, add=residual is not None)

    def state_tensors(self, state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`, or [] for another mixer's state."""
        if not isinstance(state, KernelAttentionState) or not isinstance(state.sums, LinearState):
            return []
        if self.shift_tokens != (state.shift is not None) or (self.conv is None) != (
            state.conv is None
        ):
            return []
        local = ([state.shift] if self.shift_tokens else []) + (
            [] if self.conv is None else [state.conv]
        )
        return [
            *local,
            state.sums.numerator,
            *([] if state.sums.denominator is None else [state.sums.denominator]),
        ]

    def state_from_tensors(self, tensors: list[Tensor], position: Tensor) -> KernelAttentionState:
        """The state that consists of these tensors."""
        shift = tensors.pop(0) if self.shift_tokens else None
        conv = None if self.conv is None else tensors.pop(0)
        numerator, *rest = tensors
        return KernelAttentionState(
            LinearState(numerator, rest[0] if rest else None, position), shift, conv
        )

    def encode_context(
        self,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        state: KernelAttentionState | None = None,
    ) -> KernelAttentionState:
        """The state of ``context [B, S, D_c]`` for cross attention, added to `state` if given.

        ``self(x, state=...)`` attends to it. Neither its size nor that cost depends on S.
        """
        check_features(context, self.k_proj, self.context_dim, "[B, S, D]", "context")
        x = context.new_zeros(context.shape[0], 0, self.dim)
        options = {"context": context, "context_mask": context_mask, "state": state}
        return self(x, **options, return_state=True)[1]  # type: ignore[no-any-return]

    def _check_local_state(self, state: KernelAttentionState | None, x: Tensor) -> None:
        """The state has the tensors that token shift and convolution of this module read."""
        if state is None:
            return
        shift = (x.shape[0], 1, self.dim // 2) if self.shift_tokens else None
        check_state_tensor(state.shift, "shift", "[B, 1, D/2]", shift, x)
        conv = (
            None
            if self.conv is None or not self.is_causal
            else (x.shape[0], self.conv.size - 1, self.conv.dim)
        )
        check_state_tensor(state.conv, "conv", "[B, size - 1, E]", conv, x)

    def _attend_self(
        self,
        x: Tensor,
        rows: Rows | None,
        local: LocalRows,
        cu_seqlens: Tensor | None,
        state: KernelAttentionState | None,
        return_state: bool,
    ) -> tuple[Tensor | tuple[Tensor, LinearState], Tensor | None]:
        """The heads' outputs, with `return_state` also the sums, and the convolution's new tail."""
        q, k, v = project(self.q_proj, x), project(self.k_proj, x), project(self.v_proj, x)
        tail = None if state is None else state.conv
        if self.conv is not None:
            q, k, v, tail = self.conv(
                q, k, v, tail=tail, offset=local.offset, padding=local.padding
            )
        q, k, v = (
            self._split_heads(q, self.num_heads),
            self._split_heads(k, self.num_kv_heads),
            self._split_heads(v, self.num_kv_heads),
        )
        q, k = self._normalize(q), self._normalize(k)
        if self.rotary is not None:
            start = None if state is None else state.position
            position = token_positions(x.shape[1], start, cu_seqlens, x.device)
            q, k = self.rotary.both(q, k, position)
        attended = self.attend(
            q,
            k,
            v,
            log_decay=None if self.decay is None else log_decays(self.decay, x),
            key_mask=None if rows is None else rows.mask,
            cu_seqlens=cu_seqlens,
            state=None if state is None else state.sums,
            return_state=return_state,
        )
        return attended, tail

    def _attend_context(
        self,
        x: Tensor,
        context: Tensor | None,
        context_mask: Tensor | None,
        state: KernelAttentionState | None,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, LinearState]:
        q = self._normalize(self._split_heads(project(self.q_proj, x), self.num_heads))
        if context is None:
            context = x.new_zeros(x.shape[0], 0, self.context_dim)
        if context_mask is not None:
            # masked numbers must not reach any gradient
            context = context.masked_fill(~context_mask[..., None], 0)
        k = self._normalize(self._split_heads(project(self.k_proj, context), self.num_kv_heads))
        v = self._split_heads(project(self.v_proj, context), self.num_kv_heads)
        return self.attend(
            q,
            k,
            v,
            log_decay=None,
            key_mask=context_mask,
            cu_seqlens=None,
            state=None if state is None else state.sums,
            return_state=return_state,
        )

    @staticmethod
    def _split_heads(x: Tensor, heads: int) -> Tensor:
        """``[B, T, H·K]`` -> ``[B, H, T, K]``."""
        split: Tensor = x.unflatten(-1, (heads, -1))
        return split.transpose(1, 2)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.qk_norm else x
