"""A program that runs for many sequences, which come and go from token to token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import Past, call_library
from .program import Program

UNSEEN = 1 << 62  # of the tokens that attention without a window may see


class RowProgram:
    """A program on the states of up to `rows` sequences, which it changes in place.

    A step takes the sequences in the first rows. A row's numbers do not depend on which other rows
    there are, nor on which row it is. Numbers that are not finite stay in their row.

    Args:
        program: what to run.
        rows: the most sequences.
        room: for how many tokens of each row attention without a window has memory. A window has
            room for twice its own.

    position: ``[rows]``, how many tokens each row has seen.
    """

    def __init__(self, program: Program, rows: int, room: int):
        self._program = program
        self.position = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self._capacities = {
            i: room if window is None else 2 * window for i, window in program.windows.items()
        }
        self._lengths = {i: torch.zeros_like(self.position) for i in program.windows}
        self._states = [
            torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in self._shapes(rows)
        ]
        self._next = {i: torch.zeros_like(self._states[i]) for i in program.replaced}
        pasts = []
        for i, window in program.windows.items():
            size = self._capacities[i]
            seen = UNSEEN if window is None else window - 1
            past = Past(size, size, 0, size, seen)
            past.lengths = self._lengths[i].data_ptr()
            pasts.append(past)
        self._arguments = program.arguments(rows, self._states, self._states, self.position, pasts)
        self._arguments.separate = 1
        for i, after in self._next.items():
            self._arguments.after[i] = after.data_ptr()
        self._out = torch.empty(rows, program.output.size, dtype=torch.float32, device="cpu")
        self._arguments.out = self._out.data_ptr()

    def _shapes(self, rows: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        program, room = self._program, dict(self._capacities)
        room |= {i + 1: size for i, size in self._capacities.items()}
        return [
            ((rows, *(room[i] if n == -1 else n for n in shape)), dtype)
            for i, (shape, dtype) in enumerate(
                zip(program.states, program.state_dtypes, strict=True)
            )
        ]

    @staticmethod
    def row_bytes(program: Program, room: int) -> int:
        """The memory of one row."""
        total = 0
        for i, (shape, dtype) in enumerate(zip(program.states, program.state_dtypes, strict=True)):
            window = program.windows.get(i, program.windows.get(i - 1))
            tokens = room if window is None else 2 * window
            numbers = 1
            for n in shape:
                numbers *= tokens if n == -1 else n
            total += numbers * dtype.itemsize * (2 if i in program.replaced else 1)
        return total

    def write(self, row: int, states: Sequence[Tensor], position: int) -> None:
        """Begin a row from states ``[1, ...]``, which are copied."""
        for i, state in enumerate(states):
            if i in self._lengths:
                self._lengths[i][row] = state.shape[2]
            if -1 in self._program.states[i]:
                self._states[i][row, :, : state.shape[2]] = state[0]
            else:
                self._states[i][row] = state[0]
        self.position[row] = position

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another."""
        for i, state in enumerate(self._states):
            if -1 in self._program.states[i]:
                length = int(self._lengths[i if i in self._lengths else i - 1][source])
                state[target, :, :length] = state[source, :, :length]
            else:
                state[target] = state[source]
        for lengths in (self.position, *self._lengths.values()):
            lengths[target] = lengths[source]

    def step(self, x: Tensor) -> Tensor:
        """A token of the first n rows, contiguous fp32 ``x [n, dim]``.

        Returns ``[n, output]``, which the next step overwrites. A row without room must not step.
        """
        n = len(x)
        for i, lengths in self._lengths.items():
            if int(lengths[:n].max()) >= self._capacities[i]:
                self._drop_unseen(i, n)
        self._arguments.B, self._arguments.threads = n, torch.get_num_threads()
        self._arguments.input = x.data_ptr()
        call_library("cumulant_program", self._arguments)
        for lengths in (self.position, *self._lengths.values()):
            lengths[:n] += 1
        for i, after in self._next.items():
            self._states[i], self._next[i] = after, self._states[i]
            self._arguments.before[i] = after.data_ptr()
            self._arguments.after[i] = self._next[i].data_ptr()
        return self._out[:n]

    def _drop_unseen(self, i: int, n: int) -> None:
        """Make room in full rows for another token, by what their window does not see."""
        lengths, window = self._lengths[i], self._program.windows[i]
        for row in range(n):
            length = int(lengths[row])
            if length < self._capacities[i]:
                continue
            if window is None:
                raise RuntimeError(f"row {row} has no room for more than {length} tokens")
            for j in (i, i + 1):
                kept = self._states[j][row, :, length - window + 1 : length].clone()
                self._states[j][row, :, : window - 1] = kept
            lengths[row] = window - 1
