"""Gradients of mixed chunk attention, with the weights formed again.

With x the scores, w = f(x) and ``y = w v + r S``: ``dw = dy vᵀ``, ``dx = f'(x) dw``,
``dq = dx k / g``, ``dk = dxᵀ q / g``, ``dv = wᵀ dy + s dS``, ``dr = dy Sᵀ``, ``ds = v dSᵀ``. S are
the sums before a group, and dS the gradients of those that its keys joined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, slope
from .arithmetic import add_product, operand
from .device import VARYING
from .groups import (
    find_group,
    find_slots,
    linear_scale,
    load_slots,
    load_sums,
    of_complete_groups,
    products,
    quad_scale,
    scores,
    store_slots,
    visible,
)


@triton.jit
def zeros_of(PARTS: tl.constexpr, BD: tl.constexpr, form: tl.constexpr):
    """A matrix [C, BD] of zeros for each part of vectors."""
    found = ()
    for _i in tl.static_range(PARTS):
        found = found + (tl.zeros((form.C, BD), form.SUM),)
    return found


@triton.jit
def add_parts(
    weights, x, still_open, found, slots, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    HAS_OPEN: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """found plus ``weights · x``, part by part."""
    weights, more = operand(weights, form.DOT), ()
    for part in tl.static_range(PARTS):
        y = operand(load_slots(x, still_open, slots, part, D, BD, HAS_OPEN, form), form.DOT)
        more = more + (add_product(weights, y, found[part], form.DOT),)
    return more


@triton.jit
def read_gradients(
    x, still_open, sums, at, found, slots, HAS_OPEN: tl.constexpr, form: tl.constexpr
):
    """found plus ``x · sumsᵀ`` for vectors of V numbers: parts [C, BL]."""
    for column in range(0, form.V_PARTS):
        d = load_slots(x, still_open, slots, column, form.V, form.BV, HAS_OPEN, form)
        d, more = operand(d, form.DOT), ()
        for part in tl.static_range(form.L_PARTS):
            S = operand(load_sums(sums, at, part, column, form), form.DOT)
            more = more + (add_product(d, tl.trans(S), found[part], form.DOT),)
        found = more
    return found


@triton.jit
def store_parts(
    x, still_open, found, upstream, slots, group, AFTER: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, PARTS: tl.constexpr, HAS_OPEN: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes parts of gradients. AFTER: plus those at the open groups [N·G, g, D] of the state
    after the call, where groups stay open.
    """
    place, exists, is_token, is_open, b, t, open_row = slots
    for part in tl.static_range(PARTS):
        y = found[part]
        if AFTER:
            columns = tl.arange(0, BD) + tl.cast(part, tl.int64) * BD
            at = upstream + (open_row * form.SIZE + place)[:, None] * D + columns[None, :]
            stays = of_complete_groups(slots, group, False, form)[1]
            inside = stays[:, None] & (columns < D)[None, :]
            y += tl.load(at, mask=inside, other=0.0).to(form.SUM)
        store_slots(x, still_open, y, slots, part, D, BD, HAS_OPEN, form)


