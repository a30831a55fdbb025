"""Gradients of ELiTA's attention. `torch/elita.py` has the recurrences, by tokens.

Inside a chunk they are products with the matrix ``P_ti = exp(m_t - m_i)`` for t ≤ i, which is what
is left of token t's mean at token i. With D the gradient of the means by the outputs alone,

    Q_t = Σ_{i≥t} P_ti D_i,                  D_t = Σ_r (1 - g_t) dout_t
    β_t = a_t Q_t · (v_t - u_{t-1}),         b_t = (1 - a_t) β_t
    ds_t = g_t (1 - g_t) dout_t · (v_t - u_t),   E_t = Σ_r ds_t
    M_t = -E_t - Σ_{i>t} P_ti (E_i + β_i),   dc_t = b_t + a_t M_t

A program walks from the last chunk to the first with the gradients of the state there. Values enter
by their distance from the mean, so small gradients are no differences of large numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import VARYING
from .gates import (
    add_token,
    exact_product,
    exponential,
    find_part,
    gate,
    inverse,
    load_logits,
    load_numbers,
    load_segments,
    load_vectors,
    start,
    store_vectors,
    weigh_earlier,
)
from .means import load_mean, no_mean, store_mean


@triton.jit
def remaining(top, total, segment, C: tl.constexpr, FLUSHES: tl.constexpr):
    """P [C, C] for t < i, and from each token to the chunk's end [C]."""
    token = tl.arange(0, C)
    seen = (token[:, None] < token[None, :]) & (segment[:, None] == segment[None, :])
    between = exponential(tl.where(seen, top[:, None] - top[None, :], float("-inf")), FLUSHES)
    is_last = token == C - 1
    top_end = tl.max(tl.where(is_last, top, float("-inf")), 0)
    total_end = tl.sum(tl.where(is_last, total, 0.0), 0)
    stays = segment == tl.max(segment, 0)
    to_end = exponential(tl.where(stays, top - top_end, float("-inf")), FLUSHES)
    return between * total[:, None] * inverse(total)[None, :], to_end * total * inverse(total_end)


@triton.jit
def last_of(x, C: tl.constexpr):
    """The last number of a chunk, in fp64."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), 0).to(tl.float64)


@triton.jit
def read_gates(key_logit, first, log_weights, row, inside, c_row, form: tl.constexpr):
    """A chunk again as in the forward pass, from the log-sum before it: number of sequence; weights
    and sum of earlier keys, and the factor of what was carried in; maximum and sum with the token;
    what reaches each token of the mean before the chunk, and how much of that leaves the chunk.
    """
    c = load_logits(key_logit, row, inside, c_row, form.SUM)
    segment = load_segments(first, row, inside, form.FIRST)
    top, total = start(tl.load(log_weights), form.SUM)
    weights, carried, most, earlier = weigh_earlier(c, segment, top, total, form.C, form.FLUSHES)
    top, all_of, own, kept = add_token(c, most, earlier, form.FLUSHES)
    reach = carried * kept * total.to(form.SUM) * inverse(all_of)
    left = last_of(reach, form.C)
    return segment, weights, carried, earlier, top, all_of, reach, left, total


@triton.jit(do_not_specialize=VARYING)
def mean_gradient_sums(
    key_logit, first, saved_log_weights, self_odds, dout, sums, passes,
    T, span, splits, blocks, H, G, c_batch, c_head, c_row, o_batch, o_head, o_row,
    form: tl.constexpr,
):  # fmt: skip
    """For each span: the gradient of the mean before it by its outputs, and what of a gradient
    after the span passes through.
    """
    at = tl.program_id(0)
    b, g, begin, end = find_part(at, G, splits, span, T)
    chunks = tl.cdiv(tl.maximum(end - begin, 0), form.C)
    Q, passed = no_mean(form), tl.full((), 1.0, tl.float64)
    for chunk in range(0, chunks):
        token = begin + (chunks - 1 - chunk) * form.C
        row = token + tl.arange(0, form.C)
        inside = row < end
        block = (b * G + g) * blocks + token // form.C
        at_logit = key_logit + b * c_batch + g * c_head
        segment, weights, carried, earlier, top, all_of, reach, left, total = read_gates(
            at_logit, first, saved_log_weights + block, row, inside, c_row, form
        )
        found = ()
        for i in tl.static_range(form.BLOCKS):
            D = tl.zeros((form.C, form.BV), form.SUM)
            for h in tl.static_range(form.GROUP):
                head = g * form.GROUP + h
                odds = load_numbers(self_odds + (b * H + head) * T, row, inside, 1, form.SUM)
                d = load_vectors(
                    dout + b * o_batch + head * o_head, row, inside, o_row, i * form.BV,
                    form.V, form.BV, form.SUM,
                )  # fmt: skip
                D += (1.0 / (1.0 + odds))[:, None] * d
            found = found + (Q[i] * left + tl.sum(reach[:, None] * D, 0),)
        Q, passed = found, passed * left
    store_mean(sums, Q, 1.0, at, form)
    tl.store(passes + at.to(tl.int64), passed)


@triton.jit(do_not_specialize=VARYING)
def scan_mean_gradients(
    sums, passes, last, splits, G, HAS_LAST: tl.constexpr, form: tl.constexpr
):  # fmt: skip
    """The gradient of the mean after each span, in the place of its own part of that before it."""
    n = tl.program_id(0)
    b, g = n // G, n % G
    Q = no_mean(form)
    if HAS_LAST:
        Q = load_mean(last, n, 1.0, form)
    for i in range(0, splits):
        at = (b * splits + splits - 1 - i).to(tl.int64) * G + g
        own, passed = load_mean(sums, at, 1.0, form), tl.load(passes + at)
        tl.debug_barrier()  # warps with the same numbers have all read them
        store_mean(sums, Q, 1.0, at, form)
        found = ()
        for k in tl.static_range(form.BLOCKS):
            found = found + (Q[k] * passed + own[k],)
        Q = found


@triton.jit
def add_heads(
    dout, self_odds, ds, distance, keep, row, inside, T, o_head, o_row, column, form: tl.constexpr
):
    """Of a block of the query heads' gradients: D, their part of dv, and ds with what they add."""
    D = tl.zeros((form.C, form.BV), form.SUM)
    dv, found = tl.zeros((form.C, form.BV), form.SUM), ()
    for h in tl.static_range(form.GROUP):
        odds = load_numbers(self_odds + h * tl.cast(T, tl.int64), row, inside, 1, form.SUM)
        at_d = dout + h * tl.cast(o_head, tl.int64)
        d = load_vectors(at_d, row, inside, o_row, column, form.V, form.BV, form.SUM)
        D += (1.0 / (1.0 + odds))[:, None] * d
        dv += gate(odds)[:, None] * d
        both = gate(odds) * keep / (1.0 + odds)
        found = found + (ds[h] + both * tl.sum(d * distance, 1),)
    return D, dv, found


