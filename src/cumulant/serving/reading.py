"""Prompts, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from ..models import export_state, import_state
from .sampling import log_probabilities
from .snapshots import Snapshot, SnapshotStore, piece_keys


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


class Reading:
    """A text that a model reads, and the snapshots on its way.

    Args:
        model: in evaluation mode.
        store: where to begin from the longest prefix that is known, and to keep snapshots.
        tokens: the text, at least one token.
        piece: tokens of a piece, at whose multiples all pieces begin.
        every: a snapshot is kept after each `every` pieces,
        borders: and before the piece of each of these positions, and at the end.
        start: a snapshot and its number of tokens, to begin from if the store has none further on.
            It may come from anywhere, so nothing is kept then.
        scored: None, or how many of the likeliest tokens to list at each place; then the text is
            read from its beginning.
        whole: False to read only pieces that are complete.
        keep_border: keep the state after the last whole piece in `border`.
    """

    def __init__(
        self,
        model: Any,
        store: SnapshotStore,
        tokens: Sequence[int],
        piece: int,
        *,
        every: int = 16,
        borders: Iterable[int] = (),
        start: tuple[Snapshot, int] | None = None,
        scored: int | None = None,
        whole: bool = True,
        keep_border: bool = False,
    ):
        self._model, self._store, self._piece = model, store, piece
        self.keys = piece_keys(tokens, piece)
        end = len(tokens) if whole else len(tokens) // piece * piece
        self.tokens, self.keys = tokens[:end], self.keys[: -(-end // piece) + 1]
        self._kept = {at // piece * piece for at in (*borders, end)} | {end}
        self._every = every * piece
        self.logits: Tensor | None = None
        self.scores: list[TokenScores] | None = None
        self._top = scored
        if scored is not None and end:
            self.scores = [TokenScores(tokens[0], None)]
        self.cache = DynamicCache(config=model.config)
        self.position = self.cached = 0
        self.border: tuple[Snapshot, int] | None = None
        self._keep_border, self._foreign = keep_border, start is not None
        if scored is None:
            self._begin(start)
        self._last_kept = self.cached

    def _begin(self, start: tuple[Snapshot, int] | None) -> None:
        """Begin from the longest prefix that has a snapshot."""
        end = len(self.tokens)
        found, at = start if start is not None else (None, 0)
        for i in range(len(self.keys) - 1, 0, -1):
            position = min(i * self._piece, end)
            if position <= at:
                break
            known = self._store.get(self.keys[i])
            if known is not None and self._suits(known, position):
                found, at = known, position
                break
        if found is None or (at == end and found.logits is None):
            return
        import_state(self.cache, found.state)
        self.position = self.cached = at
        self.logits = found.logits if self.done else None
        self._note_border(found)

    def _suits(self, known: Snapshot, position: int) -> bool:
        """Whether to begin there: at the text's end only with logits, and the border kept."""
        if position < len(self.tokens):
            return True
        return known.logits is not None and not (self._keep_border and position % self._piece)

    def _note_border(self, snapshot: Snapshot) -> None:
        if self._keep_border and self.position % self._piece == 0:
            self.border = snapshot, self.position

    @property
    def done(self) -> bool:
        return self.position == len(self.tokens)

    def snapshot(self) -> Snapshot:
        """The state now."""
        return Snapshot(export_state(self.cache), self.logits)

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
        logits = out.logits[0].float().cpu()
        self.position = end
        self.logits = logits[-1:].clone() if self.done else None
        if self.scores is not None:
            following = self.tokens[begin + 1 : end + 1]
            for row, token in zip(log_probabilities(logits.numpy()), following):
                self.scores.append(score_token(row, token, self._top or 0))
        if not self._foreign and (end in self._kept or end % self._every == 0):
            self._keep(end)
        if self._keep_border:
            self._note_border(self.snapshot())

    def _keep(self, end: int) -> None:
        snapshot = self.snapshot()
        if self.scores is not None:  # logits of many rows round differently from those of one
            snapshot = replace(snapshot, logits=None)
        self._store.put(self.keys[-(-end // self._piece)], snapshot, end - self._last_kept)
        if end % self._piece == 0:
            self._last_kept = end
