"""One token onto a state: the state is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LEAST, LOG2E, exp2
from .device import VARYING
from .features import level_query, slots, weights_of_slots
from .places import load_state, store_state
from .weights import inverse


@triton.jit
def load_features(base, tile, kept, factor, added, form: tl.constexpr):
    """A tile [TILE] of the features of one vector; without the weights of queries' slots."""
    if form.ORDER == 0:
        slot = tile * form.TILE + tl.arange(0, form.TILE)
        x = tl.load(base + slot.to(tl.int64), mask=slot < form.K, other=0.0).to(form.SUM)
        x = x * factor + added
        if form.ACTIVATION == "elu":
            below = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            x = exp2(below * LOG2E, form.FLUSHES) + tl.maximum(x, 0.0)
        elif form.ACTIVATION == "relu":
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.where((slot < form.K) & kept, x, 0.0)
    else:
        shift, column, is_pair, is_single, is_one = slots(tile, form)
        left = tl.load(base + column.to(tl.int64), mask=is_pair | is_single, other=1.0).to(form.SUM)
        partner = (column + shift) % form.K
        right = tl.load(base + partner.to(tl.int64), mask=is_pair, other=1.0).to(form.SUM)
        exists = is_pair | is_single | (is_one & form.CONSTANT)
        return tl.where(exists & kept, left * right, 0.0)


@triton.jit(do_not_specialize=VARYING)
def step(
    query, key, value, logs, mask, numerator, denominator, out, denominators, final, final_weights,
    G, q_batch, q_head, k_batch, k_head, v_batch, v_head, o_batch, o_head, d_batch, d_head,
    GROUP: tl.constexpr, BV: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """One program has a row and a key head, with its GROUP query heads."""
    at = tl.program_id(0)
    b, g = (at // G).to(tl.int64), (at % G).to(tl.int64)
    columns = tl.arange(0, BV)
    decay = tl.full((1,), 1.0, form.SUM)
    if form.DECAYS:
        log2 = tl.load(logs + b * d_batch + g * d_head + tl.arange(0, 1)).to(tl.float64) * LOG2E
        decay = exp2(tl.minimum(tl.maximum(log2, LEAST), 0.0).to(form.SUM), form.FLUSHES)
    exists = tl.full((1,), 1, tl.int1)
    kept = exists
    if form.MASKED:
        kept = tl.load(mask + b + tl.arange(0, 1)) != 0
        decay = tl.where(kept, decay, 1.0)
    at_key = key + b * k_batch + g * k_head
    at_value = value + b * v_batch + g * v_head + columns
    v = tl.load(at_value, mask=kept & (columns < form.V), other=0.0).to(form.SUM)
    factors, added, y, z = (), (), (), ()
    for i in tl.static_range(GROUP):
        at_query = query + b * q_batch + (g * GROUP + i) * q_head
        factor, more = level_query(at_query, form)
        factors, added = factors + (factor,), added + (more,)
        y = y + (tl.zeros((BV,), form.SUM),)
        z = z + (tl.zeros((1,), form.SUM),)
    one, zero = tl.full((1,), 1.0, form.SUM), tl.zeros((1,), form.SUM)
    for t in range(0, form.TILES):
        phi = load_features(at_key, t, kept, one, zero, form)
        s = load_state(numerator, at, t, 0, form.V, BV, False, form) * decay[:, None]
        s += phi[:, None] * v[None, :]
        store_state(final, s, at, t, 0, form.V, BV, False, form)
        if form.NORMALIZE:
            w = load_state(denominator, at, t, 0, 1, 1, False, form) * decay[:, None] + phi[:, None]
            store_state(final_weights, w, at, t, 0, 1, 1, False, form)
        y_next, z_next = (), ()
        for i in tl.static_range(GROUP):
            at_query = query + b * q_batch + (g * GROUP + i) * q_head
            q = load_features(at_query, t, exists, factors[i], added[i], form)
            if form.ORDER > 0:
                q = q * weights_of_slots(t, form)
            y_next = y_next + (y[i] + tl.sum(q[:, None] * s, 0),)
            if form.NORMALIZE:
                z_next = z_next + (z[i] + tl.sum(q * tl.sum(w, 1), 0),)
            else:
                z_next = z_next + (z[i],)
        y, z = y_next, z_next
    for i in tl.static_range(GROUP):
        h = g * GROUP + i
        found = y[i]
        if form.NORMALIZE:
            found = found * inverse(z[i], form)
            tl.store(denominators + b * (G * GROUP) + h + tl.arange(0, 1), z[i])
        tl.store(out + b * o_batch + h * o_head + columns, found, mask=columns < form.V)
