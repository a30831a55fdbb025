"""Mixed chunk attention, group by group: quadratic inside a group, sums across groups.

Shapes: ``n`` sequences alive, ``G`` key/value heads, ``M = (H/G) * C`` query rows, ``C`` tokens of
a group: queries ``[n,G,M,K]``, keys ``[n,G,C,K]``, values ``[n,G,C,V]``, sums ``S [n,G,K,V]``. The
backward pass keeps only the inputs, and walks the groups twice, as `passes` does. Weights exist for
one group at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..product import matmul
from ..spec import MixedChunkSpec
from .layout import Chunk, Dense, Packed, sort_rows, unsort_rows
from .weights import activate_in_place, activate_with_slope, bias_rows, dropout_factors, hide_later


class LoadedGroup(NamedTuple):
    """The tensors of one group. Queries are scaled: quadratic by 1/g, linear by 1/g or 1/n."""

    quad_query: Tensor
    quad_key: Tensor
    lin_query: Tensor
    lin_key: Tensor
    value: Tensor


class Groups(NamedTuple):
    """The inputs, aligned so that groups begin at multiples of g, and methods that read a group."""

    quad_query: Tensor
    quad_key: Tensor
    lin_query: Tensor
    lin_key: Tensor
    value: Tensor
    bias: Tensor | None  # [1 or H, g, g]
    seed: Tensor | None
    queries: Dense | Packed
    keys: Dense | Packed
    # [N] on the host, in the layout's order: tokens of each sequence, with those of an open group
    lengths: Tensor
    spec: MixedChunkSpec
    dtype: torch.dtype

    @property
    def uses_sums(self) -> bool:
        """Whether linear attention reads sums; else it joins the weights inside the group."""
        return self.spec.is_causal or (self.spec.reduce_groups and len(self.keys.chunks) > 1)

    def linear_scale(self, n: int) -> float | Tensor:
        if self.spec.is_causal:
            return 1 / self.spec.group_size
        return (1 / self.lengths[:n].to(self.value.device, self.dtype)).view(n, 1, 1, 1)

    def query_scales(self, c: Chunk) -> tuple[float, float | Tensor]:
        return 1 / self.spec.group_size, self.linear_scale(c.rows)

    def group_chunks(self) -> list[tuple[int, Chunk, Chunk]]:
        """Number, queries and keys of each group; tokens of an open group are keys only."""
        pairs = zip(self.queries.chunks, self.keys.chunks, strict=True)
        return [(i, a, c) for i, (a, c) in enumerate(pairs)]

    def load_query(self, x: Tensor, a: Chunk) -> Tensor:
        return self.queries.load_tokens(x, a, self.quad_key.shape[1], self.dtype)

    def load_group(self, a: Chunk, c: Chunk) -> LoadedGroup:
        heads = self.quad_key.shape[1]
        quad, lin = self.query_scales(c)
        return LoadedGroup(
            self.load_query(self.quad_query, a) * quad,
            self.keys.load_tokens(self.quad_key, c, heads, self.dtype),
            self.load_query(self.lin_query, a) * lin,
            self.keys.load_tokens(self.lin_key, c, heads, self.dtype),
            self.keys.load_tokens(self.value, c, heads, self.dtype),
        )

    def count_closed(self, c: Chunk) -> int:
        """How many sequences have all g tokens of the group: they are the first of those alive."""
        return int((self.lengths[: c.rows] >= c.start + self.spec.group_size).sum())

    def group_scores(self, c: Chunk, x: LoadedGroup) -> Tensor:
        scores = matmul(x.quad_query, x.quad_key.mT)
        heads = self.quad_query.shape[1]
        bias = bias_rows(self.bias, self.quad_key.shape[1], heads, slice(c.length), c.length)
        return scores if bias is None else scores.add_(bias.to(self.dtype))


def add_keys(S: Tensor, n: int, key: Tensor, value: Tensor) -> None:
    """S += kᵀ v for the first n sequences."""
    if n:
        S[:n] += matmul(key[:n].mT, value[:n])


def initial_sums(t: Groups, S0: Tensor | None) -> Tensor:
    """A copy of the given sums in the layout's order, or zeros."""
    S = sort_rows(S0, t.keys)
    shape = (t.keys.batch, t.value.shape[1], t.lin_key.shape[-1], t.value.shape[-1])
    return t.value.new_zeros(shape, dtype=t.dtype) if S is None else S


