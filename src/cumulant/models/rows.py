"""Tokens of many sequences at a time, each computed as if its sequence were alone.

A server's sequences come and go. They lie in slots. Neither the other sequences nor a sequence's
slot changes a bit of its logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from .. import __version__
from ..nn import KeyValueState
from ..nn.step import compiled_step
from ..ops.step import Program, RowProgram, Unsuitable, instruction_set, may_step
from .cache import ModelState, export_state, import_state, read_state
from .step import _can_step, _read_states, emit_model


class Piece(NamedTuple):
    """The next tokens of a slot, and of how many last ones logits are wanted."""

    slot: int
    tokens: Sequence[int]
    wanted: int = 1


class Rows(Protocol):
    """Sequences in slots.

    exact: pieces may be of any number of tokens, and how a text is cut into them changes no bit of
        its logits, nor of the state behind it. Otherwise they are of one token.
    """

    exact: bool

    def load(self, slot: int, state: ModelState | None) -> None:
        """Begin from a state of one sequence, which is copied, or from nothing."""
        ...

    def save(self, slot: int) -> ModelState:
        """The state of a slot, copied, if `exact`."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Begin as the sequence in another slot is."""
        ...

    def free(self, slot: int) -> None:
        """End a sequence."""
        ...

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """The logits ``[wanted tokens, vocab_size]`` (fp32) of different slots' pieces.

        Not `exact`: of all slots in use. They are on the CPU, and the next run may overwrite them.
        A sequence whose numbers are not finite has such logits, and the others are as without it.
        """
        ...


def make_rows(model: Any, slots: int, room: int, piece: int) -> Rows:
    """Memory for `slots` sequences of `model`, in evaluation mode.

    room: the most tokens of a sequence, if its state grows with them (`grows`). piece: the most
    tokens of a `Piece`.
    """
    try:
        return NativeRows(model, slots, room, piece)
    except Unsuitable:
        return SeparateRows(model)


def rows_bytes(model: Any, slots: int, room: int, piece: int) -> int:
    """The memory of `make_rows`, with what a run of a token for each slot and a piece takes."""
    try:
        program = _program(model)
    except Unsuitable:
        return slots * cache_bytes_after(model, room)
    most = piece if _is_exact(model, program) else 1
    return slots * RowProgram.slot_bytes(program, room, most) + (slots + piece) * (
        RowProgram.token_bytes(program)
    )


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


def reads_exactly(model: Any) -> bool:
    """Whether `make_rows` gives rows that are `exact`."""
    try:
        return _is_exact(model, _program(model))
    except Unsuitable:
        return False


def state_numerics(model: Any, piece: int, threads: int) -> bytes:
    """A hash of what the bits of a state depend on, besides the weights and the tokens.

    piece, threads: tokens of a piece, and PyTorch's threads, where the model's layers read texts.
    """
    exact = reads_exactly(model)
    about: list[Any] = [__version__, exact, piece, model.device.type, instruction_set()]
    if not exact:
        about += [torch.__version__, threads]
    return hashlib.sha256(repr(about).encode()).digest()


def _is_exact(model: Any, program: Program) -> bool:
    """Whether texts are to be read by the program: keys of whole texts are quicker in blocks."""
    return not program.replaced and not grows(model)


class NativeRows:
    """All sequences in one native call, which reads each weight once for all of them."""

    def __init__(self, model: Any, slots: int, room: int, piece: int):
        program = _program(model)
        self.exact = _is_exact(model, program)
        self._model, self._embed = model, model.get_input_embeddings()
        self._rows = RowProgram(program, slots, room, piece if self.exact else 1)
        cache = DynamicCache(config=model.config)
        model.model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        read = _read_states(model, cache)
        if read is None:
            raise Unsuitable
        self._counts = read.counts  # of the tensors of each layer's state
        self._order: list[int] = []  # slots in use, if the program takes them in order

    def load(self, slot: int, state: ModelState | None) -> None:
        place = self._take(slot)
        if state is None:
            self._rows.clear(place)
            return
        tensors: list[Tensor] = []
        for block, layer in zip(self._model.model.layers, state.layers, strict=True):
            tensors += block.mixer.state_tensors(layer)
        self._rows.write(place, tensors, int(state.position))

    def save(self, slot: int) -> ModelState:
        tensors, layers = self._rows.read(slot), []
        position = torch.tensor([int(self._rows.position[slot])])
        for block, count in zip(self._model.model.layers, self._counts, strict=True):
            layers.append(block.mixer.state_from_tensors(tensors[:count], position))
            del tensors[:count]
        return ModelState(tuple(layers), position)

    def copy(self, source: int, target: int) -> None:
        self._rows.copy(self._place(source), self._take(target))

    def free(self, slot: int) -> None:
        if slot in self._order:  # the last one takes its place
            place, last = self._order.index(slot), self._order.pop()
            if last != slot:
                self._rows.copy(len(self._order), place)
                self._order[place] = last

    def _take(self, slot: int) -> int:
        if self._rows.in_order and slot not in self._order:
            self._order.append(slot)
        return self._place(slot)

    def _place(self, slot: int) -> int:
        return self._order.index(slot) if self._rows.in_order else slot

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        order = list(range(len(pieces)))
        if self._rows.in_order:
            order.sort(key=lambda i: self._order.index(pieces[i].slot))
        chosen = [pieces[i] for i in order]
        ids = torch.tensor([i for piece in chosen for i in piece.tokens], dtype=torch.long)
        logits = self._rows.run(
            self._embed(ids).float().contiguous(),
            [self._place(piece.slot) for piece in chosen],
            [len(piece.tokens) for piece in chosen],
            [piece.wanted for piece in chosen],
        )
        if order == sorted(order):
            return logits
        back = torch.empty(len(order), dtype=torch.long)
        back[order] = torch.arange(len(order))
        return logits[back]


class SeparateRows:
    """One call of the model for each sequence: for models without a program of all layers."""

    exact = False

    def __init__(self, model: Any):
        self._model = model
        self._caches: dict[int, Any] = {}

    def load(self, slot: int, state: ModelState | None) -> None:
        cache = self._caches[slot] = DynamicCache(config=self._model.config)
        if state is not None:
            import_state(cache, state)

    def save(self, slot: int) -> ModelState:
        return export_state(self._caches[slot])

    def copy(self, source: int, target: int) -> None:
        self.load(target, export_state(self._caches[source]))

    def free(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        out = torch.full((len(pieces), self._model.config.vocab_size), torch.nan)
        for row, (slot, tokens, _) in enumerate(pieces):
            with suppress(ValueError, RuntimeError):  # one that fails has logits of NaN
                ids = torch.tensor([tokens], device=self._model.device)
                one = self._model(ids, past_key_values=self._caches[slot], use_cache=True)
                out[row] = one.logits[0, -1].float().cpu()
        return out