@triton.jit
def store_logit_gradients(
    dkey_logit, dself_logit, ds, a, keep, by_distance, between, to_end, reach, left, M, inside, T,
    form: tl.constexpr,
):  # fmt: skip
    """Writes a chunk's gradients of logits. M: of the log-sum after it; returns that before it."""
    E = tl.zeros((form.C,), form.SUM)
    for h in tl.static_range(form.GROUP):
        tl.store(dself_logit + h * tl.cast(T, tl.int64), ds[h], mask=inside)
        E += ds[h]
    beta = a * by_distance
    dm = to_end * M.to(form.SUM) - E - tl.sum(between * (E + beta)[None, :], 1)
    tl.store(dkey_logit, keep * beta + a * dm, mask=inside)
    return M * left - tl.sum((reach * (E + beta)).to(tl.float64), 0)


@triton.jit(do_not_specialize=VARYING)
def mean_gradients(
    key_logit, value, first, saved_log_weights, saved_means, key_odds, self_odds, dout, after,
    dlog_weight_after, dkey_logit, dself_logit, dvalue, dlog_weights, passes, dmean,
    T, span, splits, blocks, H, G, c_batch, c_head, c_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, g_batch, g_head, g_row,
    HAS_AFTER: tl.constexpr, HAS_LOG: tl.constexpr, BEFORE: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Gradients of a span's values and logits, from those of the state after it.

    after: those of the means after spans. HAS_LOG: the log-sum after all tokens has a gradient.
    That of log-sums between spans is not known yet; `finish_logits` adds its part. BEFORE: also
    writes the gradient of the mean before the sequence.
    """
    at = tl.program_id(0)
    b, g, begin, end = find_part(at, G, splits, span, T)
    chunks = tl.cdiv(tl.maximum(end - begin, 0), form.C)
    at_logit = key_logit + b * c_batch + g * c_head
    at_value = value + b * v_batch + g * v_head
    Q, M, passed = no_mean(form), tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    if HAS_AFTER:
        Q = load_mean(after, at, 1.0, form)
    if HAS_LOG:
        M = tl.where(end == T, tl.load(dlog_weight_after + b * G + g), M)
    for chunk in range(0, chunks):
        token = begin + (chunks - 1 - chunk) * form.C
        row = token + tl.arange(0, form.C)
        inside = row < end
        block = (b * G + g) * blocks + token // form.C
        segment, weights, carried, earlier, top, all_of, reach, left, total = read_gates(
            at_logit, first, saved_log_weights + block, row, inside, c_row, form
        )
        before = load_mean(saved_means, block, total, form)
        between, to_end = remaining(top, all_of, segment, form.C, form.FLUSHES)
        at_odds = self_odds + (b * H + g * form.GROUP) * T
        odds = load_numbers(key_odds + (b * G + g) * T, row, inside, 1, form.SUM)
        a, keep, share = gate(odds), 1.0 / (1.0 + odds), inverse(earlier)
        by_distance, ds, found = tl.zeros((form.C,), form.SUM), (), ()
        for h in tl.static_range(form.GROUP):
            ds = ds + (tl.zeros((form.C,), form.SUM),)
        for i in tl.static_range(form.BLOCKS):
            v = load_vectors(at_value, row, inside, v_row, i * form.BV, form.V, form.BV, form.SUM)
            mean = exact_product(weights, v, form.DOT, True)
            mean = (mean + carried[:, None] * before[i].to(form.SUM)[None, :]) * share[:, None]
            distance = v - mean
            at_d = dout + b * o_batch + g * form.GROUP * o_head
            D, dv, ds = add_heads(
                at_d, at_odds, ds, distance, keep, row, inside, T, o_head, o_row, i * form.BV, form
            )
            later = D + exact_product(between, D, form.DOT, False)
            later += to_end[:, None] * Q[i].to(form.SUM)[None, :]
            by_distance += tl.sum(later * distance, 1)
            dv += a[:, None] * later
            at_dv = dvalue + b * g_batch + g * g_head
            store_vectors(at_dv, dv, row, inside, g_row, i * form.BV, form.V, form.BV, form.OUT)
            found = found + (Q[i] * left + tl.sum(reach[:, None] * D, 0),)
        at_dc = dkey_logit + (b * G + g) * T + row.to(tl.int64)
        at_ds = dself_logit + (b * H + g * form.GROUP) * T + row.to(tl.int64)
        M = store_logit_gradients(
            at_dc, at_ds, ds, a, keep, by_distance, between, to_end, reach, left, M, inside, T, form
        )
        Q, passed = found, passed * left
    tl.store(dlog_weights + at.to(tl.int64), M)
    tl.store(passes + at.to(tl.int64), passed)
    if BEFORE:
        if begin == 0:
            store_mean(dmean, Q, 1.0, b * G + g, form)


@triton.jit(do_not_specialize=VARYING)
def finish_logits(
    key_logit, first, saved_log_weights, dlog_weights, passes, dkey_logit, dlog_weight,
    T, span, splits, blocks, G, c_batch, c_head, c_row, BEFORE: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Adds to a span's gradients of key logits the part that comes through the log-sum after it."""
    at = tl.program_id(0)
    b, g, begin, end = find_part(at, G, splits, span, T)
    own = begin // span
    M = tl.full((), 0.0, tl.float64)
    for i in range(0, splits - 1 - own):
        behind = (b * splits + splits - 1 - i) * G + g
        M = M * tl.load(passes + behind) + tl.load(dlog_weights + behind)
    if BEFORE:
        if own == 0:
            whole = M * tl.load(passes + at.to(tl.int64)) + tl.load(dlog_weights + at.to(tl.int64))
            tl.store(dlog_weight + b * G + g, whole)
    if own + 1 < splits:
        m = tl.load(saved_log_weights + ((b * G + g) * blocks + end // form.C))
        later = tl.full((), 0, tl.int32)
        chunks = tl.cdiv(tl.maximum(end - begin, 0), form.C)
        for chunk in range(0, chunks):
            row = begin + (chunks - 1 - chunk) * form.C + tl.arange(0, form.C)
            inside = row < end
            c = load_logits(key_logit + b * c_batch + g * c_head, row, inside, c_row, form.SUM)
            segment = load_segments(first, row, inside, form.FIRST)
            stays = (tl.max(segment, 0) == segment) & (later == 0) & (c > float("-inf"))
            share = tl.exp(tl.where(stays, c.to(tl.float64) - m, float("-inf")))
            at_row = dkey_logit + (b * G + g) * T + row.to(tl.int64)
            had = tl.load(at_row, mask=inside, other=0.0)
            tl.debug_barrier()  # warps with the same numbers have all read them
            tl.store(at_row, had + (share * M).to(form.SUM), mask=inside)
            later += tl.max(segment, 0)
