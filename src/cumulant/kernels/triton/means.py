"""ELiTA's outputs, and the states before spans of tokens. `gates.py` has the formulas.

One program has a span of a sequence and a key/value head, with its query heads. A state is a
log-sum m and a mean u, in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded
from .device import VARYING
from .gates import (
    add_token,
    end_of_chunk,
    exact_product,
    find_part,
    gate,
    inverse,
    load_logits,
    load_numbers,
    load_segments,
    load_vectors,
    log_sum,
    own_odds,
    start,
    store_vectors,
    weigh_earlier,
)

LEAST_LOG = tl.constexpr(-1e300)  # in the place of -inf


@triton.jit
def load_mean(means, at, factor, form: tl.constexpr):
    """Blocks [BV] of the vectors ``factor · means[at]``, in fp64."""
    found = ()
    for i in tl.static_range(form.BLOCKS):
        columns = i * form.BV + tl.arange(0, form.BV)
        at_columns = means + at.to(tl.int64) * form.V + columns
        found = found + (tl.load(at_columns, mask=columns < form.V, other=0.0) * factor,)
    return found


@triton.jit
def store_mean(means, values, factor, at, form: tl.constexpr):
    """Writes ``factor · values`` to means[at]."""
    for i in tl.static_range(form.BLOCKS):
        columns = i * form.BV + tl.arange(0, form.BV)
        at_columns = means + at.to(tl.int64) * form.V + columns
        tl.store(at_columns, values[i] * factor, mask=columns < form.V)


@triton.jit
def store_state(log_weights, means, top, total, sums, at, form: tl.constexpr):
    """Writes m and u of a maximum, a sum, and weighted values."""
    tl.store(log_weights + at.to(tl.int64), log_sum(top, total))
    store_mean(means, sums, inverse(total), at, form)


@triton.jit
def no_mean(form: tl.constexpr):
    """Blocks of zeros."""
    found = ()
    for _i in tl.static_range(form.BLOCKS):
        found = found + (tl.zeros((form.BV,), tl.float64),)
    return found


@triton.jit(do_not_specialize=VARYING)
def span_means(
    key_logit, value, first, log_weights, means, open_spans, T, span, splits, G,
    c_batch, c_head, c_row, v_batch, v_head, v_row, form: tl.constexpr,
):  # fmt: skip
    """m and u of each span alone, and whether the span sees what came before it to its end."""
    at = tl.program_id(0)
    b, g, begin, end = find_part(at, G, splits, span, T)
    at_logit = key_logit + b * c_batch + g * c_head
    at_value = value + b * v_batch + g * v_head
    top, total = start(tl.full((), float("-inf"), tl.float64), form.SUM)
    sums, still_open = no_mean(form), tl.full((), 1, tl.int32)
    for token in range(begin, end, form.C):
        row = token + tl.arange(0, form.C)
        inside = row < end
        c = load_logits(at_logit, row, inside, c_row, form.SUM)
        segment = load_segments(first, row, inside, form.FIRST)
        weights, carried, top, total = end_of_chunk(c, segment, top, total)
        found = ()
        for i in tl.static_range(form.BLOCKS):
            v = load_vectors(at_value, row, inside, v_row, i * form.BV, form.V, form.BV, form.SUM)
            found = found + (sums[i] * carried + tl.sum(weights[:, None] * v, 0),)
        sums = found
        still_open = tl.where(tl.max(segment, 0) == 0, still_open, 0)
    tl.store(open_spans + at.to(tl.int64), still_open)
    store_state(log_weights, means, top, total, sums, at, form)


@triton.jit
def add_states(m, u, more_m, more_u, is_open, form: tl.constexpr):
    """The state after two parts: of both together, or of the second alone if it is not open."""
    m = tl.where(is_open != 0, m, float("-inf"))
    top = tl.maximum(tl.maximum(m, more_m), LEAST_LOG)
    p, q = tl.exp(m - top), tl.exp(more_m - top)
    factor = inverse(p + q)
    found = ()
    for i in tl.static_range(form.BLOCKS):
        found = found + ((p * u[i] + q * more_u[i]) * factor,)
    return log_sum(top, p + q), found


@triton.jit(do_not_specialize=VARYING)
def scan_means(
    log_weights, means, open_spans, before_log_weight, before_mean, last_log_weight, last_mean,
    splits, G, HAS_BEFORE: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """The states before each span in the place of its own, and the state after all of them."""
    n = tl.program_id(0)
    b, g = n // G, n % G
    m, u = tl.full((), float("-inf"), tl.float64), no_mean(form)
    if HAS_BEFORE:
        m = tl.load(before_log_weight + n.to(tl.int64))
        u = load_mean(before_mean, n, 1.0, form)
    for i in range(0, splits):
        at = (b * splits + i).to(tl.int64) * G + g
        own_m, own_u = tl.load(log_weights + at), load_mean(means, at, 1.0, form)
        is_open = tl.load(open_spans + at)
        tl.debug_barrier()  # warps with the same numbers have all read them
        tl.store(log_weights + at, m)
        store_mean(means, u, 1.0, at, form)
        m, u = add_states(m, u, own_m, own_u, is_open, form)
    tl.store(last_log_weight + n.to(tl.int64), m)
    store_mean(last_mean, u, 1.0, n, form)


@triton.jit(do_not_specialize=VARYING)
def mean_outputs(
    key_logit, query_logit, self_logit, value, first, log_weights, means,
    out, key_odds, self_odds, saved_log_weights, saved_means, last_log_weight, last_mean,
    T, span, splits, blocks, H, G,
    c_batch, c_head, c_row, r_batch, r_head, r_row, s_batch, s_head, s_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row,
    HAS_BEFORE: tl.constexpr, SAVE: tl.constexpr, LAST: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Outputs from the states before spans. SAVE: also writes what the backward pass reads. LAST:
    the span is the sequence, and the state after it is written.
    """
    at = tl.program_id(0)
    b, g, begin, end = find_part(at, G, splits, span, T)
    at_logit = key_logit + b * c_batch + g * c_head
    at_value = value + b * v_batch + g * v_head
    top, total = start(tl.full((), float("-inf"), tl.float64), form.SUM)
    sums = no_mean(form)
    if HAS_BEFORE:
        top, total = start(tl.load(log_weights + at.to(tl.int64)), form.SUM)
        sums = load_mean(means, at, total, form)
    for token in range(begin, end, form.C):
        row = token + tl.arange(0, form.C)
        inside = row < end
        c = load_logits(at_logit, row, inside, c_row, form.SUM)
        segment = load_segments(first, row, inside, form.FIRST)
        if SAVE:
            place = (b * G + g) * blocks + token // form.C
            store_state(saved_log_weights, saved_means, top, total, sums, place, form)
        weights, carried, most, earlier = weigh_earlier(
            c, segment, top, total, form.C, form.FLUSHES
        )
        reached, all_of, own, kept = add_token(c, most, earlier, form.FLUSHES)
        ends, at_end, top_next, total_next = end_of_chunk(c, segment, top, total)
        odds = tl.where(own > 0, own / (kept * earlier), own)
        if SAVE:
            tl.store(key_odds + (b * G + g) * T + row.to(tl.int64), odds, mask=inside)
        share, next_sums = inverse(earlier), ()
        for i in tl.static_range(form.BLOCKS):
            v = load_vectors(at_value, row, inside, v_row, i * form.BV, form.V, form.BV, form.SUM)
            mean = exact_product(weights, v, form.DOT, True)
            mean = (mean + carried[:, None] * sums[i].to(form.SUM)[None, :]) * share[:, None]
            mean += gate(odds)[:, None] * (v - mean)
            for h in tl.static_range(form.GROUP):
                head = g * form.GROUP + h
                at_query = query_logit + b * r_batch + head * r_head
                at_self = self_logit + b * s_batch + head * s_head
                r = load_numbers(at_query, row, inside, r_row, form.SUM)
                s = load_numbers(at_self, row, inside, s_row, form.SUM)
                mine = own_odds(s, r, reached, all_of, form.FLUSHES)
                if SAVE and i == 0:
                    tl.store(self_odds + (b * H + head) * T + row.to(tl.int64), mine, mask=inside)
                store_vectors(
                    out + b * o_batch + head * o_head, mean + gate(mine)[:, None] * (v - mean),
                    row, inside, o_row, i * form.BV, form.V, form.BV, form.OUT,
                )  # fmt: skip
            next_sums = next_sums + (sums[i] * at_end + tl.sum(ends[:, None] * v, 0),)
        sums, top, total = next_sums, top_next, total_next
    if SAVE:
        for block in range(tl.cdiv(T, form.C), tl.where(end == T, blocks, 0)):  # never read
            place = (b * G + g) * blocks + block
            store_state(saved_log_weights, saved_means, top, total, sums, place, form)
    if LAST:
        store_state(last_log_weight, last_mean, top, total, sums, at, form)


