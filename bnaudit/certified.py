"""Certified BatchNorm: what the right answer is, in exact arithmetic.

Every sum over a channel (of x, x², dy and dy·x) is formed **exactly**, as one Python integer times a
power of two; mean, variance and everything derived from them are then ratios of integers, so that no
input, however ill-conditioned, can make the reference wrong.

How the sums are exact. A block of float64 values below 2^e in magnitude is cut into two windows of 50
bits: adding 1.5·2^(e+2) rounds a value to a multiple of g = 2^(e-50), and the difference of the two bit
patterns is that multiple as an integer, which is added up in int64 (2^11 terms of at most 2^50 stay far
below 2^63). What is left is exact (Sterbenz) and goes through a second window, 51 bits lower. If nothing
is left then, the block's sum is exact; if anything is, the block is done again by adding the significand
of every term to a wide fixed-point accumulator (Neal, "Fast exact summation using small and large
superaccumulators", arXiv:1505.05571), which cannot lose a bit. The windows of all blocks end in the
same accumulator. Integer sums may be vectorized in any order, so no fast-math is needed.

Products are exact in float64 for 16- and 32-bit inputs; for float64 a fused multiply-add gives the
rounding error of each product, which is summed in the same way (Ogita, Rump and Oishi, 2005).

Square roots are enclosed by integer square roots; a float64 is derived from an enclosure only where both
of its ends round to the same value (Ziv's test), with more bits otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic

from bnaudit.worker.rounding import storage, widen

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

BLOCK = 2048
"""Elements per block: two float64 buffers of this size stay in the first-level cache."""

LIMBS = 148
LOWEST = -2304
"""The accumulator: 32-bit digits kept in int64, digit j worth 2^(LOWEST + 32j).

Products of float64 reach from 2^-2148 to 2^2048; windows of a block may start up to 153 bits below what
they hold, hence the room. A digit takes at least 2^29 additions of a product before it could overflow;
carries are resolved after every slab.
"""

SLAB = 1 << 20
"""Elements of 16-bit input that are widened to float32 at a time, to keep memory bounded."""

WIDE_SLAB = 1 << 27
"""Elements of 32- and 64-bit input between two resolutions of the carries."""

MAGNITUDE = 0x7FFF_FFFF_FFFF_FFFF
"""Mask that clears the sign bit of a float64."""

INFINITY_BITS = 0x7FF0_0000_0000_0000


class EnvironmentFaultError(Exception):
    """The floating-point environment does not follow IEEE 754; nothing computed in it can be trusted."""


# --- the operations that exact arithmetic rests on -------------------------------------------------


def _bitcast(source: Any, target: Any) -> Callable[..., Any]:
    from llvmlite import ir

    llvm = {types.int64: ir.IntType(64), types.float64: ir.DoubleType()}[target]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvm)

    return generate


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """The bit pattern of a float64 as an int64."""
    return types.int64(types.float64), _bitcast(types.float64, types.int64)


@intrinsic
def from_bits(typing_context: Any, value: Any) -> Any:
    """The float64 with the bit pattern of an int64."""
    return types.float64(types.int64), _bitcast(types.int64, types.float64)


@intrinsic
def fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z rounded once (by the processor, or by libm where it has no such instruction)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        double = ir.DoubleType()
        function = builder.module.declare_intrinsic(
            "llvm.fma", [double], ir.FunctionType(double, [double] * 3)
        )
        return builder.call(function, arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


@njit(cache=True, nogil=True)
def two_sum(a: float, b: float) -> tuple[float, float]:
    """fl(a+b) and its exact error (Knuth)."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


@njit(cache=True, nogil=True)
def fast_two_sum(a: float, b: float) -> tuple[float, float]:
    """fl(a+b) and its exact error, for |a| >= |b| or a = 0 (Dekker)."""
    s = a + b
    return s, b - (s - a)


@njit(cache=True, nogil=True)
def two_product(a: float, b: float) -> tuple[float, float]:
    """fl(a·b) and its error, exact unless it underflows."""
    p = a * b
    return p, fma(a, b, -p)


