"""Features of queries and keys, in tiles of TILE columns that fit a kernel's registers.

Order 0: the features are the activated vectors, and a tile is some of their columns. Orders 1 and
2: features are formed from the whole vector x, in slots. With K // 2 + 1 shifts s, slot ``s K + j``
holds ``x_j x_(j+s)``, indices modulo K. The K numbers of x and a 1 are in the last tile, from slot
SINGLE on. So every pair has a slot, and pairs at the distance K / 2 have two. A tile is a product
of two factors, each a matrix product of x and a constant 0/1 matrix. A query's slots have the
weights that make φ(q)·φ(k) the polynomial: 1/2 for squares and for pairs with two slots.

Vectors are tuples of matrices, one for each of the form's parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E, add_product, exp2, operand, product, rounded


@triton.jit
def load_rows(
    base, row, kept, stride, first, D: tl.constexpr, WIDTH: tl.constexpr, form: tl.constexpr
):
    """Columns first to first + WIDTH of rows of a matrix with D columns; zeros where not kept."""
    columns = first + tl.arange(0, WIDTH)
    inside = kept[:, None] & (columns < D)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(form.SUM)


@triton.jit
def store_rows(base, x, row, kept, stride, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Writes what `load_rows` reads."""
    columns = first + tl.arange(0, WIDTH)
    inside = kept[:, None] & (columns < D)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, rounded(x, base.dtype.element_ty), mask=inside)


@triton.jit
def load_keys(base, row, kept, stride, form: tl.constexpr):
    """Activated keys, zero where not kept."""
    x = ()
    for p in tl.static_range(form.PARTS):
        part = load_rows(base, row, kept, stride, p * form.WIDTH, form.K, form.WIDTH, form)
        part = _activate(part, 0.0, form)
        if form.ACTIVATION == "elu":
            inside = kept[:, None]
            if (p + 1) * form.WIDTH > form.K:
                column = tl.arange(0, form.WIDTH) + p * form.WIDTH
                inside = inside & (column < form.K)[None, :]
            part = tl.where(inside, part, 0.0)
        x = x + (part,)
    return x


@triton.jit
def load_queries(base, row, kept, stride, form: tl.constexpr):
    """Activated queries, and the factors of their gradients.

    Taylor features take the scale into their weights instead. A normalised output is a quotient, so
    other queries are multiplied to make their largest feature about 1: otherwise a product of two
    features of 1e-20 has few digits. exp(x) is multiplied by adding to x, and the rest by powers of
    two.
    """
    x = ()
    for p in tl.static_range(form.PARTS):
        part = load_rows(base, row, kept, stride, p * form.WIDTH, form.K, form.WIDTH, form)
        x = x + (part if form.ORDER > 0 else part * form.SCALE,)
    factor = tl.full((form.C,), 1.0, form.SUM)
    if form.ORDER == 0:
        factor = factor * form.SCALE
        if form.NORMALIZE:
            top = _largest(x[0], 0, form)
            for p in tl.static_range(1, form.PARTS):
                top = tl.maximum(top, _largest(x[p], p, form))
            if form.ACTIVATION != "elu":
                power = _power_of_two(top)
                factor = factor * power
        y = ()
        for p in tl.static_range(form.PARTS):
            if form.ACTIVATION == "elu" and form.NORMALIZE:
                part = _activate(x[p], tl.minimum(top, 0.0)[:, None], form)
            elif form.NORMALIZE:
                part = _activate(x[p] * power[:, None], 0.0, form)
            else:
                part = _activate(x[p], 0.0, form)
            y = y + (part,)
        return y, factor
    else:
        return x, factor


