"""One token of many sequences at a time, each computed as if it were alone.

A server's sequences come and go. They lie in rows, the first n of which take a step. Neither the
number of rows nor a sequence's place changes a bit of its logits.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..nn import KeyValueState
from ..nn.step import compiled_step
from ..ops.step import Program, RowProgram, Unsuitable, may_step
from .cache import export_state, import_state, read_state
from .step import _can_step, _read_states, emit_model


class Rows(Protocol):
    """Sequences in rows."""

    def write(self, row: int, cache: Cache) -> None:
        """Begin a row from a cache of one sequence, which stays as it is."""
        ...

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another."""
        ...

    def step(self, ids: Tensor) -> Tensor:
        """The logits ``[n, vocab_size]`` (fp32) after ``ids [n]``, tokens of the first n rows.

        They are on the CPU, and the next step may overwrite them. A row whose numbers are not
        finite has such logits, and the others are as without it.
        """
        ...


def make_rows(model: Any, rows: int, room: int) -> Rows:
    """Memory for `rows` sequences of `model`, in evaluation mode.

    room: the most tokens of a sequence, if its state grows with them (`grows`).
    """
    try:
        return NativeRows(model, rows, room)
    except Unsuitable:
        return SeparateRows(model, rows)


def row_bytes(model: Any, room: int) -> int:
    """The memory that each of the rows of `make_rows` takes."""
    try:
        return RowProgram.row_bytes(_program(model), room) + 4 * int(model.config.vocab_size)
    except Unsuitable:
        return cache_bytes_after(model, room)


def cache_bytes_after(model: Any, tokens: int) -> int:
    """The size of one sequence's cache after `tokens` tokens."""
    cache, total = DynamicCache(config=model.config), 0
    with torch.inference_mode():
        model.model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    blocks = model.model.layers
    for i in range(len(cache.layers)):
        state: Any = read_state(cache, i, None)
        kept = 1
        if isinstance(state, KeyValueState):
            window = getattr(blocks[i % len(blocks)].mixer, "window", None)
            kept = tokens if window is None else min(tokens, window - 1)
        total += int(state.nbytes) * kept
    return total


def grows(model: Any) -> bool:
    """Whether a sequence's state has room for only so many tokens."""
    return "full_attention" in model.config.layer_types


def _program(model: Any) -> Program:
    """The program of one token through the whole model."""
    if model.device.type != "cpu" or not _can_step(model, DynamicCache(config=model.config)):
        raise Unsuitable
    sample = torch.empty(1, 1, model.config.hidden_size, dtype=model.dtype, device="cpu")
    with torch.no_grad():
        compiled = compiled_step(model, emit_model, sample)
        if compiled.program is None or compiled.has_hooks() or not may_step(sample):
            raise Unsuitable
    return compiled.program


class NativeRows:
    """All rows in one native call, which reads each weight once for all of them."""

    def __init__(self, model: Any, rows: int, room: int):
        self._model, self._rows = model, RowProgram(_program(model), rows, room)
        self._embed = model.get_input_embeddings()

    def write(self, row: int, cache: Cache) -> None:
        read = _read_states(self._model, cache)
        if read is None or any(mask is not None for mask in read.masks):
            raise ValueError("cache: expected the state of one sequence of this model")
        self._rows.write(row, [t for t in read.tensors if t is not None], int(read.position))

    def move(self, source: int, target: int) -> None:
        self._rows.move(source, target)

    def step(self, ids: Tensor) -> Tensor:
        return self._rows.step(self._embed(ids).float().contiguous())


class SeparateRows:
    """One call of the model for each row: for models without a program of all layers."""

    def __init__(self, model: Any, rows: int):
        self._model = model
        self._caches: list[Any] = [None] * rows

    def write(self, row: int, cache: Cache) -> None:
        fresh = DynamicCache(config=self._model.config)
        self._caches[row] = import_state(fresh, export_state(cache))

    def move(self, source: int, target: int) -> None:
        self._caches[target], self._caches[source] = self._caches[source], None

    def step(self, ids: Tensor) -> Tensor:
        out = torch.full((len(ids), self._model.config.vocab_size), torch.nan)
        ids = ids.to(self._model.device)
        for row, cache in enumerate(self._caches[: len(ids)]):
            with suppress(ValueError, RuntimeError):  # a row that fails has logits of NaN
                one = self._model(ids[row : row + 1, None], past_key_values=cache, use_cache=True)
                out[row] = one.logits[0, -1].float().cpu()
        return out