@triton.jit(do_not_specialize=VARYING)
def mean_step(
    key_logit, query_logit, self_logit, value, log_weights, means,
    out, last_log_weight, last_mean, G,
    c_batch, c_head, r_batch, r_head, s_batch, s_head, v_batch, v_head, o_batch, o_head,
    form: tl.constexpr,
):  # fmt: skip
    """One token onto a state, in fp64: an fp32 mean would stop moving."""
    n = tl.program_id(0)
    b, g = (n // G).to(tl.int64), (n % G).to(tl.int64)
    m = tl.load(log_weights + n.to(tl.int64))
    c = tl.load(key_logit + b * c_batch + g * c_head).to(tl.float64)
    odds = tl.where(c == float("-inf"), 0.0, tl.exp(c - m))
    top = tl.maximum(tl.maximum(m, c), LEAST_LOG)
    m = log_sum(top, tl.exp(m - top) + tl.exp(c - top))
    tl.store(last_log_weight + n.to(tl.int64), m)
    for i in tl.static_range(form.BLOCKS):
        columns = i * form.BV + tl.arange(0, form.BV)
        exists = columns < form.V
        v = tl.load(value + b * v_batch + g * v_head + columns, mask=exists, other=0.0).to(form.SUM)
        at = n.to(tl.int64) * form.V + columns
        u = tl.load(means + at, mask=exists, other=0.0)
        u += gate(odds) * (v.to(tl.float64) - u)
        tl.store(last_mean + at, u, mask=exists)
        for h in tl.static_range(form.GROUP):
            head = g * form.GROUP + h
            r = tl.load(query_logit + b * r_batch + head * r_head).to(tl.float64)
            s = tl.load(self_logit + b * s_batch + head * s_head).to(tl.float64)
            mine = tl.where(s == float("-inf"), 0.0, tl.exp(s - r - m))
            y = (u + gate(mine) * (v.to(tl.float64) - u)).to(form.SUM)
            tl.store(out + b * o_batch + head * o_head + columns, rounded(y, form.OUT), mask=exists)