@njit(cache=True, nogil=True)
def _known_answers(tiny: float, one: float) -> int:
    """Mask of the operations that answer wrongly; the arguments keep the compiler from folding."""
    wrong = 0
    if tiny * 0.5 * 2.0 != 0.0 or tiny + 0.0 == 0.0 or tiny * one == 0.0:
        wrong |= 1
    s, e = two_sum(one, one * 2.0**-60)
    if s != 1.0 or e != 2.0**-60:
        wrong |= 2
    p, e = two_product(one + 2.0**-30, one + 2.0**-30)
    if p != 1.0 + 2.0**-29 or e != 2.0**-60:
        wrong |= 4
    if one + 2.0**-53 != 1.0 or one + 3.0 * 2.0**-53 != 1.0 + 2.0**-51:
        wrong |= 8
    return wrong


def check_environment() -> None:
    """Raises EnvironmentFaultError unless this thread computes as IEEE 754 says."""
    tiny = np.array([2.0**-1074])
    wrong = _known_answers(float(tiny[0]), 1.0)
    if wrong & 1 or (tiny + 0.0)[0] == 0.0 or np.array([1e-40], np.float32)[0] * np.float32(1) == 0:
        raise EnvironmentFaultError(
            "this thread flushes subnormal numbers to zero (a library has set FTZ or DAZ), so no exact "
            "reference can be computed in it; start bnaudit in a fresh process without that library"
        )
    if wrong & 8:
        raise EnvironmentFaultError(
            "this thread does not round to nearest, so no exact reference can be computed in it; "
            "start bnaudit in a process that leaves the rounding mode alone"
        )
    if wrong:
        raise EnvironmentFaultError(
            "float64 sums and products are not exact where IEEE 754 says so (a fused multiply-add or "
            "extended precision gets in the way); run bnaudit on another processor or Python build"
        )


# --- exact sums ------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _add(limbs: Any, value: int, exponent: int) -> None:
    """limbs += value · 2^exponent, exactly, for |value| < 2^63."""
    if value == 0:
        return
    sign = 1
    if value < 0:
        sign = -1
        value = -value
    position = exponent - LOWEST
    j = position >> 5
    k = position & 31
    magnitude = np.uint64(value)
    low = magnitude & np.uint64(0xFFFFFFFF)
    high = magnitude >> np.uint64(32)
    low <<= np.uint64(k)
    high <<= np.uint64(k)
    limbs[j] += sign * np.int64(low & np.uint64(0xFFFFFFFF))
    limbs[j + 1] += sign * np.int64((low >> np.uint64(32)) + (high & np.uint64(0xFFFFFFFF)))
    limbs[j + 2] += sign * np.int64(high >> np.uint64(32))


@njit(cache=True, nogil=True)
def _significand(value: float) -> tuple[int, int]:
    """(m, e) with value = m · 2^e and |m| < 2^53, for finite values."""
    pattern = bits_of(value)
    exponent = (pattern & MAGNITUDE) >> 52
    m = pattern & 0xF_FFFF_FFFF_FFFF
    if exponent > 0:
        m |= 1 << 52
    else:
        exponent = 1
    return (-m if pattern < 0 else m), exponent - 1075


@njit(cache=True, nogil=True)
def _add_value(limbs: Any, value: float) -> None:
    m, e = _significand(value)
    _add(limbs, m, e)


@njit(cache=True, nogil=True)
def _add_product(limbs: Any, a: float, b: float) -> None:
    """limbs += a·b by schoolbook multiplication of 27-bit halves: no overflow, no underflow."""
    ma, ea = _significand(a)
    mb, eb = _significand(b)
    ah, al = ma >> 27, ma & 0x7FFFFFF
    bh, bl = mb >> 27, mb & 0x7FFFFFF
    _add(limbs, ah * bh, ea + eb + 54)
    _add(limbs, ah * bl + al * bh, ea + eb + 27)
    _add(limbs, al * bl, ea + eb)


@njit(cache=True, nogil=True)
def _left(values: Any, m: int, e: int) -> int:
    """0 if values[:m], all below 2^e, are multiples of 2^(e-101): if two windows hold them entirely."""
    first = 1.5 * 2.0 ** (e + 2)
    second = 1.5 * 2.0 ** (e - 49)
    left = 0
    for i in range(m):
        v = values[i]
        v -= (v + first) - first
        v -= (v + second) - second
        left |= bits_of(v)
    return left & MAGNITUDE


