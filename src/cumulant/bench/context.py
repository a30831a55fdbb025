"""Whether a model uses its context: the same tokens with more before them, and text that it has seen before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..text.tokenizer import token_sizes
from ..text.tokens import TokenFile

SHORTEST = 32  # tokens of context


@dataclass(frozen=True)
class Stretch:
    """Nats per token of `tokens` tokens that had first, ..., last - 1 tokens before them in their window."""

    first: int
    last: int
    nats: float
    tokens: int


@torch.inference_mode()
def loss_by_context(
    model: PreTrainedModel, text: TokenFile, length: int, *, tokens: int = 50_000, batch_tokens: int = 16_384
) -> list[Stretch]:
    """Mean loss of the same tokens, about `tokens` in all, with up to ..., `length` / 4, `length` / 2 and `length`
    tokens before them, the shortest at least 32.

    Windows of c tokens follow one another by c / 2, and their second halves count: a model that uses its context is the
    better the longer they are, one that cannot go beyond the length it was trained at is worse there.
    """
    half = length // 2
    count = min((len(text.ids) - 1 - half) // half, max(1, tokens // half)) if half else 0
    if count < 1:
        raise ValueError(f"length: the text has {len(text.ids):,} tokens, fewer than a window of {length:,}")
    model.eval()
    lengths = [length]
    while lengths[0] % 4 == 0 and lengths[0] // 2 >= SHORTEST:
        lengths.insert(0, lengths[0] // 2)
    found = []
    for size in lengths:
        step = size // 2
        starts = range(half - step, half + count * half - step, step)
        nats, together = 0.0, max(1, batch_tokens // size)
        for at in range(0, len(starts), together):
            rows = [text.ids[start : start + size + 1].astype(np.int64) for start in starts[at : at + together]]
            losses = _nats(model, torch.from_numpy(np.stack(rows)).to(model.device))
            nats += float(losses[:, -step:].sum())
        found.append(Stretch(size - step, size, nats / (len(starts) * step), len(starts) * step))
    return found


@dataclass(frozen=True)
class Copying:
    """Bits per byte of spans at the end of a window: where they stood at its beginning as well, so many tokens before,
    and where something else stood there."""

    distance: int
    second: float
    control: float


@torch.inference_mode()
def copying(
    model: PreTrainedModel,
    text: TokenFile,
    tokenizer: PreTrainedTokenizerFast,
    distances: list[int],
    *,
    span: int = 128,
    samples: int = 32,
    batch_tokens: int = 16_384,
) -> list[Copying]:
    """Paste spans of about `span` bytes behind themselves: the second time they need only be copied.

    A window is a span, `distance` tokens of text from elsewhere, and the span again; the control begins with another
    span. Spans are the same at all distances. The tokenizer must be a byte-level one.
    """
    ids, farthest = text.ids, max(distances)
    length = max(2, round(span * len(ids) / text.text_bytes))
    room = len(ids) - max(length, farthest)
    if room < farthest + 2 * length:
        raise ValueError(f"distance: the text has {len(ids):,} tokens, too few for spans {farthest:,} tokens apart")
    model.eval()
    places = np.random.default_rng(0).integers(0, room, (samples, 3))
    pieces, others = (np.stack([ids[at : at + length] for at in places[:, i]]).astype(np.int64) for i in (0, 1))
    size = int(token_sizes(tokenizer)[pieces[:, 1:]].sum())  # a span's first token follows other text
    found = []
    for distance in distances:
        between = np.stack([ids[at : at + distance] for at in places[:, 2]]).astype(np.int64)
        together = max(1, batch_tokens // (distance + 2 * length))
        nats = []
        for before in (pieces, others):
            windows = torch.from_numpy(np.concatenate((before, between, pieces), 1)).to(model.device)
            nats.append(sum(float(_nats(model, part)[:, 1 - length :].sum()) for part in windows.split(together)))
        found.append(Copying(distance, *(x / math.log(2) / size for x in nats)))
    return found


def _nats(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token after the first: ``[B, T + 1]`` -> ``[B, T]``, in fp64."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.double().view(ids.shape[0], -1)
