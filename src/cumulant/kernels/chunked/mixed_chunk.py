"""The operator of mixed chunk attention: tokens aligned to groups, whatever came before, and one-token steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..transforms import mappable
from .layout import Dense, Packed
from .mixed_passes import Groups, MixedSpec, Open, backward, forward
from .passes import compute_dtype
from .weights import activate


class _Even:
    """Every sequence goes on at the same place of its open group, token `fill`: the rows are slices of the batch."""

    def __init__(self, batch: int, tokens: int, fill: int, group_size: int):
        self.fill, self.group_size = fill, group_size
        self.queries = self.keys = Dense(batch, fill + tokens, group_size)
        self.lengths = torch.full((batch,), fill + tokens)

    def query(self, x: Tensor) -> Tensor:
        return pad(x, (0, 0, self.fill, 0)) if self.fill else x

    def key(self, x: Tensor, still_open: Tensor | None) -> Tensor:
        if still_open is None or not self.fill:
            return x
        return torch.cat((still_open[:, :, : self.fill].to(x.dtype), x), 2)

    def back_query(self, y: Tensor) -> Tensor:
        return y[:, :, self.fill :].clone() if self.fill else y

    def back_key(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens and of the open group."""
        first = pad(y[:, :, : self.fill], (0, 0, 0, self.group_size - self.fill))
        return self.back_query(y), first


