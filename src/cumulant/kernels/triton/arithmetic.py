"""Products, rounding and decays in the kernels, and the differences between Triton's versions.

Numbers are loaded to the dtype of sums at once. `operand` rounds them to the dtype of the tensor
cores, where a product takes them. Triton's interpreter keeps bf16 as raw bits; there `operand`
rounds the bits itself and the product runs in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import decay
from . import device

INTERPRETED = tl.constexpr(device.INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(decay.LEAST * 1.4426950408889634)


@triton.jit
def round_bits(x, DROPPED: tl.constexpr):
    """fp32 numbers without their last DROPPED bits, rounded to the nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    half: tl.constexpr = (1 << (DROPPED - 1)) - 1
    rounded = ((bits + half + ((bits >> DROPPED) & 1)) >> DROPPED) << DROPPED
    return tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x in another dtype, rounded to the nearest."""
    if INTERPRETED and TYPE == tl.bfloat16:
        return round_bits(x.to(tl.float32), 16).to(tl.bfloat16)
    else:
        return x.to(TYPE)


@triton.jit
def operand(x, DOT: tl.constexpr):
    """x as a factor of `product`. DOT: "bf16", "tf32", "ieee", or three products of either."""
    if DOT == "bf16":
        if INTERPRETED:
            return round_bits(x.to(tl.float32), 16)
        else:
            return x.to(tl.bfloat16)
    elif DOT == "tf32":  # tensor cores would cut digits off, not round, and leave no rest
        return round_bits(x, 13)
    else:
        return x


@triton.jit
def product(a, b, DOT: tl.constexpr):
    """The matrix product of two operands, in the dtype of sums."""
    if INTERPRETED or DOT == "bf16":
        return tl.dot(
            a,
            b,
            input_precision="ieee",
            out_dtype=tl.float64 if a.dtype == tl.float64 else tl.float32,
        )
    else:
        return tl.dot(a, b, input_precision=DOT)


@triton.jit
def add_product(a, b, sums, DOT: tl.constexpr):
    """sums plus the matrix product of two operands."""
    if INTERPRETED or DOT == "bf16":
        return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)
    else:
        return tl.dot(a, b, sums, input_precision=DOT)


@triton.jit
def exp2(x, FLUSHES: tl.constexpr):
    """2^x. FLUSHES: results below the smallest normal number are 0; faster on NVIDIA's chips."""
    if FLUSHES and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2_decays(logs, kept):
    """Log decays of tokens in base 2 and fp64, at most 0 and finite; 0 where a token is masked."""
    logs = tl.minimum(tl.maximum(logs.to(tl.float64) * LOG2E, LEAST), 0.0)
    return tl.where(kept, logs, 0.0)


@triton.jit
def split_number(x, SUM: tl.constexpr):
    """An fp64 number as a whole number and a rest below 1, whose differences fp32 holds."""
    whole = tl.floor(x)
    return whole.to(SUM), (x - whole).to(SUM)


@triton.jit
def decay_less_one(log2, SUM: tl.constexpr):
    """``2^log2 - 1`` of an fp64 number of at most 0, exact to a rounding near 0 as well.

    Sums take this in every chunk. A factor near 1 would be rounded in the same direction each time.
    """
    if SUM == tl.float64:
        return tl.exp2(log2) - 1.0
    x = (log2 / LOG2E).to(SUM)
    series = x * (1.0 / 40320)
    series = x * (1.0 / 5040 + series)
    series = x * (1.0 / 720 + series)
    series = x * (1.0 / 120 + series)
    series = x * (1.0 / 24 + series)
    series = x * (1.0 / 6 + series)
    series = x * (0.5 + series)
    return tl.where(x > -0.5, x + x * series, tl.exp2(log2.to(SUM)) - 1.0)
