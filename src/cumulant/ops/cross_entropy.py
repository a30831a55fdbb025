"""Cross entropy of a linear map's outputs, which exist for a piece of the tokens at a time.

The logits of all tokens take more memory than anything else in a small model's training step. Here
each piece's logits are multiplied, turned into their gradient in the same memory, and multiplied
into the gradients of tokens and weight. So the backward pass only scales these gradients. A step
takes the three products of the usual way; computing the logits again would take a fourth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.product import add_product, is_plain_call, linear_into, matmul
from ..kernels.spec import accumulation_dtype
from ..kernels.transforms import without_autocast

IGNORED = -100  # the label of tokens without a loss
PIECE = 1 << 24  # logits at a time, 64 MiB in fp32,
FEWEST = 256  # but of so many tokens at least, as each piece is added to the weight's gradient
BLOCK = 1 << 18  # logits at a time in softmax, which a core's cache holds


def piece_length(vocab_size: int) -> int:
    """The number of tokens whose logits exist at a time."""
    return max(FEWEST, PIECE // max(vocab_size, 1))


def fits(hidden: Tensor, labels: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the tokens can be taken in pieces, by `linear_cross_entropy` if there is a weight.

    These are plain tensors in a plain call, which is not traced, and has neither the transforms of
    `torch.func` nor forward-mode derivatives.
    """
    if not is_plain_call(hidden, labels, weight, bias):
        return False
    if weight is None:
        return True
    others = [weight] if bias is None else [weight, bias]
    device = hidden.device
    if device.type not in ("cpu", "cuda") or any(x.device != device for x in others):
        return False
    dtype = _multiplied_dtype(hidden)
    return all(_multiplied_dtype(x) == dtype for x in others)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens with a label, in fp32, or in fp64 for fp64 logits ``[N, vocab_size]``."""
    logits = logits.to(accumulation_dtype(logits))
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    divisor: Tensor | int | None = None,
) -> Tensor:
    """``Σ_i (logsumexp(z_i) - z_i[label_i]) / divisor`` with ``z = hidden weightᵀ + bias``.

    Softmax and sums are in fp32, or in fp64 for fp64 inputs. Products have the dtype of the inputs,
    or autocast's. Gradients are of first order.

    Args:
        hidden: ``[N, D]``.
        weight: ``[vocab_size, D]``.
        labels: ``[N]``; -100 leaves a token out.
        bias: ``[vocab_size]``.
        divisor: of the sum; by default the number of tokens that are not left out.

    Returns:
        The loss, fp32, or fp64 for fp64 inputs. It is NaN for a divisor of 0.

    Raises:
        ValueError: labels of another number, or beyond the vocabulary.
    """
    labels = labels.to(hidden.device)
    kept = _kept_rows(labels, len(hidden), len(weight))
    count = kept.new_tensor(len(kept)) if divisor is None else divisor
    if isinstance(count, Tensor):
        count = count.to(hidden.device)
    if not torch.is_grad_enabled():
        return _losses(hidden, weight, bias, labels, kept).sum() / count
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, kept, count)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor,
        divisor: Tensor | int,
    ) -> Tensor:
        inputs = hidden, weight, bias
        gradients: list[Tensor | None] = [None, None, None]
        for i, x in enumerate(inputs):
            if x is not None and ctx.needs_input_grad[i]:
                # the weight's is written over in any case, and takes long to fill with zeros
                make = x.new_empty if x is weight else x.new_zeros
                gradients[i] = make(x.shape, dtype=accumulation_dtype(x))
        total = _losses(*inputs, labels, kept, *gradients).sum()
        if len(kept):  # else they stay zero where the loss is NaN
            for gradient in gradients:
                if gradient is not None:
                    gradient.div_(divisor)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradients kept would pass for constants
            raise RuntimeError(
                "linear_cross_entropy: gradients of gradients are not implemented; let the model"
                " form its logits (leave skip_logits out)"
            )
        unscaled = grad.device.type == "cpu" and float(grad) == 1.0  # then nothing is copied
        found = [
            None if x is None else (x if unscaled else x * grad).to(dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None)


def _kept_rows(labels: Tensor, tokens: int, vocab_size: int) -> Tensor:
    """The indices of tokens that have a label, after checking the labels ``[N]``."""
    if labels.shape != (tokens,):
        raise ValueError(
            f"labels: expected [N] = [{tokens}], one for each token, got {list(labels.shape)}"
        )
    kept = (labels != IGNORED).nonzero()[:, 0]
    if len(kept):
        low, high = (int(x) for x in labels[kept].aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"labels: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}, or {IGNORED},"
                f" got {low if low < 0 else high}; is the tokenizer the model's?"
            )
    return kept


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
) -> Tensor:
    """The loss of each row in `kept`.

    The gradients of their sum are added to those given, and written over that of the weight.
    """
    dtype = _multiplied_dtype(hidden)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    losses = hidden.new_empty(len(kept), dtype=accumulation_dtype(hidden))
    length = min(piece_length(len(weight)), max(len(kept), 1))
    memory = hidden.new_empty((length, len(weight)), dtype=dtype)
    differentiate = any(x is not None for x in (grad_hidden, grad_weight, grad_bias))
    pieces = kept.split(length)
    first = pieces[0]
    with without_autocast(hidden):
        for rows, out in zip(pieces, losses.split(length), strict=True):
            x = hidden[rows].to(dtype)
            logits = linear_into(memory[: len(rows)], x, weight, bias)
            _softmax_losses(logits, labels[rows], out, differentiate)
            if grad_hidden is not None:
                grad_hidden[rows] = matmul(logits, weight).to(grad_hidden.dtype)
            if grad_weight is not None:
                add_product(grad_weight, logits.T, x, first=rows is first)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
            del logits  # before the next piece's, where these have memory of their own
    return losses


def _softmax_losses(logits: Tensor, labels: Tensor, losses: Tensor, differentiate: bool) -> None:
    """Write the losses of ``logits [n, vocab_size]``.

    With `differentiate` the logits become their gradient, softmax minus 1 at the label.
    """
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, BLOCK // logits.shape[1])
    for z, label, loss in zip(
        logits.split(rows), labels.split(rows), losses.split(rows), strict=True
    ):
        index = label[:, None]
        logs = torch.log_softmax(z, 1, dtype=losses.dtype)
        loss.copy_(-logs.gather(1, index)[:, 0])
        if differentiate:
            logs.exp_().scatter_add_(1, index, logs.new_full((1, 1), -1.0).expand(len(index), 1))
            z.copy_(logs)


def _multiplied_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `torch.nn.functional.linear` would multiply x here."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
