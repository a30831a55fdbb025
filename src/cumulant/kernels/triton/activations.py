"""Functions of scores: relu² and the Laplace function, with their slopes."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E, exp2

MEAN = tl.constexpr(0.7071067811865476)  # Laplace: ½ erfc((mean - x) / width)
WIDTH = tl.constexpr(0.3989422804014327)
# Chebyshev coefficients of log(erfc(z) exp(z²) / t) in 2t - 1, where t = 1 / (1 + z/2). They are
# those of the function at 60 nodes with 40 digits.
SERIES = tl.constexpr(
    (
        -1.3026537197817094342 / 2,
        0.6419697923564902603,
        0.019476473204185836312,
        -0.0095615147868086316419,
        -0.0009465953444820368663,
        0.00036683949785276145187,
        0.000042523324806907771645,
        -0.000020278578112534243154,
        -1.6242900046470255135e-6,
        1.3036558355805232018e-6,
        1.5626441722066143178e-8,
        -8.5238095914926542525e-8,
        6.5290544390988514964e-9,
        5.0593434955514689418e-9,
        -9.9136415649303308674e-10,
        -2.2736512229318358557e-10,
        9.646791102015526801e-11,
        2.3940380830391147569e-12,
        -6.8860275264975534094e-12,
        8.9448792730907257811e-13,
        3.1309213993429580778e-13,
        -1.1270822361367253002e-13,
        3.8109052551893409216e-16,
        7.1060976136092247812e-15,
        -1.523028201457094374e-15,
        -9.4574945712917069457e-17,
        1.2102371892242603679e-16,
    )
)


@triton.jit
def erfc(x, FLUSHES: tl.constexpr):
    """1 - erf(x), to the last digits where it is small too."""
    TERMS: tl.constexpr = 27 if x.dtype == tl.float64 else 13
    z = tl.abs(x)
    t = 1.0 / (1.0 + 0.5 * z)
    twice = 4.0 * t - 2.0
    later, last = tl.zeros(x.shape, x.dtype), tl.zeros(x.shape, x.dtype)
    for i in tl.static_range(0, TERMS - 1):
        now = twice * last - later + tl.full(x.shape, SERIES[TERMS - 1 - i], x.dtype)
        later, last = last, now
    series = 0.5 * twice * last - later + tl.full(x.shape, SERIES[0], x.dtype)
    power = (series - z * z) * tl.full(x.shape, LOG2E, x.dtype)
    found = t * exp2(power, FLUSHES)
    return tl.where(x < 0, 2.0 - found, found)


@triton.jit
def activate(x, form: tl.constexpr):
    """f(x)."""
    if form.ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return x * x
    else:
        mean, width = tl.full(x.shape, MEAN, x.dtype), tl.full(x.shape, WIDTH, x.dtype)
        return 0.5 * erfc((mean - x) / width, form.FLUSHES)


@triton.jit
def slope(x, form: tl.constexpr):
    """f'(x)."""
    if form.ACTIVATION == "relu2":
        return 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        # exp(-2π (x - mean)²) √2
        distance = x - tl.full(x.shape, MEAN, x.dtype)
        power = distance * distance * tl.full(x.shape, -9.064720283654388, x.dtype)
        return exp2(power, form.FLUSHES) * tl.full(x.shape, 1.4142135623730951, x.dtype)