class _Ragged:
    """Sequences of their own lengths, fills and places: all tokens in one row, followed by all open groups."""

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
            place = torch.cat((self.batch * self.tokens + slots[:, 0] * group_size + slots[:, 1], place))
            owner = torch.cat((slots[:, 0], owner))
            place = place[torch.argsort(owner, stable=True)]
            lengths = lengths + fill.cpu()
        size = self.batch * self.tokens
        self.queries = Packed(lengths, size, group_size, device, place)
        self.keys = Packed(lengths, size + (0 if fill is None else rows * group_size), group_size, device, place)
        self.lengths = self.keys.lengths

    def query(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` -> ``[1, H, B·T, D]``."""
        return x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[-1])

    def key(self, x: Tensor, still_open: Tensor | None) -> Tensor:
        x = self.query(x)
        return x if still_open is None else torch.cat((x, self.query(still_open).to(x.dtype)), 2)

    def back_query(self, y: Tensor) -> Tensor:
        tokens: Tensor = y[0, :, : self.batch * self.tokens].unflatten(1, (self.batch, self.tokens))
        return tokens.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def back_key(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = y[0, :, self.batch * self.tokens :].unflatten(1, (-1, self.group_size))
        return self.back_query(y), rows.transpose(0, 1).clone(memory_format=torch.contiguous_format)


class Past(NamedTuple):
    """A state: sums over whole groups, the open group, tokens so far."""

    numerator: Tensor
    rest: Open
    position: Tensor


def _align(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    past: Past | None,
    seed: Tensor | None,
    spec: MixedSpec,
) -> tuple[_Even | _Ragged, Groups]:
    g, shape = spec.group_size, value.shape
    fill = None if past is None else past.position % g
    fills = [0] if fill is None else fill.tolist()
    even = key_mask is None and cu_seqlens is None and len(set(fills)) <= 1
    rows: _Even | _Ragged
    rows = _Even(shape[0], shape[2], (fills or [0])[0], g) if even else _Ragged(shape, key_mask, cu_seqlens, fill, g)
    rest: Open | tuple[None, None, None] = (None, None, None) if past is None else past.rest
    groups = Groups(
        rows.query(quad_query),
        rows.key(quad_key, rest[0]),
        rows.query(lin_query),
        rows.key(lin_key, rest[1]),
        rows.key(value, rest[2]),
        bias,
        seed,
        rows.queries,
        rows.keys,
        rows.lengths,
        spec,
        compute_dtype(value.dtype),
    )
    return rows, groups


def _step(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    past: Past,
    spec: MixedSpec,
) -> tuple[Tensor, Tensor, Open]:
    """One token onto a state: into the open group, which it reads, as it does the sums; whole groups join the sums."""
    (B, H, _, _), G, g = quad_query.shape, value.shape[1], spec.group_size
    dtype, fill = compute_dtype(value.dtype), past.position % g
    at = (torch.arange(B, device=fill.device), slice(None), fill)
    rest = Open(*(x.clone(memory_format=torch.contiguous_format) for x in past.rest))
    for buffer, x in zip(rest, (quad_key, lin_key, value), strict=True):
        buffer[at] = x[:, :, 0].to(dtype)
    scores = (quad_query.to(dtype) * (1 / g)).reshape(B, G, H // G, quad_query.shape[3]) @ rest.quad_key.mT
    if bias is not None:
        scores += bias[:, fill].transpose(0, 1).expand(B, H, g).reshape(scores.shape)
    y = activate(spec.activation, scores) @ rest.value  # slots still empty hold values of zero
    y += (lin_query.to(dtype) * (1 / g)).reshape(B, G, H // G, lin_query.shape[3]) @ past.numerator
    S = past.numerator.clone(memory_format=torch.contiguous_format)
    closed = (fill == g - 1).nonzero()[:, 0]
    if len(closed):
        S[closed] += rest.lin_key[closed].mT @ rest.value[closed]
        for buffer in rest:
            buffer[closed] = 0
    return (
        y.reshape(B, H, 1, value.shape[3]).to(value.dtype, copy=True),
        S,
        rest,
    )  # no view, which could not be changed in place


def _past(numerator: Tensor | None, *parts: Tensor | None) -> Past | None:
    if numerator is None:
        return None
    quad_key, lin_key, value, position = parts
    assert quad_key is not None
    assert lin_key is not None
    assert value is not None
    assert position is not None
    return Past(numerator, Open(quad_key, lin_key, value), position)


@torch.library.custom_op("cumulant::mixed_chunk_attention", mutates_args=())
def mixed_chunk_attention(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    open_quad_key: Tensor | None,
    open_lin_key: Tensor | None,
    open_value: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
    want_state: bool,
    group_size: int,
    activation: str,
    is_causal: bool,
    reduce_groups: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, and the state's sums and open group: empty when not wanted."""
    spec = MixedSpec(group_size, activation, is_causal, reduce_groups, dropout_p)
    inputs = (quad_query, quad_key, lin_query, lin_key, value)
    past = _past(numerator, open_quad_key, open_lin_key, open_value, position)
    with torch.autocast(value.device.type, enabled=False):
        plain = key_mask is None and cu_seqlens is None and dropout_p == 0.0
        if past is not None and want_state and plain and value.shape[2] == 1:
            out, S, rest = _step(*inputs, bias, past, spec)
            return out, S, *rest
        rows, groups = _align(*inputs, bias, key_mask, cu_seqlens, past, seed, spec)
        aligned, S, still_open = forward(groups, None if past is None else past.numerator, want_state)
        out = rows.back_query(aligned)
    if still_open is None:
        a, b, c, d = (value.new_empty(0, dtype=groups.dtype) for _ in range(4))
        return out, a, b, c, d
    return out, S, *still_open


@mixed_chunk_attention.register_fake
def _(quad_query, quad_key, lin_query, lin_key, value, bias, key_mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    want_state, g = rest[6:8]
    B, G, _, V = value.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K, L, dtype = quad_key.shape[-1], lin_key.shape[-1], compute_dtype(value.dtype)
    out = value.new_empty(B, quad_query.shape[1], value.shape[2], V)
    shapes = ((N, G, L, V), (N, G, g, K), (N, G, g, L), (N, G, g, V)) if want_state else ((0,),) * 4
    return out, *(value.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("cumulant::mixed_chunk_attention_backward", mutates_args=())
def mixed_chunk_attention_backward(
    dout: Tensor,
    dnumerator: Tensor | None,
    dopen_quad_key: Tensor | None,
    dopen_lin_key: Tensor | None,
    dopen_value: Tensor | None,
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    open_quad_key: Tensor | None,
    open_lin_key: Tensor | None,
    open_value: Tensor | None,
    position: Tensor | None,
    seed: Tensor | None,
    group_size: int,
    activation: str,
    is_causal: bool,
    reduce_groups: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, the bias, and the four parts of the state; empty for what is None."""
    spec = MixedSpec(group_size, activation, is_causal, reduce_groups, dropout_p)
    inputs = (quad_query, quad_key, lin_query, lin_key, value)
    past = _past(numerator, open_quad_key, open_lin_key, open_value, position)
    with torch.autocast(value.device.type, enabled=False):
        rows, groups = _align(*inputs, bias, key_mask, cu_seqlens, past, seed, spec)
        drest = None
        if dopen_quad_key is not None and dopen_lin_key is not None and dopen_value is not None:
            drest = Open(dopen_quad_key, dopen_lin_key, dopen_value)
        grads = backward(groups, rows.query(dout), None if past is None else past.numerator, dnumerator, drest)
        keys, still_open = zip(*(rows.back_key(x) for x in (grads.quad_key, grads.lin_key, grads.value)), strict=True)
        found = [rows.back_query(grads.quad_query), keys[0], rows.back_query(grads.lin_query), keys[1], keys[2]]
    empty = [value.new_empty(0) for _ in range(5)]
    dbias = empty[0] if bias is None or grads.bias is None else grads.bias.to(bias.dtype)
    state = empty[1:] if past is None else [grads.S, *still_open]
    return (*(x.to(like.dtype) for x, like in zip(found, inputs, strict=True)), dbias, *state)


@mixed_chunk_attention_backward.register_fake
def _(dout, dS, dk, dl, dv, quad_query, quad_key, lin_query, lin_key, value, bias, mask, cu, S, k, l, v, *rest):  # type: ignore[no-untyped-def]
    like = (quad_query, quad_key, lin_query, lin_key, value, bias, S, k, l, v)
    return tuple(value.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:14])
    ctx.want_state, *ctx.options = inputs[14:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, *dstate):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    value, bias, numerator = tensors[4], tensors[5], tensors[8]
    if dout is None:
        dout = value.new_zeros(value.shape[0], tensors[0].shape[1], *value.shape[2:])
    if not ctx.want_state:
        dstate = (None,) * 4
    if any(x is not None for x in dstate[1:]):
        dstate = (dstate[0], *_filled(dstate[1:], tensors, ctx.options[0]))
    grads = _backward(dout, *dstate, *tensors, *ctx.options)
    state = grads[6:] if numerator is not None else (None,) * 4
    return *grads[:5], grads[5] if bias is not None else None, None, None, *state, *[None] * 8


def _filled(dopen: tuple[Tensor | None, ...], tensors: tuple[Tensor, ...], group_size: int) -> tuple[Tensor, ...]:
    """Zeros in place of gradients that did not come, so that the three parts come together."""
    value, cu_seqlens = tensors[4], tensors[7]
    rows = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    like = (tensors[1], tensors[3], value)
    return tuple(
        x.new_zeros(rows, value.shape[1], group_size, x.shape[-1], dtype=compute_dtype(value.dtype)) if d is None else d
        for d, x in zip(dopen, like, strict=True)
    )


mixed_chunk_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(mixed_chunk_attention_backward)
attention = mappable(mixed_chunk_attention, _save, _differentiate)
