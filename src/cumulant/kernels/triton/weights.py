"""Denominators: sums of attention's weights over keys.

A query would read the sums of all features one by one. Instead:

- Order 2: ``z = n + s q·k₁ + s²/2 qᵀ K₂ q``, with ``n = Σ 1``, ``k₁ = Σ k`` and ``K₂ = Σ k kᵀ``. K₂
  and k₁ are rows of one matrix M, the product of the last tile of left factors with the keys.
- Orders 0 and 1: every row of a matrix [C, TILE] is Σ φ(k). A product with ones adds keys to it,
  and with the causal mask instead it gives what each query sees. No sum crosses threads.

Tensor cores take rounded factors. Where a denominator would lose digits, a factor is a rounded
number and what the rounding left.

Backwards the same sums are of queries times the gradients of their denominators. There orders 0 and
1 have them in every column of a matrix [TILE, 16], which takes fewer registers (`columns`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import add_product, operand, product
from .features import constant, last_left, query_features, slots
from .places import load_state, load_tile, row_of_pair, store_state, store_tile


@triton.jit
def inverse(z, form: tl.constexpr):
    """1 / z; zero where a denominator is below the smallest normal number."""
    usual = tl.abs(z) >= form.TINY
    return tl.where(usual, 1.0 / tl.where(usual, z, 1.0), 0.0).to(form.SUM)


@triton.jit
def no_weights(COLUMNS: tl.constexpr, form: tl.constexpr):
    """The sums before any key."""
    if form.ORDER == 2:
        return tl.zeros((form.TILE, form.WIDTH), form.SUM), tl.zeros((1,), form.SUM)
    else:
        found = ()
        for _t in tl.static_range(form.TILES):
            if COLUMNS:
                found = found + (tl.zeros((form.TILE, 16), form.SUM),)
            else:
                found = found + (tl.zeros((form.C, form.TILE), form.SUM),)
        return found


@triton.jit
def load_weights(
    sums, at, state_at, SOURCE: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """The sums before a span. SOURCE: as of `load_sums`."""
    if SOURCE == "none" or not form.NORMALIZE:
        return no_weights(COLUMNS, form)
    elif form.ORDER == 2:
        if SOURCE == "spans":
            return load_moments(sums, at, form)
        else:
            return load_moments_of_state(sums, state_at, GRADIENT, form)
    else:
        found, zeros = (), no_weights(COLUMNS, form)
        for t in tl.static_range(form.TILES):
            if SOURCE == "spans":
                z = load_tile(sums, at, t, 0, 1, 1, form)
            else:
                z = load_state(sums, state_at, t, 0, 1, 1, GRADIENT, form)
            if not COLUMNS:
                z = tl.trans(z)
            found = found + (zeros[t] + z,)
        return found


@triton.jit
def scaled(sums, factor, COUNT: tl.constexpr):
    """COUNT sums times one number."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (sums[i] * factor,)
    return found


