"""How a reply's tokens are drawn: options, and one sequence's sampler.

Everything is computed for a sequence alone, in an order that depends on nothing else. So a reply
with a seed is the same whatever else runs.
"""

from __future__ import annotations

import math
import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

LEAST_TEMPERATURE = 1e-6  # at lower ones fp32 logits overflow
CANDIDATES = 256  # tokens that are sorted first when a vocabulary is large
SMALL = 4096  # tokens of a vocabulary that is sorted whole


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, in the order in which the options act.

    logit_bias: added to the logits of these tokens.
    repetition_penalty: divides positive logits and multiplies negative ones of tokens that are in
        the prompt or the reply. 1: off.
    presence_penalty, frequency_penalty: taken from the logits of tokens in the reply, once, and for
        each time.
    temperature: divides logits; 0: always the likeliest token.
    top_k: only the k likeliest tokens; 0: all. top_p: of those the likeliest that together hold
        this probability.
    seed: with it the same request gets the same reply; None: a new one each time.
    max_tokens: at most so many tokens.
    stop: texts before which the reply ends.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        check("max_tokens", 0 <= self.max_tokens < 2**31, "0 to 2,147,483,647")
        check(
            "temperature",
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf,
            f"0 (the likeliest token) or a number of at least {LEAST_TEMPERATURE}",
        )
        check("top_k", 0 <= self.top_k < 2**31, "0 (all) to 2,147,483,647")
        check("top_p", 0 < self.top_p <= 1, "a probability above 0 and up to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, -2 <= getattr(self, name) <= 2, "-2 to 2")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100")
        biases = self.logit_bias.values()
        check("logit_bias", all(-100 <= x <= 100 for x in biases), "numbers from -100 to 100")
        check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        lengths = [len(text) for text in self.stop]
        fits = len(lengths) <= 16 and all(1 <= n <= 1000 for n in lengths)
        check("stop", fits, "up to 16 texts of 1 to 1,000 characters")


class Sampler:
    """Draws the tokens of one sequence.

    index: which of a request's replies it is; each has random numbers of its own.
    barred: tokens that are never drawn.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompt: Iterable[int] = (),
        barred: NDArray[np.int64] | None = None,
        index: int = 0,
    ):
        self.options = options
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self._random = random.Random(f"{seed}/{index}")
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if options.repetition_penalty != 1 else set()
        self._barred = barred
        self._biases = dict(options.logit_bias)
        self._added: Logits | None = None  # to all logits

    @property
    def is_plain(self) -> bool:
        """Whether it always draws the likeliest token of the logits as they are."""
        o = self.options
        return (
            o.temperature == 0
            and o.repetition_penalty == 1
            and o.presence_penalty == o.frequency_penalty == 0
            and not o.logit_bias
            and (self._barred is None or not len(self._barred))
        )

    def draw(self, logits: Logits) -> int:
        """The next token after ``logits [V]``, which are not changed."""
        if self.is_plain:
            return int(logits.argmax())
        x = self._adjusted(logits)
        token = int(x.argmax()) if self.options.temperature == 0 else self._draw_random(x)
        self._counts[token] += 1
        if self.options.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        o = self.options
        if self._added is None:
            self._added = np.zeros(len(logits), dtype=np.float32)
            self._added[list(self._biases)] = list(self._biases.values())
            if self._barred is not None:
                self._added[self._barred] = -np.inf
        x = logits + self._added
        if self._seen and o.repetition_penalty != 1:
            seen = np.fromiter(self._seen, dtype=np.int64)
            found = x[seen]
            factor = np.float32(o.repetition_penalty)
            x[seen] = np.where(found > 0, found / factor, found * factor)
        if self._counts and (o.presence_penalty or o.frequency_penalty):
            drawn = np.fromiter(self._counts, dtype=np.int64)
            times = np.fromiter(self._counts.values(), dtype=np.float32)
            x[drawn] -= np.float32(o.presence_penalty) + np.float32(o.frequency_penalty) * times
        return x

    def _draw_random(self, x: Logits) -> int:
        o = self.options
        if o.temperature != 1:
            x /= np.float32(o.temperature)
        if 0 < o.top_k < len(x):
            x[x < np.partition(x, -o.top_k)[-o.top_k]] = -np.inf
        weights = np.exp(np.subtract(x, x.max(), dtype=np.float64))
        kept = None if o.top_p == 1 else _likeliest(weights, o.top_p)
        sums = np.cumsum(weights if kept is None else weights[kept])
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        place = min(place, len(sums) - 1)
        return place if kept is None else int(kept[place])


def _likeliest(weights: NDArray[np.float64], p: float) -> NDArray[np.int64]:
    """The likeliest tokens that together hold p of the sum: each whose likelier ones hold less.

    Of equal ones those with the lower number come first.
    """
    wanted = p * weights.sum()
    if len(weights) > SMALL:
        least = np.partition(weights, -CANDIDATES)[-CANDIDATES]
        candidates = np.flatnonzero(weights >= least)
        ordered = candidates[np.argsort(-weights[candidates], kind="stable")]
        sums = np.cumsum(weights[ordered])
        if sums[-1] >= wanted:
            return ordered[: int(np.searchsorted(sums, wanted)) + 1]
    ordered = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[ordered])
    return ordered[: int(np.searchsorted(sums, wanted)) + 1]


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """``log softmax(logits)`` over the last dimension, in fp64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    out: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out


def require_finite(likeliest: np.float32) -> None:
    """likeliest: the largest logit, or NaN if there is one."""
    if not np.isfinite(likeliest):
        raise FloatingPointError("the model's logits are not finite")
