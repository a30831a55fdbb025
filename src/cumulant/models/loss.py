"""Losses of models with logits, also without forming the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from ..ops.cross_entropy import (
    IGNORED,
    fits,
    linear_cross_entropy,
    piece_length,
    summed_cross_entropy,
)


def causal_loss(
    model: Any,
    hidden: Tensor,
    logits: Tensor | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    items: Tensor | int | None,
) -> Tensor:
    """The model's loss of its logits, or where these are None, of the hidden states ``[..., D]``.

    A `loss_function` of the user's gets the logits in any case.
    """
    if logits is None:
        if model.loss_function is ForCausalLMLoss:
            return loss_in_pieces(model, hidden, _shifted(labels, shift_labels), items)
        logits = model.logits(hidden)
    shifted = None if shift_labels is None else shift_labels.contiguous()
    options = {"num_items_in_batch": items, "shift_labels": shifted}
    loss: Tensor = model.loss_function(logits, labels, model.config.vocab_size, **options)
    return loss


def masked_loss(
    model: Any,
    hidden: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    items: Tensor | int | None,
) -> Tensor:
    """The loss of the logits, or where these are None, of the hidden states ``[B, T, D]``."""
    if logits is None:
        return loss_in_pieces(model, hidden, labels, items)
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        reduction="mean" if items is None else "sum",
    )
    return total if items is None else total / items


def _shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """The label of the next token in each row; the last one has none."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


def loss_in_pieces(
    model: Any, hidden: Tensor, labels: Tensor, divisor: Tensor | int | None
) -> Tensor:
    """The summed cross entropy of ``model.logits(hidden)`` over `divisor`.

    Only a piece of the tokens has logits at a time. A plain head forms its gradients in the forward
    pass. Others, such as adapters, compute their logits again in the backward pass. What traces or
    transforms the call gets all logits at once.

    Args:
        hidden: ``[..., D]``.
        labels: one for each row of `hidden`, not to be shifted; -100 is left out.
        divisor: by default the number of labels.
    """
    rows, labels = hidden.flatten(0, -2), labels.flatten().to(hidden.device)
    if len(labels) != len(rows):
        raise ValueError(
            f"shift_labels: expected {len(rows)}, one for each token with logits, got {len(labels)}"
        )
    head = model.plain_head()
    if head is not None and fits(rows, labels, head.weight, head.bias):
        return linear_cross_entropy(rows, head.weight, labels, head.bias, divisor=divisor)
    if divisor is None:
        divisor = (labels != IGNORED).sum()
    elif isinstance(divisor, Tensor):
        divisor = divisor.to(hidden.device)

    def piece_loss(x: Tensor, label: Tensor) -> Tensor:
        return summed_cross_entropy(model.logits(x), label)

    length = piece_length(model.config.vocab_size)
    if len(rows) <= length or not fits(rows, labels, None, None):
        return piece_loss(rows, labels) / divisor
    losses = [
        checkpoint(piece_loss, x, label, use_reentrant=False)
        if torch.is_grad_enabled()
        else piece_loss(x, label)
        for x, label in zip(rows.split(length), labels.split(length), strict=True)
    ]
    return torch.stack(losses).sum() / divisor
