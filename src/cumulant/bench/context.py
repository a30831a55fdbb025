"""Whether a model uses its context: the same tokens with more before them, and text that it has seen before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..text.tokenizer import token_sizes
from ..text.tokens import Ids, TokenFile

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
) -> list[Copying]:
    """Paste spans of about `span` bytes behind themselves: the second time they need only be copied.

    A window is a span, `distance` tokens of text from elsewhere, and the span again; the control begins with another
    span. Spans are the same at all distances. The tokenizer must be a byte-level one.
    """
    ids = text.ids
    need = max(distances, default=0) + 2 * span
    if len(ids) < 2 * need:
        raise ValueError(f"distance: the text has {len(ids):,} tokens, too few for spans {max(distances):,} apart")
    model.eval()
    sizes = token_sizes(tokenizer)
    places = np.random.default_rng(0).integers(0, len(ids) - need, (samples, 3))
    found = []
    for distance in distances:
        nats, total = [0.0, 0.0], 0
        for there, between, elsewhere in places:
            piece, size = _span(ids[there : there + span + 1], sizes, span)
            other = ids[elsewhere : elsewhere + len(piece)]
            for i, before in enumerate((piece, other)):
                window = np.concatenate((before, ids[between : between + distance], piece)).astype(np.int64)
                losses = _nats(model, torch.from_numpy(window)[None].to(model.device))[0]
                nats[i] += float(losses[1 - len(piece) :].sum())  # its first token follows other text
            total += size
        found.append(Copying(distance, *(x / math.log(2) / total for x in nats)))
    return found


def _span(ids: Ids, sizes: Ids, span: int) -> tuple[Ids, int]:
    """The first tokens that are at least `span` bytes together, or all; and the bytes behind the first token."""
    total = sizes[ids].cumsum()
    taken = max(min(int(np.searchsorted(total, span)) + 1, len(ids)), 2)
    return ids[:taken], max(int(total[taken - 1] - total[0]), 1)


def _nats(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token after the first: ``[B, T + 1]`` -> ``[B, T]``, in fp64."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.double().view(ids.shape[0], -1)
