"""Checks of the arguments that clients of Hugging Face models pass to `forward`.

Each argument is used, or asks for nothing, or raises an error that names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..nn.padding import packed_positions
from .config import CumulantConfig


class ClientArguments(TypedDict, total=False):
    """Further keyword arguments of every model's `forward`.

    A value that asks for nothing is accepted: None, False, all ones or the default. Other values
    raise an error, but for these:

    is_causal: as in the configuration.
    cache_position: ``[T]``, the positions of the new tokens behind the cached ones.
    cu_seq_lens_q, cu_seq_lens_k: other names of `cu_seqlens`.
    max_length_q, max_length_k: at least the length of the longest packed document.
    num_items_in_batch: divisor of the summed loss, for models with a loss over tokens.
    return_dict: False for a tuple.
    """

    output_attentions: bool | None
    output_router_logits: bool | None
    head_mask: Tensor | None
    is_causal: bool | None
    cache_position: Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | Tensor | None
    max_length_k: int | Tensor | None
    num_items_in_batch: Tensor | int | None
    return_dict: bool | None


class LossArguments(ClientArguments, total=False):
    """Further keyword arguments of models with logits.

    skip_logits: return the loss alone, with None for the logits, which then exist for some tokens
        at a time. Needs labels. Loss and gradients are the same.
    """

    skip_logits: bool | None


class CausalArguments(LossArguments, total=False):
    """Further keyword arguments of `CumulantForCausalLM`.

    ``shift_labels [B, T]`` are labels that are shifted already. If they were in the signature,
    Trainer would take them for the labels of an evaluation.
    """

    shift_labels: Tensor | None


NAMES = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "labels",
    "use_cache",
    "output_hidden_states",
    "cu_seqlens",
    "seq_idx",
    "token_type_ids",
    "logits_to_keep",
    "shift_labels",
    "skip_logits",
    *ClientArguments.__annotations__,
)


def require(condition: Tensor, message: str) -> None:
    """Raise a ValueError unless the condition holds.

    A compiled graph cannot, so it gets an assertion on the device.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def check_arguments(arguments: Mapping[str, Any], config: CumulantConfig) -> None:
    """Raise an error for names that no model knows, and for values that cannot be used."""
    for name in arguments:
        if name not in ClientArguments.__annotations__:
            near = difflib.get_close_matches(name, [known for known in NAMES if known != name], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}{hint}")
    if arguments.get("output_attentions") or (
        arguments.get("output_attentions") is None and config.output_attentions
    ):
        raise ValueError(
            "output_attentions: these models form no attention weights to return; leave it out"
        )
    if arguments.get("output_router_logits"):
        raise ValueError("output_router_logits: these models have no experts; leave it out")
    causal = arguments.get("is_causal")
    if causal is not None and bool(causal) != config.is_causal:
        raise ValueError(
            f"is_causal: the configuration says {config.is_causal}; build the model with another"
        )
    head_mask = arguments.get("head_mask")
    for mask in () if head_mask is None else head_mask:
        if mask is not None:
            require((mask == 1).all(), "head_mask: heads cannot be switched off here; leave it out")


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, dim: int) -> None:
    """A call passes either ids ``[B, T]`` or embeddings ``[B, T, D]``."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: pass either input_ids [B, T] or inputs_embeds [B, T, D]")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != dim):
        raise ValueError(
            f"inputs_embeds: expected [B, T, D] with D={dim}, got {list(inputs_embeds.shape)}"
        )
    if input_ids is None:
        return
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids: expected a tensor [B, T], got {type(input_ids).__name__}; try"
            " torch.tensor(...)"
        )
    if input_ids.dim() != 2:
        hint = "; one text is a batch of one, input_ids[None]" if input_ids.dim() == 1 else ""
        raise ValueError(f"input_ids: expected [B, T], got {list(input_ids.shape)}{hint}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"input_ids: expected int64 or int32, got {input_ids.dtype}; try input_ids.long()"
        )


def check_token_types(token_type_ids: Tensor | None) -> None:
    """Token types are zeros, as the models have no embeddings for them."""
    if token_type_ids is not None:
        require(
            (token_type_ids == 0).all(),
            "token_type_ids: these models have one type of token, so expected zeros; leave it out "
            "(return_token_type_ids=False in the tokenizer), or mark documents with position_ids",
        )


def check_cache_position(cache_position: Tensor | None, past: int, length: int) -> None:
    """The new tokens' positions follow the cached ones."""
    if cache_position is None:
        return
    expected = torch.arange(past, past + length, device=cache_position.device)
    last = past + length - 1
    message = (
        f"cache_position: expected [T] = {past} to {last}, behind the {past} cached positions;"
        " leave it out"
    )
    if cache_position.shape != expected.shape:
        raise ValueError(message)
    require((cache_position == expected).all(), message)


def split_mask(
    attention_mask: Tensor | None, x: Tensor, past: int
) -> tuple[Tensor | None, Tensor | None]:
    """Masks ``[B, T]`` of new and ``[B, S]`` of cached positions; None if all are tokens."""
    if attention_mask is None:
        return None, None
    B, T = x.shape[:2]
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != B
        or attention_mask.shape[1] != past + T
    ):
        raise ValueError(
            f"attention_mask: expected [B, S + T] = [{B}, {past + T}], {past} cached positions and"
            f" {T} new ones, got {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if attention_mask.dtype != torch.bool:
        require(
            (attention_mask == mask).all(),
            "attention_mask: expected 1 for tokens and 0 for padding, got other numbers; documents"
            " in one row are marked by position_ids, seq_idx or cu_seqlens",
        )
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None, None
    key_mask, past_mask = mask[:, mask.shape[1] - T :], mask[:, : mask.shape[1] - T]
    if not torch.compiler.is_compiling() and bool(key_mask.all()):
        return None, past_mask if past_mask.shape[1] else None
    return key_mask, past_mask if past_mask.shape[1] else None


def positions_in_texts(
    x: Tensor,
    past: int,
    key_mask: Tensor | None,
    past_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    count_padding: bool,
) -> Tensor:
    """The position of each new token in its text, ``[T]`` or ``[B, T]``."""
    T = x.shape[1]
    if cu_seqlens is not None:
        return packed_positions(T, cu_seqlens)
    position = (
        torch.arange(T, device=x.device)
        if key_mask is None or count_padding
        else key_mask.cumsum(1) - 1
    )
    if past_mask is None or count_padding:
        return position + past
    return position + past_mask.sum(1, keepdim=True)


def select_hidden_states(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The hidden states ``[B, T, D]`` for which logits are needed.

    keep: the number of last tokens (0: all), or indices ``[n]`` or ``[B, n]``, or a mask
    ``[B, T]``. With a mask the result is ``[n, D]``.
    """
    if not isinstance(keep, Tensor):
        return hidden[:, -keep:] if keep else hidden
    if keep.dtype == torch.bool:
        return hidden[keep]
    if keep.dim() == 2:
        return hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[2]))
    return hidden[:, keep]


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """There is one label for each token with logits, whose hidden states ``[..., D]`` these are."""
    if labels.dim() != 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected {list(hidden.shape[:-1])}, one for each of the logits, got"
            f" {list(labels.shape)}; with logits_to_keep pass the labels of those tokens, or none"
        )


def check_skip_logits(skip_logits: bool | None, *labels: Tensor | None) -> None:
    """Without labels there is nothing to return in place of the logits."""
    if skip_logits and all(x is None for x in labels):
        raise ValueError("skip_logits: without labels there is no loss to return; leave it out")
