"""Gated attention, a block of queries at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..spec import GatedInputs, GatedOutputs, GatedSpec, accumulation_dtype
from ..transforms import without_autocast

BLOCK = 128  # queries whose weights exist at a time

_MEAN, _WIDTH = math.sqrt(0.5), math.sqrt(1 / (2 * math.pi))  # Laplace: ½ erfc((mean - x) / width)


def activate(name: str, x: Tensor) -> Tensor:
    return x.relu().square() if name == "relu2" else torch.erfc((_MEAN - x) / _WIDTH) / 2


def attention(inputs: GatedInputs, spec: GatedSpec) -> GatedOutputs:
    """``f(scale · q kᵀ + bias) v``."""
    query, cu_seqlens = inputs.query, inputs.cu_seqlens
    with without_autocast(query):
        if cu_seqlens is None:
            return GatedOutputs(_attend(inputs, spec))
        bounds, outs = cu_seqlens.tolist(), []
        for a, b in pairwise(bounds):
            q, k, v = (x[:, :, a:b] for x in (query, inputs.key, inputs.value))
            scale = inputs.scale if inputs.scale.shape[1] == 1 else inputs.scale[:, a:b]
            bias = None if inputs.bias is None else inputs.bias[..., : b - a, : b - a]
            outs.append(_attend(GatedInputs(q, k, v, scale, bias), spec))
        outs.append(
            query.new_zeros(*query.shape[:2], query.shape[2] - bounds[-1], inputs.value.shape[3])
        )
        return GatedOutputs(torch.cat(outs, 2))


def _attend(inputs: GatedInputs, spec: GatedSpec) -> Tensor:
    query, key, value, scale, bias, *_ = inputs
    (B, H, T, _), (G, S), is_causal = query.shape, key.shape[1:3], spec.is_causal
    dtype = accumulation_dtype(query)
    q = (query.to(dtype) * scale[:, None, :, None]).unflatten(1, (G, H // G))
    k, v = key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]
    if bias is not None:
        bias = bias.to(dtype).expand(-1, H, -1, -1).unflatten(1, (G, H // G))
    outs = [query.new_zeros(B, H, 0, value.shape[3])]
    for start in range(0, T, BLOCK):
        rows, end = slice(start, start + BLOCK), min(start + BLOCK, T) + S - T if is_causal else S
        scores = q[:, :, :, rows] @ k[:, :, :, :end].mT
        weights = activate(
            spec.activation, scores if bias is None else scores + bias[:, :, :, rows, :end]
        )
        if is_causal:
            weights = weights.tril(S - T + start)
        weights = dropout(weights, spec.dropout_p) if spec.dropout_p else weights
        outs.append((weights @ v[:, :, :, :end]).flatten(1, 2).to(query.dtype))
    return torch.cat(outs, 2)
