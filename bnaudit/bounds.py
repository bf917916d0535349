"""What error each quantity of a BatchNorm may have, and why.

An allowance is twice the first-order error bound of a *good* algorithm (pairwise or blocked sums, Welford
with merges, shifted or corrected two-pass) in the statistics dtype: float32, or float64 for float64 cases.
The ratio of a deviation to its allowance is T (`bound_ratio`): up to 1 is what a backward-stable
implementation may do. T0 (`tight_ratio`) is the ratio to what the best ones do, which does not grow with n.

Each term has one cause (Chan, Golub and LeVeque 1983; Higham, Accuracy and Stability, chapters 1 and 4):

    u_o |y|                            rounding of the output
    eta_o / 2, |weight| invstd eta_s   underflow in the output and in the statistics
    g u_a X                            the mean, with g = 4 + log2(n) levels of summation and X = mean |x|
    k (1 + |xh|), k = (|x| + X) invstd the mean's error and the variance's, seen through xh = (x − mean) invstd
    |xh|, |bias|                       arithmetic of the normalization and the affine step

On ill-conditioned input such a bound grows past a whole standard deviation and would forgive anything,
so no allowance exceeds 3 % of one unless the tight bound itself is larger (CAP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from bnaudit.reference import Doubles, Gradients, Normalization
from bnaudit.worker.rounding import statistics_dtype

CAP = 0.03
"""Largest allowance in standard deviations, where the tight bound is not larger."""

POOR = 30.0
"""T above which a result with fewer than POOR_BITS good bits is `broken`."""

POOR_BITS = 8


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: significand bits and the exponents of its normal numbers."""

    precision: int
    min_exponent: int
    max_exponent: int

    @property
    def unit_roundoff(self) -> float:
        """Half the distance from 1 to the next number."""
        return 2.0**-self.precision

    @property
    def smallest(self) -> float:
        """The smallest positive (subnormal) number."""
        return math.ldexp(1.0, self.min_exponent - self.precision + 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2.0 - 2.0 ** (1 - self.precision), self.max_exponent)


FORMATS = {
    "float16": Format(11, -14, 15),
    "bfloat16": Format(8, -126, 127),
    "float32": Format(24, -126, 127),
    "float64": Format(53, -1022, 1023),
}


def summation_levels(n: int) -> float:
    """g(n) = 4 + log2(n): the depth of a good summation, with room for the operations around it."""
    return 4.0 + math.log2(max(n, 1))


class ElementBounds(NamedTuple):
    """Per-channel (C,) coefficients of the allowances of y and grad_input; see the functions below."""

    rate: Doubles  # invstd / scale: turns scaled distances into standard deviations
    rounding: float  # 2 u_o
    base: Doubles
    wide: Doubles
    size: Doubles  # X · invstd
    tight_base: Doubles
    tight: Doubles
    cap: Doubles


def y_bounds(norm: Normalization, dtype: str) -> ElementBounds:
    """Coefficients for `y_allowances`."""
    output, statistics = FORMATS[dtype], FORMATS[statistics_dtype(dtype)]
    u = statistics.unit_roundoff
    rate = norm.invstd.high / norm.scale
    gain = np.abs(norm.weight)
    underflow = output.smallest + 2 * gain * norm.invstd.high * statistics.smallest
    tight = 8 * u * gain
    tight_base = underflow + 8 * u * np.abs(norm.bias)
    if norm.training:
        g = summation_levels(norm.n)
        wide = 2 * u * g * gain
        base = underflow + 2 * u * g * np.abs(norm.bias)
        tight_base = tight_base + tight * (np.abs(norm.centre[0]) + 2 * norm.std) * rate
    else:
        wide, base = tight, tight_base
    return ElementBounds(
        rate, 2 * output.unit_roundoff, base, wide, norm.size * rate, tight_base, tight, CAP * gain
    )


