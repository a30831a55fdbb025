"""What a kernel is compiled for: the constants of a call, all but lengths and addresses."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Form(NamedTuple):
    """The constants of linear and Taylor attention's kernels, each a `tl.constexpr`.

    A vector of K numbers is read in PARTS matrices of WIDTH columns, and its features are formed in
    TILES matrices of TILE columns (`features.py`). BV columns of the values are one program's.
    """

    K: tl.constexpr
    V: tl.constexpr
    F: tl.constexpr  # features in a state
    ORDER: tl.constexpr
    CONSTANT: tl.constexpr  # whether Taylor features have a 1
    ACTIVATION: tl.constexpr
    SCALE: tl.constexpr  # of queries
    NORMALIZE: tl.constexpr
    CAUSAL: tl.constexpr
    C: tl.constexpr  # tokens in a chunk
    WIDTH: tl.constexpr
    PARTS: tl.constexpr
    TILE: tl.constexpr
    TILES: tl.constexpr
    WEIGHTS: tl.constexpr  # tensors of denominators' sums, see weights.py
    SINGLE: tl.constexpr  # the slot of a vector's first number
    BV: tl.constexpr
    BLOCKS: tl.constexpr  # of BV columns
    SUM: tl.constexpr  # dtype of sums
    TINY: tl.constexpr  # its smallest normal number
    DOT: tl.constexpr  # how products are taken, see arithmetic.py
    FLUSHES: tl.constexpr  # whether exponentials become 0 early, see `exp2`
    MASKED: tl.constexpr
    PACKED: tl.constexpr
    DECAYS: tl.constexpr
