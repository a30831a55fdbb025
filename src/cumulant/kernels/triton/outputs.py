"""Outputs and denominators of a span, from the sums before it."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import add_product, decay_less_one, exp2, operand, product, split_number
from .device import VARYING
from .features import (
    load_keys,
    load_queries,
    load_rows,
    polynomial,
    query_features,
    store_rows,
)
from .places import find_span, load_kept, load_state, load_tile, store_state
from .sums import add_key_sums, load_decays, no_sums
from .weights import (
    add_exact_product,
    decayed,
    inverse,
    load_weights,
    read_weights,
    scaled,
    store_weights_of_state,
)


@triton.jit
def load_sums(
    sums, weights, at, parts, state_at, column, SOURCE: tl.constexpr, GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Sums before a span: a tuple of tiles [TILE, BV], and those of `weights.py`.

    SOURCE: "none" for zeros, "state" for a state, "spans" for what `scan_spans` left.
    """
    S = ()
    if SOURCE == "none":
        S = no_sums(form)
    else:
        for t in tl.static_range(form.TILES):
            if SOURCE == "spans":
                s = load_tile(sums, at, t, column, form.V, form.BV, form)
            else:
                s = load_state(sums, state_at, t, column, form.V, form.BV, GRADIENT, form)
            S = S + (s,)
    Z = load_weights(weights, at * parts, state_at, SOURCE, GRADIENT, COLUMNS, form)
    if GRADIENT:  # gradients of denominators are partial: the first block has what came before
        Z = scaled(Z, tl.where(column == 0, 1.0, 0.0).to(form.SUM), form.WEIGHTS)
    return S, Z


@triton.jit
def decays_between(d, BY_KEY: tl.constexpr, form: tl.constexpr):
    """``2^(c_i - c_j)`` [C, C], where c are the running sums of a chunk's log decays d.

    It is 1 for later keys. BY_KEY: a row for each key, else for each query.
    """
    whole, rest = split_number(tl.cumsum(d, 0), form.SUM)
    log2 = (whole[:, None] - whole[None, :]) + (rest[:, None] - rest[None, :])
    return exp2(tl.minimum(-log2 if BY_KEY else log2, 0.0), form.FLUSHES)


@triton.jit
def scores(q, k, form: tl.constexpr):
    """The products of features, or of queries and keys times the scale: [C, C]."""
    x = product(operand(q[0], form.DOT), tl.trans(operand(k[0], form.DOT)), form.DOT)
    for p in tl.static_range(1, form.PARTS):
        x = add_product(operand(q[p], form.DOT), tl.trans(operand(k[p], form.DOT)), x, form.DOT)
    return x if form.ORDER == 0 else x * form.SCALE


@triton.jit
def visible(kept, BY_KEY: tl.constexpr, form: tl.constexpr):
    """Which keys of a chunk its queries see, if causal: [C, C]. Keys after the end come later."""
    token = tl.arange(0, form.C)
    if BY_KEY:
        seen = token[:, None] <= token[None, :]
        if form.MASKED:
            seen = seen & kept[:, None]
    else:
        seen = token[:, None] >= token[None, :]
        if form.MASKED:
            seen = seen & kept[None, :]
    return seen


@triton.jit
def weigh(x, seen, decay, form: tl.constexpr):
    """x [C, C] times decays, which are zero where a key is not seen."""
    if form.DECAYS:
        return x * decay
    else:
        return tl.where(seen, x, 0.0)


@triton.jit
def read_sums(q, S, form: tl.constexpr):
    """φ(q)ᵀ S [C, BV]."""
    y = tl.zeros((form.C, form.BV), form.SUM)
    for t in tl.static_range(form.TILES):
        phi = operand(query_features(q, t, form), form.DOT)
        y = add_product(phi, operand(S[t], form.DOT), y, form.DOT)
    return y


@triton.jit
def denominators_of(q, k, w, decay, before, Z, form: tl.constexpr):
    """The denominators [C] of a chunk's queries.

    w: their weights of the chunk's keys; decay: the factors in these; before: decays from the
    chunk's start.
    """
    if form.ORDER > 0:
        return read_weights(q, Z, form) * before + tl.sum(w, 1)
    else:
        z = tl.zeros((form.C,), form.SUM)
        seen = operand(decay, form.DOT)
        for t in tl.static_range(form.TILES):
            total = Z[t]
            if form.DECAYS:
                total = total * before[:, None]
                rest = operand(decay - seen.to(form.SUM), form.DOT)
                total = add_product(rest, operand(k[t], form.DOT), total, form.DOT)
            z += tl.sum(q[t] * add_exact_product(seen, k[t], total, form), 1)
        return z


