"""Gated attention, ``f(q kᵀ / n + bias) v``, a block of queries at a time.

Weights exist for one block only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..product import matmul
from ..spec import GatedInputs, GatedOutputs, GatedSpec, accumulation_dtype, new_heads
from ..transforms import without_autocast
from .weights import activate_in_place, activate_with_slope, bias_rows, dropout_factors, hide_later

BLOCK = 128  # queries whose weights exist at a time


def obstacle(inputs: GatedInputs, spec: GatedSpec) -> str:
    return ""


def prepared(inputs: GatedInputs, spec: GatedSpec) -> GatedSpec:
    return spec._replace(block=BLOCK)


def describe(inputs: GatedInputs, spec: GatedSpec) -> str:
    return f"{spec.block} queries at a time on all their keys"


class _Block(NamedTuple):
    """A block of queries of one sequence, and the keys that they see."""

    number: int
    rows: slice  # the queries
    columns: slice  # the keys
    past: int  # query i of the block sees the first past + i + 1 keys, if causal
    first: int  # the sequence's first token


class _Call(NamedTuple):
    """The inputs, and methods that read a block of them."""

    inputs: GatedInputs
    bounds: list[int] | None
    spec: GatedSpec
    dtype: torch.dtype

    @classmethod
    def from_inputs(cls, inputs: GatedInputs, spec: GatedSpec) -> _Call:
        bounds = None if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
        return cls(inputs, bounds, spec, accumulation_dtype(inputs.query))

    def query_blocks(self) -> Iterator[_Block]:
        T, S = self.inputs.query.shape[2], self.inputs.key.shape[2]
        spans = (
            [(0, T, 0, S)]
            if self.bounds is None
            else [(a, b, a, b) for a, b in pairwise(self.bounds)]
        )
        number = 0
        for first, end, first_key, end_key in spans:
            for a in range(first, end, self.spec.block):
                b = min(a + self.spec.block, end)
                past = end_key - end + a - first_key
                last = first_key + past + b - a if self.spec.is_causal else end_key
                yield _Block(number, slice(a, b), slice(first_key, last), past, first)
                number += 1

    def load_block(self, at: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries ``[B,G,R·n,K]``, keys and values seen, scale ``[B,1,n,1]``."""
        query, key, value, scale = (
            self.inputs.query,
            self.inputs.key,
            self.inputs.value,
            self.inputs.scale,
        )
        (B, H), G = query.shape[:2], key.shape[1]
        scale = (scale[:, at.rows] if scale.shape[1] > 1 else scale)[:, None, :, None]
        q = query[:, :, at.rows].to(self.dtype) * scale
        q = q.reshape(B, G, H // G * q.shape[2], q.shape[3])
        return (
            q,
            key[:, :, at.columns].to(self.dtype),
            value[:, :, at.columns].to(self.dtype),
            scale,
        )

    def block_scores(self, at: _Block, q: Tensor, k: Tensor) -> Tensor:
        scores = matmul(q, k.mT)
        bias = self._block_bias(at)
        return scores if bias is None else scores.add_(bias.to(self.dtype))

    def _block_bias(self, at: _Block) -> Tensor | None:
        rows = slice(at.rows.start - at.first, at.rows.stop - at.first)
        columns, G, H = (
            at.columns.stop - at.columns.start,
            self.inputs.key.shape[1],
            self.inputs.query.shape[1],
        )
        return bias_rows(self.inputs.bias, G, H, rows, columns)


def forward(inputs: GatedInputs, spec: GatedSpec) -> GatedOutputs:
    out = spec.new_outputs(inputs).out.zero_()
    with without_autocast(out):
        t = _Call.from_inputs(inputs, spec)
        for at in t.query_blocks():
            q, k, v, _ = t.load_block(at)
            weights = activate_in_place(spec.activation, t.block_scores(at, q, k))
            if spec.is_causal:
                hide_later(weights, at.rows.stop - at.rows.start, at.past)
            kept = dropout_factors(weights, spec.dropout_p, inputs.seed, at.number)
            if kept is not None:
                weights *= kept
            out[:, :, at.rows] = matmul(weights, v).reshape(out[:, :, at.rows].shape)
    return GatedOutputs(out)


def backward(
    upstream: GatedOutputs, inputs: GatedInputs, outputs: GatedOutputs, spec: GatedSpec
) -> GatedInputs:
    query, key, value, bias = inputs.query, inputs.key, inputs.value, inputs.bias
    with without_autocast(query):
        t = _Call.from_inputs(inputs, spec)
        dquery, dkey, dvalue = (
            new_heads(x, x.shape[1], x.shape[3], t.dtype).zero_() for x in (query, key, value)
        )
        dbias = None if bias is None else bias.new_zeros(bias.shape, dtype=t.dtype)
        for at in t.query_blocks():
            q, k, v, scale = t.load_block(at)
            n = at.rows.stop - at.rows.start
            # The weights w are formed again, and w' = dw / dscores. Both are multiplied by the same
            # dropout factors and causal zeros: those are constants of the derivative.
            weights, slope = activate_with_slope(spec.activation, t.block_scores(at, q, k))
            kept = dropout_factors(weights, spec.dropout_p, inputs.seed, at.number)
            for part in (weights, slope):
                if kept is not None:
                    part.mul_(kept)
                if spec.is_causal:
                    hide_later(part, n, at.past)
            # Sums over queries are added up in the accumulation dtype, and rounded once at the end.
            dy = upstream.out[:, :, at.rows].to(t.dtype).reshape(*q.shape[:3], v.shape[-1])
            # out = w v, so dv = wᵀ dout and dw = dout vᵀ. Then dscores = w' dw, in w's memory.
            dvalue[:, :, at.columns] += matmul(weights.mT, dy)
            dscores = slope.mul_(matmul(dy, v.mT))
            # scores = (scale q) kᵀ + bias. The loaded q is scaled already, so dk needs no scale;
            # dq does. A bias is shared by sequences and perhaps heads, so its gradient sums them.
            dkey[:, :, at.columns] += matmul(dscores.mT, q)
            dq = matmul(dscores, k).reshape(query[:, :, at.rows].shape)
            dquery[:, :, at.rows] = dq * scale
            if dbias is not None:
                rows = slice(at.rows.start - at.first, at.rows.stop - at.first)
                part = dbias[..., rows, : at.columns.stop - at.columns.start]
                part += dscores.unflatten(2, (-1, n)).flatten(1, 2).sum_to_size(part.shape)
        dq, dk, dv = dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)
        dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return GatedInputs(dq, dk, dv, None, dbias)  # type: ignore[arg-type]
