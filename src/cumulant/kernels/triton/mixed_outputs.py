"""Outputs of mixed chunk attention, and the open group of the state after them."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .arithmetic import add_product, operand
from .device import VARYING
from .groups import (
    find_group,
    find_slots,
    linear_scale,
    load_slots,
    load_sums,
    products,
    scores,
    store_slots,
    visible,
)


@triton.jit(do_not_specialize=VARYING)
def mixed_outputs(
    quad_query, quad_key, lin_query, lin_key, value, open_quad_key, open_lin_key, open_value,
    bias, sums, out, index, rows, numbers, bases, fills, T, most, H, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, r_batch, r_head, r_row,
    s_batch, s_head, s_row, v_batch, v_head, v_row, o_batch, o_head, o_row, form: tl.constexpr,
):  # fmt: skip
    """One program has a group, a query head, C of its queries, and BV columns of values."""
    at = tl.program_id(0)
    column, at = at % form.V_PARTS, at // form.V_PARTS
    mine, at = at % form.CHUNKS, at // form.CHUNKS
    u, h = at // H, (at % H).to(tl.int64)
    g = h // form.GROUP
    group = find_group(u, T, most, rows, numbers, bases, fills, form)
    n, open_row, linear = group[0], group[0] * G + g, linear_scale(group[3], form)
    slots = find_slots(mine, group, T, index, open_row, form)
    q, r = (quad_query + h * q_head, q_batch, q_row), (lin_query + h * r_head, r_batch, r_row)
    k, s = (quad_key + g * k_head, k_batch, k_row), (lin_key + g * s_head, s_batch, s_row)
    v = value + g * v_head, v_batch, v_row
    y = tl.zeros((form.C, form.BV), form.SUM)
    for chunk in range(0, mine + 1 if form.CAUSAL else form.CHUNKS):
        slots_k = find_slots(chunk, group, T, index, open_row, form)
        seen = visible(slots, slots_k, form)
        x = scores(q, slots, k, open_quad_key, slots_k, bias, h, seen, form)
        w = tl.where(seen, activate(x, form), 0.0)
        if not form.SUMMED:
            w += linear * products(
                r, slots, s, open_lin_key, slots_k, form.L, form.BL, form.L_PARTS, form
            )
        values = load_slots(v, open_value, slots_k, column, form.V, form.BV, True, form)
        y = add_product(operand(w, form.DOT), operand(values, form.DOT), y, form.DOT)
    if form.SUMMED:
        place = (u if form.CAUSAL else n).to(tl.int64) * G + g
        read = tl.zeros((form.C, form.BV), form.SUM)
        for part in range(0, form.L_PARTS):
            x = load_slots(r, open_lin_key, slots, part, form.L, form.BL, False, form)
            S = load_sums(sums, place, part, column, form)
            read = add_product(operand(x, form.DOT), operand(S, form.DOT), read, form.DOT)
        y += read * linear  # queries are rounded no second time
    store_slots(
        (out + h * o_head, o_batch, o_row),
        open_value,
        y,
        slots,
        column,
        form.V,
        form.BV,
        False,
        form,
    )


@triton.jit(do_not_specialize=VARYING)
def open_group(
    x, still_open, out, index, bases, fills, T, G, x_batch, x_head, x_row,
    D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """The tokens [N, G, g, D] of each sequence's last group if it is open, then zeros.

    One program has a sequence, a key head, C slots, and a part of their vectors.
    """
    at = tl.program_id(0)
    part, at = at % PARTS, at // PARTS
    chunk, at = at % form.CHUNKS, at // form.CHUNKS
    n, g = (at // G).to(tl.int64), (at % G).to(tl.int64)
    base, length = n * T, tl.cast(T, tl.int64)
    if form.INDEXED:
        base = tl.load(bases + n)
        length = tl.load(bases + n + 1) - base
    fill = tl.zeros((), tl.int64)
    if form.STATE:
        fill = tl.load(fills + n)
    length += fill
    group = n, length // form.SIZE, fill, length, base
    slots = find_slots(chunk, group, T, index, n * G + g, form)
    y = load_slots((x + g * x_head, x_batch, x_row), still_open, slots, part, D, BD, True, form)
    place, columns = slots[0], tl.arange(0, BD) + tl.cast(part, tl.int64) * BD
    at_out = out + ((n * G + g) * form.SIZE + place)[:, None] * D + columns[None, :]
    tl.store(at_out, y, mask=(place < form.SIZE)[:, None] & (columns < D)[None, :])
