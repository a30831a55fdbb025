"""What `LinearAttention` and `TaylorAttention` share: projections, local mixing, positions, gates and the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.state import LinearState, State, register
from .padding import Rows, check_input, clear_slack, compact, offsets, positions, restore
from .rotary import RotaryEmbedding
from .short_convolution import ShortConvolution
from .token_shift import token_shift


@dataclass(frozen=True)
class KernelAttentionState(State):
    """sums: the attention's own state. shift: ``[B, 1, D/2]`` or None. conv: ``[B, size - 1, E]`` or None."""

    sums: LinearState
    shift: Tensor | None
    conv: Tensor | None

    @property
    def position(self) -> Tensor:
        return self.sums.position


register(KernelAttentionState)


class KernelAttention(nn.Module):
    """Multi-head attention through one of the linear operations. Subclasses say which, in `attend`.

    ``q, k, v = conv(W_q x, W_k x, W_v x)``, q and k rotated, ``out = W_o (gate ⊙ attend(q, k, v))``; x is token-shifted
    first. Every part but the projections is optional.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        head_dim: int,
        value_dim: int | None,
        is_causal: bool,
        rotary: bool,
        rotary_base: float,
        gate_values: bool,
        shift_tokens: bool,
        conv_size: int,
    ):
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if groups < 1 or num_heads < 1 or num_heads % groups:
            raise ValueError(f"num_kv_heads: the {groups} key/value heads must divide the {num_heads} query heads")
        if value_dim is None and dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} must divide dim={dim}, or value_dim must be given")
        if (shift_tokens or conv_size) and not is_causal:
            raise ValueError("is_causal: token shift and short convolutions look backwards only; they need is_causal")
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, groups, head_dim
        self.value_dim = dim // num_heads if value_dim is None else value_dim
        self.is_causal, self.shift_tokens = is_causal, shift_tokens
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, groups * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, groups * self.value_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * self.value_dim, dim, bias=False)
        self.gate_proj = nn.Linear(dim, num_heads, bias=False) if gate_values else None
        self.rotary = RotaryEmbedding(head_dim, rotary_base) if rotary else None
        self.conv = ShortConvolution(sum(self._sizes), conv_size) if conv_size else None

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.q_proj.out_features, self.k_proj.out_features, self.v_proj.out_features

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
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KernelAttentionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, KernelAttentionState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, with `return_state` also the state; see `cumulant.nn` for the protocol."""
        check_input(x, self.dim, key_mask, cu_seqlens, state is not None or return_state)
        if not self.is_causal and (state is not None or return_state):
            raise ValueError(
                "state: only causal attention carries a state from call to call; build with is_causal=True"
            )
        rows: Rows | None = None
        padding, offset = None, None
        if key_mask is not None:
            x, rows = compact(x, key_mask)
            padding = x.shape[1] - rows.tokens
        if cu_seqlens is not None:
            x, offset = clear_slack(x, cu_seqlens), offsets(x.shape[1], cu_seqlens)
        shift, conv = (None, None) if state is None else (state.shift, state.conv)
        if self.shift_tokens:
            x, shift = token_shift(x, tail=shift, offset=offset, padding=padding)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            mixed, conv = self.conv(torch.cat((q, k, v), -1), tail=conv, offset=offset, padding=padding)
            q, k, v = mixed.split(self._sizes, -1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = k.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_kv_heads, self.value_dim)).transpose(1, 2)
        if self.rotary is not None:
            start = None if state is None else state.position
            position = positions(x.shape[1], start, cu_seqlens, x.device)
            q, k = self.rotary(q, position), self.rotary(k, position)
        attended = self.attend(
            q,
            k,
            v,
            key_mask=None if rows is None else rows.mask,
            cu_seqlens=cu_seqlens,
            state=None if state is None else state.sums,
            return_state=return_state,
        )
        out = attended[0] if isinstance(attended, tuple) else attended
        if self.gate_proj is not None:
            out = out * self.gate_proj(x).sigmoid().mT[..., None]
        y = restore(self.out_proj(out.transpose(1, 2).flatten(2)), rows)
        return (y, KernelAttentionState(attended[1], shift, conv)) if isinstance(attended, tuple) else y