@triton.jit
def chunk_decays(d, form: tl.constexpr):
    """From a chunk's log decays: each token's decay from the start, what is left of it at the end,
    and the decay of the whole, less 1.
    """
    passed, total = tl.cumsum(d, 0), tl.sum(d, 0)
    left = exp2(tl.minimum(total - passed, 0.0).to(form.SUM), form.FLUSHES)
    return exp2(passed.to(form.SUM), form.FLUSHES), left, decay_less_one(total, form.SUM)


@triton.jit
def add_keys(k, kept, v, d, S, Z, COLUMNS: tl.constexpr, form: tl.constexpr):
    """S and Z after a chunk of keys; d: log decays."""
    left = tl.full((form.C,), 1.0, form.SUM)
    if form.DECAYS:
        before, left, less = chunk_decays(d, form)
        S, Z = decayed(S, less, form.TILES), decayed(Z, less, form.WEIGHTS)
    return add_key_sums(k, kept, v, left, S, Z, COLUMNS, form)


@triton.jit(do_not_specialize=VARYING)
def outputs(
    query, key, value, logs, mask, sums, weights, out, denominators, final, final_weights,
    rows, begins, offsets, T, span, splits, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, d_batch, d_head, d_row,
    SOURCE: tl.constexpr, FINAL: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """One program has a span, a query head, and BV columns of the values.

    FINAL: whether it also writes the state after the span, which is then the sequence.
    """
    at, column = tl.program_id(0) // form.BLOCKS, tl.program_id(0) % form.BLOCKS
    column = column.to(tl.int64) * form.BV
    u, h = at // H, (at % H).to(tl.int64)
    g = h // (H // G)
    b, n, begin, end = find_span(u, T, span, splits, rows, begins, offsets, form)
    place = u * G + g if form.CAUSAL else n * G + g
    S, Z = load_sums(sums, weights, place, 1, n * G + g, column, SOURCE, False, False, form)
    at_query = query + b * q_batch + h * q_head
    at_key = key + b * k_batch + g * k_head
    at_value = value + b * v_batch + g * v_head
    at_out = out + b * o_batch + h * o_head
    for first in range(begin, end, form.C):
        row = first + tl.arange(0, form.C)
        inside = row < end
        q, factor = load_queries(at_query, row, inside, q_row, form)
        y = read_sums(q, S, form)
        if form.CAUSAL:
            kept = load_kept(mask, b, T, row, end, form)
            k = load_keys(at_key, row, kept, k_row, form)
            v = load_rows(at_value, row, kept, v_row, column, form.V, form.BV, form)
            d = tl.zeros((form.C,), tl.float64)
            seen = visible(kept, False, form)
            decay = tl.where(seen, 1.0, 0.0).to(form.SUM)
            before = tl.full((form.C,), 1.0, form.SUM)
            if form.DECAYS:
                d = load_decays(logs, mask, b, T, g, d_batch, d_head, d_row, row, end, form)
                before = exp2(tl.cumsum(d, 0).to(form.SUM), form.FLUSHES)
                decay = tl.where(seen, decays_between(d, False, form), 0.0)
                y = y * before[:, None]
            w = weigh(polynomial(scores(q, k, form), form), seen, decay, form)
            y = add_product(operand(w, form.DOT), operand(v, form.DOT), y, form.DOT)
            if form.NORMALIZE:
                z = denominators_of(q, k, w, decay, before, Z, form)
            S, Z = add_keys(k, kept, v, d, S, Z, False, form)
        elif form.NORMALIZE:
            z = read_weights(q, Z, form)
        if form.NORMALIZE:
            y = y * inverse(z, form)[:, None]
            if column == 0:
                tl.store(denominators + (b * H + h) * T + row.to(tl.int64), z, mask=inside)
        store_rows(at_out, y, row, inside, o_row, column, form.V, form.BV)
    if FINAL:
        if h % (H // G) == 0:
            for t in tl.static_range(form.TILES):
                store_state(final, S[t], n * G + g, t, column, form.V, form.BV, False, form)
            if form.NORMALIZE and column == 0:
                store_weights_of_state(final_weights, Z, n * G + g, False, False, form)
