"""Multi-query associative recall (Arora et al. 2023, "Zoology"): its sequences.

A sequence states n pairs of a key and its value: ``k1 v1 … kn vn``. Slots of two tokens follow, and
each key is asked for in one of them. There the model is to predict the key's value. Early slots
are more likely: slot g has the probability ``p(g) ∝ (g + 1)^(a - 1)`` with a = 0.01. All other
tokens are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

POWER = 0.01  # a


@dataclass(frozen=True)
class Task:
    """Sequences of `length` tokens from a vocabulary of `vocabulary`.

    pairs: the numbers of pairs of the sequences.
    """

    length: int = 128
    vocabulary: int = 512
    pairs: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1:
            raise ValueError(f"pairs: expected numbers of at least 1, got {list(self.pairs)}")
        if self.length % 2 or 4 * max(self.pairs) > self.length:
            raise ValueError(
                f"length: expected an even number of at least {4 * max(self.pairs)}, for"
                f" {max(self.pairs)} pairs and as many questions, got {self.length}"
            )
        if max(self.pairs) > self.vocabulary // 2 - 1:
            raise ValueError(
                f"vocabulary: {self.vocabulary} tokens hold no {max(self.pairs)} different keys"
            )

    def draw_sequences(
        self, rows: int, pairs: int, random: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[rows, length]``; positions and answers of the questions, ``[rows, pairs]``."""
        half = self.vocabulary // 2

        def different(first: int, last: int) -> np.ndarray:
            return first + random.random((rows, last - first)).argpartition(pairs - 1)[:, :pairs]

        keys = random.permuted(different(1, half), axis=1)
        values = random.permuted(different(half, self.vocabulary), axis=1)
        tokens = np.zeros((rows, self.length), dtype=np.int64)
        tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        slots = (self.length - 2 * pairs) // 2
        # the first `pairs` arrivals of a race at rates p are a draw without replacement by p
        arrivals = random.exponential(size=(rows, slots)) * (np.arange(slots) + 1.0) ** (1 - POWER)
        places = 2 * pairs + 2 * arrivals.argsort(axis=1)[:, :pairs]
        np.put_along_axis(tokens, places, keys, axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(places), torch.from_numpy(values)
