"""Programs: one token through a whole layer in one native call, for decoding.

For a single token, Python takes longer than the arithmetic. So modules write a program once, a list
of instructions on vectors, and it runs for every token. It works in fp32, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_instructions import AttentionInstructions
from .instructions import DTYPES, OPERATIONS, PLACED, Unsuitable, Vector
from .library import (
    TYPES,
    Instruction,
    Past,
    _pointer,
    call_library,
    instruction_set_number,
)
from .library import Program as Arguments

__all__ = ["DTYPES", "Program", "Unsuitable", "Vector"]


class Program(AttentionInstructions):
    """Instructions that can be run, once they are all written."""

    def set_output(self, output: Vector) -> None:
        """End the program; `output` is its result."""
        self.output, self._widest = output, max(self._widest, self._width)
        behind = (OPERATIONS[i.operation] for i in self._instructions[self.tail :])
        if not self.tail or not PLACED.isdisjoint(behind):
            self.tail = len(self._instructions)
        self._written = (Instruction * len(self._instructions))(*self._instructions)

    @property
    def width(self) -> int:
        """Numbers of a token that a run keeps."""
        return self._widest

    def accepts_states(self, x: Tensor, states: Sequence[Tensor | None]) -> bool:
        """Whether the program can run on these states."""
        if len(states) != len(self.states):
            return False
        rows, dtypes = x.shape[0], self.state_dtypes
        # A generator's calls would take longer than the checks.
        for i, (s, shape) in enumerate(zip(states, self.states, strict=True)):
            if not isinstance(s, Tensor) or s.dtype != dtypes[i] or s.device.type != "cpu":
                return False
            if -1 in shape:  # keys or values, of any number of tokens
                if s.dim() != 4 or (*s.shape[:2], s.shape[3]) != (rows, shape[0], shape[2]):
                    return False
            elif s.shape != (rows, *shape) or not s.is_contiguous():
                return False
        return not self.windows or self._accepts_pasts(states)

    def _accepts_pasts(self, states: Sequence[Any]) -> bool:
        """Whether keys and values are of as many tokens, and not of more than a window keeps."""
        for i, window in self.windows.items():
            length = states[i].shape[2]
            if states[i + 1].shape[2] != length or (window is not None and length >= window):
                return False
        return True

    def run(
        self, x: Tensor, states: Sequence[Tensor], position: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run on contiguous fp32 ``x [B, ..., dim]``; returns ``[B, output]`` and the new states.

        position: ``[B]``, the tokens' positions, which only rotations need.
        """
        out, after = x.new_empty(x.shape[0], self.output.size), list(map(torch.empty_like, states))
        pasts, before = [], list(states)
        for i, window in self.windows.items():
            B, G, length, K = states[i].shape
            kept = length + 1 if window is None else min(length + 1, window - 1)
            for j in (i, i + 1):
                before[j], after[j] = before[j].contiguous(), before[j].new_empty(B, G, kept, K)
            pasts.append(Past(length, length, length + 1 - kept, kept, length))
        arguments = self.arguments(x.shape[0], before, after, position, pasts)
        arguments.input, arguments.out = x.data_ptr(), out.data_ptr()
        call_library("cumulant_program", arguments)
        return out, after

    def arguments(
        self,
        rows: int,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        position: Tensor | None,
        pasts: list[Past],
    ) -> Arguments:
        """The arguments of a run, but for its input and output."""
        if position is None and self.needs_position:
            raise ValueError("position: expected [B], got None")
        output, pointers = self.output, _pointer * len(before)
        return Arguments(
            rows, self._widest, len(self._instructions), self.input.size, output.start, output.size,
            torch.get_num_threads(), instruction_set_number(), TYPES[self.dtype], self._written,
            None if position is None else position.data_ptr(), None, None,
            pointers(*map(Tensor.data_ptr, before)), pointers(*map(Tensor.data_ptr, after)),
            (Past * len(pasts))(*pasts), 0, None, None, 0, self.tail,
        )  # fmt: skip
