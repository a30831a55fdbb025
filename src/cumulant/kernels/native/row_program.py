"""A program that runs for many sequences, any number of tokens of each at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .library import Past, call_library
from .program import Program

UNSEEN = 1 << 62  # of the tokens that attention without a window may see


class RowProgram:
    """A program on the states of up to `slots` sequences, which it changes in place.

    A token's numbers do not depend on the other sequences, nor on how many tokens of its own are
    run together with it: the bits are the same. Numbers that are not finite stay in their sequence.

    Args:
        program: what to run.
        slots: the most sequences.
        room: for how many tokens of each attention without a window has memory.
        most: the most tokens of a sequence in one run.

    in_order: whether a run must be of one token of each of the first n slots, because the program
        does not write all its states in place.
    position: ``[slots]``, how many tokens each sequence has.
    """

    def __init__(self, program: Program, slots: int, room: int, most: int):
        self._program, self._most = program, most
        self.in_order = bool(program.replaced)
        self.position = np.zeros(slots, dtype=np.int64)
        self._capacities = _capacities(program, room, most)
        self._lengths = {i: np.zeros(slots, dtype=np.int64) for i in program.windows}
        self._states = [
            torch.empty(shape, dtype=dtype, device="cpu").fill_(initial)
            for shape, dtype, initial in zip(
                self._shapes(slots), program.state_dtypes, program.initial, strict=True
            )
        ]
        self._next = {i: torch.zeros_like(self._states[i]) for i in program.replaced}
        pasts = []
        for i, window in program.windows.items():
            size = self._capacities[i]
            pasts.append(Past(size, size, 0, size, UNSEEN if window is None else window - 1))
        position = torch.from_numpy(self.position)
        self._arguments = program.arguments(slots, self._states, self._states, position, pasts)
        self._arguments.separate = 1
        for i, after in self._next.items():
            self._arguments.after[i] = after.data_ptr()
        self._out = torch.empty(0, program.output.size, dtype=torch.float32, device="cpu")

    def _shapes(self, slots: int) -> list[tuple[int, ...]]:
        sizes = self._capacities | {i + 1: size for i, size in self._capacities.items()}
        return [
            (slots, *(sizes[i] if n == -1 else n for n in shape))
            for i, shape in enumerate(self._program.states)
        ]

    @staticmethod
    def slot_bytes(program: Program, room: int, most: int) -> int:
        """The memory of one slot."""
        total, sizes = 0, _capacities(program, room, most)
        for i, (shape, dtype) in enumerate(zip(program.states, program.state_dtypes, strict=True)):
            numbers = 1
            for n in shape:
                numbers *= sizes[i if i in sizes else i - 1] if n == -1 else n
            total += numbers * dtype.itemsize * (2 if i in program.replaced else 1)
        return total

    @staticmethod
    def token_bytes(program: Program) -> int:
        """The memory that each token of a run takes."""
        return 4 * (program.width + program.output.size)

    def clear(self, slot: int) -> None:
        """Begin a sequence of no tokens."""
        for state, initial in zip(self._states, self._program.initial, strict=True):
            state[slot] = initial
        for lengths in (self.position, *self._lengths.values()):
            lengths[slot] = 0

    def write(self, slot: int, states: Sequence[Tensor], position: int) -> None:
        """Begin a sequence from states ``[1, ...]``, which are copied."""
        for i, state in enumerate(states):
            if i in self._lengths:
                self._lengths[i][slot] = state.shape[2]
            if -1 in self._program.states[i]:
                self._states[i][slot, :, : state.shape[2]] = state[0]
            else:
                self._states[i][slot] = state[0]
        self.position[slot] = position

    def read(self, slot: int) -> list[Tensor]:
        """The states ``[1, ...]`` of a sequence, copied."""
        states = []
        for i, state in enumerate(self._states):
            one = state[slot : slot + 1]
            if -1 in self._program.states[i]:
                first = i if i in self._lengths else i - 1
                length, window = int(self._lengths[first][slot]), self._program.windows[first]
                begin = 0 if window is None else max(0, length - window + 1)
                one = one[:, :, begin:length]
            states.append(one.clone())
        return states

    def copy(self, source: int, target: int) -> None:
        """Begin a sequence as another one is."""
        for i, state in enumerate(self._states):
            if -1 in self._program.states[i]:
                length = int(self._lengths[i if i in self._lengths else i - 1][source])
                state[target, :, :length] = state[source, :, :length]
            else:
                state[target] = state[source]
        for lengths in (self.position, *self._lengths.values()):
            lengths[target] = lengths[source]

    def run(
        self, x: Tensor, slots: Sequence[int], counts: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        """The next tokens of sequences, contiguous fp32 ``x [n, dim]``.

        counts: how many there are of each slot, one after another. wanted: the outputs of how many
        last ones are wanted. Returns these, ``[sum(wanted), output]``, which the next run
        overwrites. A sequence without room must not run.
        """
        where, many = np.array(slots, dtype=np.int64), np.array(counts, dtype=np.int64)
        ends = many.cumsum()
        self._check(where, many, int(ends[-1]), len(x))
        for i, lengths in self._lengths.items():
            for slot in where[lengths[where] + many > self._capacities[i]]:
                self._drop_unseen(i, int(slot))
        rows = where.repeat(many)
        behind = np.arange(len(rows)) - (ends - many).repeat(many)  # of each sequence's first
        position = self.position[rows] + behind
        lengths_of_rows = [lengths[rows] + behind for lengths in self._lengths.values()]
        found = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, wanted)])
        if len(found) > len(self._out):
            self._out = self._out.new_empty(len(found), self._program.output.size)
        a = self._arguments
        a.B, a.threads, a.input = len(rows), torch.get_num_threads(), x.data_ptr()
        a.position, a.out = position.ctypes.data, self._out.data_ptr()
        a.slots = None if self.in_order else rows.ctypes.data
        a.wanted, a.wanted_count = (found if len(found) else rows).ctypes.data, len(found)
        for number, lengths in enumerate(lengths_of_rows):
            a.pasts[number].lengths = lengths.ctypes.data
        call_library("cumulant_program", a)
        for lengths in (self.position, *self._lengths.values()):
            lengths[where] += many
        for i, after in self._next.items():
            self._states[i], self._next[i] = after, self._states[i]
            a.before[i], a.after[i] = after.data_ptr(), self._next[i].data_ptr()
        return self._out[: len(found)]

    def _check(self, slots: np.ndarray, counts: np.ndarray, total: int, given: int) -> None:
        if total != given or len(slots) != len(counts) or counts.min() < 1:
            raise ValueError(f"counts: expected at least 1 each and {given} in all, got {counts}")
        if counts.max() > self._most or len(set(slots.tolist())) < len(slots):
            raise ValueError(f"slots: expected each once, with at most {self._most} tokens")
        if self.in_order and (total > len(slots) or (slots != np.arange(len(slots))).any()):
            raise ValueError("slots: expected one token of each of the first slots")

    def _drop_unseen(self, i: int, slot: int) -> None:
        """Make room for further tokens, by what their window does not see."""
        lengths, window = self._lengths[i], self._program.windows[i]
        length = int(lengths[slot])
        if window is None:
            raise RuntimeError(f"slot {slot} has no room for more than {length} tokens")
        for j in (i, i + 1):
            kept = self._states[j][slot, :, length - window + 1 : length].clone()
            self._states[j][slot, :, : window - 1] = kept
        lengths[slot] = window - 1


def _capacities(program: Program, room: int, most: int) -> dict[int, int]:
    """The tokens that each state of keys has memory for."""
    return {
        i: room if window is None else window + max(window, most)
        for i, window in program.windows.items()
    }
