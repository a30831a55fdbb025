"""Short causal convolutions, the local mixing that linear attention lacks (Arora et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.pointwise import short_convolution
from ..ops.state import State, register_state
from ..ops.step import Vector
from .checks import (
    check_counts,
    check_floats,
    check_input,
    check_state,
    check_state_tensor,
    check_tensor_like,
)
from .padding import compact_rows, last_tokens, packed_positions, restore_rows, zero_after_packed
from .projection import project
from .step import StepBuilder, known_to_programs, step_mixer


@known_to_programs
class ShortConvolution(nn.Module):
    """Depthwise causal convolution: ``y_t = Σ_{j < size} w_j ⊙ x_{t-j}``.

    There are zeros before the first token. It starts near the identity (w_0 near 1, the rest near
    0), so adding it to a model changes little at first.

    Args:
        dim: channels D.
        size: taps, the newest token included.
    """

    def __init__(self, dim: int, size: int = 4):
        super().__init__()
        check_counts(dim=dim, size=size)
        self.dim, self.size = dim, size
        self.weight = nn.Parameter(torch.empty(size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(self.initial_weight(self.weight))

    @staticmethod
    def initial_weight(like: Tensor) -> Tensor:
        """1 for the newest tap, 0 for the rest, plus noise of deviation 0.02."""
        weight = torch.randn_like(like) * 0.02
        weight[0] += 1
        return weight

    def forward(
        self,
        *x: Tensor,
        tail: Tensor | None = None,
        offset: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """``x [B, T, D]`` -> ``[B, T, D]`` and the new tail ``[B, size - 1, D]``.

        The channels may be split over several tensors, each of which gets an output. tail, offset
        and padding are as in `token_shift`, but for the length of the tail.
        """
        self._check_input(x, tail)
        sizes, n = [part.shape[-1] for part in x], self.size - 1
        weights = self.weight.to(x[0].dtype).split(sizes, -1)
        tails = [None] * len(x) if tail is None else tail.to(x[0].dtype).split(sizes, -1)
        new = []
        for part, past in zip(x, tails, strict=True):
            # a compiled graph must not compare lengths, or it holds for some only
            long = padding is None and not torch.compiler.is_compiling() and part.shape[1] >= n
            before = (
                part.new_zeros(part.shape[0], n, part.shape[2])
                if past is None and not long
                else past
            )
            new.append(last_tokens(part if long else torch.cat((before, part), 1), padding, n))
        mixed = (
            short_convolution(*inputs, offset) for inputs in zip(x, weights, tails, strict=True)
        )
        tail = new[0] if len(x) == 1 else torch.cat(new, -1)
        # a state has the dtype of the weights, under autocast too
        return *mixed, tail.to(self.weight.dtype)

    def _check_input(self, x: tuple[Tensor, ...], tail: Tensor | None) -> None:
        for part in x:
            check_floats(part, "[B, T, D]")
        if (
            not x
            or any(part.dim() != 3 for part in x)
            or sum(part.shape[-1] for part in x) != self.dim
        ):
            raise ValueError(
                f"x: expected [B, T, D] with D={self.dim} in all, got"
                f" {[list(part.shape) for part in x]}"
            )
        if any(part.shape[:2] != x[0].shape[:2] or part.dtype != x[0].dtype for part in x[1:]):
            got = ", ".join(f"{list(part.shape)} {part.dtype}" for part in x)
            raise ValueError(f"x: expected tensors with the same B, T and dtype, got {got}")
        if tail is not None:
            check_tensor_like(
                tail,
                "tail: expected",
                "[B, size - 1, D]",
                (x[0].shape[0], self.size - 1, self.dim),
                x[0],
            )


@dataclass(frozen=True)
class ConvolutionState(State):
    """The state of `GatedShortConvolution`.

    tail: ``[B, size - 1, D]``, the last inputs, which the next tokens see. position: ``[B]``, the
    number of tokens so far.
    """

    tail: Tensor
    position: Tensor


register_state(ConvolutionState)


@known_to_programs
class GatedShortConvolution(nn.Module):
    """Gated convolution, ``W_out (conv(W_in x) ⊙ W_gate x)``: Based's third kind of layer, causal.

    Args:
        dim: model dim D.
        size: taps of the convolution.
    """

    def __init__(self, dim: int, *, size: int = 4):
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv = ShortConvolution(dim, size)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ConvolutionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ConvolutionState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`."""
        if state is not None and return_state and key_mask is None and cu_seqlens is None:
            stepped = step_mixer(self, x, state)
            if stepped is not None:
                return stepped
        check_input(
            x, self.in_proj, self.dim, key_mask, cu_seqlens, state is not None or return_state
        )
        check_state(state, ConvolutionState, x)
        if state is not None:
            tail = x.shape[0], self.conv.size - 1, self.dim
            check_state_tensor(state.tail, "tail", "[B, size - 1, D]", tail, x)
        rows, padding, offset = None, None, None
        if key_mask is not None:
            x, rows = compact_rows(x, key_mask)
            padding = x.shape[1] - rows.tokens
        if cu_seqlens is not None:
            x, offset = zero_after_packed(x, cu_seqlens), packed_positions(x.shape[1], cu_seqlens)
        content, gate = project(self.in_proj, x).chunk(2, -1)
        content, tail = self.conv(
            content, tail=None if state is None else state.tail, offset=offset, padding=padding
        )
        y = restore_rows(project(self.out_proj, content * gate), rows)
        if not return_state:
            return y
        count = (
            x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
            if rows is None
            else rows.tokens
        )
        return y, ConvolutionState(tail, count if state is None else count + state.position)

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        builder.rely_on(self.conv)
        content, gate = builder.emit_projection(self.in_proj, x).split(self.dim, self.dim)
        mixed = builder.program.activate(
            "product", builder.program.convolve(content, self.conv.weight), gate
        )
        return builder.emit_projection(self.out_proj, mixed, residual, add=residual is not None)

    @staticmethod
    def state_tensors(state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`, or [] for another mixer's state."""
        return [state.tail] if isinstance(state, ConvolutionState) else []

    @staticmethod
    def state_from_tensors(tensors: list[Tensor], position: Tensor) -> ConvolutionState:
        """The state that consists of these tensors."""
        return ConvolutionState(tensors[0], position)
