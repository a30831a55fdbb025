"""The loop of `generate` for greedy decoding and sampling, with one native call a token.

It draws the same tokens as transformers' loop, and takes transformers' own processors, criteria and
streamers. What it saves are the model's Python for every token and sorting whole vocabularies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ..ops.step import Unsuitable
from .step import Decoder

TAKEN = frozenset(("attention_mask", "past_key_values", "use_cache", "logits_to_keep"))
MOST_KEPT = 256  # tokens that `QuickTopP` looks at
SMALL = 4096  # tokens of a vocabulary that is sorted at once
MARGIN = 1e-4  # of a sum of probabilities, beside which rounding could decide


def can_decode(ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    """Whether the options and arguments of `generate` ask for nothing that `decode` lacks."""
    asked = {name for name, value in model_kwargs.items() if value is not None}
    return (
        asked <= TAKEN
        and "past_key_values" in asked
        and bool(model_kwargs.get("use_cache"))
        and not config.return_dict_in_generate
        and not getattr(config, "is_assistant", False)
        and config.prefill_chunk_size is None
        and config.compile_config is None
        and ids.device.type == "cpu"
    )


def decode(
    model: Any,
    ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """``ids [B, T]`` and what follows them, as transformers' `_sample` returns it."""
    cache, mask, pad = (
        model_kwargs["past_key_values"],
        model_kwargs.get("attention_mask"),
        config._pad_token_tensor,
    )
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    quick = (QuickTopP(p) if type(p) is TopPLogitsWarper else p for p in processors)
    processors, unfinished = LogitsProcessorList(quick), ids.new_ones(ids.shape[0])
    # ids are the whole text or, as the length of the mask tells, what follows the cached part
    whole = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    unread = ids.shape[1] - cache.get_seq_length() if whole == ids.shape[1] else None
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=unread, is_first_iteration=True, **model_kwargs
    )
    logits = model(**inputs, return_dict=True).logits[:, -1]
    decoder: Decoder | Forward | None = None
    try:
        while True:
            scores = processors(ids, logits.to(copy=True, dtype=torch.float32))
            if config.do_sample:
                new = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                new = argmax(scores)
            if ends:
                new = new * unfinished + pad * (1 - unfinished)
            ids = torch.cat((ids, new[:, None]), -1)
            if streamer is not None:
                streamer.put(new.cpu())
            unfinished = unfinished & ~criteria(ids, None)
            if not bool(unfinished.any()):
                break
            if decoder is None:
                decoder = begin_decoding(model, cache, mask)
            logits = decoder.step(new)
    finally:
        if decoder is not None:
            decoder.close()
    if streamer is not None:
        streamer.end()
    return ids


def argmax(scores: Tensor) -> Tensor:
    """``scores.argmax(-1)`` on the CPU, for which NumPy takes a tenth of the time."""
    return torch.from_numpy(scores.float().numpy().argmax(-1))


def begin_decoding(model: Any, cache: Cache, mask: Tensor | None) -> Decoder | Forward:
    """What takes one token of each row at a time; ``mask [B, S]``: that of the cached tokens."""
    try:
        return Decoder(model, cache, None if mask is None or bool(mask.all()) else mask)
    except Unsuitable:
        return Forward(model, cache, mask)


class Forward:
    """Steps by the model's `forward`, for models without a `Decoder`."""

    def __init__(self, model: Any, cache: Cache, mask: Tensor | None):
        self._model, self._cache = model, cache
        self._mask = None if mask is None or bool(mask.all()) else mask

    def step(self, ids: Tensor) -> Tensor:
        """The logits ``[B, vocab_size]`` after ``ids [B]``."""
        if self._mask is not None:
            self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), 1)
        logits: Tensor = self._model(
            input_ids=ids[:, None],
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits[:, -1]

    def close(self) -> None:
        """Nothing: `forward` has written the cache."""


class QuickTopP:
    """transformers' top-p, which sorts the whole vocabulary, from the likeliest tokens alone.

    A token is kept if the sum of all likelier ones is below p. Where rounding or equal
    probabilities could decide, transformers' own does.
    """

    def __init__(self, warper: TopPLogitsWarper):
        self.warper = warper

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        size, p = scores.shape[-1], self.warper.top_p
        if size <= SMALL or self.warper.min_tokens_to_keep > MOST_KEPT:
            return self.warper(ids, scores)  # type: ignore[no-any-return]
        likely, index = scores.softmax(-1).topk(MOST_KEPT, sorted=True)
        before = likely.cumsum(-1) - likely
        kept = before < p
        kept[:, : self.warper.min_tokens_to_keep] = True
        last = kept.sum(-1, keepdim=True) - 1
        edge = likely.gather(-1, (last + 1).clamp(max=MOST_KEPT - 1))
        doubtful = ((before - p).abs() < MARGIN).any() | (likely.gather(-1, last) == edge).any()
        if bool(doubtful | kept[:, -1].any()):
            return self.warper(ids, scores)  # type: ignore[no-any-return]
        out = torch.full_like(scores, self.warper.filter_value)
        return out.scatter_(
            -1, index, scores.gather(-1, index).masked_fill(~kept, self.warper.filter_value)
        )
