"""Which tokens a program has, and where sums and states are.

The tokens of a sequence are split into spans. A program walks one span, chunk by chunk. Packed
sequences have a table of their spans, built on the device; rows of a batch are split alike and need
none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .features import constant, slots


@triton.jit
def find_span(u, T, span, splits, rows, begins, offsets, form: tl.constexpr):
    """Of span u: row of the batch, sequence, its first token, and the one after its last.

    A packed span that does not exist is empty.
    """
    if form.PACKED:
        u = u.to(tl.int64)
        n = tl.load(rows + u).to(tl.int64)
        begin = tl.load(begins + u)
        return n * 0, n, begin, tl.minimum(begin + span, tl.load(offsets + n + 1))
    else:
        b = u // splits
        begin = (u - b * splits) * span
        b = b.to(tl.int64)
        return b, b, begin, tl.minimum(begin + span, T)


@triton.jit
def load_kept(mask, b, T, row, end, form: tl.constexpr):
    """Which keys of a chunk exist and are not masked; mask [B, T]."""
    kept = row < end
    if form.MASKED:
        kept = kept & (tl.load(mask + b * T + row.to(tl.int64), mask=kept, other=0) != 0)
    return kept


@triton.jit
def load_tile(sums, at, tile, column, V: tl.constexpr, BV: tl.constexpr, form: tl.constexpr):
    """A tile [TILE, BV] of matrix `at` of sums [..., TILES * TILE, V], whose rows are slots."""
    row = tile * form.TILE + tl.arange(0, form.TILE)
    columns = column + tl.arange(0, BV)
    first = at.to(tl.int64) * (form.TILES * form.TILE)
    at_columns = sums + (first + row)[:, None] * V + columns[None, :]
    return tl.load(at_columns, mask=(columns < V)[None, :], other=0.0)


@triton.jit
def store_tile(sums, x, at, tile, column, V: tl.constexpr, BV: tl.constexpr, form: tl.constexpr):
    """Writes what `load_tile` reads."""
    row = tile * form.TILE + tl.arange(0, form.TILE)
    columns = column + tl.arange(0, BV)
    first = at.to(tl.int64) * (form.TILES * form.TILE)
    at_columns = sums + (first + row)[:, None] * V + columns[None, :]
    tl.store(at_columns, x.to(form.SUM), mask=(columns < V)[None, :])


@triton.jit
def _rows_of_states(tile, form: tl.constexpr):
    """For each slot of a tile: the row of a state, whether it has one, whether it is the first of
    its pair's slots, and the factors of rows that are sums, and that are gradients of sums.

    A state's rows are in the order of degrees, then lexicographic, and a square has the weight
    ``1/sqrt(2)``.
    """
    if form.ORDER == 0:
        slot = tile * form.TILE + tl.arange(0, form.TILE)
        ones = tl.full((form.TILE,), 1.0, form.SUM)
        return slot, slot < form.K, slot < form.K, ones, ones
    else:
        shift, column, is_pair, is_single, is_one = slots(tile, form)
        single: tl.constexpr = 1 if form.CONSTANT else 0  # the row of a vector's first number
        row = tl.where(is_pair, row_of_pair(column, (column + shift) % form.K, form), 0)
        row = tl.where(is_single, single + column, row)
        exists = is_pair | is_single | (is_one & form.CONSTANT)
        twice = is_pair & (2 * shift == form.K)
        first = exists & ((2 * column < form.K) | ~twice)
        square = is_pair & (shift == 0)
        as_sums = tl.where(square, constant(1.4142135623730951, form), 1.0)
        others = tl.where(twice, constant(0.5, form), 1.0)
        as_gradients = tl.where(square, constant(0.7071067811865476, form), others)
        return row, exists, first, as_sums, as_gradients


@triton.jit
def row_of_pair(a, b, form: tl.constexpr):
    """The row of a state that has x_a x_b."""
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    first: tl.constexpr = form.K + (1 if form.CONSTANT else 0)
    return first + low * form.K - low * (low - 1) // 2 + high - low


@triton.jit
def _at_state(
    state, at, row, exists, column, V: tl.constexpr, BV: tl.constexpr, form: tl.constexpr
):
    """Addresses of rows of matrix `at` of a state [..., F, V], and which of them exist."""
    columns = column + tl.arange(0, BV)
    address = state + (at.to(tl.int64) * form.F + row)[:, None] * V + columns[None, :]
    return address, exists[:, None] & (columns < V)[None, :]


@triton.jit
def load_state(
    state, at, tile, column, V: tl.constexpr, BV: tl.constexpr, GRADIENT: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """A tile, in slots, of matrix `at` of a state [..., F, V], or of the gradient of one."""
    row, exists, first, as_sums, as_gradients = _rows_of_states(tile, form)
    address, inside = _at_state(state, at, row, exists, column, V, BV, form)
    factor = as_gradients if GRADIENT else as_sums
    return tl.load(address, mask=inside, other=0.0).to(form.SUM) * factor[:, None]


@triton.jit
def store_state(
    state, x, at, tile, column, V: tl.constexpr, BV: tl.constexpr, GRADIENT: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """Writes what `load_state` reads."""
    row, exists, first, as_sums, as_gradients = _rows_of_states(tile, form)
    address, inside = _at_state(state, at, row, first, column, V, BV, form)
    factor = as_gradients if GRADIENT else as_sums
    tl.store(address, (x / factor[:, None]).to(form.SUM), mask=inside)
