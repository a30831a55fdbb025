"""How a model uses its context: loss by context length, and loss on repeated text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ...text.tokenizer import token_sizes
from ...text.tokens import TokenFile

SHORTEST = 32  # tokens of context
PIECE = 4096  # tokens that are read at a time


@dataclass(frozen=True)
class Stretch:
    """Bits per byte of `tokens` tokens.

    They had first, ..., last - 1 tokens before them in their window.
    """

    first: int
    last: int
    bits: float
    tokens: int


@torch.inference_mode()
def loss_by_context(
    model: PreTrainedModel,
    text: TokenFile,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    *,
    tokens: int = 200_000,
    batch_tokens: int = 16_384,
    piece: int = PIECE,
) -> list[Stretch]:
    """Mean loss of the same tokens, about `tokens` in all, in windows of several lengths.

    The lengths are `length`, `length` / 2, `length` / 4, ..., down to 32 tokens. A window of c
    tokens begins c / 2 tokens after the one before, and its second half is scored. A model that
    uses its context has a lower loss in longer windows. A model that cannot go beyond its training
    length has a higher one.

    A window of more than `piece` tokens is read piece by piece, and the model's cache carries its
    states. So memory does not grow with the logits of a long window, and softmax attention alone
    takes time that grows with its square.

    Raises:
        ValueError: the text is shorter than a window.
    """
    half = length // 2
    count = min((len(text.ids) - 1 - half) // half, max(1, tokens // half)) if half else 0
    if count < 1:
        raise ValueError(
            f"length: the text has {len(text.ids):,} tokens, fewer than a window of {length:,}"
        )
    model.eval()
    lengths = [length]
    while lengths[0] % 4 == 0 and lengths[0] // 2 >= SHORTEST:
        lengths.insert(0, lengths[0] // 2)
    scored = text.ids[half + 1 : half + 1 + count * half]
    found, text_bytes = [], int(token_sizes(tokenizer)[scored].sum())
    for size in lengths:
        step = size // 2
        starts = range(half - step, half + count * half - step, step)
        nats, together = 0.0, max(1, batch_tokens // size)
        for at in range(0, len(starts), together):
            rows = [
                text.ids[start : start + size + 1].astype(np.int64)
                for start in starts[at : at + together]
            ]
            losses = _token_losses(model, torch.from_numpy(np.stack(rows)).to(model.device), piece)
            nats += float(losses[:, -step:].sum())
        found.append(
            Stretch(size - step, size, nats / math.log(2) / text_bytes, len(starts) * step)
        )
    return found


@dataclass(frozen=True)
class Copying:
    """Bits per byte of spans of `span` tokens at the end of a window.

    second: the same span is at its beginning, with `distance` tokens between.
    control: another span is at its beginning.
    """

    distance: int
    second: float
    control: float
    span: int


@torch.inference_mode()
def loss_on_copies(
    model: PreTrainedModel,
    text: TokenFile,
    tokenizer: PreTrainedTokenizerFast,
    distances: list[int],
    *,
    span: int = 128,
    samples: int = 32,
    batch_tokens: int = 16_384,
) -> list[Copying]:
    """Loss on spans of about `span` bytes that the model has read before, and could copy.

    A window is a span, `distance` tokens of text from elsewhere, and the span again; the control
    begins with another span. Spans are the same at all distances. The tokenizer must be a
    byte-level one.

    Raises:
        ValueError: the text is too short for the greatest distance.
    """
    ids, farthest = text.ids, max(distances)
    length = max(2, round(span * len(ids) / text.text_bytes))
    if len(ids) < 4 * (farthest + length):
        raise ValueError(
            f"distance: the text has {len(ids):,} tokens, too few for spans {farthest:,} tokens"
            " apart"
        )
    model.eval()
    starts = np.array(_draw_starts(len(ids), length, farthest, samples))
    spans, others = (
        np.stack([ids[at : at + length] for at in starts[:, i]]).astype(np.int64) for i in (0, 1)
    )
    # without a span's first token, which follows other text
    size = int(token_sizes(tokenizer)[spans[:, 1:]].sum())
    found = []
    for distance in distances:
        between = np.stack([ids[at : at + distance] for at in starts[:, 2]]).astype(np.int64)
        together = max(1, batch_tokens // (distance + 2 * length))
        bits = []
        for before in (spans, others):
            windows = torch.from_numpy(np.concatenate((before, between, spans), 1)).to(model.device)
            nats = sum(
                float(_token_losses(model, batch, PIECE)[:, 1 - length :].sum())
                for batch in windows.split(together)
            )
            bits.append(nats / math.log(2) / size)
        second, control = bits
        found.append(Copying(distance, second, control, length))
    return found


def _draw_starts(size: int, span: int, between: int, samples: int) -> list[tuple[int, int, int]]:
    """Offsets of a span, another span, and the text between them.

    Neither the other span nor the text between overlaps the span.
    """
    draw = np.random.default_rng(0)
    found: list[tuple[int, int, int]] = []
    while len(found) < samples:
        one, other, rest = (
            int(draw.integers(0, size - length + 1)) for length in (span, span, between)
        )
        if abs(one - other) >= span and not one - between < rest < one + span:
            found.append((one, other, rest))
    return found


def _token_losses(model: PreTrainedModel, ids: torch.Tensor, piece: int) -> torch.Tensor:
    """Loss of every token after the first: ``[B, T + 1]`` -> ``[B, T]``, in fp64.

    `piece` tokens are read at a time, with the states of those before.
    """
    last, cache, found = ids.shape[1] - 1, None, []
    for at in range(0, last, piece):
        part = ids[:, at : min(at + piece, last) + 1]
        output = model(input_ids=part[:, :-1], past_key_values=cache, use_cache=last > piece)
        cache = output.past_key_values
        losses = torch.nn.functional.cross_entropy(
            output.logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none"
        )
        found.append(losses.double().view(ids.shape[0], -1))
    return torch.cat(found, 1)
