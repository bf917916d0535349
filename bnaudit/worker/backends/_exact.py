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

# ruff: noqa: B905 - zip knows no strict in Python 3.7

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from ._numpy import channel_rows, empty_batch, from_rows

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Pair = Tuple[Array, Array]
    Fractions = List[Optional[Fraction]]  # one per channel; None: not finite
    Channels = List[Optional["Channel"]]  # None: no result of the channel is finite

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
        limbs = [
            a0 * b0,
            a0 * b1 + a1 * b0,
            a0 * b2 + a1 * b1 + a2 * b0,
            a1 * b2 + a2 * b1,
            a2 * b2,
        ]
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
    """Return k with 2^(k-1) < |value| < 2^(k+1); for 0, less than that of any float64."""
    return value.numerator.bit_length() - value.denominator.bit_length() if value else -1100


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


def _round(
    high: Array, low: Array, error: Array, exponent: Array, odd: bool
) -> Tuple[Array, Array]:
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


def _centre(values: Array, centres: List[Fraction]) -> Tuple[Pair, Array, Array]:
    """Return (values - centre) · 2^-exponent of every channel, the exponents, whether 0 is exact.

    A centre is mean or 0. Its nearest float64 is subtracted first and exactly; no other value is nearer
    to it, so what is left of the centre is no larger than the difference, and nothing cancels.
    """
    largest = np.frexp(np.abs(values).max(axis=1))[1].tolist()
    exponents = [max(k, _exponent(centre)) for k, centre in zip(largest, centres)]
    parts = [_parts(centre, k, 3) for k, centre in zip(exponents, centres)]
    exact = [
        _scaled(Fraction(part[0]), k) == centre
        for k, part, centre in zip(exponents, parts, centres)
    ]
    exponent = np.array(exponents, np.intc)[:, None]
    first, second, third = _columns(parts)
    difference = _two_sum(np.ldexp(values, -exponent), -first)
    return _add(difference, (-second, -third)), exponent, np.array(exact)[:, None]


def _slopes(channels: List[Channel]) -> Tuple[Pair, Array]:
    """Return weight / sqrt(square) of every channel as a pair in (1/2, 2), and its exponents."""
    slopes = [channel.weight * _inverse_root(channel.square, 160)[0] for channel in channels]
    exponents = [_exponent(slope) for slope in slopes]
    high, low = _columns([_parts(slope, k, 2) for k, slope in zip(exponents, slopes)])
    return (high, low), np.array(exponents, np.intc)[:, None]


def _settle(result: Array, undecided: Array, compute: Callable[..., float], *given: Array) -> None:
    """Put compute(channel, values of `given`) where the result is undecided, once per distinct value."""
    known: Dict[Tuple[float, ...], float] = {}
    for c in np.flatnonzero(undecided.any(axis=1)).tolist():
        known.clear()
        for i in np.flatnonzero(undecided[c]).tolist():
            values = tuple(float(array[c, i]) for array in given)
            if values not in known:
                known[values] = compute(c, *values)
            result[c, i] = known[values]


def _y(rows: Array, channels: List[Channel], odd: bool) -> Array:
    deviation, exponent, exact = _centre(rows, [channel.mean for channel in channels])
    slope, slope_exponent = _slopes(channels)
    product_exponent = exponent + slope_exponent
    bias_exponent = [_exponent(channel.bias) for channel in channels]
    exponent = np.maximum(product_exponent, np.array(bias_exponent, np.intc)[:, None])
    high, low = _multiply(deviation, slope)
    drop = product_exponent - exponent
    product = np.ldexp(high, drop), np.ldexp(low, drop)
    scales = zip(channels, exponent[:, 0].tolist())
    (bias,) = _columns([_parts(channel.bias, k, 1) for channel, k in scales])
    y = _add(product, (bias, np.zeros_like(bias)))
    error = ERROR * (np.abs(product[0]) + np.abs(bias))
    result, undecided = _round(y[0], y[1], error, exponent, odd)
    # At the mean, or with weight 0, y is the bias.
    only_bias = (exact & (deviation[0] == 0)) | (slope[0] == 0)
    (bias,) = _columns([[nearest(channel.bias)] for channel in channels])
    result = np.where(only_bias, bias, result)

    def compute(c: int, x: float) -> float:
        mean, square, weight, bias = channels[c]
        return round_quotient(weight * (Fraction(x) - mean), square, bias, _rounding(odd))

    _settle(result, undecided & ~only_bias, compute, rows)
    return result