@njit(cache=True, nogil=True)
def _windows(
    u: Any, v: Any, m: int, e: int, f: int, narrow: bool
) -> tuple[int, int, int, int, int, int, int, int]:
    """Two windows each of Σu, Σuv and (unless narrow) of the products' rounding errors, over m elements.

    Every |u| is below 2^e, every |uv| below 2^f. Returns Σu in units of 2^(e-50) and 2^(e-101), Σ|u| in
    units of 2^(e-50), each term rounded, Σuv in units of 2^(f-50) and 2^(f-101), the errors in units
    of 2^(f-102) and 2^(f-153), and a mask that is 0 if nothing is left over.
    """
    a1, a2 = 1.5 * 2.0 ** (e + 2), 1.5 * 2.0 ** (e - 49)
    p1, p2 = 1.5 * 2.0 ** (f + 2), 1.5 * 2.0 ** (f - 49)
    q1, q2 = 1.5 * 2.0 ** (f - 50), 1.5 * 2.0 ** (f - 101)
    sum1 = sum2 = size = product1 = product2 = error1 = error2 = left = 0
    for i in range(m):
        a = u[i]
        p = a * v[i]
        q = 0.0 if narrow else fma(a, v[i], -p)
        size += bits_of(abs(a) + a1)
        t = a + a1
        sum1 += bits_of(t)
        a -= t - a1
        t = a + a2
        sum2 += bits_of(t)
        left |= bits_of(a - (t - a2))
        t = p + p1
        product1 += bits_of(t)
        p -= t - p1
        t = p + p2
        product2 += bits_of(t)
        left |= bits_of(p - (t - p2))
        if not narrow:
            t = q + q1
            error1 += bits_of(t)
            q -= t - q1
            t = q + q2
            error2 += bits_of(t)
            left |= bits_of(q - (t - q2))
    return (
        sum1 - m * bits_of(a1),
        sum2 - m * bits_of(a2),
        size - m * bits_of(a1),
        product1 - m * bits_of(p1),
        product2 - m * bits_of(p2),
        0 if narrow else error1 - m * bits_of(q1),
        0 if narrow else error2 - m * bits_of(q2),
        left & MAGNITUDE,
    )


@njit(cache=True, nogil=True)
def _gather(x: Any, image: int, channel: int, start: int, m: int, out: Any) -> int:
    """Copies m elements of a channel, from element `start` after `image`, into out as float64.

    Returns the bit pattern of the largest magnitude: at least INFINITY_BITS if one is not finite.
    """
    size = x.shape[2]
    image += start // size
    s = start % size
    top = 0
    done = 0
    while done < m:
        take = min(size - s, m - done)
        row = x[image, channel, s : s + take]
        part = out[done : done + take]
        for i in range(take):
            v = np.float64(row[i])
            part[i] = v
            top = max(top, bits_of(v) & MAGNITUDE)
        done += take
        image += 1
        s = 0
    return top


