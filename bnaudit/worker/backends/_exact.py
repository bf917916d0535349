"""`exact`: what BatchNorm is, rounded once. No output in the case's dtype is nearer.

Independent of the auditor's reference: sums are exact integers, means and variances are fractions, and
every element is computed in double-double arithmetic with a bound on its error; where that bound leaves
the rounding undecided, the element is computed again with integers of as many bits as it takes.

With r = 1 / sqrt(V + eps), V and mu the batch's in training and the running statistics in inference:

    y = (x - mu) · w r + b
    grad_input = w r (dy - mean(dy) - (x - mu) · D / (n (V + eps)))      in inference w r dy
    grad_weight = r D, grad_bias = Σ dy                                  with D = Σ dy (x - mu)

Rounding. Float64 x gives the nearest float64. For narrower dtypes y and grad_input are float64 values
rounded to odd (what is not representable goes to the neighbour whose last bit is 1), so that one more
rounding to float32, bfloat16 or float16 gives what rounding the exact value once would (Boldo and
Melquiond, IEEE Trans. Computers 57 (2008) 462-471). Per-channel quantities have the dtype of x.

Not finite: a channel in training as soon as one of its values is not; in inference the elements touched;
a channel whose V + eps is not positive. Magnitudes from 1e-320 to 1e308 are fine.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from ._numpy import channel_rows, empty_batch, from_rows

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Pair = Tuple[Array, Array]

LIMIT = 10**6
"""Largest number of elements of x."""


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here, or None if it can."""
    return None if hasattr(math, "isqrt") else "exact needs Python 3.8 or newer (math.isqrt)"


# --- exact sums -------------------------------------------------------------------------------------


def _limbs(values: Array) -> Tuple[List[Array], Array]:
    """Split finite values into (limb0 + limb1 2^18 + limb2 2^36) 2^exponent, limbs below 2^18."""
    fraction, exponent = np.frexp(values)
    whole = (fraction * 2.0**53).astype(np.int64)
    mask = 2**18 - 1
    limbs = [whole & mask, (whole >> 18) & mask, whole >> 36]
    return [limb.astype(np.float64) for limb in limbs], exponent.astype(np.int64) - 53


def exact_sum(a: Array, b: Optional[Array] = None) -> Fraction:
    """Return Σ a, or Σ a·b, of finite float64 values, exactly."""
    limbs, exponent = _limbs(a)
    if b is not None:
        (a0, a1, a2), ((b0, b1, b2), more) = limbs, _limbs(b)
        limbs = [a0 * b0, a0 * b1 + a1 * b0, a0 * b2 + a1 * b1 + a2 * b0, a1 * b2 + a2 * b1, a2 * b2]
        exponent = exponent + more
    lowest = int(exponent.min())
    bins = exponent - lowest
    total = 0
    # Limb products are below 3·2^36, so that 2^15 of them add up without rounding.
    for start in range(0, a.size, 2**15):
        part = slice(start, start + 2**15)
        for level, limb in enumerate(limbs):
            sums = np.bincount(bins[part], weights=limb[part])
            for power in np.flatnonzero(sums).tolist():
                total += int(sums[power]) << (power + 18 * level)
    return _scaled(Fraction(total), lowest)


def _scaled(value: Fraction, exponent: int) -> Fraction:
    """Return value · 2^exponent."""
    return value * (1 << exponent) if exponent >= 0 else value / (1 << -exponent)


# --- rounding one number ----------------------------------------------------------------------------


def nearest(value: Fraction) -> float:
    """Return the float64 nearest to the value, ties to even."""
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def to_odd(value: Fraction) -> float:
    """Return the value where it is a float64, else that of its two neighbours whose last bit is 1."""
    near = nearest(value)
    if Fraction(near) == value or np.float64(near).view(np.int64) & 1:
        return near
    return float(np.nextafter(near, math.inf if value > near else -math.inf))


