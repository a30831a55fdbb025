"""Mixed chunk attention: aligns tokens to their groups, and steps one token onto a state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..spec import (
    MixedChunkInputs,
    MixedChunkOutputs,
    MixedChunkSpec,
    accumulation_dtype,
    copy_heads,
    mixed_chunk_gradients,
)
from ..transforms import without_autocast
from .layout import Dense, Packed
from .mixed_passes import Groups, OpenGroup, backward_groups, forward_groups
from .weights import activate_in_place


class _EvenRows:
    """Rows whose open groups have the same number of tokens: groups are slices of the batch."""

    def __init__(self, batch: int, tokens: int, fill: int, group_size: int):
        self.fill, self.group_size = fill, group_size
        self.queries = self.keys = Dense(batch, fill + tokens, group_size)
        self.lengths = torch.full((batch,), fill + tokens)

    def align_query(self, x: Tensor) -> Tensor:
        return pad(x, (0, 0, self.fill, 0)) if self.fill else x

    def align_key(self, x: Tensor, still_open: Tensor | None) -> Tensor:
        if still_open is None or not self.fill:
            return x
        return torch.cat((still_open[:, :, : self.fill].to(x.dtype), x), 2)

    def restore_query(self, y: Tensor) -> Tensor:
        return copy_heads(y[:, :, self.fill :]) if self.fill else y

    def restore_key(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens and of the open group."""
        first = pad(y[:, :, : self.fill], (0, 0, 0, self.group_size - self.fill))
        return self.restore_query(y), first


