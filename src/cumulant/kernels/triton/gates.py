"""What a chunk's logits say: the gates of ELiTA's recurrence, and the sums that its kernels carry.

With ``m_t = log Σ_{j≤t} exp(c_j)``, the mean of all values so far moves by a gate,
``u_t = u_{t-1} + a_t (v_t - u_{t-1})`` with ``a_t = exp(c_t - m_t)``, and
``out_t = u_t + g_t (v_t - u_t)``. No token waits for the one before it: inside a chunk the means
are a product of a matrix ``exp(c_j - m_t)`` with the values.

Sums are of ``exp(c_j - M_t)`` with the running maximum M, so no exponential is above 1. A program
carries M, the sum and the weighted values, the last two in fp64. `first` marks where packed
sequences begin. What came before such a token is not seen after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E, exp2, operand, product, rounded, split_number

LOWEST = tl.constexpr(-3.4028234663852886e38)  # in the place of -inf, whose differences are NaN


@triton.jit
def find_part(at, G, splits, span, T):
    """Row and key/value head of a program, its first token, and the one after its last."""
    u, g = at // G, (at % G).to(tl.int64)
    begin = (u % splits) * span
    return (u // splits).to(tl.int64), g, begin, tl.minimum(begin + span, T)


@triton.jit
def exponential(x, FLUSHES: tl.constexpr):
    """exp(x) for x of at most 0; the product with log2(e) loses no digits."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        high = x * 1.4426950216293335
        rest = x * 1.92596298909109e-08
        low = tl.fma(x, 1.4426950216293335, -high) + rest
        power = exp2(high, FLUSHES)
        return tl.where(power > 0, power + power * (low * 0.6931471805599453), power)


@triton.jit
def exact_product(a, b, DOT: tl.constexpr, EXACT: tl.constexpr):
    """The matrix product of fp32 numbers by tensor cores, which round their factors: with the rest
    of each. EXACT: b has no rest.
    """
    if DOT == "bf16" or DOT == "tf32":
        left, right = operand(a, DOT), operand(b, DOT)
        rest = operand(a - left.to(a.dtype), DOT)
        found = product(left, right, DOT) + product(rest, right, DOT)
        if not EXACT:
            found += product(left, operand(b - right.to(b.dtype), DOT), DOT)
        return found
    else:
        return product(a, b, DOT)


@triton.jit
def load_numbers(base, row, inside, stride, SUM: tl.constexpr):
    """A chunk of one number for each token, zero after the end."""
    return tl.load(base + row.to(tl.int64) * stride, mask=inside, other=0.0).to(SUM)


@triton.jit
def load_logits(base, row, inside, stride, SUM: tl.constexpr):
    """A chunk of key logits, -inf after the end."""
    return tl.load(base + row.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(SUM)


@triton.jit
def load_segments(first, row, inside, FIRST: tl.constexpr):
    """The number of a token's sequence in its chunk: 0 for what the chunk before ended with."""
    if FIRST:
        return tl.cumsum(tl.load(first + row.to(tl.int64), mask=inside, other=0).to(tl.int32), 0)
    else:
        return row * 0


@triton.jit
def load_vectors(
    base, row, inside, stride, column, V: tl.constexpr, BV: tl.constexpr, SUM: tl.constexpr
):
    """A chunk of vectors [C, BV], zero after the end."""
    columns = column + tl.arange(0, BV)
    at = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < V)[None, :], other=0.0).to(SUM)


@triton.jit
def store_vectors(
    base, x, row, inside, stride, column, V: tl.constexpr, BV: tl.constexpr, OUT: tl.constexpr
):
    """Writes a chunk of vectors [C, BV], rounded to OUT."""
    columns = column + tl.arange(0, BV)
    at = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, rounded(x, OUT), mask=inside[:, None] & (columns < V)[None, :])


@triton.jit
def inverse(x):
    """1 / x, and 0 for 0."""
    return tl.where(x != 0, 1.0 / tl.where(x != 0, x, 1.0), 0.0)


@triton.jit
def start(log_weight, SUM: tl.constexpr):
    """The maximum and sum (fp64) of a state; a sum of zero where it has seen nothing."""
    top = tl.maximum(log_weight, LOWEST).to(SUM)
    return top, tl.where(log_weight > LOWEST, tl.exp(log_weight - top.to(tl.float64)), 0.0)


@triton.jit
def log_sum(top, total):
    """m in fp64, from maximum and sum; -inf for nothing."""
    some = total != 0
    found = top.to(tl.float64) + tl.log(tl.where(some, total, 1.0))
    return tl.where(some, found, float("-inf"))


@triton.jit
def weigh_earlier(c, segment, top, total, C: tl.constexpr, FLUSHES: tl.constexpr):
    """Before each token of a chunk: its weights [C, C] of the chunk's earlier keys, the factor of
    what was carried into the chunk, the maximum, and the sum.
    """
    token = tl.arange(0, C)
    seen = (token[:, None] > token[None, :]) & (segment[:, None] == segment[None, :])
    most = tl.max(tl.where(seen, c[None, :], float("-inf")), 1)
    most = tl.maximum(most, tl.where(segment == 0, top, LOWEST))
    weights = exponential(tl.where(seen, c[None, :] - most[:, None], float("-inf")), FLUSHES)
    carried = exponential(tl.where(segment == 0, top - most, float("-inf")), FLUSHES)
    return weights, carried, most, carried * total.to(c.dtype) + tl.sum(weights, 1)


@triton.jit
def add_token(c, most, before, FLUSHES: tl.constexpr):
    """The maximum and sum with each token itself: its weight, and the factor of what was before."""
    top = tl.maximum(c, most)
    own, kept = exponential(c - top, FLUSHES), exponential(most - top, FLUSHES)
    return top, kept * before + own, own, kept


@triton.jit
def end_of_chunk(c, segment, top, total):
    """At the end of a chunk: each key's weight, the factor of what was carried into the chunk, the
    maximum, and the sum. Sums are in fp64, where roundings of all keys would add up.
    """
    last = tl.max(segment, 0)
    seen = segment == last
    most = tl.max(tl.where(seen, c, float("-inf")), 0)
    most = tl.maximum(most, tl.where(last == 0, top, LOWEST))
    weights = tl.exp(tl.where(seen, c - most, float("-inf")).to(tl.float64))
    carried = tl.where(last == 0, tl.exp((top - most).to(tl.float64)), 0.0)
    return weights.to(c.dtype), carried, most, carried * total + tl.sum(weights, 0)


@triton.jit
def own_odds(own_logit, query_logit, top, total, FLUSHES: tl.constexpr):
    """``exp(s - r - m)``; differences are taken in fp64, and 0 where s is -inf."""
    difference = own_logit.to(tl.float64) - query_logit.to(tl.float64) - top.to(tl.float64)
    if top.dtype == tl.float64:
        odds = tl.exp(difference) / total
    else:
        whole, rest = split_number(difference * LOG2E, top.dtype)
        odds = exp2(rest, FLUSHES) * exp2(whole, FLUSHES) / total
    return tl.where(own_logit == float("-inf"), 0.0, odds)


@triton.jit
def gate(odds):
    """a from its odds a / (1 - a), which may be infinite; 1 - a is ``1 / (1 + odds)``."""
    return 1.0 / (1.0 + 1.0 / odds)
