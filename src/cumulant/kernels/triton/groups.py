"""Groups of mixed chunk attention: where their tokens are, their scores, and their sums.

A sequence has slots: first the tokens of the state's open group, then its own unmasked tokens. A
group is g slots. A program has C slots of a group. It finds a token by its row, or by an index of
tokens where some are masked or sequences are packed.

Two tuples go from function to function. `slots` has, for C slots: their places in the group, which
exist, which are tokens of the call and which of a state, the former's rows of the batch and places
in them, and the number of the sequence's open group. `x` is a tensor
``[B, ., T, D]`` at one head: its address, and the strides of rows and tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import add_product, operand, rounded
from .device import VARYING


@triton.jit
def find_group(u, T, most, rows, numbers, bases, fills, form: tl.constexpr):
    """Of group u: its sequence, its number there, and of the sequence the slots filled by a state,
    all slots, and the place of its first token. A group that does not exist has no slots.
    """
    if form.INDEXED:
        at = tl.cast(u, tl.int64)
        n, c = tl.load(rows + at), tl.load(numbers + at)
        exists = n >= 0
        n = tl.maximum(n, 0).to(tl.int64)
        base = tl.load(bases + n)
        length = tl.where(exists, tl.load(bases + n + 1) - base, 0)
    else:
        n, c = (u // most).to(tl.int64), u % most
        base, length = n * T, tl.cast(T, tl.int64)
    fill = tl.zeros((), tl.int64)
    if form.STATE:
        fill = tl.load(fills + n)
        if form.INDEXED:
            fill = tl.where(exists, fill, 0)
    return n, c, fill, fill + length, base


@triton.jit
def find_slots(chunk, group, T, index, open_row, form: tl.constexpr):
    """`slots` of a chunk of C; group: as of `find_group`."""
    n, c, fill, length, base = group
    place = tl.arange(0, form.C) + chunk * form.C
    slot = c.to(tl.int64) * form.SIZE + place
    exists = (place < form.SIZE) & (slot < length)
    is_token, is_open = exists & (slot >= fill), exists & (slot < fill)
    flat = base + slot - fill
    if form.INDEXED:
        flat = tl.load(index + flat, mask=is_token, other=0).to(tl.int64)
    b = flat // tl.maximum(T, 1)
    return place, exists, is_token, is_open, b, flat - b * T, open_row


@triton.jit
def of_complete_groups(slots, group, COMPLETE: tl.constexpr, form: tl.constexpr):
    """The same slots, which exist only if their group is complete, or only if it is not.

    A state has the sums of complete groups, and the tokens of another.
    """
    place, exists, is_token, is_open, b, t, open_row = slots
    n, c, fill, length, base = group
    end = (c.to(tl.int64) + 1) * form.SIZE + place * 0  # a vector, as the interpreter needs
    wanted = end <= length if COMPLETE else end > length
    return place, exists & wanted, is_token & wanted, is_open & wanted, b, t, open_row


@triton.jit
def load_slots(
    x, still_open, slots, part, D: tl.constexpr, BD: tl.constexpr, HAS_OPEN: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """Part of the vectors [C, BD] of slots: of tokens, or of a state's open groups [N·G, g, D]."""
    address, batch, row = x
    place, exists, is_token, is_open, b, t, open_row = slots
    columns = tl.arange(0, BD) + tl.cast(part, tl.int64) * BD
    inside = (columns < D)[None, :]
    at = address + (b * batch + t * row)[:, None] + columns[None, :]
    found = tl.load(at, mask=is_token[:, None] & inside, other=0.0).to(form.SUM)
    if HAS_OPEN and form.STATE:
        at_open = still_open + (open_row * form.SIZE + place)[:, None] * D + columns[None, :]
        found += tl.load(at_open, mask=is_open[:, None] & inside, other=0.0).to(form.SUM)
    return found