class _RaggedRows:
    """Rows of different lengths and fills: all tokens in one row, followed by all open groups.

    An index lists the tokens of every sequence, those of its open group first. It leaves out masked
    tokens.
    """

    def __init__(
        self,
        shape: torch.Size,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        fill: Tensor | None,
        group_size: int,
    ):
        (self.batch, _, self.tokens, _), device = shape, torch.device("cpu")
        self.group_size = group_size
        place = torch.arange(self.batch * self.tokens)
        if cu_seqlens is None:
            rows = self.batch
            owner = place // max(self.tokens, 1)
        else:
            device, rows = cu_seqlens.device, len(cu_seqlens) - 1
            owner = torch.searchsorted(cu_seqlens.cpu().long(), place, right=True) - 1
        if fill is not None:
            device = fill.device
        seen = owner < rows
        if key_mask is not None:
            device = key_mask.device
            seen &= key_mask.flatten().cpu()
        place, owner = place[seen], owner[seen]
        lengths = torch.bincount(owner, minlength=rows)
        if fill is not None:
            slots = (torch.arange(group_size) < fill.cpu()[:, None]).nonzero()
            place = torch.cat(
                (self.batch * self.tokens + slots[:, 0] * group_size + slots[:, 1], place)
            )
            owner = torch.cat((slots[:, 0], owner))
            place = place[torch.argsort(owner, stable=True)]
            lengths = lengths + fill.cpu()
        size = self.batch * self.tokens
        self.queries = Packed(lengths, size, group_size, device, place)
        self.keys = Packed(
            lengths, size + (0 if fill is None else rows * group_size), group_size, device, place
        )
        self.lengths = self.keys.lengths

    def align_query(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` -> ``[1, H, B·T, D]``."""
        return x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[-1])

    def align_key(self, x: Tensor, still_open: Tensor | None) -> Tensor:
        x = self.align_query(x)
        return (
            x if still_open is None else torch.cat((x, self.align_query(still_open).to(x.dtype)), 2)
        )

    def restore_query(self, y: Tensor) -> Tensor:
        tokens: Tensor = y[0, :, : self.batch * self.tokens].unflatten(1, (self.batch, self.tokens))
        return copy_heads(tokens.transpose(0, 1))

    def restore_key(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = y[0, :, self.batch * self.tokens :].unflatten(1, (-1, self.group_size))
        return self.restore_query(y), rows.transpose(0, 1).clone(
            memory_format=torch.contiguous_format
        )


def obstacle(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    return ""


def prepared(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkSpec:
    return spec


def describe(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    if inputs.value.shape[2] == 1 and inputs.position is not None and spec.returns_state:
        return f"one token onto a state, {spec.group_size} slots of the open group"
    return f"groups of {spec.group_size} tokens, one after another"


def _align_groups(
    x: MixedChunkInputs, spec: MixedChunkSpec
) -> tuple[_EvenRows | _RaggedRows, Groups]:
    g, shape = spec.group_size, x.value.shape
    fill = None if x.position is None else x.position % g
    fills = [0] if fill is None else fill.tolist()
    even = x.covers_tokens and len(set(fills)) <= 1
    rows: _EvenRows | _RaggedRows
    rows = (
        _EvenRows(shape[0], shape[2], (fills or [0])[0], g)
        if even
        else _RaggedRows(shape, x.key_mask, x.cu_seqlens, fill, g)
    )
    groups = Groups(
        rows.align_query(x.quad_query),
        rows.align_key(x.quad_key, x.open_quad_key),
        rows.align_query(x.lin_query),
        rows.align_key(x.lin_key, x.open_lin_key),
        rows.align_key(x.value, x.open_value),
        x.bias,
        x.seed,
        rows.queries,
        rows.keys,
        rows.lengths,
        spec,
        accumulation_dtype(x.value),
    )
    return rows, groups


def _step_token(
    x: MixedChunkInputs,
    numerator: Tensor,
    past: OpenGroup,
    position: Tensor,
    g: int,
    activation: str,
) -> MixedChunkOutputs:
    """One token onto a state.

    The token joins its open group, and attends to that group and to the sums. A group that is then
    complete joins the sums.
    """
    (quad_query, quad_key, lin_query, lin_key, value), bias = x.tokens, x.bias
    (B, H, _, _), G, dtype, fill = (
        quad_query.shape,
        value.shape[1],
        accumulation_dtype(value),
        position % g,
    )
    at = (torch.arange(B, device=fill.device), slice(None), fill)
    rest = OpenGroup(*(x.clone(memory_format=torch.contiguous_format) for x in past))
    for buffer, new in zip(rest, (quad_key, lin_key, value), strict=True):
        buffer[at] = new[:, :, 0].to(dtype)
    scores = (quad_query.to(dtype) * (1 / g)).reshape(
        B, G, H // G, quad_query.shape[3]
    ) @ rest.quad_key.mT
    if bias is not None:
        scores += bias[:, fill].transpose(0, 1).expand(B, H, g).reshape(scores.shape)
    y = activate_in_place(activation, scores) @ rest.value  # empty slots have values of zero
    y += (lin_query.to(dtype) * (1 / g)).reshape(B, G, H // G, lin_query.shape[3]) @ numerator
    S = numerator.clone(memory_format=torch.contiguous_format)
    closed = (fill == g - 1).nonzero()[:, 0]
    if len(closed):
        S[closed] += rest.lin_key[closed].mT @ rest.value[closed]
        for buffer in rest:
            buffer[closed] = 0
    # a copy, because a view could not be changed in place
    out = y.reshape(B, H, 1, value.shape[3]).to(value.dtype, copy=True)
    return MixedChunkOutputs(out, S, *rest)


def forward(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkOutputs:
    with without_autocast(inputs.value):
        plain = inputs.covers_tokens and spec.dropout_p == 0.0 and spec.returns_state
        if (
            plain
            and inputs.value.shape[2] == 1
            and inputs.numerator is not None
            and inputs.position is not None
        ):
            past = OpenGroup(*inputs.sums[1:])  # type: ignore[arg-type]
            return _step_token(
                inputs, inputs.numerator, past, inputs.position, spec.group_size, spec.activation
            )
        rows, groups = _align_groups(inputs, spec)
        aligned, S, still_open = forward_groups(groups, inputs.numerator)
        out = rows.restore_query(aligned)
    if still_open is None:
        return MixedChunkOutputs(out, *(out.new_empty(0, dtype=groups.dtype) for _ in range(4)))
    return MixedChunkOutputs(out, S, *still_open)


def backward(
    upstream: MixedChunkOutputs,
    inputs: MixedChunkInputs,
    outputs: MixedChunkOutputs,
    spec: MixedChunkSpec,
) -> MixedChunkInputs:
    with without_autocast(inputs.value):
        rows, groups = _align_groups(inputs, spec)
        # The same alignment as in the forward pass. A token's gradient is restored to where the
        # token came from: the call's tokens, or the open group of the state.
        drest = _open_upstream(upstream, inputs, spec)
        grads = backward_groups(
            groups,
            rows.align_query(upstream.out),
            inputs.numerator,
            upstream.final_numerator,
            drest,
        )
        keys, still_open = zip(
            *(rows.restore_key(x) for x in (grads.quad_key, grads.lin_key, grads.value)),
            strict=True,
        )
        found = [
            rows.restore_query(grads.quad_query),
            keys[0],
            rows.restore_query(grads.lin_query),
            keys[1],
            keys[2],
        ]
    tokens = [x.to(like.dtype) for x, like in zip(found, inputs.tokens, strict=True)]
    dbias = None if inputs.bias is None or grads.bias is None else grads.bias.to(inputs.bias.dtype)
    state = (None,) * 4 if inputs.numerator is None else (grads.S, *still_open)
    return mixed_chunk_gradients(tokens, dbias, state)


def _open_upstream(
    upstream: MixedChunkOutputs, inputs: MixedChunkInputs, spec: MixedChunkSpec
) -> OpenGroup | None:
    """Gradients at the open group, with zeros for missing ones; None if all are missing."""
    given = upstream.final_quad_key, upstream.final_lin_key, upstream.final_value
    if all(x is None for x in given):
        return None
    _, *shapes = spec.state_shapes(inputs)
    dtype = accumulation_dtype(inputs.value)
    zeros = (inputs.value.new_zeros(shape, dtype=dtype) for shape in shapes)
    return OpenGroup(*(zero if x is None else x for x, zero in zip(given, zeros, strict=True)))
