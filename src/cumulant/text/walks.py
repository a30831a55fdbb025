"""Windows for states that are carried: which follow one another, and which start without a past."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .tokens import DisjointWindows, RandomWindows, TokenFile


class DocumentWalks(Dataset[dict[str, Tensor]]):
    """Each of `rows` rows walks along the text; window i is row ``i % rows``'s at ``i // rows``.

    A document is read from its start, window after window. Its last window goes on into the
    documents that follow, as windows anywhere do. The next window then starts with the document
    that this one cut, without a past (``fresh``). The rows begin at equal distances, shifted by the
    seed, and go round.
    """

    def __init__(self, tokens: TokenFile, length: int, count: int, seed: int, rows: int):
        RandomWindows(tokens, length, count, seed)  # the same demand on the text
        self.tokens, self.length, self.count, self.rows = tokens, length, count, rows
        self.plan = plan_walks(tokens, length)
        self.shift = int(np.random.default_rng(seed).integers(len(self.plan)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, row = divmod(index, self.rows)
        place = self.shift + row * len(self.plan) // self.rows + turn
        start, fresh = self.plan[place % len(self.plan)]
        ids = torch.from_numpy(self.tokens.ids[start : start + self.length + 1].astype(np.int64))
        return {"input_ids": ids[:-1], "labels": ids[1:], "fresh": torch.tensor(fresh)}


def plan_walks(tokens: TokenFile, length: int) -> list[tuple[int, bool]]:
    """All windows of a walk: the first token, and whether a document starts there."""
    starts = np.asarray(tokens.starts)
    plan, place, fresh = [], 0, True
    end = len(tokens.ids)
    while place + length < end:
        plan.append((place, fresh))
        document, cut = np.searchsorted(starts, [place, place + length], side="right") - 1
        fresh = bool(document != cut)
        place = int(starts[cut]) if fresh else place + length
    return plan


class CarriedWindows(Dataset[dict[str, Tensor]]):
    """`windows`, where each row starts without a past (``fresh``) once in `limit` turns.

    The rows take turns, so every step has pasts of different lengths. With a limit of 0 only
    `windows` say where a row starts without a past.
    """

    def __init__(
        self, windows: RandomWindows | DisjointWindows | DocumentWalks, rows: int, limit: int
    ):
        self.windows, self.rows, self.limit = windows, rows, limit

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, row = divmod(index, self.rows)
        due = self.limit > 0 and (turn + row * self.limit // self.rows) % self.limit == 0
        window = self.windows[index]
        fresh = window.get("fresh", torch.tensor(False))
        return {**window, "fresh": fresh | due}
