"""ELiTA's layer: attention by scalar logits of content and position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.elita import elita_attention
from ..ops.state import ElitaState
from ..ops.step import Unsuitable, Vector
from .checks import check_counts, check_input, check_state, size_of_head
from .padding import packed_positions, restore_rows, zero_after_packed, zero_masked
from .position_logits import SinusoidalLogits
from .projection import project
from .step import StepBuilder, known_to_programs, step_alone


@known_to_programs
class ElitaAttention(nn.Module):
    """Multi-head `cumulant.elita_attention` with logits of content and position.

    For every head, with `SinusoidalLogits` P₁ and P₂::

        c_j = k₁·x_j + P₁(j),   r_i = k₃·x_i + P₂(i),   s_i = k₂·x_i,   v_j = W_v x_j
        y = W_o elita_attention(c, r, s, v)

    The state holds H · (V + 1) numbers and the count of tokens.

    Source: Sharma 2023, "Efficient Linear-Time Attention Transformers" (ELiTA), Attention2.

    Args:
        dim: model dim D.
        num_heads: H.
        head_dim: value dim V of a head, by default D / H.
        features: sines of each position logit.
        horizon: length over which positions run from 0 to `time`, as a rule the longest training
            context; see `SinusoidalLogits` for positions beyond it. None: the length of the
            sequence less one, as published. Positions then depend on the final length. So there is
            no state, and the outputs of a prefix differ from those of the whole.
        time: see `SinusoidalLogits`.
        query_logit: use k₃; False: r is P₂ alone, as in the published code.
        clip: limit c, r and s to this size, 20 in the published code; None: exact for any size.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        features: int = 16,
        horizon: float | None = 1024,
        time: float = 1.0,
        query_logit: bool = True,
        clip: float | None = None,
    ):
        super().__init__()
        check_counts(dim=dim, num_heads=num_heads, head_dim=head_dim)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
        self.dim, self.num_heads, self.clip, self.relative = dim, num_heads, clip, horizon is None
        self.head_dim = size_of_head("head_dim", head_dim, dim, num_heads)
        self.logit_proj = nn.Linear(
            dim, (3 if query_logit else 2) * num_heads, bias=False
        )  # rows k1, k2, k3
        self.position = SinusoidalLogits(
            num_heads, features, horizon=1 if horizon is None else horizon, time=time
        )
        self.v_proj = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def extra_repr(self) -> str:
        return f"horizon={None if self.relative else self.position.horizon}, clip={self.clip}"

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ElitaState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ElitaState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`."""
        stepped = step_alone(self, x, state, return_state, key_mask, cu_seqlens)
        if stepped is not None:
            return stepped  # type: ignore[no-any-return]
        check_input(
            x, self.v_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        check_state(state, ElitaState, x)
        if self.relative and (state is not None or return_state):
            raise ValueError(
                "state: with horizon=None positions depend on the length of the whole sequence, so"
                " there is no state; give a horizon"
            )
        rows = None
        if key_mask is not None:
            x, rows = zero_masked(x, key_mask)
        if cu_seqlens is not None:
            x = zero_after_packed(x, cu_seqlens)
        key, query = self._position_logits(x, key_mask, cu_seqlens, state)
        content = project(self.logit_proj, x)
        content = content.to(torch.promote_types(content.dtype, torch.float32)).unflatten(
            -1, (-1, self.num_heads)
        )
        logits = content.permute(2, 0, 3, 1)  # [2 or 3, B, H, T]
        c, s = logits[0] + key, logits[1]
        r = logits[2] + query if len(logits) == 3 else query.to(c.dtype).expand_as(c)
        if self.clip is not None:
            c, r, s = (logit.clamp(-self.clip, self.clip) for logit in (c, r, s))
        value = (
            project(self.v_proj, x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        )
        attended = elita_attention(
            c,
            r,
            s,
            value,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
        out = attended[0] if isinstance(attended, tuple) else attended
        y = restore_rows(project(self.out_proj, out.transpose(1, 2).flatten(2)), rows)
        return (y, attended[1]) if isinstance(attended, tuple) else y

    def _position_logits(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: ElitaState | None,
    ) -> tuple[Tensor, Tensor]:
        """P₁ and P₂, ``[H, T]`` or ``[B, H, T]``. Masked tokens are not counted."""
        T = x.shape[1]
        if cu_seqlens is not None:
            position = packed_positions(T, cu_seqlens)
        elif key_mask is not None:
            position = (key_mask.cumsum(1) - 1).clamp(min=0)
        else:
            position = torch.arange(T, device=x.device)
        horizon = self._last_positions(T, key_mask, cu_seqlens) if self.relative else None
        if state is not None:
            position = position + state.position[:, None]
        elif horizon is None and position.dim() == 2:
            # rows share positions, so compute each position once
            table = self.position(torch.arange(T, device=x.device))
            return table[0][position].mT, table[1][position].mT
        key, query = self.position(position, horizon)
        return key.mT, query.mT

    @staticmethod
    def _last_positions(
        T: int, key_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor | float:
        """The last position of each token's sequence, at least 1."""
        if cu_seqlens is not None:
            lengths = torch.cat((cu_seqlens.diff(), cu_seqlens.new_full((1,), T)))
            index = torch.arange(T, device=cu_seqlens.device)
            return (lengths[torch.searchsorted(cu_seqlens[1:], index, right=True)] - 1).clamp(min=1)
        return (
            max(T - 1, 1) if key_mask is None else (key_mask.sum(1, keepdim=True) - 1).clamp(min=1)
        )

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        builder.rely_on(self.position)
        program, position = builder.program, self.position
        logits = builder.emit_projection(self.logit_proj, x)
        kinds, rest = divmod(logits.size, self.num_heads)
        if self.relative or not 0 < position.horizon < math.inf or rest or kinds not in (2, 3):
            raise Unsuitable
        factor = position.time / position.horizon
        split = logits.split(*[self.num_heads] * kinds)
        c = program.add_position_logits(split[0], position.a1, position.b1, position.c, factor)
        r = program.add_position_logits(
            split[2] if len(split) == 3 else None, position.a2, position.b2, position.c, factor
        )
        s = split[1]
        if self.clip is not None:
            c, r, s = (program.clamp(logit, self.clip) for logit in (c, r, s))
        attended = program.attend_elita(c, r, s, builder.emit_projection(self.v_proj, x))
        return builder.emit_projection(self.out_proj, attended, residual, add=residual is not None)

    def state_tensors(self, state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`, or [] for another mixer's state."""
        return [state.log_weight, state.mean] if isinstance(state, ElitaState) else []

    def state_from_tensors(self, tensors: list[Tensor], position: Tensor) -> ElitaState:
        """The state that consists of these tensors."""
        return ElitaState(tensors[0], tensors[1], position)