@triton.jit
def level_query(base, form: tl.constexpr):
    """What `load_queries` multiplies one query by, the scale included, and what it adds: [1]."""
    zero = tl.zeros((1,), form.SUM)
    if form.ORDER > 0:
        return zero + 1.0, zero
    if not form.NORMALIZE:
        return zero + form.SCALE, zero
    top = zero + float("-inf")
    for p in tl.static_range(form.PARTS):
        column = p * form.WIDTH + tl.arange(0, form.WIDTH)
        x = tl.load(base + column, mask=column < form.K, other=0.0).to(form.SUM) * form.SCALE
        top = tl.maximum(top, _largest(x[None, :], p, form))
    if form.ACTIVATION == "elu":
        return zero + form.SCALE, -tl.minimum(top, 0.0)
    else:
        return form.SCALE * _power_of_two(top), zero


@triton.jit
def _largest(x, p: tl.constexpr, form: tl.constexpr):
    """The largest number of each row that the activation passes."""
    if form.ACTIVATION == "identity":
        return tl.max(tl.abs(x), 1)
    elif (p + 1) * form.WIDTH > form.K:
        column = p * form.WIDTH + tl.arange(0, form.WIDTH)
        return tl.max(tl.where((column < form.K)[None, :], x, -1e30), 1)
    else:
        return tl.max(x, 1)


@triton.jit
def _power_of_two(top):
    """1 over the largest power of two up to `top`; 1 where it is not positive or not finite."""
    usual = (top > 0) & (top < float("inf"))
    exponent = tl.floor(tl.log2(tl.where(usual, top, 1.0)))
    exponent = tl.minimum(tl.maximum(exponent, -125.0), 125.0)
    return tl.exp2(-exponent)


@triton.jit
def _activate(x, top, form: tl.constexpr):
    """The activation of a part; top: what elu's exponent lacks, if all its numbers are negative.

    elu + 1 is exp(min(x, 0)) + max(x, 0), of which one is always 1 or 0.
    """
    if form.ACTIVATION == "elu":
        below = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return exp2((below - top) * LOG2E, form.FLUSHES) + tl.maximum(x, 0.0)
    elif form.ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x


@triton.jit
def activation_gradient(phi, grad, form: tl.constexpr):
    """The gradient before the activation, from activated numbers."""
    if form.ACTIVATION == "elu":
        return grad * tl.minimum(phi, 1.0)
    elif form.ACTIVATION == "relu":
        return tl.where(phi > 0, grad, 0.0)
    else:
        return grad


@triton.jit
def polynomial(x, form: tl.constexpr):
    """Attention's weights from the products of features, or of queries and keys times the scale."""
    if form.ORDER == 0:
        return x
    constant: tl.constexpr = 1.0 if form.CONSTANT else 0.0
    if form.ORDER == 1:
        return x + constant
    else:
        return x * (0.5 * x + 1.0) + constant