@triton.jit(do_not_specialize=VARYING)
def mixed_query_gradients(
    quad_query, quad_key, lin_query, lin_key, value, open_quad_key, open_lin_key, open_value,
    bias, sums, dout, dquad_query, dlin_query, index, rows, numbers, bases, fills, T, most, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, r_batch, r_head, r_row,
    s_batch, s_head, s_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    x_batch, x_head, x_row, y_batch, y_head, y_row, form: tl.constexpr,
):  # fmt: skip
    """Of quadratic and linear queries. One program has a group, a query head, and C queries."""
    at = tl.program_id(0)
    mine, at = at % form.CHUNKS, at // form.CHUNKS
    u, h = at // H, (at % H).to(tl.int64)
    g = h // form.GROUP
    group = find_group(u, T, most, rows, numbers, bases, fills, form)
    open_row = group[0] * G + g
    slots = find_slots(mine, group, T, index, open_row, form)
    q, k = (quad_query + h * q_head, q_batch, q_row), (quad_key + g * k_head, k_batch, k_row)
    s, v = (lin_key + g * s_head, s_batch, s_row), (value + g * v_head, v_batch, v_row)
    d = dout + h * o_head, o_batch, o_row
    dq, dr = zeros_of(form.K_PARTS, form.BK, form), zeros_of(form.L_PARTS, form.BL, form)
    for chunk in range(0, mine + 1 if form.CAUSAL else form.CHUNKS):
        slots_k = find_slots(chunk, group, T, index, open_row, form)
        seen = visible(slots, slots_k, form)
        x = scores(q, slots, k, open_quad_key, slots_k, bias, h, seen, form)
        dw = products(d, slots, v, open_value, slots_k, form.V, form.BV, form.V_PARTS, form)
        dx = tl.where(seen, slope(x, form) * dw, 0.0) * quad_scale(form)
        dq = add_parts(dx, k, open_quad_key, dq, slots_k, form.K, form.BK, form.K_PARTS, True, form)
        if not form.SUMMED:
            dr = add_parts(
                dw, s, open_lin_key, dr, slots_k, form.L, form.BL, form.L_PARTS, True, form
            )
    if form.SUMMED:
        place = (u if form.CAUSAL else group[0]).to(tl.int64) * G + g
        dr = read_gradients(d, open_value, sums, place, dr, slots, False, form)
    scaled = ()
    for part in tl.static_range(form.L_PARTS):
        scaled = scaled + (dr[part] * linear_scale(group[3], form),)
    store_parts(
        (dquad_query + h * x_head, x_batch, x_row), bias, dq, bias, slots, group, False,
        form.K, form.BK, form.K_PARTS, False, form,
    )  # fmt: skip
    store_parts(
        (dlin_query + h * y_head, y_batch, y_row), bias, scaled, bias, slots, group, False,
        form.L, form.BL, form.L_PARTS, False, form,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def mixed_key_gradients(
    quad_query, quad_key, lin_query, lin_key, value, open_quad_key, open_lin_key, open_value,
    bias, sums, dout, after_quad_key, after_lin_key, dquad_key, dlin_key, dopen_quad_key,
    dopen_lin_key, index, rows, numbers, bases, fills, T, most, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, r_batch, r_head, r_row,
    s_batch, s_head, s_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    x_batch, x_head, x_row, y_batch, y_head, y_row, AFTER: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Of quadratic and linear keys. One program has a group, a key head, and C of its keys."""
    at = tl.program_id(0)
    mine, at = at % form.CHUNKS, at // form.CHUNKS
    u, g = at // G, (at % G).to(tl.int64)
    group = find_group(u, T, most, rows, numbers, bases, fills, form)
    open_row, linear = group[0] * G + g, linear_scale(group[3], form)
    slots_k = find_slots(mine, group, T, index, open_row, form)
    k, v = (quad_key + g * k_head, k_batch, k_row), (value + g * v_head, v_batch, v_row)
    dk, ds = zeros_of(form.K_PARTS, form.BK, form), zeros_of(form.L_PARTS, form.BL, form)
    for h in range(g * form.GROUP, (g + 1) * form.GROUP):
        q, r = (quad_query + h * q_head, q_batch, q_row), (lin_query + h * r_head, r_batch, r_row)
        d = dout + h * o_head, o_batch, o_row
        for chunk in range(mine if form.CAUSAL else 0, form.CHUNKS):
            slots = find_slots(chunk, group, T, index, open_row, form)
            seen = visible(slots, slots_k, form)
            x = scores(q, slots, k, open_quad_key, slots_k, bias, h, seen, form)
            dw = products(d, slots, v, open_value, slots_k, form.V, form.BV, form.V_PARTS, form)
            dx = tl.trans(tl.where(seen, slope(x, form) * dw, 0.0) * quad_scale(form))
            dk = add_parts(
                dx, q, open_quad_key, dk, slots, form.K, form.BK, form.K_PARTS, False, form
            )
            if not form.SUMMED:
                ds = add_parts(
                    tl.trans(dw) * linear, r, open_lin_key, ds, slots,
                    form.L, form.BL, form.L_PARTS, False, form,
                )  # fmt: skip
    if form.SUMMED:
        place = (u if form.CAUSAL else group[0]).to(tl.int64) * G + g
        counted = slots_k
        if form.CAUSAL:
            counted = of_complete_groups(slots_k, group, True, form)
        ds = read_gradients(v, open_value, sums, place, ds, counted, True, form)
    store_parts(
        (dquad_key + g * x_head, x_batch, x_row), dopen_quad_key, dk, after_quad_key, slots_k,
        group, AFTER, form.K, form.BK, form.K_PARTS, True, form,
    )  # fmt: skip
    store_parts(
        (dlin_key + g * y_head, y_batch, y_row), dopen_lin_key, ds, after_lin_key, slots_k,
        group, AFTER, form.L, form.BL, form.L_PARTS, True, form,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def mixed_value_gradients(
    quad_query, quad_key, lin_query, lin_key, value, open_quad_key, open_lin_key, open_value,
    bias, sums, dout, after_value, dvalue, dopen_value, index, rows, numbers, bases, fills,
    T, most, H, G, q_batch, q_head, q_row, k_batch, k_head, k_row, r_batch, r_head, r_row,
    s_batch, s_head, s_row, v_batch, v_head, v_row, o_batch, o_head, o_row, x_batch, x_head, x_row,
    AFTER: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Of values. One program has a group, a key head, C of its keys, and BV columns."""
    at = tl.program_id(0)
    column, at = at % form.V_PARTS, at // form.V_PARTS
    mine, at = at % form.CHUNKS, at // form.CHUNKS
    u, g = at // G, (at % G).to(tl.int64)
    group = find_group(u, T, most, rows, numbers, bases, fills, form)
    open_row, linear = group[0] * G + g, linear_scale(group[3], form)
    slots_k = find_slots(mine, group, T, index, open_row, form)
    k, s = (quad_key + g * k_head, k_batch, k_row), (lin_key + g * s_head, s_batch, s_row)
    dv = tl.zeros((form.C, form.BV), form.SUM)
    for h in range(g * form.GROUP, (g + 1) * form.GROUP):
        q, r = (quad_query + h * q_head, q_batch, q_row), (lin_query + h * r_head, r_batch, r_row)
        d = dout + h * o_head, o_batch, o_row
        for chunk in range(mine if form.CAUSAL else 0, form.CHUNKS):
            slots = find_slots(chunk, group, T, index, open_row, form)
            seen = visible(slots, slots_k, form)
            x = scores(q, slots, k, open_quad_key, slots_k, bias, h, seen, form)
            w = tl.where(seen, activate(x, form), 0.0)
            if not form.SUMMED:
                w += linear * products(
                    r, slots, s, open_lin_key, slots_k, form.L, form.BL, form.L_PARTS, form
                )
            dy = load_slots(d, open_value, slots, column, form.V, form.BV, False, form)
            w = operand(tl.trans(w), form.DOT)
            dv = add_product(w, operand(dy, form.DOT), dv, form.DOT)
    if form.SUMMED:
        place = (u if form.CAUSAL else group[0]).to(tl.int64) * G + g
        counted = slots_k
        if form.CAUSAL:
            counted = of_complete_groups(slots_k, group, True, form)
        for part in range(0, form.L_PARTS):
            keys = load_slots(s, open_lin_key, counted, part, form.L, form.BL, True, form)
            S = load_sums(sums, place, part, column, form)
            dv = add_product(operand(keys, form.DOT), operand(S, form.DOT), dv, form.DOT)
    if AFTER:
        columns = tl.arange(0, form.BV) + tl.cast(column, tl.int64) * form.BV
        stays, place_k = of_complete_groups(slots_k, group, False, form)[1], slots_k[0]
        at_rows = (open_row * form.SIZE + place_k)[:, None] * form.V
        inside = stays[:, None] & (columns < form.V)[None, :]
        at_after = after_value + at_rows + columns[None, :]
        dv += tl.load(at_after, mask=inside, other=0.0).to(form.SUM)
    x = dvalue + g * x_head, x_batch, x_row
    store_slots(x, dopen_value, dv, slots_k, column, form.V, form.BV, True, form)


@triton.jit(do_not_specialize=VARYING)
def bias_gradients(
    quad_query, quad_key, lin_query, lin_key, value, open_quad_key, open_lin_key, open_value,
    bias, sums, dout, dbias, index, rows, numbers, bases, fills, T, most, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, r_batch, r_head, r_row,
    s_batch, s_head, s_row, v_batch, v_head, v_row, o_batch, o_head, o_row, groups, splits,
    form: tl.constexpr,
):  # fmt: skip
    """Of the bias: sums [splits, H, g, g], each over every splits-th group. One program has one of
    these parts, a query head, C queries and C keys.
    """
    at = tl.program_id(0)
    mine_k, at = at % form.CHUNKS, at // form.CHUNKS
    mine, at = at % form.CHUNKS, at // form.CHUNKS
    split, h = at // H, (at % H).to(tl.int64)
    g = h // form.GROUP
    q, k = (quad_query + h * q_head, q_batch, q_row), (quad_key + g * k_head, k_batch, k_row)
    d, v = (dout + h * o_head, o_batch, o_row), (value + g * v_head, v_batch, v_row)
    found = tl.zeros((form.C, form.C), form.SUM)
    for u in range(split, groups, splits):
        group = find_group(u, T, most, rows, numbers, bases, fills, form)
        slots = find_slots(mine, group, T, index, group[0] * G + g, form)
        slots_k = find_slots(mine_k, group, T, index, group[0] * G + g, form)
        seen = visible(slots, slots_k, form)
        x = scores(q, slots, k, open_quad_key, slots_k, bias, h, seen, form)
        dw = products(d, slots, v, open_value, slots_k, form.V, form.BV, form.V_PARTS, form)
        found += tl.where(seen, slope(x, form) * dw, 0.0)
    place, place_k = tl.arange(0, form.C) + mine * form.C, tl.arange(0, form.C) + mine_k * form.C
    inside = (place < form.SIZE)[:, None] & (place_k < form.SIZE)[None, :]
    first = (split * H + h) * (form.SIZE * form.SIZE)
    place, place_k = place.to(tl.int64), place_k.to(tl.int64)
    at_bias = dbias + first + place[:, None] * form.SIZE + place_k[None, :]
    tl.store(at_bias, found, mask=inside)