@triton.jit
def decayed(sums, less, COUNT: tl.constexpr):
    """COUNT sums times ``1 + less``."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (sums[i] + sums[i] * less,)
    return found


@triton.jit
def store_weights(sums, Z, at, COLUMNS: tl.constexpr, form: tl.constexpr):
    """Writes what `load_weights` reads of spans."""
    if form.ORDER == 2:
        store_moments(sums, Z, at, form)
    else:
        for t in tl.static_range(form.TILES):
            z = tl.max(Z[t], 1 if COLUMNS else 0)[:, None]
            store_tile(sums, z, at, t, 0, 1, 1, form)


@triton.jit
def store_weights_of_state(
    state, Z, at, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, form: tl.constexpr
):
    """Writes what `load_weights` reads of a state."""
    if form.ORDER == 2:
        store_moments_of_state(state, Z, at, GRADIENT, form)
    else:
        for t in tl.static_range(form.TILES):
            z = tl.max(Z[t], 1 if COLUMNS else 0)[:, None]
            store_state(state, z, at, t, 0, 1, 1, GRADIENT, form)


@triton.jit
def add_exact_product(a, b, sums, form: tl.constexpr):
    """sums + a b, with all digits of b; a is a factor already."""
    high = operand(b, form.DOT)
    sums = add_product(a, high, sums, form.DOT)
    if form.DOT == "bf16" or form.DOT == "tf32":
        sums = add_product(a, operand(b - high.to(form.SUM), form.DOT), sums, form.DOT)
    return sums


@triton.jit
def columns(x, rest, form: tl.constexpr):
    """Factors [C, 16] of a product with sums in columns, as `rows_of` takes them apart.

    x is a factor already, and `rest` is what its rounding left.
    """
    column = tl.arange(0, 16)[None, :]
    found = tl.where(column < 2, x[:, None], tl.where(column == 2, rest[:, None], 0.0))
    return operand(found, form.DOT)


@triton.jit
def rows_of(z, form: tl.constexpr):
    """Sums in columns as the other factor [16, TILE]: rounded, what is left, and rounded again."""
    high = operand(z, form.DOT).to(form.SUM)
    column = tl.arange(0, 16)[None, :]
    return tl.trans(operand(tl.where(column == 1, z - high, high), form.DOT))


@triton.jit
def add_key_weights(k, phi, kept, left, Z, COLUMNS: tl.constexpr, form: tl.constexpr):
    """The sums after a chunk of keys.

    phi: the tiles of their features, decayed to the chunk's end. left: these decays.
    """
    if form.ORDER == 2:
        u = last_left(k[0], form) * left[:, None]
        M = _add_exact_product_of_keys(u, k[0], Z[0], form)
        return M, Z[1] + tl.sum(tl.where(kept, left, 0.0), 0)
    else:
        ones = operand(tl.full((form.C, 16 if COLUMNS else form.C), 1.0, form.SUM), form.DOT)
        found = ()
        for t in tl.static_range(form.TILES):
            if COLUMNS:
                z = add_product(tl.trans(operand(phi[t], form.DOT)), ones, Z[t], form.DOT)
            else:
                z = add_exact_product(ones, phi[t], Z[t], form)
            found = found + (z,)
        return found


@triton.jit
def _add_exact_product_of_keys(u, k, M, form: tl.constexpr):
    """M + uᵀ k. Without decays u and k are numbers of the inputs, which are exact."""
    k, high = operand(k, form.DOT), operand(u, form.DOT)
    M = add_product(tl.trans(high), k, M, form.DOT)
    if form.DECAYS and (form.DOT == "bf16" or form.DOT == "tf32"):
        rest = operand(u - high.to(form.SUM), form.DOT)
        M = add_product(tl.trans(rest), k, M, form.DOT)
    return M


@triton.jit
def add_query_weights(q, phi, dz, before, Z, form: tl.constexpr):
    """The sums, in columns, after a chunk of queries with the gradients dz of their denominators.

    phi: the tiles of their features, decayed from the chunk's start. before: these decays.
    """
    if form.ORDER == 2:
        w = dz * before
        u = operand(last_left(q[0], form) * w[:, None], form.DOT)
        M = add_product(tl.trans(u), operand(q[0], form.DOT), Z[0], form.DOT)
        return M, Z[1] + tl.sum(w, 0)
    else:
        weight = operand(tl.zeros((form.C, 16), form.SUM) + dz[:, None], form.DOT)
        found = ()
        for t in tl.static_range(form.TILES):
            z = add_product(tl.trans(operand(phi[t], form.DOT)), weight, Z[t], form.DOT)
            found = found + (z,)
        return found


@triton.jit
def read_weights(x, Z, form: tl.constexpr):
    """φ(x)·Z [C]: of queries denominators, and of keys, with order 2, what Z's gradient gives."""
    if form.ORDER == 2:
        M = _rows_of_moments(Z[0], 1.0, 2.0 / form.SCALE, form)
        u = operand(last_left(x[0], form), form.DOT)
        y = add_exact_product(u, M, tl.zeros((form.C, form.WIDTH), form.SUM), form)
        z = tl.sum(y * x[0], 1) * (0.5 * form.SCALE * form.SCALE)
        if form.CONSTANT:
            z += Z[1]
        return z
    else:
        z = tl.zeros((form.C,), form.SUM)
        for t in tl.static_range(form.TILES):
            z += tl.sum(query_features(x, t, form) * Z[t], 1)
        return z