def _inverse_root(value: Fraction, bits: int) -> Tuple[Fraction, Fraction]:
    """Enclose 1 / sqrt(value) to within 2^-bits of itself; both ends are equal where it is rational."""
    p, q = value.numerator, value.denominator
    shift = max(0, bits + 1 - (p * q).bit_length() // 2)
    square = (p * q) << (2 * shift)
    root = math.isqrt(square)
    low, unit = Fraction(root, p << shift), Fraction(1, p << shift)
    return low, low if root * root == square else low + unit


def round_quotient(
    a: Fraction, square: Fraction, b: Fraction, rounding: Callable[[Fraction], float]
) -> float:
    """Round a / sqrt(square) + b once."""
    bits = 160
    while True:
        low, high = (a * root + b for root in _inverse_root(square, bits))
        rounded = rounding(low)
        # An irrational value is no float64 and halfway between none, so that some precision decides.
        if low == high or rounded == rounding(high):
            return rounded
        bits *= 2


# --- double-double arithmetic on arrays -------------------------------------------------------------
# Joldes, Muller and Popescu, "Tight and rigorous error bounds for basic building blocks of double-word
# arithmetic", ACM TOMS 44 (2017): relative errors of 3u² + 13u³ for _add (their AccurateDWPlusDW) and
# 7u² for _multiply (DWTimesDW1), u = 2^-53, unless something underflows.


def _two_sum(a: Array, b: Array) -> Pair:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _fast_two_sum(a: Array, b: Array) -> Pair:
    s = a + b
    return s, b - (s - a)


def _split(a: Array) -> Pair:
    scaled = a * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def _two_product(a: Array, b: Array) -> Pair:
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    return p, al * bl - (((p - ah * bh) - al * bh) - ah * bl)


def _add(a: Pair, b: Pair) -> Pair:
    s, t = _two_sum(a[0], b[0]), _two_sum(a[1], b[1])
    v = _fast_two_sum(s[0], s[1] + t[0])
    return _fast_two_sum(v[0], t[1] + v[1])


def _multiply(a: Pair, b: Pair) -> Pair:
    high, low = _two_product(a[0], b[0])
    return _fast_two_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


# --- all elements of all channels -------------------------------------------------------------------

ERROR = 2.0**-98
"""Allowed for the arithmetic below, which errs by less than 2^-99 of the magnitudes it adds up."""

TINY = 2.0**-800
"""From here on, in scaled values, what underflows is far below ERROR."""


class Channel(NamedTuple):
    """A channel whose results are finite: mean, var + eps, and the affine parameters."""

    mean: Fraction
    square: Fraction
    weight: Fraction
    bias: Fraction


def _exponent(value: Fraction) -> int:
    """Return k with 2^(k-1) < |value| < 2^(k+1); 0 for 0."""
    return value.numerator.bit_length() - value.denominator.bit_length() if value else 0


def _parts(value: Fraction, exponent: int, count: int) -> List[float]:
    """Return value · 2^-exponent as a sum of `count` float64 of falling magnitude."""
    value = _scaled(value, -exponent)
    parts = []
    for _ in range(count):
        parts.append(nearest(value))
        value -= Fraction(parts[-1])
    return parts


def _columns(rows: List[List[float]]) -> List[Array]:
    """Turn one list per channel into one (C, 1) array per entry."""
    return [column[:, None] for column in np.array(rows, np.float64).T]


def _round(high: Array, low: Array, error: Array, exponent: Array, odd: bool) -> Tuple[Array, Array]:
    """Round (high + low) · 2^exponent, known to ± error · 2^exponent; also tell what is undecided."""
    if odd:
        even = high.view(np.int64) & 1 == 0
        rounded = np.where(even, np.nextafter(high, np.copysign(np.inf, low)), high)
        decided = np.abs(low) > error
    else:
        rounded = high
        decided = (high + (low - error) == high) & (high + (low + error) == high)
    result = np.ldexp(rounded, exponent)
    in_range = (np.abs(result) >= 2.0**-1021) & np.isfinite(result)
    return result, ~(decided & in_range & (np.abs(high) >= TINY))
