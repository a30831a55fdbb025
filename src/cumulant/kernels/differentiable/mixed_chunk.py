"""Mixed chunk attention: tokens in their groups' slots, every group at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from ..spec import MixedChunkInputs, MixedChunkOutputs, MixedChunkSpec, accumulation_dtype
from ..transforms import without_autocast
from .gated import activate
from .packed import each_sequence


def attention(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkOutputs:
    """Outputs and the state after all tokens."""
    run = partial(_attend, spec=spec)
    with without_autocast(inputs.value):
        if inputs.cu_seqlens is None:
            return run(inputs)
        by_token = ("quad_query", "quad_key", "lin_query", "lin_key", "value")
        state = ("numerator", "open_quad_key", "open_lin_key", "open_value", "position")
        found: MixedChunkOutputs = each_sequence(run, inputs, by_token, state)
        return found


def _attend(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkOutputs:
    (quad_query, quad_key, lin_query, lin_key, value), (S, *still_open) = inputs.tokens, inputs.sums
    bias, key_mask, position, is_causal = (
        inputs.bias,
        inputs.key_mask,
        inputs.position,
        spec.is_causal,
    )
    (B, H, T, _), G, g, dtype = (
        quad_query.shape,
        value.shape[1],
        spec.group_size,
        accumulation_dtype(value),
    )
    seen = value.new_ones(B, T, dtype=torch.bool) if key_mask is None else key_mask
    fill = torch.zeros_like(seen.sum(1)) if position is None else position % g
    groups = -(-(T + (0 if position is None else g - 1)) // g)
    place = (fill[:, None] + seen.cumsum(1) - 1).masked_fill(~seen, groups * g)[:, None, :, None]

    def slotted(x: Tensor, still_open: Tensor | None = None) -> Tensor:
        """``[B, heads, T, D]`` -> ``[B, heads, groups, g, D]``, zeros where no token is."""
        empty = x.new_zeros(B, x.shape[1], groups * g + 1, x.shape[3], dtype=dtype)
        y: Tensor = empty.scatter(2, place.expand(x.shape), x.to(dtype))[:, :, :-1].unflatten(
            2, (groups, g)
        )
        if still_open is None:
            return y
        filled = torch.arange(g, device=fill.device) < fill[:, None]
        still_open = still_open.masked_fill(~filled[:, None, :, None], 0)
        first: Tensor = pad(still_open[:, :, None], (0, 0, 0, 0, 0, groups - 1))
        return y + first

    k, s, v = (
        slotted(x, rest) for x, rest in zip((quad_key, lin_key, value), still_open, strict=True)
    )
    q, r = (slotted(x).unflatten(1, (G, H // G)) for x in (quad_query, lin_query))
    scores = q @ k[:, :, None].mT / g
    if bias is not None:
        scores = scores + bias.to(dtype).expand(H, g, g).unflatten(0, (G, H // G))[:, :, None]
    weights = activate(spec.activation, scores)
    weights = weights.tril() if is_causal else weights
    weights = dropout(weights, spec.dropout_p) if spec.dropout_p else weights
    out, own = weights @ v[:, :, None], s.mT @ v  # own: each group's sum
    S = (
        own.new_zeros(own[:, :, 0].shape if groups else (B, G, s.shape[-1], v.shape[-1]))
        if S is None
        else S
    )
    if is_causal:
        before = torch.cat((S[:, :, None], S[:, :, None] + own.cumsum(2)), 2)[:, :, :groups]
        out = out + r @ before[:, :, None] / g
    else:
        sums = own.sum(2, keepdim=True) if spec.reduce_groups else own
        out = out + r @ sums[:, :, None] / seen.sum(1).clamp(min=1).view(B, 1, 1, 1, 1, 1)
    out = pad(
        out.flatten(1, 2).flatten(2, 3), (0, 0, 0, 1)
    )  # the last row is that of tokens that are none
    out = out.gather(2, place.expand(B, H, T, out.shape[-1])).to(value.dtype)
    return MixedChunkOutputs(out, *_end(S, own, (k, s, v), fill + seen.sum(1), g))


def _end(S: Tensor, own: Tensor, parts: tuple[Tensor, ...], tokens: Tensor, g: int) -> list[Any]:
    """The state after so many tokens ``[B]``, an open group's included."""
    closed = tokens // g
    whole = torch.arange(own.shape[2], device=own.device) < closed[:, None]
    found = [S + (own * whole[:, None, :, None, None]).sum(2)]
    for x in parts:
        index = closed.view(-1, 1, 1, 1, 1).expand(*x.shape[:2], 1, *x.shape[3:])
        found.append(pad(x, (0, 0, 0, 0, 0, 1)).gather(2, index).squeeze(2))
    return found