def _grad_input(
    rows: Array,
    grads: Array,
    channels: List[Channel],
    shifts: List[Fraction],
    tilts: List[Fraction],
    odd: bool,
) -> Array:
    """Return (dy - shift - (x - mean) · tilt) · weight / sqrt(square)."""
    deviation, exponent, _ = _centre(rows, [channel.mean for channel in channels])
    grad, grad_exponent, _ = _centre(grads, shifts)
    slope, slope_exponent = _slopes(channels)
    unit = (grad_exponent - exponent)[:, 0].tolist()
    high, low = _columns([_parts(tilt, k, 2) for k, tilt in zip(unit, tilts)])
    high, low = _multiply(deviation, (high, low))
    product = _multiply(_add(grad, (-high, -low)), slope)
    error = ERROR * (np.abs(grad[0]) + np.abs(high))
    result, undecided = _round(product[0], product[1], error, grad_exponent + slope_exponent, odd)
    flat = slope[0] == 0
    result = np.where(flat, 0.0, result)

    def compute(c: int, x: float, dy: float) -> float:
        mean, square, weight, _ = channels[c]
        value = Fraction(dy) - shifts[c] - (Fraction(x) - mean) * tilts[c]
        return round_quotient(weight * value, square, Fraction(0), _rounding(odd))

    tilted = np.array([tilt != 0 for tilt in tilts])[:, None]
    _settle(result, undecided & ~flat, compute, np.where(tilted, rows, 0.0), grads)
    return result


def _rounding(odd: bool) -> Callable[[Fraction], float]:
    return to_odd if odd else nearest


# --- the layer --------------------------------------------------------------------------------------


def _fraction(value: float) -> Optional[Fraction]:
    return Fraction(float(value)) if math.isfinite(value) else None


def _moments(rows: Array) -> Tuple[Fractions, Fractions]:
    """Return mean and biased variance of every row."""
    means: Fractions = []
    variances: Fractions = []
    for row in rows:
        finite = bool(np.isfinite(row).all())
        mean = exact_sum(row) / row.size if finite else None
        means.append(mean)
        variances.append(None if mean is None else exact_sum(row, row) / row.size - mean * mean)
    return means, variances


def _running(before: Array, batch: Fractions, momentum: float, correction: Fraction) -> Fractions:
    """Return (1 - momentum) · before + momentum · correction · batch."""
    w = Fraction(momentum)
    olds = [_fraction(value) for value in before]
    return [
        None if old is None or new is None else (1 - w) * old + w * correction * new
        for old, new in zip(olds, batch)
    ]


def _channels(
    means: Fractions, variances: Fractions, eps: float, weights: Array, biases: Array
) -> Channels:
    channels: Channels = []
    for mean, var, weight, bias in zip(means, variances, weights, biases):
        w, b = _fraction(weight), _fraction(bias)
        if mean is None or var is None or w is None or b is None or var + Fraction(eps) <= 0:
            channels.append(None)
        else:
            channels.append(Channel(mean, var + Fraction(eps), w, b))
    return channels


def _column(values: Fractions, dtype: Any) -> Array:
    """Round one value per channel."""
    rounding = _rounding(dtype != np.float64)
    rounded = [math.nan if value is None else rounding(value) for value in values]
    return np.array(rounded).astype(dtype)


def _invstd_times(values: Fractions, channels: Channels, dtype: Any) -> Array:
    """Round value / sqrt(square), one per channel."""
    rounding = _rounding(dtype != np.float64)
    rounded = [
        math.nan
        if value is None or channel is None
        else round_quotient(value, channel.square, Fraction(0), rounding)
        for value, channel in zip(values, channels)
    ]
    return np.array(rounded).astype(dtype)


