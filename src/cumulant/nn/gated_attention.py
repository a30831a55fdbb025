"""The gated attention unit: one head of quadratic attention, gated."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.checks import check_bias
from ..ops.gated import gated_attention
from ..ops.state import KeyValueState
from .checks import check_input, check_key_value_state, check_state
from .gated_unit import GatedUnit, PreparedRows
from .padding import token_positions


class GatedAttentionUnit(GatedUnit):
    """The gated attention unit: ``y = W_o (silu(W_g h) ⊙ f(q kᵀ / n + b) silu(W_v h)) + x``.

    h is norm(x), and q and k are two scaled and offset copies of ``silu(W_z h)``. Its time is
    quadratic in the length, and its state grows.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 2.

    Args:
        dim: model dim D.
        query_key_dim: K.
        expansion_factor: value dim over D.
        is_causal: token t sees tokens up to t.
        activation: "relu2" or "laplace".
        length_scale: the divisor n. None: the number of tokens that a query sees. "total": the
            length of the whole sequence, as in FLASH-pytorch. With "total" a causal unit's outputs
            change as the sequence grows, so it has no state and cannot generate.
        scale_bias: divide the bias by n as well, as in FLASH-pytorch.
        norm: "layernorm", "rmsnorm", "scalenorm" or None.
        residual: add x to the output.
        relative_bias: add T5's relative position bias b, times sqrt(D).
        rotary_dim: number of dimensions of q and k to rotate, even; 0 for none.
        rotary_base: see `RotaryEmbedding`.
        dropout: dropout of attention weights.
        out_dropout: dropout of the output, before x is added.
        count_padding: count masked tokens in positions and in n, as FLASH-pytorch does. Their keys
            are hidden, but their outputs are not set to zero.
    """

    def __init__(
        self,
        dim: int,
        *,
        query_key_dim: int = 128,
        expansion_factor: float = 2.0,
        is_causal: bool = True,
        activation: str = "relu2",
        length_scale: float | str | None = None,
        scale_bias: bool = False,
        norm: str | None = "layernorm",
        residual: bool = True,
        relative_bias: bool = True,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        count_padding: bool = False,
    ):
        super().__init__(
            dim,
            uses=2,
            query_key_dim=query_key_dim,
            expansion_factor=expansion_factor,
            is_causal=is_causal,
            activation=activation,
            norm=norm,
            relative_bias=relative_bias,
            relative_bias_scale=dim**0.5,
            rotary_dim=rotary_dim,
            rotary_base=rotary_base,
            residual=residual,
            dropout=dropout,
            out_dropout=out_dropout,
            count_padding=count_padding,
        )
        number = isinstance(length_scale, (int, float)) and 0 < length_scale < math.inf
        if not (length_scale is None or length_scale == "total" or number):
            raise ValueError(
                f"length_scale: expected a positive number, 'total' or None, got {length_scale!r}"
            )
        self.length_scale, self.scale_bias = length_scale, scale_bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length_scale={self.length_scale!r}"

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KeyValueState | None = None,
        return_state: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`.

        ``bias [T, S]`` or ``[B, 1, T, S]`` is added to the unit's own bias. Its columns are the
        tokens of the state, then those of x, padding included.
        """
        check_input(
            x, self.qk_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        check_state(state, KeyValueState, x)
        check_key_value_state(state, 1, self.query_key_dim, self.hidden_dim, x)
        if state is not None or return_state:
            self._check_state_allowed()
        # A state keeps padding between tokens. Without one, padding moves to the end of each row,
        # and all rows share one bias.
        stateless = state is None and not return_state and bias is None
        inner = self._prepare_rows(x, key_mask, cu_seqlens, in_order=stateless)
        mask = key_mask if inner.rows is None else inner.rows.mask
        h = inner.x if self.norm is None else self.norm(inner.x)
        position = self._token_positions(inner, state, cu_seqlens)
        query, key = self._queries_and_keys(h, position)
        divisor = self._length_divisor(inner, position, cu_seqlens)
        scattered = not self.count_padding and not stateless
        scattered &= inner.rows is not None or (state is not None and state.mask is not None)
        attended = gated_attention(
            query,
            key,
            self._project_values(h),
            activation=self.activation,
            is_causal=self.is_causal,
            length_scale=divisor,
            bias=self._total_bias(x, bias, position, scattered, state, divisor, cu_seqlens),
            dropout_p=self._active_dropout,
            key_mask=mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
        if isinstance(attended, tuple):
            end = attended[1]
            if self.count_padding:
                end = replace(end, position=torch.full_like(end.position, end.key.shape[2]))
            return self._gate_and_project(attended[0], h, inner), end
        return self._gate_and_project(attended, h, inner)

    def _check_state_allowed(self) -> None:
        if not self.is_causal:
            raise ValueError(
                "state: only causal attention carries a state from call to call; build with"
                " is_causal=True"
            )
        if self.length_scale == "total":
            raise ValueError(
                "state: length_scale='total' divides scores by the length of the whole sequence,"
                " which is not known while it grows; build with length_scale=<the length the unit"
                " was trained at>, or length_scale=None"
            )

    def _token_positions(
        self, inner: PreparedRows, state: KeyValueState | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The position of each token in its sequence, ``[T]`` or ``[B, T]``."""
        start = None if state is None else state.position
        if self.count_padding and state is not None:
            return torch.arange(inner.x.shape[1], device=inner.x.device) + state.key.shape[2]
        if inner.rows is None:
            return token_positions(inner.x.shape[1], start, cu_seqlens, inner.x.device)
        index = (inner.rows.mask.cumsum(1) - 1).clamp(min=0)
        return index if start is None else index + start[:, None]

    def _length_divisor(
        self, inner: PreparedRows, position: Tensor, cu_seqlens: Tensor | None
    ) -> float | Tensor | None:
        """The divisor n, or one for each query ``[B or 1, T or 1]``; None: the operation's own."""
        T = inner.x.shape[1]
        if isinstance(self.length_scale, (int, float)):
            return float(self.length_scale)
        if self.length_scale is None and not self.scale_bias and not self.count_padding:
            return None
        if self.length_scale is None and self.is_causal:
            return (position if position.dim() == 2 else position[None]) + 1
        if inner.rows is not None:
            return inner.rows.tokens[:, None].clamp(min=1)
        if cu_seqlens is not None:
            # the first index of each token's sequence
            first = torch.arange(T, device=position.device) - position
            ends = torch.cat((cu_seqlens[1:], cu_seqlens.new_full((1,), T)))
            after = torch.searchsorted(cu_seqlens[1:].contiguous(), first, right=True)
            return (ends[after] - first).clamp(min=1)[None]
        return float(max(T, 1))

    def _total_bias(
        self,
        x: Tensor,
        bias: Tensor | None,
        position: Tensor,
        scattered: bool,
        state: KeyValueState | None,
        divisor: float | Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor | None:
        """The unit's bias plus the argument's, ``[1, T, S]`` or ``[B, 1, T, S]``."""
        T, past = position.shape[-1], 0 if state is None else state.key.shape[2]
        S = past + T
        check_bias(
            bias,
            ((T, S), (1, T, S), (1, 1, T, S), (x.shape[0], 1, T, S)),
            "[T, S] or [B, 1, T, S]",
            x,
        )
        if self.relative_bias is not None:
            if scattered:
                own = self.relative_bias.at(position, _key_positions(position, state))
            elif cu_seqlens is not None and bias is None and not torch.compiler.is_compiling():
                # all sequences share one bias, as long as the longest of them
                T = S = int(cu_seqlens.diff().max())
                own = self.relative_bias(T, device=x.device)
            else:
                own = self.relative_bias(T, S, device=x.device)
            bias = own if bias is None else own + bias
        if bias is None or not self.scale_bias or divisor is None:
            return bias
        if cu_seqlens is not None and isinstance(divisor, Tensor):
            if self.length_scale == "total" or not self.is_causal:
                raise ValueError(
                    "cu_seqlens: with scale_bias each packed sequence needs a bias of its own; pass"
                    " a padded batch, or build with length_scale=<a number>"
                )
            # by position in a sequence, as the bias
            divisor = torch.arange(1, T + 1, device=bias.device)[None]
        return bias / (divisor if isinstance(divisor, float) else divisor[:, None, :, None])


def _key_positions(position: Tensor, state: KeyValueState | None) -> Tensor:
    """The position of each key in its sequence, the state's keys first: ``[B, S]``."""
    if state is None:
        return position
    past = torch.arange(state.key.shape[2], device=position.device).expand(position.shape[0], -1)
    if state.mask is not None:
        past = state.mask.cumsum(1) - 1
    return torch.cat((past, position), 1)
