"""Whether a model uses its context: loss by position, beyond the training length too, and on text seen before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..text.tokens import TokenFile


@dataclass(frozen=True)
class Stretch:
    """Nats per token of the tokens with first, ..., last - 1 tokens before them in their window; how many they were."""

    first: int
    last: int
    nats: float
    tokens: int


@torch.inference_mode()
def loss_by_position(
    model: PreTrainedModel, text: TokenFile, length: int, *, tokens: int = 200_000, batch: int = 4
) -> list[Stretch]:
    """Mean loss in stretches that double, over non-overlapping windows of `length` tokens, about `tokens` in all.

    Windows are spread over the whole text. A model that uses its context is the better the more it has; one that cannot
    go beyond the length it was trained at is worse there.
    """
    whole = (len(text.ids) - 1) // length
    if whole < 1:
        raise ValueError(f"length: the text has {len(text.ids):,} tokens, fewer than a window of {length:,}")
    count = max(1, min(whole, tokens // length))
    starts = [int(i * whole / count) * length for i in range(count)]
    sums = torch.zeros(length, dtype=torch.float64)
    model.eval()
    for at in range(0, count, batch):
        rows = [text.ids[start : start + length + 1].astype(np.int64) for start in starts[at : at + batch]]
        ids = torch.from_numpy(np.stack(rows)).to(model.device)
        sums += _nats(model, ids).sum(0).cpu()
    edges = [0, *(2**p for p in range(4, 31) if 2**p < length), length]
    return [Stretch(a, b, float(sums[a:b].sum()) / ((b - a) * count), (b - a) * count) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Copying:
    """Bits per byte of spans the first and the second time they stand in a window, so many tokens apart."""

    distance: int
    first: float
    second: float


@torch.inference_mode()
def copying(
    model: PreTrainedModel,
    text: TokenFile,
    tokenizer: PreTrainedTokenizerBase,
    distances: list[int],
    *,
    span: int = 128,
    samples: int = 32,
) -> list[Copying]:
    """Paste spans of about `span` bytes behind themselves: the second time they need only be copied.

    A window is a span, `distance` tokens of text from elsewhere, and the span again. The tokenizer must be a byte-level
    one.
    """
    found = []
    model.eval()
    ids = text.ids
    for distance in distances:
        need = distance + 2 * span
        if len(ids) < 2 * need:
            raise ValueError(f"distance: the text has {len(ids):,} tokens, too few for spans {distance:,} tokens apart")
        places = np.random.default_rng(0).integers(0, len(ids) - need, (samples, 2))
        nats, total = [0.0, 0.0], 0
        for there, between in places:
            piece, size = _span(ids[there : there + span + 1], tokenizer, span)
            window = np.concatenate((piece, ids[between : between + distance], piece)).astype(np.int64)
            losses = _nats(model, torch.from_numpy(window)[None].to(model.device))[0]
            # the first token of each copy follows other text; what counts is the rest of the span
            n = len(piece) - 1
            nats[0] += float(losses[:n].sum())
            nats[1] += float(losses[len(losses) - n :].sum())
            total += size
        found.append(Copying(distance, *(x / math.log(2) / total for x in nats)))
    return found


def _span(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, span: int) -> tuple[np.ndarray, int]:
    """The first tokens that are at least `span` bytes together, or all; and the bytes behind the first token."""
    special = set(tokenizer.all_special_ids)
    # in a byte-level vocabulary every character of a token stands for a byte
    sizes = [0 if int(i) in special else len(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]
    taken = next((n for n in range(2, len(ids)) if sum(sizes[:n]) >= span), len(ids))
    return ids[:taken], max(sum(sizes[1:taken]), 1)


def _nats(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token after the first: ``[B, T + 1]`` -> ``[B, T]``, in fp64."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.double().view(ids.shape[0], -1)