@njit(cache=True, nogil=True, inline="always")
def y_allowances(
    training: bool,
    x: float,
    xh: float,
    y: float,
    rounding: float,
    base: float,
    wide: float,
    size: float,
    tight_base: float,
    tight: float,
    cap: float,
) -> tuple[float, float]:
    """(allowance, tight allowance) of one element.

    x: |x| · invstd; xh: |x − mean| · invstd; y: the reference's |y|; the rest as in ElementBounds.
    """
    output = rounding * y
    k = x + size
    if training:
        allowed = base + output + wide * (k * (1.0 + xh) + xh)
        best = tight_base + output + tight * xh
    else:
        allowed = best = base + output + wide * (k + xh)
    return min(allowed, max(best, cap + output)), best


def ill_conditioned(norm: Normalization, dtype: str) -> Doubles:
    """Error of a good float sum in standard deviations, g u_a X invstd, per channel; the cap acts above CAP."""
    u = FORMATS[statistics_dtype(dtype)].unit_roundoff
    return summation_levels(norm.n) * u * norm.size * (norm.invstd.high / norm.scale)


def floor(norm: Normalization, dtype: str) -> Doubles:
    """Deviation of y, per channel, that rounding the mean to the statistics dtype causes by itself."""
    mean = norm.mean
    if not norm.training:
        return np.zeros_like(mean.high)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = mean.high.astype(statistics_dtype(dtype)).astype(np.float64)
        return np.abs(norm.weight) * norm.invstd.high * np.abs((stored - mean.high) - mean.low)


class Allowance(NamedTuple):
    """Allowances of a per-channel quantity, shape (C,); tight is None where no such bound is defined."""

    allowed: Doubles
    tight: Doubles | None


class StatisticsBounds(NamedTuple):
    """Single (not doubled) error bounds of one batch's mean and variance, capped and plain, and tight."""

    mean: Doubles
    mean_tight: Doubles
    var: Doubles
    var_plain: Doubles


def statistics_bounds(
    norm: Normalization, size: Doubles, eps: float, dtype: str
) -> StatisticsBounds:
    """Bounds of batch_mean and batch_var. size: mean |x| per channel, unscaled."""
    form = FORMATS[statistics_dtype(dtype)]
    u, g = form.unit_roundoff, summation_levels(norm.n)
    mean, var = np.abs(norm.mean.high), norm.var.high
    with np.errstate(over="ignore", invalid="ignore"):
        sigma = np.sqrt(var)
        spread = mean + 2 * sigma
        wide = u * mean + g * u * size + form.smallest
        tight = u * mean + 4 * u * spread + form.smallest
        var_wide = u * var + g * u * (var + 2 * sigma * size) + (g * u * size) ** 2 + form.smallest
        var_tight = 5 * u * var + (4 * u * spread) ** 2 + form.smallest
        return StatisticsBounds(
            np.minimum(wide, np.maximum(tight, CAP * np.sqrt(var + eps))),
            tight,
            np.minimum(var_wide, np.maximum(var_tight, 2 * CAP * (var + eps))),
            var_wide,
        )


def mean_allowance(bounds: StatisticsBounds) -> Allowance:
    """Allowance of batch_mean."""
    return Allowance(2 * bounds.mean, 2 * bounds.mean_tight)


def var_allowance(bounds: StatisticsBounds) -> Allowance:
    """Allowance of batch_var. No tight one: Welford and Chan merges legitimately lose more than it."""
    return Allowance(2 * bounds.var, None)


def invstd_allowance(
    norm: Normalization, bounds: StatisticsBounds, eps: float, dtype: str
) -> Allowance:
    """Allowance of invstd: what an allowed error of the variance does to it, and eight roundings."""
    u = FORMATS[statistics_dtype(dtype)].unit_roundoff
    r, var, error = norm.invstd.high, norm.var.high, 2 * bounds.var_plain
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        below = r - 1 / np.sqrt(var + error + eps)
        above = 1 / np.sqrt(np.maximum(var - error, 0) + eps) - r
        return Allowance(8 * u * r + np.maximum(below, above), None)


