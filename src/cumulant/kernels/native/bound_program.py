"""A program that runs for many tokens, on states of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import Past, call_library
from .program import Program, Unsuitable

UNSEEN = 1 << 62  # of the tokens that attention without a window may see
ROOM = 256  # tokens, at least, by which memory of keys and values grows


class BoundProgram:
    """A program on states that it changes in place from token to token.

    Keys and values lie in memory with room for more tokens, which grows by a fourth.

    Args:
        program: what to run.
        states: as `Program.accepts_states` wants them. They are not changed.
        position: ``[B]``, or None if nothing rotates; whoever runs the program counts it on.
        masks: for each pair of keys and values a mask ``[B, S]`` of the tokens before, or None. Of
            each row only the first ones may be masked.
    """

    def __init__(
        self,
        program: Program,
        states: list[Tensor],
        position: Tensor | None,
        masks: list[Tensor | None],
    ):
        rows = len(states[0])
        self._program, self._position = program, position
        self.failed = False  # a token has failed half-way, so the states are of no use
        self._firsts = [None if mask is None else _count_masked(mask) for mask in masks]
        self._states, pasts = [s.clone() for s in states], []
        self._next = {i: torch.empty_like(states[i]) for i in program.replaced}
        for i, window in program.windows.items():
            self._states[i : i + 2] = states[i : i + 2]  # copied where room is made
            length = states[i].shape[2]
            seen = UNSEEN if window is None else window - 1
            pasts.append(Past(length, length, 0, length, seen))
        self._arguments = program.arguments(rows, self._states, self._states, position, pasts)
        for i, after in self._next.items():
            self._arguments.after[i] = after.data_ptr()
        self._pasts = self._arguments.pasts[: len(pasts)]
        for past, first in zip(self._pasts, self._firsts, strict=True):
            past.first = None if first is None else first.data_ptr()
        self._out = torch.empty(rows, program.output.size, dtype=torch.float32, device="cpu")
        self._arguments.out = self._out.data_ptr()

    def step(self, x: Tensor) -> Tensor:
        """Run on contiguous fp32 ``x [B, dim]``; returns ``[B, output]``, which is overwritten."""
        for number, past in enumerate(self._pasts):
            if past.length == past.capacity:
                self._make_room(number)
        self._arguments.input = x.data_ptr()
        try:
            call_library("cumulant_program", self._arguments)
        except Exception:
            self.failed = True
            raise
        finally:  # an interruption that comes during the call is raised behind it
            for past in self._pasts:
                past.length += 1
            for i, after in self._next.items():
                self._states[i], self._next[i] = after, self._states[i]
                self._arguments.before[i] = after.data_ptr()
                self._arguments.after[i] = self._next[i].data_ptr()
        return self._out

    def states(self) -> list[Tensor]:
        """The states now; those of fixed size are the program's own memory."""
        states = list(self._states)
        for (i, _), past in zip(self._program.windows.items(), self._pasts, strict=True):
            for j in (i, i + 1):
                states[j] = states[j][:, :, self._begin(past) : past.length].clone()
        return states

    def masks(self) -> list[Tensor | None]:
        """The masks of keys and values now, as at first."""
        return [
            None
            if first is None
            else torch.arange(self._begin(past), past.length, device="cpu") >= first[:, None]
            for past, first in zip(self._pasts, self._firsts, strict=True)
        ]

    @staticmethod
    def _begin(past: Past) -> int:
        return max(0, int(past.length) - int(past.seen))

    def _make_room(self, number: int) -> None:
        """Make room for another token. What no later token sees is dropped."""
        past, state = self._pasts[number], list(self._program.windows)[number]
        begin, length = self._begin(past), past.length
        room = max(ROOM, (length - begin) // 4)
        for i in (state, state + 1):
            old = self._states[i]
            B, G, _, K = old.shape
            new = self._states[i] = old.new_empty(B, G, length - begin + room, K)
            new[:, :, : length - begin] = old[:, :, begin:length]
            self._arguments.before[i] = self._arguments.after[i] = new.data_ptr()
        past.length, past.capacity = length - begin, length - begin + room
        past.new_capacity = past.capacity
        first = self._firsts[number]
        if first is not None:
            first.sub_(begin).clamp_(min=0)


def _count_masked(mask: Tensor) -> Tensor:
    """How many first tokens of each row are masked; Unsuitable if others are."""
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise Unsuitable
    return (~mask).sum(1)
