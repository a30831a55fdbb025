"""Gradients of queries, forwards in time, and of keys and values, backwards in time.

Weights are formed again. Within a chunk the gradient of weight (i, j) is ``dy_i·v_j + dz_i``, where
dy and dz are the gradients of numerators and denominators. Beyond it queries read the sums before
the chunk, and keys the gradients of the sums after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import add_product, exp2, operand, product
from .device import VARYING
from .features import (
    activation_gradient,
    add_taylor_gradient,
    key_features,
    load_keys,
    load_queries,
    load_rows,
    polynomial,
    query_features,
    store_rows,
    weights_of_slots,
)
from .outputs import add_keys, chunk_decays, decays_between, load_sums, scores, visible, weigh
from .places import find_span, load_kept, store_state
from .sums import add_query_sums, load_decays, load_output_gradient
from .weights import (
    columns,
    decayed,
    inverse,
    read_weights,
    rows_of,
    store_weights_of_state,
    weights_gradient,
)


@triton.jit
def weight_gradients(q, k, v, dy, dz, d, kept, BY_KEY: tl.constexpr, form: tl.constexpr):
    """Of a chunk: the weights, and the gradients of scores and of log decays' pairs.

    BY_KEY: a row for each key, else for each query. As they are, results are left factors of
    products.
    """
    v = operand(v, form.DOT)
    if BY_KEY:
        x = scores(k, q, form)
        dw = product(v, tl.trans(dy), form.DOT) + dz[None, :]
    else:
        x = scores(q, k, form)
        dw = product(dy, tl.trans(v), form.DOT) + dz[:, None]
    seen, decay = visible(kept, BY_KEY, form), x
    if form.DECAYS:
        decay = tl.where(seen, decays_between(d, BY_KEY, form), 0.0)
    w = weigh(polynomial(x, form), seen, decay, form)
    dx = weigh(dw, seen, decay, form)
    if form.ORDER == 2:
        dx = dx * (x + 1.0)
    return w, dx, w * dw


@triton.jit
def add_score_gradients(dx, x, grads, form: tl.constexpr):
    """grads plus dx x: the gradients of vectors whose scores with x have the gradients dx."""
    found = ()
    for p in tl.static_range(form.PARTS):
        if form.ORDER == 0:
            found = found + (add_product(dx, operand(x[p], form.DOT), grads[p], form.DOT),)
        else:
            more = product(dx, operand(x[p], form.DOT), form.DOT) * form.SCALE
            found = found + (grads[p] + more,)
    return found


@triton.jit
def gradients_from_keys(q, dy, dz, before, S, Z, SHARES: tl.constexpr, form: tl.constexpr):
    """Of a chunk's queries, from the sums S and Z before it: gradients at activated vectors, and
    shares in the gradients of log decays.
    """
    share, found = tl.zeros((form.C,), form.SUM), ()
    taylor = tl.zeros((form.C, form.WIDTH), form.SUM)
    for t in tl.static_range(form.TILES):
        dphi = product(dy, tl.trans(operand(S[t], form.DOT)), form.DOT)
        if form.NORMALIZE and form.ORDER < 2:
            rounded = operand(dz, form.DOT).to(form.SUM)
            weight = columns(rounded, dz - rounded, form)
            dphi = add_product(weight, rows_of(Z[t], form), dphi, form.DOT)
        if form.DECAYS:
            dphi = dphi * before[:, None]
        if SHARES:
            share += tl.sum(dphi * query_features(q, t, form), 1)
        if form.ORDER > 0:
            dphi = dphi * weights_of_slots(t, form)[None, :]
            taylor = add_taylor_gradient(q, dphi, taylor, t, form)
        else:
            found = found + (dphi,)
    if form.NORMALIZE and form.ORDER == 2:
        weight = dz * before
        taylor += weights_gradient(q, Z, form) * weight[:, None]
        if SHARES:
            share += read_weights(q, Z, form) * weight
    if form.ORDER > 0:
        found = (taylor,)
    return found, share


@triton.jit
def gradients_from_queries(k, kept, v, left, S, Z, SHARES: tl.constexpr, form: tl.constexpr):
    """Of a chunk's keys, from the gradients S and Z of the sums after it: gradients at activated
    keys and at values, and shares in the gradients of log decays.
    """
    share, found = tl.zeros((form.C,), form.SUM), ()
    taylor = tl.zeros((form.C, form.WIDTH), form.SUM)
    dv = tl.zeros((form.C, form.BV), form.SUM)
    for t in tl.static_range(form.TILES):
        phi, s = key_features(k, kept, t, form), operand(S[t], form.DOT)
        dphi = product(operand(v, form.DOT), tl.trans(s), form.DOT)
        if form.NORMALIZE and form.ORDER < 2:
            one = tl.full((form.C,), 1.0, form.SUM)
            dphi = add_product(columns(one, one * 0.0, form), rows_of(Z[t], form), dphi, form.DOT)
        if form.DECAYS:
            dphi = dphi * left[:, None]
            if SHARES:
                share += tl.sum(dphi * phi, 1)
            phi = phi * left[:, None]
        dv = add_product(operand(phi, form.DOT), s, dv, form.DOT)
        if form.ORDER > 0:
            taylor = add_taylor_gradient(k, dphi, taylor, t, form)
        else:
            found = found + (dphi,)
    if form.NORMALIZE and form.ORDER == 2:
        taylor += weights_gradient(k, Z, form) * left[:, None]
        if SHARES:
            share += read_weights(k, Z, form) * left
    if form.ORDER > 0:
        found = (taylor,)
    return found, dv, share


@triton.jit
def store_gradients(base, x, grads, factor, row, inside, kept, stride, form: tl.constexpr):
    """Writes the gradients of vectors, from those at activated ones; zeros where not kept.

    factor: of each row.
    """
    for p in tl.static_range(form.PARTS):
        d = grads[p]
        if form.ORDER == 0:
            d = activation_gradient(x[p], d, form) * factor[:, None]
        if form.MASKED:
            d = tl.where(kept[:, None], d, 0.0)
        store_rows(base, d, row, inside, stride, p * form.WIDTH, form.K, form.WIDTH)


@triton.jit
def new_output_gradient(
    dout, out, denominators, ddenominators, row, inside, g_row, o_row, column, form: tl.constexpr
):
    """What `load_output_gradient` loads. It writes the gradients of denominators."""
    d = load_rows(dout, row, inside, g_row, column, form.V, form.BV, form)
    if form.NORMALIZE:
        y = load_rows(out, row, inside, o_row, column, form.V, form.BV, form)
        z = tl.load(denominators + row.to(tl.int64), mask=inside, other=0.0)
        dy = operand(d * inverse(z, form)[:, None], form.DOT)
        # of the rounded numbers, as the two nearly cancel where a weight hardly matters
        dz = -tl.sum(dy.to(form.SUM) * y, 1)
        tl.store(ddenominators + row.to(tl.int64), dz, mask=inside)
        return dy, dz
    else:
        return operand(d, form.DOT), tl.zeros((form.C,), form.SUM)


@triton.jit(do_not_specialize=VARYING)
def query_gradients(
    query, key, value, logs, mask, sums, weights, dout, out, denominators,
    ddenominators, dquery, shares, rows, begins, offsets, T, span, splits, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, o_batch, o_head, o_row, d_batch, d_head, d_row, size,
    SOURCE: tl.constexpr, SHARES: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """One program has a span, a query head, and BV columns of the values: a part of the gradient.

    dquery [parts, B, T, H, K]; `size` is the number of elements of a part. ddenominators
    [parts, B, H, T] gets the gradients of denominators, also in parts. With SHARES it writes each
    query's share in the gradients of log decays: that of its weights of earlier tokens.
    """
    at, block = tl.program_id(0) // form.BLOCKS, (tl.program_id(0) % form.BLOCKS).to(tl.int64)
    column = block * form.BV
    u, h = at // H, (at % H).to(tl.int64)
    g = h // (H // G)
    b, n, begin, end = find_span(u, T, span, splits, rows, begins, offsets, form)
    place = u * G + g if form.CAUSAL else n * G + g
    S, Z = load_sums(sums, weights, place, 1, n * G + g, column, SOURCE, False, True, form)
    at_query = query + b * q_batch + h * q_head
    at_key, at_value = key + b * k_batch + g * k_head, value + b * v_batch + g * v_head
    at_dout, at_out = dout + b * g_batch + h * g_head, out + b * o_batch + h * o_head
    at_z, part = (b * H + h) * T, block * (size // form.K)
    at_grad = dquery + block * size + (b * T * H + h) * form.K
    for first in range(begin, end, form.C):
        row = first + tl.arange(0, form.C)
        inside = row < end
        q, factor = load_queries(at_query, row, inside, q_row, form)
        dy, dz = new_output_gradient(
            at_dout, at_out, denominators + at_z, ddenominators + part + at_z,
            row, inside, g_row, o_row, column, form,
        )  # fmt: skip
        d, before = tl.zeros((form.C,), tl.float64), tl.full((form.C,), 1.0, form.SUM)
        if form.DECAYS:
            d = load_decays(logs, mask, b, T, g, d_batch, d_head, d_row, row, end, form)
            before = exp2(tl.cumsum(d, 0).to(form.SUM), form.FLUSHES)
        grads, share = gradients_from_keys(q, dy, dz, before, S, Z, SHARES, form)
        if form.CAUSAL:
            kept = load_kept(mask, b, T, row, end, form)
            k = load_keys(at_key, row, kept, k_row, form)
            v = load_rows(at_value, row, kept, v_row, column, form.V, form.BV, form)
            w, dx, pairs = weight_gradients(q, k, v, dy, dz, d, kept, False, form)
            if SHARES:
                share += tl.sum(tl.where(row[:, None] > row[None, :], pairs, 0.0), 1)
            grads = add_score_gradients(operand(dx, form.DOT), k, grads, form)
            S, Z = add_keys(k, kept, v, d, S, Z, True, form)
        store_gradients(at_grad, q, grads, factor, row, inside, inside, H * form.K, form)
        if SHARES:
            tl.store(shares + part + at_z + row.to(tl.int64), share, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def key_gradients(
    query, key, value, logs, mask, sums, weights, dout, denominators, ddenominators,
    dkey, dvalue, shares, dbefore, dbefore_weights,
    rows, begins, offsets, T, span, splits, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, d_batch, d_head, d_row, size, sizes, parts,
    SOURCE: tl.constexpr, FINAL: tl.constexpr, SHARES: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """One program has a span, a key head, and BV columns: a part of the keys' gradient.

    sums, weights: the gradients of the sums after the span. dkey [parts, B, T, G, K], dvalue
    [B, T, G, V]. `size` and `sizes` are the numbers of elements of a part of dkey and of
    ddenominators. FINAL: whether it writes the gradient of the state before the span, which is then
    the sequence. With SHARES it writes each key's share in the gradients of log decays.
    """
    at, block = tl.program_id(0) // form.BLOCKS, (tl.program_id(0) % form.BLOCKS).to(tl.int64)
    column = block * form.BV
    u, g = at // G, (at % G).to(tl.int64)
    b, n, begin, end = find_span(u, T, span, splits, rows, begins, offsets, form)
    place = u * G + g if form.CAUSAL else n * G + g
    S, Z = load_sums(sums, weights, place, parts, n * G + g, column, SOURCE, True, True, form)
    at_key, at_value = key + b * k_batch + g * k_head, value + b * v_batch + g * v_head
    at_dkey = dkey + block * size + (b * T * G + g) * form.K
    at_dvalue = dvalue + (b * T * G + g) * form.V
    chunks = (end - begin + form.C - 1) // form.C
    for i in range(0, chunks):
        row = begin + (chunks - 1 - i) * form.C + tl.arange(0, form.C)
        inside = row < end
        kept = load_kept(mask, b, T, row, end, form)
        k = load_keys(at_key, row, kept, k_row, form)
        v = load_rows(at_value, row, kept, v_row, column, form.V, form.BV, form)
        one = tl.full((form.C,), 1.0, form.SUM)
        d, before, left = tl.zeros((form.C,), tl.float64), one, one
        if form.DECAYS:
            d = load_decays(logs, mask, b, T, g, d_batch, d_head, d_row, row, end, form)
            before, left, less = chunk_decays(d, form)
        grads, dv, share = gradients_from_queries(k, kept, v, left, S, Z, SHARES, form)
        if form.CAUSAL:
            if form.DECAYS:
                S, Z = decayed(S, less, form.TILES), decayed(Z, less, form.WEIGHTS)
            for h in range(g * (H // G), (g + 1) * (H // G)):
                q, factor = load_queries(query + b * q_batch + h * q_head, row, inside, q_row, form)
                at_dout, at_z = dout + b * g_batch + h * g_head, (b * H + h) * T
                at_dz = ddenominators + block * sizes + at_z
                dy, dz = load_output_gradient(
                    at_dout, denominators + at_z, at_dz, row, inside, g_row, column, form
                )
                w, dx, pairs = weight_gradients(q, k, v, dy, dz, d, kept, True, form)
                if SHARES:
                    share += tl.sum(tl.where(row[:, None] < row[None, :], pairs, 0.0), 1)
                dv = add_product(operand(w, form.DOT), dy, dv, form.DOT)
                grads = add_score_gradients(operand(dx, form.DOT), q, grads, form)
                S, Z = add_query_sums(q, dy, dz, before, S, Z, form)
        if form.MASKED:
            dv = tl.where(kept[:, None], dv, 0.0)
        store_gradients(at_dkey, k, grads, one, row, inside, kept, G * form.K, form)
        store_rows(at_dvalue, dv, row, inside, G * form.V, column, form.V, form.BV)
        if SHARES:
            at_share = shares + block * (size // form.K) + (b * G + g) * T
            tl.store(at_share + row.to(tl.int64), tl.where(kept, share, 0.0), mask=inside)
    if FINAL:
        for t in tl.static_range(form.TILES):
            store_state(dbefore, S[t], n * G + g, t, column, form.V, form.BV, True, form)
        if form.NORMALIZE:
            at_weights = (n * G + g) * form.BLOCKS + block
            store_weights_of_state(dbefore_weights, Z, at_weights, True, True, form)
