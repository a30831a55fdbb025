"""Prompts, read piece by piece."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from ..models import ModelState, export_state, import_state
from ..models.rows import Piece, Rows
from .sampling import log_probabilities
from .snapshots import Snapshot, SnapshotStore, TextKeys

log = logging.getLogger("cumulant.serving")


@dataclass
class TokenScores:
    """Log-probabilities of one token and of the likeliest ones at its place."""

    token: int
    log_probability: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


def score_token(scores: NDArray[np.float64], token: int, top: int) -> TokenScores:
    """From the log-probabilities ``scores [V]`` of all tokens at a place."""
    likely: list[tuple[int, float]] = []
    if top:
        top = min(top, len(scores))
        found = np.argpartition(-scores, top - 1)[:top]
        found = found[np.lexsort((found, -scores[found]))]
        likely = [(int(i), float(scores[i])) for i in found]
    return TokenScores(token, float(scores[token]), likely)


@dataclass(frozen=True)
class Plan:
    """What is wanted of a reading.

    borders: positions before which other texts may part from this one: snapshots are kept there.
    start: a snapshot and its number of tokens, to begin from if the store has none further on.
        It may come from anywhere, so nothing is kept then.
    scored: None, or how many of the likeliest tokens to list at each place; then the text is
        read from its beginning.
    keep_border: note the state after the last whole piece in `border`, where texts may not be cut
        anywhere.
    every: a snapshot is kept after each `every` pieces.
    """

    borders: Iterable[int] = ()
    start: tuple[Snapshot, int] | None = None
    scored: int | None = None
    keep_border: bool = False
    every: int = 16


class Reading:
    """A text that is read, and the snapshots on its way.

    Args:
        store: where to begin from the longest prefix that is known, and to keep snapshots.
        tokens: the text.
        piece: the most tokens that are read at a time.
        plan: what is wanted.
    """

    def __init__(self, store: SnapshotStore, tokens: Sequence[int], piece: int, plan: Plan):
        self._store, self._piece, self.tokens = store, piece, tokens
        self.keys = TextKeys(tokens, piece, store.root)
        self._plan, self.foreign = plan, plan.start is not None
        self.logits: Tensor | None = None
        self.scores: list[TokenScores] | None = None
        if plan.scored is not None and tokens:
            self.scores = [TokenScores(tokens[0], None)]
        self.position = self.cached = 0
        self.border: tuple[Snapshot, int] | None = None
        self._kept = {self._cut(at) for at in plan.borders} | {self._cut(len(tokens)), len(tokens)}
        found = self._find() if plan.scored is None else None
        self._load(None if found is None else found[0].state)
        if found is not None:
            self.position = self.cached = found[1]
            known = found[0].logits if self.done else None
            self.logits = None if known is None else known.cpu()
        self._last_kept = self.cached

    def _find(self) -> tuple[Snapshot, int] | None:
        """What to begin from."""
        found, end = self._plan.start, len(self.tokens)
        least = 0 if found is None else found[1]
        longer = self._store.longest(self.keys, least, self._suits)
        found = longer or found
        if found is not None and found[1] == end and found[0].logits is None:
            return None
        return found

    def _suits(self, count: int) -> bool:
        """Whether to begin after so many tokens."""
        return True

    def _cut(self, position: int) -> int:
        """Where a piece may end, at most at `position`."""
        return position

    def _load(self, state: ModelState | None) -> None:
        """Begin from a state, or from nothing."""
        raise NotImplementedError

    def _state(self) -> ModelState:
        """The state now."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        return self.position == len(self.tokens)

    def snapshot(self) -> Snapshot:
        """The state now, with the logits at the text's end."""
        return Snapshot(self._state(), self.logits)

    def _advance(self, end: int, logits: Tensor) -> None:
        """Note that tokens were read up to `end`; their last `logits`, or all if scored."""
        begin, self.position = self.position, end
        self.logits = logits[-1:].clone() if self.done else None
        if self.scores is not None:
            following = self.tokens[begin + 1 : end + 1]
            for row, token in zip(log_probabilities(logits.numpy()), following):
                self.scores.append(score_token(row, token, self._plan.scored or 0))
        every = self._plan.every * self._piece
        if not self.foreign and self._store.keeps and (end in self._kept or end % every == 0):
            self._keep(self.snapshot())

    def _keep(self, snapshot: Snapshot) -> None:
        saved = self.position - self._last_kept
        self._store.put(self.keys.place(self.position), snapshot, saved)
        self._last_kept = self.position


