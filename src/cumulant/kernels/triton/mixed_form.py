"""What the kernels of mixed chunk attention are compiled for."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class MixedForm(NamedTuple):
    """The constants of a call, each a `tl.constexpr`."""

    K: tl.constexpr  # numbers in a quadratic query or key
    L: tl.constexpr  # in a linear query or key
    V: tl.constexpr
    BK: tl.constexpr  # in a part of these vectors
    BL: tl.constexpr
    BV: tl.constexpr
    K_PARTS: tl.constexpr
    L_PARTS: tl.constexpr
    V_PARTS: tl.constexpr
    SIZE: tl.constexpr  # g, tokens in a group
    C: tl.constexpr  # tokens of a group that a program has
    CHUNKS: tl.constexpr  # of C tokens in a group
    GROUP: tl.constexpr  # query heads of a key/value head
    ACTIVATION: tl.constexpr
    CAUSAL: tl.constexpr
    SUMMED: tl.constexpr  # linear sums are over all groups, not only the token's own
    BIASES: tl.constexpr  # heads of the bias, 0 for none
    SUM: tl.constexpr  # dtype of sums
    DOT: tl.constexpr  # how products are taken, see arithmetic.py
    FLUSHES: tl.constexpr  # whether exponentials become 0 early
    INDEXED: tl.constexpr  # tokens are found by an index, not by their row
    STATE: tl.constexpr  # the first group may begin with tokens of a state