def _sum_all_groups(t: Groups, S: Tensor) -> None:
    """Adds all keys and values to S, for attention in both directions."""
    heads = t.value.shape[1]
    for c in t.keys.chunks:
        lin_key, value = (t.keys.load_tokens(x, c, heads, t.dtype) for x in (t.lin_key, t.value))
        add_keys(S, c.rows, lin_key, value)


class OpenGroup(NamedTuple):
    """Tokens of each sequence's open group ``[N,G,g,·]``, then zeros."""

    quad_key: Tensor
    lin_key: Tensor
    value: Tensor


def new_open_group(t: Groups) -> OpenGroup:
    shape = (t.keys.batch, t.value.shape[1], t.spec.group_size)
    return OpenGroup(
        *(x.new_zeros(*shape, x.shape[-1], dtype=t.dtype) for x in (t.quad_key, t.lin_key, t.value))
    )


def forward_groups(t: Groups, S0: Tensor | None) -> tuple[Tensor, Tensor, OpenGroup | None]:
    """Output in the aligned layout, the sums over whole groups, and the open group of the state."""
    H, T, V = t.quad_query.shape[1], t.quad_query.shape[2], t.value.shape[-1]
    out = t.queries.new_buffer(H, T, V, t.value, t.value.dtype)
    S = initial_sums(t, S0)
    rest = new_open_group(t) if t.spec.returns_state else None
    if t.uses_sums and not t.spec.is_causal:
        _sum_all_groups(t, S)
    for i, a, c in t.group_chunks():
        x, n = t.load_group(a, c), c.rows
        weights = activate_in_place(t.spec.activation, t.group_scores(c, x))
        if t.spec.is_causal:
            hide_later(weights, c.length)
        kept = dropout_factors(weights, t.spec.dropout_p, t.seed, i)
        if kept is not None:
            weights *= kept
        if not t.uses_sums:
            weights += matmul(x.lin_query, x.lin_key.mT)
        y = matmul(weights, x.value)
        if t.uses_sums and (i > 0 or S0 is not None or not t.spec.is_causal):
            y += matmul(x.lin_query, S[:n])
        t.queries.store_tokens(out, a, y)
        if t.spec.is_causal:
            closed = t.count_closed(c)
            if t.spec.returns_state or i + 1 < len(t.queries.chunks):
                add_keys(S, closed, x.lin_key, x.value)
            if rest is not None and closed < n:
                for buffer, part in zip(rest, (x.quad_key, x.lin_key, x.value), strict=True):
                    buffer[closed:n, :, : c.length] = part[closed:]
    if rest is not None:
        rest = OpenGroup(*(unsort_rows(x, t.keys) for x in rest))
    return t.queries.finish_buffer(out), unsort_rows(S, t.keys), rest


class MixedGrads(NamedTuple):
    """Gradients of the inputs in the aligned layout, of the bias, and of the initial sums."""

    quad_query: Tensor
    quad_key: Tensor
    lin_query: Tensor
    lin_key: Tensor
    value: Tensor
    bias: Tensor | None
    S: Tensor


