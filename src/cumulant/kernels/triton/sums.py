"""Sums over the tokens of each span, and the sums before each span.

`key_sums` adds up ``φ(k) vᵀ`` over the keys of a span, and `query_sums` the same of queries and
gradients of outputs. `scan_spans` then walks the spans of a sequence and leaves the sums before
each in their place. Forwards these are states. Backwards they are the gradients of states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import add_product, exp2, log2_decays, operand
from .device import VARYING
from .features import key_features, load_keys, load_queries, load_rows, query_features
from .places import find_span, load_kept, load_state, load_tile, store_state, store_tile
from .weights import (
    add_key_weights,
    add_query_weights,
    inverse,
    load_moments,
    load_moments_of_state,
    no_weights,
    store_moments,
    store_moments_of_state,
    store_weights,
)


@triton.jit
def load_decays(logs, mask, b, T, g, batch, head, row_stride, row, end, form: tl.constexpr):
    """Log decays of a chunk in base 2; log_decay [B, G, T]."""
    kept = load_kept(mask, b, T, row, end, form)
    at = logs + b * batch + g * head + row.to(tl.int64) * row_stride
    return log2_decays(tl.load(at, mask=kept, other=0.0), kept)


@triton.jit
def load_output_gradient(
    dout, denominators, shares, row, inside, stride, column, form: tl.constexpr
):
    """The gradients of numerators [C, BV], as factors of products, and of denominators [C].

    The latter are what `query_gradients` left: a sum over BV columns.
    """
    d = load_rows(dout, row, inside, stride, column, form.V, form.BV, form)
    if form.NORMALIZE:
        z = tl.load(denominators + row.to(tl.int64), mask=inside, other=0.0)
        dz = tl.load(shares + row.to(tl.int64), mask=inside, other=0.0)
        return operand(d * inverse(z, form)[:, None], form.DOT), dz
    else:
        return operand(d, form.DOT), tl.zeros((form.C,), form.SUM)


@triton.jit
def no_sums(form: tl.constexpr):
    """Tiles [TILE, BV] of sums over nothing."""
    S = ()
    for t in tl.static_range(form.TILES):
        S = S + (tl.zeros((form.TILE, form.BV), form.SUM),)
    return S


@triton.jit
def add_key_sums(k, kept, v, left, S, Z, COLUMNS: tl.constexpr, form: tl.constexpr):
    """The sums after a chunk of keys, decayed by what is `left` of each. COLUMNS: `weights.py`."""
    v = operand(v, form.DOT)
    found, phis = (), ()
    for t in tl.static_range(form.TILES):
        phi = key_features(k, kept, t, form)
        if form.DECAYS:
            phi = phi * left[:, None]
        found = found + (add_product(tl.trans(operand(phi, form.DOT)), v, S[t], form.DOT),)
        phis = phis + (phi,)
    if form.NORMALIZE:
        Z = add_key_weights(k, phis, kept, left, Z, COLUMNS, form)
    return found, Z


@triton.jit
def add_query_sums(q, dy, dz, before, S, Z, form: tl.constexpr):
    """The sums after a chunk of queries and gradients, decayed by what came `before` each."""
    found, phis = (), ()
    for t in tl.static_range(form.TILES):
        phi = query_features(q, t, form)
        if form.DECAYS:
            phi = phi * before[:, None]
        found = found + (add_product(tl.trans(operand(phi, form.DOT)), dy, S[t], form.DOT),)
        phis = phis + (phi,)
    if form.NORMALIZE:
        Z = add_query_weights(q, phis, dz, before, Z, form)
    return found, Z


@triton.jit(do_not_specialize=VARYING)
def key_sums(
    key, value, logs, mask, sums, weights, totals, rows, begins, offsets,
    T, span, splits, G, k_batch, k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row,
    form: tl.constexpr,
):  # fmt: skip
    """``Σ φ(k) vᵀ`` and ``Σ φ(k)`` of each span, decayed to its end, and its log decay.

    One program has a span, a key head, and BV columns.
    """
    at, column = tl.program_id(0) // form.BLOCKS, tl.program_id(0) % form.BLOCKS
    column = column.to(tl.int64) * form.BV
    u, g = at // G, (at % G).to(tl.int64)
    b, n, begin, end = find_span(u, T, span, splits, rows, begins, offsets, form)
    total = tl.zeros((1,), tl.float64)
    if form.DECAYS:
        for first in range(begin, end, form.C):
            row = first + tl.arange(0, form.C)
            total += tl.sum(
                load_decays(logs, mask, b, T, g, d_batch, d_head, d_row, row, end, form), 0
            )
        if column == 0:
            tl.store(totals + at.to(tl.int64) + tl.arange(0, 1), total)
    passed = tl.zeros((1,), tl.float64)
    S, Z = no_sums(form), no_weights(False, form)
    at_key = key + b * k_batch + g * k_head
    at_value = value + b * v_batch + g * v_head
    for first in range(begin, end, form.C):
        row = first + tl.arange(0, form.C)
        kept = load_kept(mask, b, T, row, end, form)
        k = load_keys(at_key, row, kept, k_row, form)
        v = load_rows(at_value, row, kept, v_row, column, form.V, form.BV, form)
        decay = tl.full((form.C,), 1.0, form.SUM)
        if form.DECAYS:
            d = load_decays(logs, mask, b, T, g, d_batch, d_head, d_row, row, end, form)
            left = total - passed - tl.cumsum(d, 0)
            decay = exp2(tl.minimum(left, 0.0).to(form.SUM), form.FLUSHES)
            passed += tl.sum(d, 0)
        S, Z = add_key_sums(k, kept, v, decay, S, Z, False, form)
    for t in tl.static_range(form.TILES):
        store_tile(sums, S[t], at, t, column, form.V, form.BV, form)
    if form.NORMALIZE and column == 0:
        store_weights(weights, Z, at, False, form)


@triton.jit(do_not_specialize=VARYING)
def query_sums(
    query, dout, denominators, ddenominators, logs, mask, sums, weights, rows, begins, offsets,
    T, span, splits, H, G, q_batch, q_head, q_row, g_batch, g_head, g_row,
    d_batch, d_head, d_row, size,
    form: tl.constexpr,
):  # fmt: skip
    """The same of queries and gradients of outputs, decayed to the span's first token.

    It adds up the query heads of a key head. The weights are partial: of BV columns of outputs.
    """
    at, block = tl.program_id(0) // form.BLOCKS, (tl.program_id(0) % form.BLOCKS).to(tl.int64)
    column = block * form.BV
    u, g = at // G, (at % G).to(tl.int64)
    b, n, begin, end = find_span(u, T, span, splits, rows, begins, offsets, form)
    S, Z = no_sums(form), no_weights(True, form)
    passed = tl.zeros((1,), tl.float64)
    for first in range(begin, end, form.C):
        row = first + tl.arange(0, form.C)
        inside = row < end
        decay = tl.full((form.C,), 1.0, form.SUM)
        if form.DECAYS:
            d = load_decays(logs, mask, b, T, g, d_batch, d_head, d_row, row, end, form)
            decay = exp2((passed + tl.cumsum(d, 0)).to(form.SUM), form.FLUSHES)
            passed += tl.sum(d, 0)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            at_query = query + b * q_batch + h * q_head
            q, factor = load_queries(at_query, row, inside, q_row, form)
            at_dout, at_z = dout + b * g_batch + h * g_head, (b * H + h) * T
            at_dz = ddenominators + block * size + at_z
            dy, dz = load_output_gradient(
                at_dout, denominators + at_z, at_dz, row, inside, g_row, column, form
            )
            S, Z = add_query_sums(q, dy, dz, decay, S, Z, form)
    for t in tl.static_range(form.TILES):
        store_tile(sums, S[t], at, t, column, form.V, form.BV, form)
    if form.NORMALIZE:
        store_weights(weights, Z, at * form.BLOCKS + block, True, form)


@triton.jit(do_not_specialize=VARYING)
def scan_spans(
    sums, totals, first_spans, before, after, splits, G, parts,
    V: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BACKWARDS: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """Replaces the sums of each span by those before it (after it, if BACKWARDS).

    before: the state before the first span; after: gets the state after the last. One program has a
    sequence, a key head, a tile and BV columns. It adds up in fp64.

    parts: how many matrices of each span and head are added up; the first gets the result.
    """
    at, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    at, tile = at // form.TILES, at % form.TILES
    n, g = at // G, at % G
    column = block * BV
    if form.PACKED:
        at_span = first_spans + n.to(tl.int64)
        first, last = tl.load(at_span), tl.load(at_span + 1)
    else:
        first, last = n * splits, (n + 1) * splits
    S = tl.zeros((form.TILE, BV), tl.float64)
    if HAS_BEFORE:
        S = load_state(before, at, tile, column, V, BV, BACKWARDS, form).to(tl.float64)
    for i in range(0, last - first):
        u = first + i
        if BACKWARDS:
            u = last - 1 - i
        place = u * G + g
        own = load_tile(sums, place * parts, tile, column, V, BV, form).to(tl.float64)
        for p in range(1, parts):
            own += load_tile(sums, place * parts + p, tile, column, V, BV, form)
        tl.debug_barrier()  # warps with the same numbers have all read them
        store_tile(sums, S, place * parts, tile, column, V, BV, form)
        if form.DECAYS:
            S = S * tl.exp2(tl.load(totals + place.to(tl.int64)))
        S += own
    if HAS_AFTER:
        store_state(after, S, at, tile, column, V, BV, BACKWARDS, form)


@triton.jit(do_not_specialize=VARYING)
def scan_moments(
    sums, totals, first_spans, before, after, splits, G, parts,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BACKWARDS: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """`scan_spans` for the denominators of order 2. One program has a sequence and a key head."""
    at = tl.program_id(0)
    n, g = at // G, at % G
    if form.PACKED:
        at_span = first_spans + n.to(tl.int64)
        first, last = tl.load(at_span), tl.load(at_span + 1)
    else:
        first, last = n * splits, (n + 1) * splits
    M = tl.zeros((form.TILE, form.WIDTH), tl.float64)
    count = tl.zeros((1,), tl.float64)
    if HAS_BEFORE:
        M, count = load_moments_of_state(before, at, BACKWARDS, form)
        M, count = M.to(tl.float64), count.to(tl.float64)
    for i in range(0, last - first):
        u = first + i
        if BACKWARDS:
            u = last - 1 - i
        place = u * G + g
        own, own_count = load_moments(sums, place * parts, form)
        own, own_count = own.to(tl.float64), own_count.to(tl.float64)
        for p in range(1, parts):
            more, more_count = load_moments(sums, place * parts + p, form)
            own, own_count = own + more, own_count + more_count
        tl.debug_barrier()  # as above
        store_moments(sums, (M, count), place * parts, form)
        if form.DECAYS:
            decay = tl.exp2(tl.load(totals + place.to(tl.int64)))
            M, count = M * decay, count * decay
        M, count = M + own, count + own_count
    if HAS_AFTER:
        store_moments_of_state(after, (M, count), at, BACKWARDS, form)