def _forward(rows: Array, channels: Channels, odd: bool) -> Array:
    """Return y, (C, n)."""
    y = np.full(rows.shape, np.nan)
    chosen = [c for c, channel in enumerate(channels) if channel is not None]
    known = [channel for channel in channels if channel is not None]
    if known:
        given = rows[chosen]
        finite = np.isfinite(given)
        # Only in inference is there a value that is not finite: it stays the infinity or NaN it is.
        (weight,) = _columns([[nearest(channel.weight)] for channel in known])
        right = _y(np.where(finite, given, 0.0), known, odd)
        y[chosen] = np.where(finite, right, given * weight)
    return y


def _backward(
    rows: Array, grads: Array, channels: Channels, training: bool, dtype: Any
) -> Dict[str, Array]:
    """Return grad_input, (C, n), grad_weight and grad_bias, (C,)."""
    totals: Fractions = []
    products: Fractions = []
    for row, grad, channel in zip(rows, grads, channels):
        total = exact_sum(grad) if np.isfinite(grad).all() else None
        totals.append(total)
        if total is None or channel is None or not np.isfinite(row).all():
            products.append(None)
        else:
            products.append(exact_sum(row, grad) - channel.mean * total)

    n = rows.shape[1]
    chosen: List[int] = []
    known: List[Channel] = []
    shifts: List[Fraction] = []
    tilts: List[Fraction] = []
    for c, (total, product, channel) in enumerate(zip(totals, products, channels)):
        if channel is None or (training and product is None):
            continue
        chosen.append(c)
        known.append(channel)
        shifts.append(total / n if training and total is not None else Fraction(0))
        tilts.append(
            product / n / channel.square if training and product is not None else Fraction(0)
        )
    grad_input = np.full(rows.shape, np.nan)
    if known:
        given, x = grads[chosen], rows[chosen]
        finite = np.isfinite(given)
        (weight,) = _columns([[nearest(channel.weight)] for channel in known])
        right = _grad_input(
            np.where(np.isfinite(x), x, 0.0),
            np.where(finite, given, 0.0),
            known,
            shifts,
            tilts,
            dtype != np.float64,
        )
        grad_input[chosen] = np.where(finite, right, given * weight)
    return {
        "grad_input": grad_input,
        "grad_weight": _invstd_times(products, channels, dtype),
        "grad_bias": _column(totals, dtype),
    }


def exact(
    x: Array,
    weight: Optional[Array],
    bias: Optional[Array],
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Optional[Array] = None,
) -> Dict[str, Array]:
    """Return every output, also invstd, rounded as the module says.

    Raises NotImplementedError for more than LIMIT elements.
    """
    if x.size > LIMIT:
        raise NotImplementedError("exact takes up to %d elements, these are %d" % (LIMIT, x.size))
    if x.shape[0] == 0:
        backward = grad_output is not None
        return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
    rows = channel_rows(x).astype(np.float64)
    count, n = rows.shape
    weights = np.ones(count) if weight is None else weight.astype(np.float64)
    biases = np.zeros(count) if bias is None else bias.astype(np.float64)
    outputs = {}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if training:
            means, variances = _moments(rows)
            outputs["batch_mean"] = _column(means, x.dtype)
            outputs["batch_var"] = _column(variances, x.dtype)
            mean = _running(running_mean, means, momentum, Fraction(1))
            var = _running(running_var, variances, momentum, Fraction(n, max(n - 1, 1)))
            outputs["running_mean"] = _column(mean, x.dtype)
            outputs["running_var"] = _column(var, x.dtype)
        else:
            means = [_fraction(value) for value in running_mean]
            variances = [_fraction(value) for value in running_var]
        channels = _channels(means, variances, eps, weights, biases)
        outputs["invstd"] = _invstd_times([Fraction(1)] * count, channels, x.dtype)
        outputs["y"] = from_rows(_forward(rows, channels, x.dtype != np.float64), x.shape)
        if grad_output is not None:
            grads = channel_rows(grad_output).astype(np.float64)
            gradients = _backward(rows, grads, channels, training, x.dtype)
            outputs["grad_input"] = from_rows(gradients["grad_input"], x.shape)
            if weight is not None:
                outputs["grad_weight"] = gradients["grad_weight"]
            if bias is not None:
                outputs["grad_bias"] = gradients["grad_bias"]
    return outputs


exact.widened = True  # type: ignore[attr-defined]
