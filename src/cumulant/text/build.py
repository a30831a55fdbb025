"""The tokenizer and the model of a training run, from its options."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from ..models import CumulantConfig, CumulantForCausalLM, from_preset
from .carry import check_carries
from .chat import Chat, chat_renderer
from .checkpoint import checkpoint_folder, unused_ids
from .corpus import Corpus
from .options import TrainingOptions
from .tokenizer import byte_tokenizer, load_tokenizer, train_bpe, vocabulary_size
from .warm_start import SETTLED, freeze_backbone, inherited_configuration, inherited_model

SETTLED_NAMES = {field: name for name, field in SETTLED.items()}


def check_before_reading(options: TrainingOptions, given: Collection[str]) -> None:
    """Refuse a tokenizer or a model that cannot be built, before the text is read."""
    if options.train_bpe is None:
        check_model(options, choose_tokenizer(options, None, lambda _: None), given)
    else:
        check_model(options, byte_tokenizer(), given, options.train_bpe)


def check_model(
    options: TrainingOptions,
    tokenizer: PreTrainedTokenizerFast,
    given: Collection[str],
    size: int | None = None,
) -> None:
    """Refuse a model that cannot be built, before anything is written."""
    config = _configuration(options, tokenizer, None, given)
    needed = vocabulary_size(tokenizer) if size is None else min(size, vocabulary_size(tokenizer))
    if config.vocab_size < needed:
        raise ValueError(
            f"vocab_size: expected at least {needed}, since the tokenizer has ids up to"
            f" {needed - 1}, got {config.vocab_size}"
        )
    if options.carry_state != "none":
        check_carries(config)
    if options.init_from is not None:
        inherited_model(options, config)
    with torch.device("meta"):
        CumulantForCausalLM(config)


def build_model(
    options: TrainingOptions,
    tokenizer: PreTrainedTokenizerFast,
    start: Path | None,
    given: Collection[str],
) -> CumulantForCausalLM:
    """A new model, or the trained one to start from.

    `start` is the checkpoint of a resumed run: the trainer loads its weights.
    """
    config = _configuration(options, tokenizer, start, () if options.resume else given)
    new = options.init_from is None or start is not None
    model = CumulantForCausalLM(config) if new else inherited_model(options, config)
    model.generation_config.suppress_tokens = unused_ids(tokenizer, config.vocab_size) or None
    if options.freeze_backbone:
        freeze_backbone(model)
    return model


def choose_tokenizer(
    options: TrainingOptions, corpus: Corpus | None, say: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    """The tokenizer that the options name; a byte-level BPE is trained on `corpus`."""
    if options.init_from is not None:
        return load_tokenizer(checkpoint_folder(options.init_from))
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    if options.train_bpe is not None and corpus is not None:
        say(f"tokenizer: training a byte-level BPE of {options.train_bpe} tokens")
        return train_bpe(corpus.train, options.train_bpe)
    return byte_tokenizer()


def choose_chat(options: TrainingOptions) -> Chat | None:
    """The renderer of the tokenizer's chat template; a tokenizer trained here has none."""
    if options.resume:
        return chat_renderer(load_tokenizer(options.output))
    return chat_renderer(choose_tokenizer(options, None, lambda _: None))


def _configuration(
    options: TrainingOptions,
    tokenizer: PreTrainedTokenizerFast,
    start: Path | None,
    given: Collection[str],
) -> CumulantConfig:
    """The configuration of `start`, of the trained model, or of the preset and the options."""
    if options.init_from is not None:
        return inherited_configuration(
            options, start or checkpoint_folder(options.init_from), given
        )
    fields = {
        "vocab_size": vocabulary_size(tokenizer),
        "hidden_size": options.width,
        "num_hidden_layers": options.depth,
        "num_attention_heads": options.heads,
        "intermediate_size": options.intermediate,
        "dropout": options.dropout,
        "horizon": options.context,
        "logit_ffn": options.logit_ffn,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    overrides = options.overrides()
    try:
        return from_preset(options.preset, **{**fields, **overrides})
    except ValueError as error:
        message = str(error)
        for field, name in SETTLED_NAMES.items():
            if field not in overrides:
                message = message.replace(field, name)
        raise ValueError(message) from error