@triton.jit
def slots(tile, form: tl.constexpr):
    """Of the slots of a tile: shifts, columns, which are pairs, single numbers, and the 1."""
    slot = tile * form.TILE + tl.arange(0, form.TILE)
    pairs: tl.constexpr = (form.K // 2 + 1) * form.K if form.ORDER == 2 else 0
    is_pair, is_single = slot < pairs, (slot >= form.SINGLE) & (slot < form.SINGLE + form.K)
    column = tl.where(is_pair, slot % form.K, slot - form.SINGLE)
    return slot // form.K, column, is_pair, is_single, slot == form.SINGLE + form.K


@triton.jit
def constant(x: tl.constexpr, form: tl.constexpr):
    """A vector [TILE] of one number; a literal would be rounded to fp32."""
    return tl.full((form.TILE,), x, form.SUM)


@triton.jit
def _left_matrix(tile, form: tl.constexpr):
    """[WIDTH, TILE]: picks x_j for every slot of a pair and of a single number.

    It is the same for every tile where K divides TILE, so that its product is taken once. Slots
    that it need not fill have a right factor of zero.
    """
    row = tl.arange(0, form.WIDTH)
    if form.TILE % form.K == 0:
        picked = row[:, None] == (tl.arange(0, form.TILE) % form.K)[None, :]
    else:
        shift, column, is_pair, is_single, is_one = slots(tile, form)
        picked = (row[:, None] == column[None, :]) & (is_pair | is_single)[None, :]
    return operand(tl.where(picked, 1.0, 0.0).to(form.SUM), form.DOT)


@triton.jit
def _right_matrix(tile, form: tl.constexpr):
    """[WIDTH, TILE]: picks x_(j+s) for the slots of pairs."""
    shift, column, is_pair, is_single, is_one = slots(tile, form)
    row = tl.arange(0, form.WIDTH)
    picked = (row[:, None] == ((column + shift) % form.K)[None, :]) & is_pair[None, :]
    return operand(tl.where(picked, 1.0, 0.0).to(form.SUM), form.DOT)


@triton.jit
def weights_of_slots(tile, form: tl.constexpr):
    """The weight of each slot in a query's features."""
    shift, column, is_pair, is_single, is_one = slots(tile, form)
    halved = (shift == 0) | (2 * shift == form.K)
    pair = constant(form.SCALE * form.SCALE, form) * tl.where(halved, 0.5, 1.0)
    return tl.where(is_pair, pair, tl.where(is_single, constant(form.SCALE, form), 1.0))


@triton.jit
def _left(x, tile: tl.constexpr, form: tl.constexpr):
    """The left factor [C, TILE] of a tile of Taylor features of x: x_j, and the 1."""
    left = product(operand(x, form.DOT), _left_matrix(tile, form), form.DOT)
    if tile == form.TILES - 1:
        shift, column, is_pair, is_single, is_one = slots(tile, form)
        left = tl.where(is_one[None, :], 1.0, left)
    return left


@triton.jit
def _right(x, tile: tl.constexpr, form: tl.constexpr):
    """The right factor: x_(j+s) for pairs, and 1 for single numbers and the 1."""
    shift, column, is_pair, is_single, is_one = slots(tile, form)
    alone = is_single | (is_one & form.CONSTANT)
    if form.ORDER == 1:
        return tl.where(alone[None, :], 1.0, tl.zeros((form.C, form.TILE), form.SUM))
    else:
        right = product(operand(x, form.DOT), _right_matrix(tile, form), form.DOT)
        if tile == form.TILES - 1:
            right = tl.where(alone[None, :], 1.0, right)
        return right


@triton.jit
def last_left(x, form: tl.constexpr):
    """The left factor of the last tile, which has single numbers and a 1."""
    return _left(x, form.TILES - 1, form)


@triton.jit
def key_features(x, kept, tile: tl.constexpr, form: tl.constexpr):
    """A tile [C, TILE] of the features of keys.

    Where a key is not kept, its values are zero, and `weights.py` leaves out the 1.
    """
    if form.ORDER == 0:
        return x[tile]
    else:
        phi = _left(x[0], tile, form) * _right(x[0], tile, form)
        if form.ORDER == 1:
            phi = tl.where(kept[:, None], phi, 0.0)
        return phi


@triton.jit
def query_features(x, tile: tl.constexpr, form: tl.constexpr):
    """A tile [C, TILE] of the features of queries."""
    if form.ORDER == 0:
        return x[tile]
    else:
        weights = weights_of_slots(tile, form)
        return _left(x[0], tile, form) * _right(x[0], tile, form) * weights[None, :]


@triton.jit
def add_taylor_gradient(x, grad, sums, tile: tl.constexpr, form: tl.constexpr):
    """sums [C, WIDTH] plus the gradient at x, from a tile's at its unweighted Taylor features."""
    by_left = grad * _right(x[0], tile, form)
    if tile == form.TILES - 1:
        shift, column, is_pair, is_single, is_one = slots(tile, form)
        by_left = tl.where(is_one[None, :], 0.0, by_left)
    by_left = operand(by_left, form.DOT)
    sums = add_product(by_left, tl.trans(_left_matrix(tile, form)), sums, form.DOT)
    if form.ORDER == 2:
        by_right = operand(grad * _left(x[0], tile, form), form.DOT)
        sums = add_product(by_right, tl.trans(_right_matrix(tile, form)), sums, form.DOT)
    return sums