def backward_groups(
    t: Groups, dout: Tensor, S0: Tensor | None, dS_final: Tensor | None, drest: OpenGroup | None
) -> MixedGrads:
    """Gradients of the inputs, from those at the output and at the final state."""
    heads, tokens, seen = t.quad_query.shape[1], t.quad_query.shape[2], t.quad_key.shape[2]
    grads = MixedGrads(
        t.queries.new_buffer(heads, tokens, t.quad_query.shape[-1], t.value, t.dtype),
        t.keys.new_buffer(t.value.shape[1], seen, t.quad_key.shape[-1], t.value, t.dtype),
        t.queries.new_buffer(heads, tokens, t.lin_query.shape[-1], t.value, t.dtype),
        t.keys.new_buffer(t.value.shape[1], seen, t.lin_key.shape[-1], t.value, t.dtype),
        t.keys.new_buffer(t.value.shape[1], seen, t.value.shape[-1], t.value, t.dtype),
        None if t.bias is None else t.bias.new_zeros(t.bias.shape, dtype=t.dtype),
        initial_sums(t, dS_final),
    )
    S, dS = initial_sums(t, S0), grads.S
    drest = (
        None
        if drest is None
        else OpenGroup(*(x[:] if t.keys.order is None else x[t.keys.order] for x in drest))
    )
    if t.uses_sums and not t.spec.is_causal:
        _sum_all_groups(t, S)
    # Forwards: linear queries need the sums that they read, so S is rebuilt as in the forward pass.
    # In both directions all queries read the same sums, whose gradient must be complete before any
    # key uses it: dS sums over the queries here. Causally it grows in the second walk.
    for i, a, c in t.group_chunks():
        x, dy = t.load_group(a, c), t.load_query(dout, a)
        _group_backward(t, i, a, c, x, dy, S, grads)
        if t.spec.is_causal:
            if i + 1 < len(t.queries.chunks):
                add_keys(S, t.count_closed(c), x.lin_key, x.value)
        elif t.uses_sums:
            add_keys(dS, c.rows, x.lin_query, dy)
    # Backwards: a group's keys reach the queries of later groups through S, so dS holds exactly
    # those queries when the group is visited.
    if t.uses_sums:
        for i, a, c in reversed(t.group_chunks()):
            _sums_backward(t, a, c, dout, dS, drest, grads, reads=i > 0 or S0 is not None)
    finish_q, finish_k = t.queries.finish_buffer, t.keys.finish_buffer
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
    t: Groups, i: int, a: Chunk, c: Chunk, x: LoadedGroup, dy: Tensor, S: Tensor, grads: MixedGrads
) -> None:
    """Gradients inside a group, and of its linear queries."""
    # The weights w = f(scores) are formed again, with f'. Dropout factors and causal zeros are
    # constants, so both take them. The linear weights r sᵀ have neither, and are added afterwards.
    weights, slope = activate_with_slope(t.spec.activation, t.group_scores(c, x))
    kept = dropout_factors(weights, t.spec.dropout_p, t.seed, i)
    if kept is not None:
        weights *= kept
        slope *= kept
    if t.spec.is_causal:
        hide_later(weights, c.length)
        hide_later(slope, c.length)
    if not t.uses_sums:
        weights += matmul(x.lin_query, x.lin_key.mT)
    # y = w v: dv = wᵀ dy, dw = dy vᵀ, and dscores = f' dw, in the memory of f'.
    t.keys.store_tokens(grads.value, c, matmul(weights.mT, dy))
    dweights = matmul(dy, x.value.mT)
    dscores = slope.mul_(dweights)
    # scores = (q / g) kᵀ + bias. The loaded queries are scaled, so dk needs no scale; dq does. The
    # bias is shared by all groups and sequences, so its gradient sums over them.
    quad, lin = t.query_scales(c)
    t.queries.store_tokens(grads.quad_query, a, matmul(dscores, x.quad_key) * quad)
    t.keys.store_tokens(grads.quad_key, c, matmul(dscores.mT, x.quad_query))
    if grads.bias is not None:
        by_head = dscores.unflatten(2, (-1, c.length)).sum(0).flatten(0, 1)  # [H, C, C]
        grads.bias[:, : c.length, : c.length] += by_head if len(grads.bias) > 1 else by_head.sum(0)
    # The linear part is y += r S, so dr = dy Sᵀ; or, inside the group, w += r sᵀ, so dr = dw s and
    # ds = dwᵀ r.
    if t.uses_sums:
        t.queries.store_tokens(grads.lin_query, a, matmul(dy, S[: c.rows].mT) * lin)
    else:
        t.queries.store_tokens(grads.lin_query, a, matmul(dweights, x.lin_key) * lin)
        t.keys.store_tokens(grads.lin_key, c, matmul(dweights.mT, x.lin_query))


def _sums_backward(
    t: Groups,
    a: Chunk,
    c: Chunk,
    dout: Tensor,
    dS: Tensor,
    drest: OpenGroup | None,
    grads: MixedGrads,
    reads: bool,
) -> None:
    """Gradients of a group's linear keys and values through the sums, or through the open group."""
    # Whole groups are in S = Σ sᵀ v: ds = v dSᵀ, dv = s dS. A group that stays open is not in S.
    # The final state keeps its tokens themselves, so the gradients there are added as they are.
    x, n = t.load_group(a, c), c.rows
    closed = t.count_closed(c) if t.spec.is_causal else n
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
            t.keys.store_tokens(grads.quad_key, c, dquad_key, accumulate=True)
        dlin_key, dvalue = torch.cat((dlin_key, tail[0])), torch.cat((dvalue, tail[1]))
    t.keys.store_tokens(grads.lin_key, c, dlin_key)
    t.keys.store_tokens(grads.value, c, dvalue, accumulate=True)
    # The group's queries read S before the group joined it, so they are added for earlier groups.
    if t.spec.is_causal and reads:
        add_keys(dS, n, x.lin_query, t.load_query(dout, a))
