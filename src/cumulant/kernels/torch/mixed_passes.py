"""Mixed chunk attention, group by group: quadratic inside a group, sums across groups.

Shapes: ``n`` sequences alive, ``G`` key/value heads, ``M = (H/G) * C`` query rows, ``C`` tokens of
a group: queries ``[n,G,M,K]``, keys ``[n,G,C,K]``, values ``[n,G,C,V]``, sums ``S [n,G,K,V]``. Only
the inputs are kept for the backward pass, which walks the groups twice, as `passes` does; weights
exist for one group at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..product import matmul
from ..spec import MixedChunkSpec
from .layout import Chunk, Dense, Packed, sort_rows, unsort_rows
from .weights import activate, activate_with_slope, bias_rows, dropped, hide_later


class Loaded(NamedTuple):
    """One group. Queries are scaled: the quadratic ones by 1/g, the linear ones by 1/g or 1/n."""

    quad_query: Tensor
    quad_key: Tensor
    lin_query: Tensor
    lin_key: Tensor
    value: Tensor


class Groups(NamedTuple):
    """The inputs, aligned so that groups begin at multiples of g, with what it takes to read one
    group.
    """

    quad_query: Tensor
    quad_key: Tensor
    lin_query: Tensor
    lin_key: Tensor
    value: Tensor
    bias: Tensor | None  # [1 or H, g, g]
    seed: Tensor | None
    queries: Dense | Packed
    keys: Dense | Packed
    # [N] on the host, in the layout's order: tokens of each sequence, those of an open group
    # included
    lengths: Tensor
    spec: MixedChunkSpec
    dtype: torch.dtype

    @property
    def summed(self) -> bool:
        """Whether the linear part goes through sums; else it is a part of the weights inside the
        group.
        """
        return self.spec.is_causal or (self.spec.reduce_groups and len(self.keys.chunks) > 1)

    def linear_scale(self, n: int) -> float | Tensor:
        if self.spec.is_causal:
            return 1 / self.spec.group_size
        return (1 / self.lengths[:n].to(self.value.device, self.dtype)).view(n, 1, 1, 1)

    def query_scales(self, c: Chunk) -> tuple[float, float | Tensor]:
        return 1 / self.spec.group_size, self.linear_scale(c.rows)

    def chunks(self) -> list[tuple[int, Chunk, Chunk]]:
        """Number of each group, its queries, its keys: the same slots, but an open group's tokens
        ask no more.
        """
        pairs = zip(self.queries.chunks, self.keys.chunks, strict=True)
        return [(i, a, c) for i, (a, c) in enumerate(pairs)]

    def load_query(self, x: Tensor, a: Chunk) -> Tensor:
        return self.queries.load(x, a, self.quad_key.shape[1], self.dtype)

    def load(self, a: Chunk, c: Chunk) -> Loaded:
        heads = self.quad_key.shape[1]
        quad, lin = self.query_scales(c)
        return Loaded(
            self.load_query(self.quad_query, a) * quad,
            self.keys.load(self.quad_key, c, heads, self.dtype),
            self.load_query(self.lin_query, a) * lin,
            self.keys.load(self.lin_key, c, heads, self.dtype),
            self.keys.load(self.value, c, heads, self.dtype),
        )

    def closed(self, c: Chunk) -> int:
        """Sequences whose group is whole: the first so many of those alive."""
        return int((self.lengths[: c.rows] >= c.start + self.spec.group_size).sum())

    def scores(self, c: Chunk, x: Loaded) -> Tensor:
        scores = matmul(x.quad_query, x.quad_key.mT)
        heads = self.quad_query.shape[1]
        bias = bias_rows(self.bias, self.quad_key.shape[1], heads, slice(c.length), c.length)
        return scores if bias is None else scores.add_(bias.to(self.dtype))


def accumulate(S: Tensor, n: int, key: Tensor, value: Tensor) -> None:
    """S += kᵀ v for the first n sequences."""
    if n:
        S[:n] += matmul(key[:n].mT, value[:n])


def initial_sums(t: Groups, S0: Tensor | None) -> Tensor:
    S = sort_rows(S0, t.keys)
    shape = (t.keys.batch, t.value.shape[1], t.lin_key.shape[-1], t.value.shape[-1])
    return t.value.new_zeros(shape, dtype=t.dtype) if S is None else S


def _sum_all(t: Groups, S: Tensor) -> None:
    heads = t.value.shape[1]
    for c in t.keys.chunks:
        lin_key, value = (t.keys.load(x, c, heads, t.dtype) for x in (t.lin_key, t.value))
        accumulate(S, c.rows, lin_key, value)


class Open(NamedTuple):
    """Tokens of the group still open in each sequence, ``[N,G,g,·]``, zeros behind them."""

    quad_key: Tensor
    lin_key: Tensor
    value: Tensor


def new_open(t: Groups) -> Open:
    shape = (t.keys.batch, t.value.shape[1], t.spec.group_size)
    return Open(
        *(x.new_zeros(*shape, x.shape[-1], dtype=t.dtype) for x in (t.quad_key, t.lin_key, t.value))
    )


def forward_groups(t: Groups, S0: Tensor | None) -> tuple[Tensor, Tensor, Open | None]:
    """Output in the aligned layout, the sums over whole groups, and the open group if a state is
    wanted.
    """
    H, T, V = t.quad_query.shape[1], t.quad_query.shape[2], t.value.shape[-1]
    out = t.queries.new(H, T, V, t.value, t.value.dtype)
    S = initial_sums(t, S0)
    rest = new_open(t) if t.spec.returns_state else None
    if t.summed and not t.spec.is_causal:
        _sum_all(t, S)
    for i, a, c in t.chunks():
        x, n = t.load(a, c), c.rows
        weights = activate(t.spec.activation, t.scores(c, x))
        if t.spec.is_causal:
            hide_later(weights, c.length)
        kept = dropped(weights, t.spec.dropout_p, t.seed, i)
        if kept is not None:
            weights *= kept
        if not t.summed:
            weights += matmul(x.lin_query, x.lin_key.mT)
        y = matmul(weights, x.value)
        if t.summed and (i > 0 or S0 is not None or not t.spec.is_causal):
            y += matmul(x.lin_query, S[:n])
        t.queries.store(out, a, y)
        if t.spec.is_causal:
            closed = t.closed(c)
            if t.spec.returns_state or i + 1 < len(t.queries.chunks):
                accumulate(S, closed, x.lin_key, x.value)
            if rest is not None and closed < n:
                for buffer, part in zip(rest, (x.quad_key, x.lin_key, x.value), strict=True):
                    buffer[closed:n, :, : c.length] = part[closed:]
    if rest is not None:
        rest = Open(*(unsort_rows(x, t.keys) for x in rest))
    return t.queries.finish(out), unsort_rows(S, t.keys), rest


class MixedGrads(NamedTuple):
    """In the aligned layout; of the inputs in their order, of the bias and of the sums that came
    in.
    """

    quad_query: Tensor
    quad_key: Tensor
    lin_query: Tensor
    lin_key: Tensor
    value: Tensor
    bias: Tensor | None
    S: Tensor


def backward_groups(
    t: Groups, dout: Tensor, S0: Tensor | None, dS_final: Tensor | None, drest: Open | None
) -> MixedGrads:
    heads, tokens, seen = t.quad_query.shape[1], t.quad_query.shape[2], t.quad_key.shape[2]
    grads = MixedGrads(
        t.queries.new(heads, tokens, t.quad_query.shape[-1], t.value, t.dtype),
        t.keys.new(t.value.shape[1], seen, t.quad_key.shape[-1], t.value, t.dtype),
        t.queries.new(heads, tokens, t.lin_query.shape[-1], t.value, t.dtype),
        t.keys.new(t.value.shape[1], seen, t.lin_key.shape[-1], t.value, t.dtype),
        t.keys.new(t.value.shape[1], seen, t.value.shape[-1], t.value, t.dtype),
        None if t.bias is None else t.bias.new_zeros(t.bias.shape, dtype=t.dtype),
        initial_sums(t, dS_final),
    )
    S, dS = initial_sums(t, S0), grads.S
    drest = (
        None
        if drest is None
        else Open(*(x[:] if t.keys.order is None else x[t.keys.order] for x in drest))
    )
    if t.summed and not t.spec.is_causal:
        _sum_all(t, S)
    for i, a, c in t.chunks():
        x, dy = t.load(a, c), t.load_query(dout, a)
        _group_backward(t, i, a, c, x, dy, S, grads)
        if t.spec.is_causal:
            if i + 1 < len(t.queries.chunks):
                accumulate(S, t.closed(c), x.lin_key, x.value)
        elif t.summed:
            accumulate(dS, c.rows, x.lin_query, dy)
    if t.summed:
        for i, a, c in reversed(t.chunks()):
            _sums_backward(t, a, c, dout, dS, drest, grads, reads=i > 0 or S0 is not None)
    finish_q, finish_k = t.queries.finish, t.keys.finish
    return MixedGrads(
        finish_q(grads.quad_query),
        finish_k(grads.quad_key),
        finish_q(grads.lin_query),
        finish_k(grads.lin_key),
        finish_k(grads.value),
        grads.bias,
        unsort_rows(dS, t.keys),
    )


def _group_backward(
    t: Groups, i: int, a: Chunk, c: Chunk, x: Loaded, dy: Tensor, S: Tensor, grads: MixedGrads
) -> None:
    """Gradients inside a group, and of its linear queries."""
    weights, slope = activate_with_slope(t.spec.activation, t.scores(c, x))
    kept = dropped(weights, t.spec.dropout_p, t.seed, i)
    if kept is not None:
        weights *= kept
        slope *= kept
    if t.spec.is_causal:
        hide_later(weights, c.length)
        hide_later(slope, c.length)
    if not t.summed:
        weights += matmul(x.lin_query, x.lin_key.mT)
    t.keys.store(grads.value, c, matmul(weights.mT, dy))
    dweights = matmul(dy, x.value.mT)
    dscores = slope.mul_(dweights)
    quad, lin = t.query_scales(c)
    t.queries.store(grads.quad_query, a, matmul(dscores, x.quad_key) * quad)
    t.keys.store(grads.quad_key, c, matmul(dscores.mT, x.quad_query))
    if grads.bias is not None:
        by_head = dscores.unflatten(2, (-1, c.length)).sum(0).flatten(0, 1)  # [H, C, C]
        grads.bias[:, : c.length, : c.length] += by_head if len(grads.bias) > 1 else by_head.sum(0)
    if t.summed:
        t.queries.store(grads.lin_query, a, matmul(dy, S[: c.rows].mT) * lin)
    else:
        t.queries.store(grads.lin_query, a, matmul(dweights, x.lin_key) * lin)
        t.keys.store(grads.lin_key, c, matmul(dweights.mT, x.lin_query))


def _sums_backward(
    t: Groups,
    a: Chunk,
    c: Chunk,
    dout: Tensor,
    dS: Tensor,
    drest: Open | None,
    grads: MixedGrads,
    reads: bool,
) -> None:
    """Gradients that reach a group's linear keys and values through the sums, and those of the open
    group.
    """
    x, n = t.load(a, c), c.rows
    closed = t.closed(c) if t.spec.is_causal else n
    dlin_key, dvalue = (
        matmul(x.value[:closed], dS[:closed].mT),
        matmul(x.lin_key[:closed], dS[:closed]),
    )
    if closed < n:
        still = n - closed, *x.value.shape[1:3]
        if drest is None:
            tail = [y.new_zeros(*still, y.shape[-1]) for y in (dlin_key, dvalue)]
        else:
            tail = [y[closed:n, :, : c.length] for y in drest[1:]]
            dquad_key = torch.zeros_like(x.quad_key)
            dquad_key[closed:] = drest.quad_key[closed:n, :, : c.length]
            t.keys.store(grads.quad_key, c, dquad_key, accumulate=True)
        dlin_key, dvalue = torch.cat((dlin_key, tail[0])), torch.cat((dvalue, tail[1]))
    t.keys.store(grads.lin_key, c, dlin_key)
    t.keys.store(grads.value, c, dvalue, accumulate=True)
    if t.spec.is_causal and reads:
        accumulate(dS, n, x.lin_query, t.load_query(dout, a))