@njit(cache=True, nogil=True)
def _accumulate(
    a: Any,
    b: Any,
    same: bool,
    narrow: bool,
    first: Any,
    cross: Any,
    size: Any,
    top: Any,
    top_b: Any,
) -> None:
    """Adds Σa to first[c], Σab to cross[c] and Σ|a| to size[c]; raises top, top_b to the largest bits.

    a, b: (N, C, S) float32 or float64; first, cross, size: (C, LIMBS). `same`: b is a. `narrow`: products of
    two elements are exact in float64. Values of b that are not finite count as 0, and top_b tells.
    """
    images, channels, plane = a.shape
    group = max(1, BLOCK // max(1, plane))
    u = np.empty(BLOCK)
    v = u if same else np.empty(BLOCK)
    for image in range(0, images, group):
        count = min(group, images - image) * plane
        for c in range(channels):
            for start in range(0, count, BLOCK):
                m = min(BLOCK, count - start)
                top_u = _gather(a, image, c, start, m, u)
                top_v = top_u if same else _gather(b, image, c, start, m, v)
                top[c] = max(top[c], top_u)
                top_b[c] = max(top_b[c], top_v)
                if top_u >= INFINITY_BITS:
                    continue
                if top_v >= INFINITY_BITS:
                    v[:m] = 0.0
                    top_v = 0
                e_u = (top_u >> 52) - 1022  # every |value| < 2^e
                e_v = (top_v >> 52) - 1022
                # Outside this range the windows' own constants would overflow or underflow.
                plain = -400 < e_u < 400 and -400 < e_v < 400
                if plain and not same:
                    plain = _left(v, m, e_v) == 0
                if plain:
                    # If both operands are multiples of 2^(e-101), no product can underflow here.
                    e = e_u + e_v
                    s1, s2, s0, p1, p2, q1, q2, left = _windows(u, v, m, e_u, e, narrow)
                    plain = left == 0
                if plain:
                    _add(size[c], s0, e_u - 50)
                    _add(first[c], s1, e_u - 50)
                    _add(first[c], s2, e_u - 101)
                    _add(cross[c], p1, e - 50)
                    _add(cross[c], p2, e - 101)
                    _add(cross[c], q1, e - 102)
                    _add(cross[c], q2, e - 153)
                else:
                    for i in range(m):
                        _add_value(size[c], abs(u[i]))
                        _add_value(first[c], u[i])
                        _add_product(cross[c], u[i], v[i])


@njit(cache=True, nogil=True)
def _carry(limbs: Any) -> None:
    """Brings every digit but the highest below 2^32, without a change of the value. limbs: (C, LIMBS)."""
    for c in range(limbs.shape[0]):
        for j in range(LIMBS - 1):
            carry = limbs[c, j] >> 32
            limbs[c, j] -= carry << 32
            limbs[c, j + 1] += carry


class Scaled(NamedTuple):
    """The rational number numerator · 2^exponent, exactly."""

    numerator: int
    exponent: int


def _collect(limbs: Array) -> Scaled:
    """The value of an accumulator, as a short integer with its scale."""
    used = np.flatnonzero(limbs)
    if used.size == 0:
        return Scaled(0, 0)
    lowest = int(used[0])
    total = 0
    for j, digit in zip(used.tolist(), limbs[used].tolist(), strict=True):
        total += digit << (32 * (j - lowest))
    return Scaled(total, LOWEST + 32 * lowest)


@dataclass(frozen=True)
class Sums:
    """Per channel Σa, Σab and Σ|a|, None where an operand is not finite, and max|a|.

    Exact, but for Σ|a|, whose terms may be rounded to 50 bits below the largest of their block.
    """

    first: list[Scaled | None]
    cross: list[Scaled | None]
    size: list[Scaled | None]
    largest: Doubles


def slabs(dtype: str, *tensors: Array) -> Iterator[tuple[int, list[Array]]]:
    """Cuts (N, C, S) tensors along N and widens 16-bit storage: (first image, float32 or float64 arrays)."""
    images = tensors[0].shape[0]
    row = max(1, tensors[0][:1].size)
    step = max(1, (SLAB if storage(dtype).itemsize == 2 else WIDE_SLAB) // row)
    for start in range(0, images, step):
        yield start, [widen(t[start : start + step], dtype) for t in tensors]


def exact_sums(dtype: str, a: Array, b: Array | None = None) -> Sums:
    """Exact Σa and Σab (b defaults to a) over axes 0 and 2 of (N, C, S) tensors in storage of `dtype`."""
    channels = a.shape[1]
    first = np.zeros((channels, LIMBS), np.int64)
    cross = np.zeros((channels, LIMBS), np.int64)
    size = np.zeros((channels, LIMBS), np.int64)
    top = np.zeros(channels, np.int64)
    top_b = np.zeros(channels, np.int64)
    narrow = dtype != "float64"
    for _, parts in slabs(dtype, a) if b is None else slabs(dtype, a, b):
        _accumulate(parts[0], parts[-1], b is None, narrow, first, cross, size, top, top_b)
        for limbs in (first, cross, size):
            _carry(limbs)
    finite = top < INFINITY_BITS
    both = finite & (top_b < INFINITY_BITS)
    return Sums(
        [_collect(limbs) if ok else None for limbs, ok in zip(first, finite, strict=True)],
        [_collect(limbs) if ok else None for limbs, ok in zip(cross, both, strict=True)],
        [_collect(limbs) if ok else None for limbs, ok in zip(size, finite, strict=True)],
        top.view(np.float64),
    )


# --- exact rationals to float64 --------------------------------------------------------------------


def nearest(numerator: int, denominator: int) -> float:
    """numerator / denominator correctly rounded to float64 (an infinity where it overflows).

    Python's own division of integers is correctly rounded, subnormal results included.
    """
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if (numerator > 0) == (denominator > 0) else -math.inf


def expand(numerator: int, denominator: int, terms: int = 2) -> tuple[float, ...]:
    """An unevaluated sum of `terms` float64 that agrees with the ratio to 53 bits per term."""
    parts = []
    for _ in range(terms):
        value = nearest(numerator, denominator)
        parts.append(value)
        if not math.isfinite(value) or value == 0:
            parts += [0.0] * (terms - len(parts))
            break
        a, b = value.as_integer_ratio()
        numerator, denominator = numerator * b - a * denominator, denominator * b
    return tuple(parts)


def root(numerator: int, denominator: int) -> tuple[int, int]:
    """p, q with p/q <= √(numerator/denominator) < (1 + 2^-198) p/q, both ends rounding to one float64.

    Near ties take more bits: a fixed number of them would certify a result that is one unit off.
    """
    if numerator == 0:
        return 0, 1
    bits = 200  # of p
    while True:
        k = bits - (numerator.bit_length() - denominator.bit_length()) // 2
        top, bottom = (
            (numerator << 2 * k, denominator) if k >= 0 else (numerator, denominator << -2 * k)
        )
        square, rest = divmod(top, bottom)
        r = math.isqrt(square)
        low, q = _ratio(Scaled(r, -k), 1)
        high, _ = _ratio(Scaled(r + 1, -k), 1)
        if (rest == 0 and r * r == square) or nearest(low, q) == nearest(high, q):
            return low, q
        bits *= 2


def _ratio(value: Scaled, divisor: int) -> tuple[int, int]:
    """value / divisor as a quotient of integers."""
    numerator, exponent = value
    if exponent >= 0:
        return numerator << exponent, divisor
    return numerator, divisor << -exponent


class Pair(NamedTuple):
    """Per-channel values as the unevaluated sum high + low of two float64 arrays of shape (C,).

    high is the exact value correctly rounded; NaN where the exact result is not finite or not defined.
    """

    high: Doubles
    low: Doubles


def _pair(values: list[tuple[float, ...]]) -> Pair:
    table = np.array(values, np.float64).reshape(len(values), 2)
    return Pair(table[:, 0].copy(), table[:, 1].copy())


UNDEFINED = (math.nan, 0.0)


# --- one batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Exact mean and biased variance of each channel of one batch; None where a value is not finite.

    mean[c] = (p, q) stands for p/q; var likewise. size: mean |x|; largest: max |x|.
    """

    n: int
    mean: list[tuple[int, int] | None]
    var: list[tuple[int, int] | None]
    size: Doubles
    largest: Doubles


def moments(dtype: str, x: Array) -> Moments:
    """Exact moments of an (N, C, S) tensor in the storage of `dtype`."""
    sums = exact_sums(dtype, x)
    n = x.shape[0] * x.shape[2]
    if n == 0:
        nothing: list[tuple[int, int] | None] = [None] * x.shape[1]
        return Moments(0, nothing, nothing, np.full(x.shape[1], math.nan), sums.largest)
    size = [math.nan if total is None else nearest(*_ratio(total, n)) for total in sums.size]
    mean: list[tuple[int, int] | None] = []
    var: list[tuple[int, int] | None] = []
    for first, square in zip(sums.first, sums.cross, strict=True):
        if first is None or square is None:
            mean.append(None)
            var.append(None)
            continue
        mean.append(_ratio(first, n))
        # n²V = n·Σx² − (Σx)², on the finer of the two scales
        e = min(2 * first.exponent, square.exponent)
        scatter = (n * square.numerator << square.exponent - e) - (
            first.numerator**2 << 2 * first.exponent - e
        )
        var.append(_ratio(Scaled(scatter, e), n * n))
    return Moments(n, mean, var, np.array(size), sums.largest)


OK, NONFINITE, UNJUDGED = 0, 1, 2
"""State of a channel: judged, its right result is not finite, or variance + eps is not positive and finite."""

EXTREME = 400
"""Exponents beyond which float64 values are scaled, so that no intermediate result leaves the range."""


class Line(NamedTuple):
    """Coefficients of y = (x·scale − (m0 + m1 + m2)) · (slope + slope_low) · up · lift + bias, per channel.

    All (C,) float64. slope is near 1: what weight·invstd / scale is beyond that is up·lift, powers of two.
    scale is a power of two as well, and 1 unless float64 values are extreme.
    """

    scale: Doubles
    m0: Doubles
    m1: Doubles
    m2: Doubles
    slope: Doubles
    slope_low: Doubles
    up: Doubles
    lift: Doubles
    bias: Doubles


@dataclass(frozen=True)
class Normalization:
    """The statistics of each channel, and what y is made of. All arrays (C,) float64.

    state: of the statistics; y_state: of y, which a weight or bias that is not finite spoils as well.
    rate: invstd / scale. std, size: standard deviation and mean |x| (in inference |running_mean|), both
    times scale. exponent: slope · 2^exponent is weight·invstd.
    """

    n: int
    training: bool
    state: npt.NDArray[np.int64]
    y_state: npt.NDArray[np.int64]
    constant: npt.NDArray[np.bool_]
    line: Line
    exponent: npt.NDArray[np.int64]
    rate: Doubles
    std: Doubles
    size: Doubles
    mean: Pair
    var: Pair
    invstd: Pair
    weight: Doubles
    bias: Doubles


def powers(exponent: npt.NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """2^exponent as a product of two factors, each in float64's range for |exponent| <= 2000."""
    half = exponent // 2
    return np.ldexp(1.0, half), np.ldexp(1.0, exponent - half)


def _scaling(largest: float) -> int:
    """The exponent by which values up to `largest` are to be divided; 0 where that is not needed."""
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return max(-1000, min(1000, exponent)) if abs(exponent) > EXTREME else 0


def normalization(
    mean: list[tuple[int, int] | None],
    var: list[tuple[int, int] | None],
    largest: Doubles,
    size: Doubles,
    eps: float,
    weight: Doubles,
    bias: Doubles,
    *,
    n: int,
    training: bool,
) -> Normalization:
    """Exact mean, variance and affine parameters of each channel, turned into coefficients.

    largest: what bounds |x| and |mean|. size: see Normalization, but not scaled.
    """
    channels = len(mean)
    state = np.zeros(channels, np.int64)
    constant = np.zeros(channels, np.bool_)
    shift = np.zeros(channels, np.int64)
    exponent = np.zeros(channels, np.int64)
    rate, std = np.full((2, channels), math.nan)
    centres: list[tuple[float, ...]] = [(math.nan,) * 3] * channels
    means: list[tuple[float, ...]] = [UNDEFINED] * channels
    variances: list[tuple[float, ...]] = [UNDEFINED] * channels
    inverse: list[tuple[float, ...]] = [UNDEFINED] * channels
    slopes: list[tuple[float, ...]] = [UNDEFINED] * channels
    eps_p, eps_q = eps.as_integer_ratio()
    for c in range(channels):
        m, v = mean[c], var[c]
        if m is None or v is None:
            state[c] = NONFINITE
            continue
        constant[c] = v[0] == 0 and training
        shift[c] = e = _scaling(float(largest[c]))
        centres[c] = expand(*_ratio(Scaled(m[0], -e), m[1]), terms=3)
        means[c] = expand(*m)
        variances[c] = expand(*v)
        std[c] = math.sqrt(max(0.0, nearest(*_ratio(Scaled(v[0], -2 * e), v[1]))))
        numerator, denominator = v[0] * eps_q + eps_p * v[1], v[1] * eps_q
        if numerator <= 0:
            state[c] = UNJUDGED
            continue
        r, q = root(denominator, numerator)
        inverse[c] = expand(r, q)
        rate[c] = nearest(*_ratio(Scaled(r, e), q))
        if not math.isfinite(weight[c]):
            continue
        a, b = float(weight[c]).as_integer_ratio()
        p, q = a * r, b * q
        exponent[c] = p.bit_length() - q.bit_length()
        slopes[c] = expand(*_ratio(Scaled(p, -int(exponent[c])), q))
    m0, m1, m2 = np.array(centres, np.float64).reshape(channels, 3).T.copy()
    slope = _pair(slopes)
    up, lift = powers(exponent + shift)
    scale = np.ldexp(1.0, -shift)
    return Normalization(
        n,
        training,
        state,
        np.where((state == OK) & ~np.isfinite(weight + bias), NONFINITE, state),
        constant,
        Line(scale, m0, m1, m2, slope.high, slope.low, up, lift, bias),
        exponent,
        rate,
        std,
        size * scale,
        _pair(means),
        _pair(variances),
        _pair(inverse),
        weight,
        bias,
    )


@njit(cache=True, nogil=True)
def deviation(x: float, scale: float, m0: float, m1: float, m2: float) -> tuple[float, float]:
    """x·scale − (m0 + m1 + m2) as a pair, relative error below 2^-80 unless x·scale underflows."""
    high, low = two_sum(x * scale, -m0)
    high, rest = two_sum(high, -m1)
    return fast_two_sum(high, (low + rest) - m2)


@njit(cache=True, nogil=True)
def multiply(ah: float, al: float, bh: float, bl: float) -> tuple[float, float]:
    """Product of two pairs, relative error below 2^-100 unless it underflows."""
    p, e = two_product(ah, bh)
    return fast_two_sum(p, e + (ah * bl + al * bh))


@njit(cache=True, nogil=True)
def add(ah: float, al: float, bh: float, bl: float) -> tuple[float, float]:
    """Sum of two pairs, error below 2^-100 (|a| + |b|)."""
    s, e = two_sum(ah, bh)
    return fast_two_sum(s, e + (al + bl))


@njit(cache=True, nogil=True, inline="always")
def line_of(line: Line, c: int) -> Any:
    """The coefficients of channel c: a Line of numbers, which a loop can keep in registers."""
    return Line(
        line.scale[c],
        line.m0[c],
        line.m1[c],
        line.m2[c],
        line.slope[c],
        line.slope_low[c],
        line.up[c],
        line.lift[c],
        line.bias[c],
    )


@njit(cache=True, nogil=True, inline="always")
def y_element(x: float, line: Any) -> tuple[float, float, float]:
    """(high, low, distance): y = high + low, distance = scaled x − mean. line: of one channel.

    The error of y is below 2^-80 (|y − bias| + |bias|), or a few units of 2^-1074.
    """
    d, d_low = deviation(x, line.scale, line.m0, line.m1, line.m2)
    p, p_low = multiply(d, d_low, line.slope, line.slope_low)
    y, y_low = add(p * line.up * line.lift, p_low * line.up * line.lift, line.bias, 0.0)
    return y, y_low, d


# --- gradients -------------------------------------------------------------------------------------


class Tangent(NamedTuple):
    """Coefficients of grad_input = slope · (dy·scale − shift − (x − mean) · tilt) · up · lift, per channel.

    All (C,) float64. x − mean and slope are those of Line; shift and tilt are divided by its scales, and
    0 in inference. scale and up·lift are powers of two, scale 1 unless dy is extreme.
    """

    scale: Doubles
    shift: Doubles
    shift_low: Doubles
    tilt: Doubles
    tilt_low: Doubles
    up: Doubles
    lift: Doubles


@dataclass(frozen=True)
class Gradients:
    """grad_weight and grad_bias as pairs (NaN where not finite), and grad_input's coefficients.

    exponent: -log2 of tangent.scale. state: of grad_input.
    """

    grad_weight: Pair
    grad_bias: Pair
    tangent: Tangent
    exponent: npt.NDArray[np.int64]
    state: npt.NDArray[np.int64]


def gradients(
    dtype: str, x: Array, dy: Array, statistics: Moments, eps: float, norm: Normalization
) -> Gradients:
    """Exact parameter gradients of one (N, C, S) batch and the coefficients of grad_input.

    `statistics` are those that x is normalized with: of the batch, or the running ones in inference.
    """
    sums = exact_sums(dtype, dy, x)
    channels = x.shape[1]
    weights: list[tuple[float, ...]] = [UNDEFINED] * channels
    biases: list[tuple[float, ...]] = [UNDEFINED] * channels
    shifts: list[tuple[float, ...]] = [(0.0, 0.0)] * channels
    tilts: list[tuple[float, ...]] = [(0.0, 0.0)] * channels
    state = np.where((norm.state == OK) & ~np.isfinite(norm.weight), NONFINITE, norm.state)
    exponent = np.array([_scaling(v) for v in sums.largest.tolist()], np.int64)
    eps_p, eps_q = eps.as_integer_ratio()
    for c in range(channels):
        total, cross = sums.first[c], sums.cross[c]
        mean, var = statistics.mean[c], statistics.var[c]
        if total is not None:
            biases[c] = expand(*_ratio(total, 1))
        if mean is None or var is None or norm.state[c] != OK:
            continue
        if total is None or cross is None:
            # In training the sums are in every element; in inference only grad_weight needs them.
            state[c] = NONFINITE if norm.training else state[c]
            continue
        # D = Σ dy (x − mean) = Σ dy·x − mean · Σ dy
        (tp, tq), (cp, cq) = _ratio(total, 1), _ratio(cross, 1)
        dp, dq = cp * mean[1] * tq - mean[0] * tp * cq, cq * mean[1] * tq
        vp, vq = var[0] * eps_q + eps_p * var[1], var[1] * eps_q
        # D · invstd as the root of a ratio, so that it is certified as a whole
        p, q = root(dp * dp * vq, dq * dq * vp)
        weights[c] = expand(p if dp >= 0 else -p, q)
        if norm.training:
            e = int(exponent[c])
            shifts[c] = expand(*_ratio(Scaled(tp, -e), tq * norm.n))
            x_exponent = 1 - math.frexp(norm.line.scale[c])[1]
            tilts[c] = expand(*_ratio(Scaled(dp * vq, x_exponent - e), dq * norm.n * vp))
    shift, tilt = _pair(shifts), _pair(tilts)
    up, lift = powers(norm.exponent + exponent)
    tangent = Tangent(
        np.ldexp(1.0, -exponent), shift.high, shift.low, tilt.high, tilt.low, up, lift
    )
    return Gradients(_pair(weights), _pair(biases), tangent, exponent, state)


@njit(cache=True, nogil=True, inline="always")
def tangent_of(tangent: Tangent, c: int) -> Any:
    """The coefficients of channel c: a Tangent of numbers."""
    return Tangent(
        tangent.scale[c],
        tangent.shift[c],
        tangent.shift_low[c],
        tangent.tilt[c],
        tangent.tilt_low[c],
        tangent.up[c],
        tangent.lift[c],
    )


@njit(cache=True, nogil=True, inline="always")
def grad_input_element(x: float, dy: float, line: Any, tangent: Any) -> tuple[float, float, float]:
    """(high, low, distance): grad_input = high + low, distance = scaled x − mean, in one channel.

    The error is below 2^-78 |slope| (|dy| + |shift| + |x − mean| |tilt|), or a few units of 2^-1074 (where
    dy is scaled: of 2^-1074 |slope| max |dy|).
    """
    d, d_low = deviation(x, line.scale, line.m0, line.m1, line.m2)
    t, t_low = multiply(d, d_low, tangent.tilt, tangent.tilt_low)
    g, g_low = add(dy * tangent.scale, 0.0, -tangent.shift, -tangent.shift_low)
    g, g_low = add(g, g_low, -t, -t_low)
    h, h_low = multiply(g, g_low, line.slope, line.slope_low)
    return h * tangent.up * tangent.lift, h_low * tangent.up * tangent.lift, d


# --- running statistics ----------------------------------------------------------------------------


def step_weight(momentum: float | None, step: int) -> Fraction:
    """Weight of the new batch at a step counted from 1; momentum None is the cumulative average."""
    return Fraction(1, step) if momentum is None else Fraction(momentum)


def running_statistics(
    start: Doubles,
    batches: list[list[tuple[int, int] | None]],
    weights: list[Fraction],
    factor: Fraction,
) -> Pair:
    """R_t = (1 − w) R_(t−1) + w · factor · v_t in exact arithmetic, over all steps, per channel."""
    result: list[tuple[float, ...]] = []
    for c, first in enumerate(start.tolist()):
        exact = [v for batch in batches if (v := batch[c]) is not None]
        if not math.isfinite(first) or len(exact) < len(batches):
            result.append(UNDEFINED)
            continue
        value = Fraction(first)
        for statistic, w in zip(exact, weights, strict=True):
            value += w * (factor * Fraction(*statistic) - value)
        result.append(expand(value.numerator, value.denominator))
    return _pair(result)
