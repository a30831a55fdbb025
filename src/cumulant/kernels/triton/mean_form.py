"""What the kernels of ELiTA's attention are compiled for."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class MeanForm(NamedTuple):
    """The constants of a call, each a `tl.constexpr`."""

    V: tl.constexpr
    BV: tl.constexpr  # columns of values in a block
    BLOCKS: tl.constexpr
    C: tl.constexpr  # tokens in a chunk
    GROUP: tl.constexpr  # query heads of a key/value head
    SUM: tl.constexpr  # dtype of sums
    OUT: tl.constexpr  # dtype of the values, and of outputs
    DOT: tl.constexpr  # how products are taken, see arithmetic.py
    FLUSHES: tl.constexpr  # whether exponentials become 0 early
    FIRST: tl.constexpr  # whether sequences are packed