class SlotReading(Reading):
    """A text that is read in a slot, together with other slots' tokens; it may be cut anywhere."""

    def __init__(
        self,
        rows: Rows,
        slot: int,
        store: SnapshotStore,
        tokens: Sequence[int],
        piece: int,
        plan: Plan,
    ):
        self._rows, self.slot = rows, slot
        super().__init__(store, tokens, piece, plan)
        self._stops = sorted(self._kept)

    def _load(self, state: ModelState | None) -> None:
        self._rows.load(self.slot, state)

    def _state(self) -> ModelState:
        return self._rows.save(self.slot)

    def next_piece(self, most: int) -> Piece:
        """At most so many tokens, up to the next snapshot."""
        begin, every = self.position, self._plan.every * self._piece
        end = min(begin + most, begin // every * every + every, len(self.tokens))
        end = next((stop for stop in self._stops if begin < stop < end), end)
        tokens = self.tokens[begin:end]
        wanted = len(tokens) if self.scores is not None else int(end == len(self.tokens))
        return Piece(self.slot, tokens, wanted)

    def take(self, piece: Piece, logits: Tensor) -> None:
        """Note that the piece was read, with the logits that it wanted."""
        self._advance(self.position + len(piece.tokens), logits)


class BlockReading(Reading):
    """A text that the model's layers read, in pieces that begin at multiples of `piece`.

    For models whose program of single tokens is slower for texts, or that have none.
    """

    def __init__(
        self, model: Any, store: SnapshotStore, tokens: Sequence[int], piece: int, plan: Plan
    ):
        self._model = model
        self.cache = DynamicCache(config=model.config)
        super().__init__(store, tokens, piece, plan)
        self._note_border()

    def _cut(self, position: int) -> int:
        return position // self._piece * self._piece

    def _load(self, state: ModelState | None) -> None:
        if state is not None:
            import_state(self.cache, state)

    def _state(self) -> ModelState:
        return export_state(self.cache)

    def _suits(self, count: int) -> bool:
        """Whether to begin there: after whole pieces, or at the text's end without a border."""
        whole = count % self._piece == 0
        return whole or (count == len(self.tokens) and not self._plan.keep_border)

    def read_piece(self) -> None:
        """Read up to the next multiple of a piece, or to the end."""
        begin = self.position
        end = min(begin // self._piece * self._piece + self._piece, len(self.tokens))
        ids = torch.tensor([self.tokens[begin:end]], dtype=torch.long, device=self._model.device)
        wanted = end - begin if self.scores is not None else 1
        with torch.inference_mode():
            out = self._model(
                ids, past_key_values=self.cache, use_cache=True, logits_to_keep=wanted
            )
        self._advance(end, out.logits[0].float().cpu())
        self._note_border()

    def _note_border(self) -> None:
        if self._plan.keep_border and self.position and self.position % self._piece == 0:
            self.border = self.snapshot(), self.position

    def _keep(self, snapshot: Snapshot) -> None:
        if self.scores is not None:  # logits of many rows round differently from those of one
            snapshot = replace(snapshot, logits=None)
        super()._keep(snapshot)


MOST_ENDED = 256  # ended replies whose text may wait to be read


class EndedTexts:
    """Texts with their replies, to be read in whole pieces when there is time.

    A prompt that goes on from one then begins behind it.
    """

    def __init__(self, model: Any, store: SnapshotStore, piece: int):
        self._model, self._store, self._piece = model, store, piece
        self._waiting: deque[list[int]] = deque(maxlen=MOST_ENDED)
        self._reading: BlockReading | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting) or self._reading is not None

    def add(self, tokens: list[int], known: int) -> None:
        """A text of which the first `known` tokens were read."""
        whole = len(tokens) // self._piece * self._piece
        if whole > known:
            self._waiting.append(tokens[:whole])

    def read_piece(self) -> None:
        """Read a piece, if there is one."""
        try:
            if self._reading is None and self._waiting:
                tokens = self._waiting.popleft()
                self._reading = BlockReading(self._model, self._store, tokens, self._piece, Plan())
            if self._reading is not None and not self._reading.done:
                self._reading.read_piece()
            if self._reading is not None and self._reading.done:
                self._reading = None
        except Exception:
            log.exception("an ended reply cannot be read")
            self._reading = None
