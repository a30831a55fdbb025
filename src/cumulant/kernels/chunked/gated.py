"""Gated attention, ``f(q kᵀ / n + bias) v``, a block of queries at a time: weights exist for one block only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..product import matmul
from ..transforms import mappable
from .passes import compute_dtype
from .weights import activate, activate_with_slope, bias_rows, dropped, hide_later


@dataclass(frozen=True)
class GatedSpec:
    activation: str
    is_causal: bool
    dropout_p: float
    block: int


class _Block(NamedTuple):
    """Queries ``rows`` of one sequence, which see keys ``columns``, `past` more than queries come before them."""

    number: int
    rows: slice
    columns: slice
    past: int
    first: int  # of the sequence


class _Inputs(NamedTuple):
    query: Tensor  # [B, H, T, K]
    key: Tensor  # [B, G, S, K]
    value: Tensor
    scale: Tensor  # [B or 1, T or 1], 1 / n
    bias: Tensor | None  # [B or 1, H or 1, T, S]
    seed: Tensor | None
    bounds: list[int] | None
    spec: GatedSpec
    dtype: torch.dtype

    def blocks(self) -> Iterator[_Block]:
        T, S = self.query.shape[2], self.key.shape[2]
        spans = [(0, T, 0, S)] if self.bounds is None else [(a, b, a, b) for a, b in pairwise(self.bounds)]
        number = 0
        for first, end, first_key, end_key in spans:
            for a in range(first, end, self.spec.block):
                b = min(a + self.spec.block, end)
                past = end_key - end + a - first_key
                last = first_key + past + b - a if self.spec.is_causal else end_key
                yield _Block(number, slice(a, b), slice(first_key, last), past, first)
                number += 1

    def load(self, at: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries ``[B,G,R·n,K]``, keys and values seen, scale ``[B,1,n,1]``."""
        B, H = self.query.shape[:2]
        scale = self.scale[:, at.rows] if self.scale.shape[1] > 1 else self.scale
        scale = scale[:, None, :, None]
        q = self.query[:, :, at.rows].to(self.dtype) * scale
        q = q.reshape(B, self.key.shape[1], H // self.key.shape[1] * q.shape[2], q.shape[3])
        return q, self.key[:, :, at.columns].to(self.dtype), self.value[:, :, at.columns].to(self.dtype), scale

    def scores(self, at: _Block, q: Tensor, k: Tensor) -> Tensor:
        scores = matmul(q, k.mT)
        bias = self._bias(at)
        return scores if bias is None else scores.add_(bias.to(self.dtype))

    def _bias(self, at: _Block) -> Tensor | None:
        if self.bias is None:
            return None
        rows = slice(at.rows.start - at.first, at.rows.stop - at.first)
        columns = at.columns.stop - at.columns.start
        return bias_rows(self.bias, self.key.shape[1], self.query.shape[1], rows, columns)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    spec: GatedSpec,
) -> _Inputs:
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    return _Inputs(query, key, value, scale, bias, seed, bounds, spec, compute_dtype(query.dtype))


@torch.library.custom_op("cumulant::gated_attention", mutates_args=())
def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    activation: str,
    is_causal: bool,
    dropout_p: float,
    block: int,
) -> Tensor:
    spec = GatedSpec(activation, is_causal, dropout_p, block)
    with torch.autocast(query.device.type, enabled=False):
        t = _inputs(query, key, value, scale, bias, cu_seqlens, seed, spec)
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        for at in t.blocks():
            q, k, v, _ = t.load(at)
            weights = activate(activation, t.scores(at, q, k))
            if is_causal:
                hide_later(weights, at.rows.stop - at.rows.start, at.past)
            kept = dropped(weights, dropout_p, seed, at.number)
            if kept is not None:
                weights *= kept
            out[:, :, at.rows] = matmul(weights, v).reshape(out[:, :, at.rows].shape)
    return out


@gated_attention.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("cumulant::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    activation: str,
    is_causal: bool,
    dropout_p: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty without one)."""
    spec = GatedSpec(activation, is_causal, dropout_p, block)
    with torch.autocast(query.device.type, enabled=False):
        t = _inputs(query, key, value, scale, bias, cu_seqlens, seed, spec)
        dquery, dkey, dvalue = (x.new_zeros(x.shape, dtype=t.dtype) for x in (query, key, value))
        dbias = query.new_zeros(() if bias is None else bias.shape, dtype=t.dtype)
        for at in t.blocks():
            q, k, v, scale_at = t.load(at)
            n = at.rows.stop - at.rows.start
            weights, slope = activate_with_slope(activation, t.scores(at, q, k))
            kept = dropped(weights, dropout_p, seed, at.number)
            for part in (weights, slope):
                if kept is not None:
                    part.mul_(kept)
                if is_causal:
                    hide_later(part, n, at.past)
            dy = dout[:, :, at.rows].to(t.dtype).reshape(*q.shape[:3], v.shape[-1])
            dvalue[:, :, at.columns] += matmul(weights.mT, dy)
            dscores = slope.mul_(matmul(dy, v.mT))
            dkey[:, :, at.columns] += matmul(dscores.mT, q)
            dq = matmul(dscores, k).reshape(query[:, :, at.rows].shape)
            dquery[:, :, at.rows] = dq * scale_at
            if bias is not None:
                rows = slice(at.rows.start - at.first, at.rows.stop - at.first)
                part = dbias[..., rows, : at.columns.stop - at.columns.start]
                part += dscores.unflatten(2, (-1, n)).flatten(1, 2).sum_to_size(part.shape)
        bias_gradient = query.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), bias_gradient


@gated_attention_backward.register_fake
def _(dout, query, key, value, scale, bias, *rest):  # type: ignore[no-untyped-def]
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (query, key, value, bias))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate(ctx, dout):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors  # once: checkpointing hands them out a single time
    *grads, dbias = _backward(dout, *tensors, *ctx.options)
    return *grads, None, dbias if tensors[4] is not None else None, *[None] * 6


gated_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(gated_attention_backward)
attention = mappable(gated_attention, _save, _differentiate)
