"""Bits per byte of a text under a model.

This is the model's code length of the text, in bits, over the text's length in UTF-8 bytes. Every
token is predicted once. An end-of-text token precedes each document, and none follows the last.
There are two methods:

- *whole*: each document by itself, from its first token to its last, with the state carried along;
  any token can use all of the document before it.
- *windowed*: the documents end to end, cut into windows of `context` tokens that do not overlap; a
  token can use the tokens before it in its window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .tokens import Ids, TokenFile

LONG = 16_384  # tokens of a document that softmax attention reads in some seconds


@dataclass(frozen=True)
class Score:
    """The score of a model on a text.

    loss: nats per token. tokens: predicted. text_bytes: of UTF-8.
    lost: share of the bytes that the tokenizer does not keep; if it keeps less than all, bits per
        byte cannot be compared with others'.
    """

    bits_per_byte: float
    loss: float
    tokens: int
    text_bytes: int
    lost: float = 0.0

    @property
    def note(self) -> str:
        """A warning to print beside the score; empty if there is none."""
        return lost_note(self.lost)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def lost_note(lost: float) -> str:
    if not lost:
        return ""
    share = f"{lost:.0%}" if lost >= 0.01 else "less than 1%"
    return (
        f"the tokenizer does not keep the text: {share} of its bytes differ; bits per byte is not"
        " comparable"
    )


def check_scored(tokens: int, text: TokenFile) -> None:
    """Refuse a score per byte if some tokens were not scored."""
    if tokens != len(text.ids) - 1:
        raise ValueError(
            f"text: {tokens} tokens were scored, but the text has {len(text.ids) - 1} to score"
        )


def _score(nats: float, tokens: int, text: TokenFile) -> Score:
    check_scored(tokens, text)
    return Score(
        nats / math.log(2) / text.text_bytes, nats / tokens, tokens, text.text_bytes, text.lost
    )


def _summed_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor, **options: Any) -> float:
    """Summed cross entropy of the labels ``[b, T]`` at the tokens ``ids [b, T]``."""
    ids, labels = ids.to(model.device), labels.to(model.device)
    loss = model(
        input_ids=ids, shift_labels=labels, num_items_in_batch=1, skip_logits=True, **options
    ).loss
    return float(loss)


@torch.inference_mode()
def windowed(
    model: PreTrainedModel,
    text: TokenFile,
    context: int,
    *,
    batch_size: int = 16,
    rank: int = 0,
    processes: int = 1,
) -> tuple[float, int]:
    """Summed nats and tokens of this process's share of the windows."""
    nats, count = 0.0, 0
    for number, (inputs, labels) in enumerate(_windows(text.ids, context, batch_size)):
        if number % processes == rank:
            nats += _summed_loss(model, inputs, labels, use_cache=False)
            count += labels.numel()
    return nats, count


def _windows(ids: Ids, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels ``[b, context]``, then the shorter last window by itself."""
    whole = (len(ids) - 1) // context
    for first in range(0, whole, batch_size):
        last = min(first + batch_size, whole)
        span = torch.from_numpy(ids[first * context : last * context + 1].astype(np.int64))
        yield span[:-1].view(-1, context), span[1:].view(-1, context)
    rest = torch.from_numpy(ids[whole * context :].astype(np.int64))
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]


def evaluate_windowed(
    model: PreTrainedModel, text: TokenFile, context: int, *, batch_size: int = 16
) -> Score:
    """Bits per byte over windows of `context` tokens; see the module's docstring."""
    if batch_size < 1:
        raise ValueError(f"batch: expected at least 1 window, got {batch_size}")
    if context < 1:
        raise ValueError(f"context: expected at least 1 token, got {context}")
    model.eval()
    nats, count = windowed(model, text, context, batch_size=batch_size)
    return _score(nats, count, text)


@torch.inference_mode()
def evaluate_whole(model: PreTrainedModel, text: TokenFile, *, piece: int = 4096) -> Score:
    """Bits per byte with the state carried over each whole document, `piece` tokens a step."""
    model.eval()
    nats, count = 0.0, 0
    ends = [*text.starts[1:], len(text.ids) - 1]
    for start, end in zip(text.starts, ends, strict=True):
        cache = DynamicCache(config=model.config)
        for a in range(start, end, piece):
            ids = torch.from_numpy(text.ids[a : min(a + piece, end) + 1].astype(np.int64))[None]
            nats += _summed_loss(
                model, ids[:, :-1], ids[:, 1:], past_key_values=cache, use_cache=True
            )
            count += ids.shape[1] - 1
    return _score(nats, count, text)


def notice_of_cost(model: PreTrainedModel, text: TokenFile) -> str:
    """A warning before `evaluate_whole` that softmax attention will be slow on a long document.

    Empty if there is no such document.
    """
    longest = int(np.diff([*text.starts, len(text.ids)]).max())
    if longest <= LONG or "full_attention" not in model.config.layer_types:
        return ""
    return (
        f"whole documents: the longest has {longest:,} tokens, and softmax attention takes time"
        " that grows with their square; --no-whole leaves them out"
    )
