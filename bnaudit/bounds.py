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

from bnaudit.certified import Doubles, Gradients, Normalization
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
    gain = np.abs(norm.weight)
    # invstd · eta_s, also where invstd itself overflows
    lost = norm.rate * (norm.line.scale * statistics.smallest)
    underflow = output.smallest + 2 * gain * lost
    tight = 8 * u * gain
    tight_base = underflow + 8 * u * np.abs(norm.bias)
    if norm.training:
        g = summation_levels(norm.n)
        wide = 2 * u * g * gain
        base = underflow + 2 * u * g * np.abs(norm.bias)
        spread = (np.abs(norm.line.m0) + 2 * norm.std) * norm.rate
        tight_base = tight_base + tight * spread
    else:
        wide, base = tight, tight_base
    return ElementBounds(
        norm.rate,
        2 * output.unit_roundoff,
        base,
        wide,
        norm.size * norm.rate,
        tight_base,
        tight,
        CAP * gain,
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
    return summation_levels(norm.n) * u * norm.size * norm.rate


def floor(norm: Normalization, dtype: str) -> Doubles:
    """Deviation of y, per channel, that rounding the mean to the statistics dtype causes by itself."""
    mean = norm.mean
    if not norm.training:
        return np.zeros_like(mean.high)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = mean.high.astype(statistics_dtype(dtype)).astype(np.float64)
        error = np.abs((stored - mean.high) - mean.low) * norm.line.scale
        return np.abs(norm.weight) * (norm.rate * error)


class Allowance(NamedTuple):
    """Allowances of a per-channel quantity, shape (C,); tight is None where no such bound is defined."""

    allowed: Doubles
    tight: Doubles | None


class StatisticsBounds(NamedTuple):
    """Single (not doubled) error bounds of one batch's mean and variance, capped, and the mean's tight one."""

    mean: Doubles
    mean_tight: Doubles
    var: Doubles


def statistics_bounds(
    norm: Normalization, size: Doubles, eps: float, dtype: str
) -> StatisticsBounds:
    """Bounds of batch_mean and batch_var. size: mean |x| per channel, unscaled."""
    form = FORMATS[statistics_dtype(dtype)]
    u, g = form.unit_roundoff, summation_levels(norm.n)
    mean, var = np.abs(norm.mean.high), norm.var.high
    with np.errstate(over="ignore", invalid="ignore"):
        sigma = norm.std / norm.line.scale
        spread = mean + 2 * sigma
        wide = u * mean + g * u * size + form.smallest
        tight = u * mean + 4 * u * spread + form.smallest
        var_wide = u * var + g * u * (var + 2 * sigma * size) + (g * u * size) ** 2 + form.smallest
        var_tight = 5 * u * var + (4 * u * spread) ** 2 + form.smallest
        return StatisticsBounds(
            np.minimum(wide, np.maximum(tight, CAP * np.hypot(sigma, math.sqrt(eps)))),
            tight,
            np.minimum(var_wide, np.maximum(var_tight, 2 * CAP * (var + eps))),
        )


def mean_allowance(bounds: StatisticsBounds) -> Allowance:
    """Allowance of batch_mean."""
    return Allowance(2 * bounds.mean, 2 * bounds.mean_tight)


def var_allowance(bounds: StatisticsBounds) -> Allowance:
    """Allowance of batch_var. No tight one: Welford and Chan merges legitimately lose more than it."""
    return Allowance(2 * bounds.var, None)


def invstd_allowance(norm: Normalization, dtype: str) -> Allowance:
    """Allowance of invstd: what an allowed error of the variance does to it, and eight roundings.

    The variance's error is taken relative to variance + eps, which neither overflows nor underflows, and
    capped as the variance's own bound is.
    """
    form = FORMATS[statistics_dtype(dtype)]
    u, g, r = form.unit_roundoff, summation_levels(norm.n), norm.invstd.high
    sigma, magnitude = norm.std * norm.rate, norm.size * norm.rate
    mean = np.abs(norm.line.m0) * norm.rate
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        underflow = form.smallest * r * r
        wide = u * sigma**2 + g * u * (sigma**2 + 2 * sigma * magnitude) + (g * u * magnitude) ** 2
        tight = 5 * u * sigma**2 + (4 * u * (mean + 2 * sigma)) ** 2
        error = 2 * (np.minimum(wide, np.maximum(tight, 2 * CAP)) + underflow)
        # No error takes more than the whole variance away; where it may, a hundredth is left.
        lost = np.minimum(np.minimum(error, sigma**2), 0.99)
        below = -np.expm1(-0.5 * np.log1p(error))
        above = np.expm1(-0.5 * np.log1p(-lost))
        return Allowance(8 * u * r + r * np.maximum(below, above), None)


def running_allowance(
    start: Doubles,
    batches: list[tuple[Doubles, Doubles]],
    weights: list[float],
    factor: float,
    dtype: str,
) -> Allowance:
    """Allowance of a running statistic kept in `dtype`, after the batches' (value, bound) pairs, all (C,).

    R_t = (1 − w) R_(t−1) + w c B_t + 4 u (|s_(t−1)| + |c v_t|) + eta, the last terms being the update's own
    roundings: they do not shrink with w, because 1 − 0.9f alone is off by 4 u. A weight of 0 rounds nothing.
    """
    form = FORMATS[dtype]
    bound = np.zeros_like(start)
    value = start
    for (statistic, error), w in zip(batches, weights, strict=True):
        if w == 0:
            continue
        rounding = 4 * form.unit_roundoff * (np.abs(value) + np.abs(factor * statistic))
        bound = (1 - w) * bound + w * factor * error + rounding + form.smallest
        value = (1 - w) * value + w * factor * statistic
    return Allowance(2 * bound, None)


class GradientBounds(NamedTuple):
    """Per-channel (C,) coefficients of grad_input's allowance and the parameter gradients' allowances.

    All but base and the two allowances are in units of 1 / tangent.scale.
    """

    rate: Doubles
    rounding: float
    base: float
    gain: Doubles  # |slope|
    levels: float  # g u_a
    spread: Doubles  # 1 + invstd² σ X
    size: Doubles  # X · invstd
    bias_mean: Doubles  # |grad_bias| / n
    weight_mean: Doubles  # |grad_weight| / n
    bias_error: Doubles  # bound of grad_bias / n
    weight_error: Doubles  # bound of grad_weight / n
    cap: Doubles  # largest relative error that ill-conditioned statistics excuse
    weight_cap: (
        Doubles  # bound of grad_weight / n with statistics that are off by no more than the cap
    )
    grad_weight: Allowance
    grad_bias: Allowance


def gradient_bounds(
    norm: Normalization,
    grads: Gradients,
    magnitude: Doubles,
    weighted: Doubles,
    dtype: str,
    parameters: str,
) -> GradientBounds:
    """Bounds of the gradients, those of the parameters in the dtype `parameters`.

    magnitude: Σ|dy|; weighted: Σ|dy| q (training) or Σ|dy| (|x| + |m|) invstd; both times tangent.scale.
    """
    output, form = FORMATS[dtype], FORMATS[statistics_dtype(dtype)]
    u = form.unit_roundoff
    levels = summation_levels(norm.n) * u
    n = max(norm.n, 1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        smallest = form.smallest * grads.tangent.scale
        bias_mean = np.abs(grads.tangent.shift)
        weight_mean = np.abs(grads.tangent.tilt) / norm.rate

        stored = FORMATS[parameters]

        def allowance(right: Doubles, error: Doubles) -> Allowance:
            summation = np.ldexp(levels * error, grads.exponent)
            return Allowance(2 * (stored.unit_roundoff * right + summation + stored.smallest), None)

        # What rounding the mean does to xh; to first order in itself and in the variance, to second.
        rounded = 4 * u * (np.abs(norm.line.m0) * norm.rate + 2)
        cap = np.maximum(CAP / 2, rounded + rounded**2)
        return GradientBounds(
            norm.rate,
            2 * output.unit_roundoff,
            output.smallest,
            np.abs(norm.line.slope),
            levels if norm.training else 4 * u,
            1 + (norm.rate * norm.std) * (norm.rate * norm.size),
            norm.size * norm.rate,
            bias_mean,
            weight_mean,
            u * bias_mean + (levels * magnitude + smallest) / n,
            u * weight_mean + (levels * weighted + smallest) / n,
            cap,
            cap * (bias_mean + weight_mean) + (4 * levels * magnitude + smallest) / n,
            allowance(np.abs(grads.grad_weight.high), weighted),
            allowance(np.abs(grads.grad_bias.high), magnitude),
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
    c: int,
    limits: GradientBounds,
    up: float,
    lift: float,
) -> float:
    """Allowance of one element of grad_input in channel c.

    x, xh: as in y_allowances; dy: |dy| times tangent.scale; dx: the reference's |grad_input|; up, lift:
    Tangent's. Capped as y's is: statistics that are ill-conditioned excuse 3 % of the terms of a gradient,
    or what rounding the mean costs by itself.
    """
    output = limits.base + limits.rounding * dx
    if not training:
        return output + 2.0 * limits.levels * dx
    weight_mean = limits.weight_mean[c]
    direct = limits.levels * (dy + limits.bias_mean[c] + xh * weight_mean) * limits.spread[c]
    moved = limits.levels * sensitivity(x, xh, limits.size[c]) * weight_mean
    wide = direct + xh * limits.weight_error[c] + moved
    terms = dy + limits.bias_mean[c] + xh * weight_mean
    capped = (limits.cap[c] + limits.levels) * terms + xh * limits.weight_cap[c]
    error = limits.bias_error[c] + min(wide, capped)
    return output + 2.0 * limits.gain[c] * error * up * lift