def running_allowance(
    start: Doubles,
    batches: list[tuple[Doubles, Doubles]],
    weights: list[float],
    factor: float,
    dtype: str,
) -> Allowance:
    """Allowance of a running statistic after the batches' (value, bound) pairs, each of shape (C,).

    R_t = (1 − w) R_(t−1) + w c B_t + 4 u_s (|s_(t−1)| + |c v_t|) + eta_s, the last terms being the update's own
    roundings: they do not shrink with w, because 1 − 0.9f alone is off by 4 u.
    """
    form = FORMATS[statistics_dtype(dtype)]
    bound = np.zeros_like(start)
    value = start
    for (statistic, error), w in zip(batches, weights, strict=True):
        rounding = 4 * form.unit_roundoff * (np.abs(value) + np.abs(factor * statistic))
        bound = (1 - w) * bound + w * factor * error + rounding + form.smallest
        value = (1 - w) * value + w * factor * statistic
    return Allowance(2 * bound, None)


class GradientBounds(NamedTuple):
    """Per-channel (C,) coefficients of grad_input's allowance and the parameter gradients' allowances."""

    rate: Doubles
    rounding: float
    base: Doubles
    gain: Doubles  # |weight| · invstd
    levels: float  # g u_a
    spread: Doubles  # 1 + invstd² σ X
    size: Doubles  # X · invstd
    bias_mean: Doubles  # |grad_bias| / n
    weight_mean: Doubles  # |grad_weight| / n
    bias_error: Doubles  # bound of grad_bias / n
    weight_error: Doubles  # bound of grad_weight / n
    grad_weight: Allowance
    grad_bias: Allowance


def gradient_bounds(
    norm: Normalization, grads: Gradients, magnitude: Doubles, weighted: Doubles, dtype: str
) -> GradientBounds:
    """Bounds of the gradients. magnitude: Σ|dy|; weighted: Σ|dy| q (training) or Σ|dy| (|x| + |m|) invstd."""
    output, form = FORMATS[dtype], FORMATS[statistics_dtype(dtype)]
    u = form.unit_roundoff
    levels = summation_levels(norm.n) * u
    n = max(norm.n, 1)
    rate = norm.invstd.high / norm.scale
    bias_size, weight_size = np.abs(grads.grad_bias.high), np.abs(grads.grad_weight.high)
    bias_bound = u * bias_size + levels * magnitude + form.smallest
    weight_bound = u * weight_size + levels * weighted + form.smallest
    return GradientBounds(
        rate,
        2 * output.unit_roundoff,
        np.full_like(rate, output.smallest),
        np.abs(norm.weight) * norm.invstd.high,
        levels if norm.training else 4 * u,
        1 + (rate * norm.std) * (rate * norm.size),
        norm.size * rate,
        bias_size / n,
        weight_size / n,
        bias_bound / n,
        weight_bound / n,
        Allowance(2 * weight_bound, None),
        Allowance(2 * bias_bound, None),
    )


@njit(cache=True, nogil=True, inline="always")
def sensitivity(x: float, xh: float, size: float) -> float:
    """q = k (1 + |xh|) + |xh|: how far the error of the statistics moves one xh. x, size as in y_allowances."""
    return (x + size) * (1.0 + xh) + xh


@njit(cache=True, nogil=True, inline="always")
def grad_input_allowance(
    training: bool,
    x: float,
    xh: float,
    dy: float,
    dx: float,
    rounding: float,
    base: float,
    gain: float,
    levels: float,
    spread: float,
    size: float,
    bias_mean: float,
    weight_mean: float,
    bias_error: float,
    weight_error: float,
) -> float:
    """Allowance of one element of grad_input; magnitudes in, see GradientBounds."""
    if not training:
        return base + rounding * dx + 2.0 * levels * dx
    direct = levels * (dy + bias_mean + xh * weight_mean) * spread
    statistics = bias_error + xh * weight_error + levels * sensitivity(x, xh, size) * weight_mean
    return base + rounding * dx + 2.0 * gain * (direct + statistics)