@triton.jit
def store_slots(
    x, still_open, y, slots, part, D: tl.constexpr, BD: tl.constexpr, HAS_OPEN: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """Writes what `load_slots` reads."""
    address, batch, row = x
    place, exists, is_token, is_open, b, t, open_row = slots
    columns = tl.arange(0, BD) + tl.cast(part, tl.int64) * BD
    inside = (columns < D)[None, :]
    at = address + (b * batch + t * row)[:, None] + columns[None, :]
    tl.store(at, rounded(y, address.dtype.element_ty), mask=is_token[:, None] & inside)
    if HAS_OPEN and form.STATE:
        at_open = still_open + (open_row * form.SIZE + place)[:, None] * D + columns[None, :]
        tl.store(at_open, y, mask=is_open[:, None] & inside)


@triton.jit
def quad_scale(form: tl.constexpr):
    """1/g."""
    return tl.full((), 1.0, form.SUM) / form.SIZE


@triton.jit
def linear_scale(length, form: tl.constexpr):
    """1/g, or 1/n over all n tokens if not causal."""
    if form.CAUSAL:
        return quad_scale(form)
    else:
        return tl.full((), 1.0, form.SUM) / tl.maximum(length, 1).to(form.SUM)


@triton.jit
def products(
    query, slots, key, open_key, slots_k, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """Products [C, C] of queries and keys, part by part."""
    x = tl.zeros((form.C, form.C), form.SUM)
    for part in range(0, PARTS):
        q = operand(load_slots(query, open_key, slots, part, D, BD, False, form), form.DOT)
        k = operand(load_slots(key, open_key, slots_k, part, D, BD, True, form), form.DOT)
        x = add_product(q, tl.trans(k), x, form.DOT)
    return x


@triton.jit
def visible(slots, slots_k, form: tl.constexpr):
    """Which keys [C, C] the queries of their group see."""
    place, there, is_token, is_open, b, t, open_row = slots
    place_k, exists, is_key, is_open_key, b_k, t_k, open_row_k = slots_k
    seen = is_token[:, None] & exists[None, :]
    if form.CAUSAL:
        seen = seen & (place[:, None] >= place_k[None, :])
    return seen


@triton.jit
def scores(query, slots, key, open_key, slots_k, bias, h, seen, form: tl.constexpr):
    """``q·k / g`` plus the bias [1 or H, g, g]."""
    x = products(query, slots, key, open_key, slots_k, form.K, form.BK, form.K_PARTS, form)
    x = x * quad_scale(form)
    if form.BIASES > 0:
        head = tl.where(form.BIASES > 1, h, 0).to(tl.int64) * (form.SIZE * form.SIZE)
        place, place_k = slots[0].to(tl.int64), slots_k[0].to(tl.int64)
        at = bias + head + place[:, None] * form.SIZE + place_k[None, :]
        x += tl.load(at, mask=seen, other=0.0).to(form.SUM)
    return x


@triton.jit
def load_sums(sums, at, part, column, form: tl.constexpr):
    """A part [BL, BV] of matrix `at` of sums [..., L, V]."""
    rows, columns = (
        tl.arange(0, form.BL) + tl.cast(part, tl.int64) * form.BL,
        tl.arange(0, form.BV) + tl.cast(column, tl.int64) * form.BV,
    )
    at_sums = sums + (at * form.L + rows)[:, None] * form.V + columns[None, :]
    return tl.load(at_sums, mask=(rows < form.L)[:, None] & (columns < form.V)[None, :], other=0.0)


@triton.jit(do_not_specialize=VARYING)
def group_sums(
    key, value, open_key, open_value, sums, index, rows, numbers, bases, fills, T, most, H, G,
    k_batch, k_head, k_row, v_batch, v_head, v_row, QUERIES: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """``Σ s vᵀ`` [L, V] of each group: of keys and values, or of queries and gradients of outputs.

    QUERIES: the latter, scaled, over a key head's query heads. Otherwise a causal group that stays
    open has zeros. One program has a group, a key head, and a part of L and V.
    """
    at = tl.program_id(0)
    column, at = at % form.V_PARTS, at // form.V_PARTS
    part, at = at % form.L_PARTS, at // form.L_PARTS
    u, g = at // G, (at % G).to(tl.int64)
    group = find_group(u, T, most, rows, numbers, bases, fills, form)
    found = tl.zeros((form.BL, form.BV), form.SUM)
    for chunk in range(0, form.CHUNKS):
        slots = find_slots(chunk, group, T, index, group[0] * G + g, form)
        if form.CAUSAL and not QUERIES:
            slots = of_complete_groups(slots, group, True, form)
        for i in range(0, form.GROUP if QUERIES else 1):
            head = g * form.GROUP + i if QUERIES else g
            keys, values = (
                (key + head * k_head, k_batch, k_row),
                (value + head * v_head, v_batch, v_row),
            )
            s = load_slots(keys, open_key, slots, part, form.L, form.BL, not QUERIES, form)
            v = load_slots(values, open_value, slots, column, form.V, form.BV, not QUERIES, form)
            s = tl.trans(operand(s, form.DOT))
            found = add_product(s, operand(v, form.DOT), found, form.DOT)
    if QUERIES:
        found = found * linear_scale(group[3], form)
    rows_of, columns = (
        tl.arange(0, form.BL) + tl.cast(part, tl.int64) * form.BL,
        tl.arange(0, form.BV) + tl.cast(column, tl.int64) * form.BV,
    )
    at_sums = sums + (at.to(tl.int64) * form.L + rows_of)[:, None] * form.V + columns[None, :]
    tl.store(at_sums, found, mask=(rows_of < form.L)[:, None] & (columns < form.V)[None, :])


@triton.jit(do_not_specialize=VARYING)
def scan_groups(
    sums, firsts, before, after, most, G, size,
    HAS_BEFORE: tl.constexpr, KEEP: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr,
    form: tl.constexpr,
):  # fmt: skip
    """The sums over all groups of a sequence in `after`, onto those in `before`.

    KEEP: leaves the sums before each group in the place of its own, or those after it if BACKWARDS.
    `firsts` has each sequence's first group. One program has BLOCK of a matrix's `size` numbers.
    """
    blocks = tl.cdiv(size, BLOCK)
    at, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, g = (at // G).to(tl.int64), at % G
    columns = column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros((BLOCK,), tl.float64)
    if HAS_BEFORE:
        total += tl.load(before + (n * G + g) * size + columns, mask=inside, other=0.0)
    first, count = n * most, tl.cast(most, tl.int64)
    if form.INDEXED:
        first = tl.load(firsts + n)
        count = tl.load(firsts + n + 1) - first
    for i in range(0, count):
        u = first + (count - 1 - i if BACKWARDS else i)
        at_sums = sums + (u * G + g) * size + columns
        own = tl.load(at_sums, mask=inside, other=0.0)
        tl.debug_barrier()  # warps with the same numbers have all read them
        if KEEP:
            tl.store(at_sums, total.to(form.SUM), mask=inside)
        total += own
    tl.store(after + (n * G + g) * size + columns, total.to(form.SUM), mask=inside)