@triton.jit
def _rows_of_moments(M, pairs: tl.constexpr, linear: tl.constexpr, form: tl.constexpr):
    """K₂ times one number and k₁ times another, in the rows of M; zero in all others."""
    shift, column, is_pair, is_single, is_one = slots(form.TILES - 1, form)
    factor = tl.where(is_single, constant(pairs, form), 0.0)
    factor = tl.where(is_one, constant(linear, form), factor)
    return tl.where((is_single | is_one)[:, None], M * factor[:, None], 0.0)


@triton.jit
def weights_gradient(x, Z, form: tl.constexpr):
    """Order 2: the gradient of `read_weights` at x [C, WIDTH]."""
    M = _rows_of_moments(Z[0], form.SCALE * form.SCALE, form.SCALE, form)
    return product(operand(last_left(x[0], form), form.DOT), operand(M, form.DOT), form.DOT)


# Order 2's sums in memory: M, and n in the row after that of k₁.


@triton.jit
def _at_moments(sums, at, form: tl.constexpr):
    """The addresses of M, and which is that of n."""
    row, column = tl.arange(0, form.TILE)[:, None], tl.arange(0, form.WIDTH)[None, :]
    base = sums + at.to(tl.int64) * (form.TILE * form.WIDTH)
    count: tl.constexpr = form.SINGLE % form.TILE + form.K + 1
    return base + row * form.WIDTH + column, row == count, (row == count) & (column == 0)


@triton.jit
def load_moments(sums, at, form: tl.constexpr):
    """M and n of a span."""
    address, is_row, is_count = _at_moments(sums, at, form)
    M = tl.load(address)
    n = tl.sum(tl.sum(tl.where(is_count, M, 0.0), 1)[None, :], 1)
    return tl.where(is_row, 0.0, M), n


@triton.jit
def store_moments(sums, Z, at, form: tl.constexpr):
    """Writes what `load_moments` reads."""
    address, is_row, is_count = _at_moments(sums, at, form)
    M = tl.where(is_row, 0.0, Z[0])
    tl.store(address, tl.where(is_count, Z[1][:, None], M).to(form.SUM))


@triton.jit
def _places_in_state(state, at, GRADIENT: tl.constexpr, form: tl.constexpr):
    """For M: addresses in a state, which exist, which are stored, and factors of what is there."""
    shift, a, is_pair, is_single, is_one = slots(form.TILES - 1, form)
    b = tl.arange(0, form.WIDTH)
    single: tl.constexpr = 1 if form.CONSTANT else 0
    row = tl.where(is_one[:, None], single + b[None, :], 0)
    row = tl.where(is_single[:, None], row_of_pair(a[:, None], b[None, :], form), row)
    exists = (is_single | is_one)[:, None] & (b < form.K)[None, :]
    stored = exists & (is_one[:, None] | (a[:, None] <= b[None, :]))
    pairs: tl.constexpr = 1.0 / (form.SCALE * form.SCALE) if GRADIENT else 1.0
    linear: tl.constexpr = 1.0 / form.SCALE if GRADIENT else 1.0
    factor = tl.where(is_single, constant(pairs, form), constant(linear, form))[:, None]
    square = is_single[:, None] & (a[:, None] == b[None, :])
    factor = factor * tl.where(square, constant(1.4142135623730951, form)[:, None], 1.0)
    return state + at.to(tl.int64) * form.F + row, exists, stored, factor


@triton.jit
def load_moments_of_state(state, at, GRADIENT: tl.constexpr, form: tl.constexpr):
    """M and n of a state's denominator, or of the gradient of one."""
    address, exists, stored, factor = _places_in_state(state, at, GRADIENT, form)
    M = tl.load(address, mask=exists, other=0.0).to(form.SUM) * factor
    n = tl.zeros((1,), form.SUM)
    if form.CONSTANT:
        n = tl.load(state + at.to(tl.int64) * form.F + tl.arange(0, 1)).to(form.SUM)
    return M, n


@triton.jit
def store_moments_of_state(state, Z, at, GRADIENT: tl.constexpr, form: tl.constexpr):
    """Writes what `load_moments_of_state` reads."""
    address, exists, stored, factor = _places_in_state(state, at, GRADIENT, form)
    tl.store(address, (Z[0] / factor).to(form.SUM), mask=stored)
    if form.CONSTANT:
        tl.store(state + at.to(tl.int64) * form.F + tl.arange(0, 1), Z[1].to(form.SUM))
