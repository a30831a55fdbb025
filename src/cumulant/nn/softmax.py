"""Softmax attention (PyTorch's SDPA) as a mixer: the baseline, with a state that grows."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.dispatch import no_transform_active
from ..ops.state import KeyValueState
from ..ops.step import Unsuitable, Vector
from .checks import (
    check_counts,
    check_input,
    check_key_value_state,
    check_state,
    count_kv_heads,
    size_of_head,
)
from .padding import packed_positions, zero_after_packed
from .projection import project
from .rotary import RotaryEmbedding
from .step import StepBuilder, known_to_programs, step_alone


def attend_softmax(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA with grouped heads. For tangents and under vmap it runs as a formula, not a kernel."""
    if torch.compiler.is_compiling() or no_transform_active():
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def attend_visible(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """SDPA under a boolean mask ``[..., T, S]``. Rows that see nothing are zero, not NaN."""
    blind = ~visible.any(-1, keepdim=True)
    out = attend_softmax(query, key, value, attn_mask=visible | blind)
    return out.masked_fill(blind, 0)


@known_to_programs
class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention, ``softmax(q kᵀ / sqrt(K)) v``.

    Args:
        dim: model dim D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, dividing H; by default H.
        head_dim: dim of a head, by default ``dim / num_heads``.
        is_causal: token t sees tokens up to t.
        rotary: rotate queries and keys by their position.
        rotary_base: see `RotaryEmbedding`.
    """

    window: int | None = None  # tokens that a token sees

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = True,
        rotary: bool = False,
        rotary_base: float = 10000.0,
    ):
        super().__init__()
        check_counts(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        groups = count_kv_heads(num_kv_heads, num_heads)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, groups
        self.head_dim = size_of_head("head_dim", head_dim, dim, num_heads)
        self.is_causal = is_causal
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.rotary = RotaryEmbedding(self.head_dim, rotary_base) if rotary else None

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KeyValueState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`."""
        stepped = step_alone(self, x, state, return_state, key_mask, cu_seqlens)
        if stepped is not None:
            return stepped  # type: ignore[no-any-return]
        check_input(
            x, self.q_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        check_state(state, KeyValueState, x)
        check_key_value_state(state, self.num_kv_heads, self.head_dim, self.head_dim, x)
        if not self.is_causal and (state is not None or return_state):
            raise ValueError(
                "state: only causal attention carries a state from call to call; build with"
                " is_causal=True"
            )
        q, k, v, count = self._project_heads(x, key_mask, cu_seqlens, state)
        past = 0
        mask = key_mask
        if state is not None:
            past = state.key.shape[2]
            if key_mask is not None or state.mask is not None:
                mask = torch.cat(
                    (_mask_or_ones(state.mask, x, past), _mask_or_ones(key_mask, x, x.shape[1])), 1
                )
            k, v = torch.cat((state.key, k), 2), torch.cat((state.value, v), 2)
        out = (
            self.attend_packed(q, k, v, cu_seqlens)
            if cu_seqlens is not None
            else self.attend(q, k, v, mask, past)
        )
        y = project(self.out_proj, out.transpose(1, 2).flatten(2))
        if key_mask is not None:
            y = y.masked_fill(~key_mask[..., None], 0)
        if not return_state:
            return y
        position = count if state is None else count + state.position
        return y, self.remember(k, v, mask, position)

    def _project_heads(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: KeyValueState | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated q and k, v, and the number of new tokens in each row ``[B]``."""
        B, T = x.shape[:2]
        if cu_seqlens is not None:
            x = zero_after_packed(x, cu_seqlens)
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0)
            count = key_mask.sum(1)
        else:
            count = torch.full((B,), T, dtype=torch.int64, device=x.device)
        q = project(self.q_proj, x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = (
            project(self.k_proj, x)
            .unflatten(-1, (self.num_kv_heads, self.head_dim))
            .transpose(1, 2)
        )
        v = (
            project(self.v_proj, x)
            .unflatten(-1, (self.num_kv_heads, self.head_dim))
            .transpose(1, 2)
        )
        if self.rotary is not None:
            if cu_seqlens is not None:
                position = packed_positions(T, cu_seqlens)
            elif key_mask is not None:
                position = key_mask.cumsum(1) - 1
            else:
                position = torch.arange(T, device=x.device)
            if state is not None:
                position = position + state.position[:, None]
            q, k = self.rotary.both(q, k, position)
        return q, k, v, count

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """``q [B, H, T, K]`` attends to ``k, v [B, G, past + T, K]``."""
        T, S = q.shape[2], k.shape[2]
        if mask is None and (past == 0 or T == 1 or not self.is_causal):
            # a bool in compiled graphs too, where lengths are symbols
            causal = self.is_causal if past == 0 else False
            return attend_softmax(q, k, v, is_causal=causal)
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
        if self.is_causal:
            visible = visible.tril(past)
        if mask is not None:
            visible = visible & mask[:, None, None, :]
        return attend_visible(q, k, v, visible)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Each packed sequence attends to itself. Rows after the last sequence are zero."""
        bounds = cu_seqlens.tolist()
        spans = itertools.pairwise(bounds)
        outs = [self.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], None, 0) for a, b in spans]
        outs.append(torch.zeros_like(q[:, :, bounds[-1] :]))
        return torch.cat(outs, 2)

    def remember(
        self, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor
    ) -> KeyValueState:
        return KeyValueState(k, v, mask, position)

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        if not self.is_causal:
            raise Unsuitable
        size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = builder.program.vector(size + 2 * kv_size).split(size, kv_size, kv_size)
        for projection, part in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)):
            builder.emit_projection(projection, x, part)
        if self.rotary is not None:
            builder.rely_on(self.rotary)
            both = Vector(q.start, size + kv_size)
            builder.program.rotate(both, self.head_dim, self.rotary.base)
        y = builder.program.attend_softmax(q, k, v, self.num_kv_heads, self.head_dim, self.window)
        return builder.emit_projection(self.out_proj, y, residual, add=residual is not None)

    def state_tensors(self, state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`, or [] for one that steps cannot take."""
        if not isinstance(state, KeyValueState) or state.mask is not None:
            return []
        return [state.key, state.value]

    def state_from_tensors(self, tensors: list[Tensor], position: Tensor) -> KeyValueState:
        """The state that consists of these tensors."""
        return KeyValueState(tensors[0], tensors[1], None, position)


def _mask_or_ones(mask: Tensor | None, x: Tensor, length: int) -> Tensor:
    return x.new_ones(x.shape[0], length, dtype=torch.bool) if mask is None else mask
