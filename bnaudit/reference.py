"""Case and inputs → the reference: the certified answers, and how far a backend's outputs are from each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numba import njit

from bnaudit import bounds
from bnaudit.bounds import FORMATS, Allowance, GradientBounds
from bnaudit.certified import (
    NONFINITE,
    OK,
    UNJUDGED,
    Array,
    Doubles,
    Gradients,
    Line,
    Moments,
    Pair,
    Tangent,
    gradients,
    moments,
    nearest,
    normalization,
    running_statistics,
    slabs,
    step_weight,
)
from bnaudit.inputs import Inputs
from bnaudit.measure import (
    Measurement,
    difference_of_y,
    flat,
    measure_channels,
    measure_grad_input,
    measure_unchanged,
    measure_y,
)
from bnaudit.scenario import Case
from bnaudit.worker.rounding import widen

QUANTITIES = (
    "y",
    "batch_mean",
    "batch_var",
    "invstd",
    "running_mean",
    "running_var",
    "grad_input",
    "grad_weight",
    "grad_bias",
)
"""In the order in which they are reported: of two that are equally bad, the first is named."""


@dataclass(frozen=True)
class Declarations:
    """What a backend says of its running statistics: the variance's correction and the update rule."""

    running_var_correction: int = 1
    running_update: str = "ema"


@dataclass(frozen=True)
class Facts:
    """What is known of a case's input, and decides how deviations are explained.

    condition_number: largest sqrt(1 + mean²/var) over the channels of all steps; inf where var is 0.
    ill_conditioned: whether the cap on the allowances of y is at work in some channel.
    extreme: whether squares of the last batch's values leave the statistics dtype's normal range.
    """

    mode: str
    condition_number: float
    ill_conditioned: bool
    extreme: bool


class Reference:
    """The certified answers to one case, computed once and compared with every backend's outputs.

    Attributes:
        facts: what else a verdict takes into account.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        """Forms the sums of every step, and the coefficients of the last."""
        self.case = case
        self._averages: dict[tuple[bool, int, str], tuple[Pair, Allowance]] = {}
        dtype = case.dtype
        x = [flat(step) for step in inputs.x]
        channels = case.channels
        ones = np.ones(channels)

        def values(stored: Array | None, default: Doubles) -> Doubles:
            if stored is None:
                return default
            return widen(stored, case.parameter_dtype).astype(np.float64)

        self.weight = values(inputs.weight, ones)
        self.bias = values(inputs.bias, np.zeros(channels))
        self.running_mean = values(inputs.running_mean, np.zeros(channels))
        self.running_var = values(inputs.running_var, ones)
        training = case.mode == "training"
        self.batches = [moments(dtype, step) for step in x] if training else []
        statistics = self.batches[-1] if training else self._running_moments(x[-1])
        self.norm = normalization(
            statistics.mean,
            statistics.var,
            statistics.largest,
            statistics.size,
            case.eps,
            self.weight,
            self.bias,
            n=case.n,
            training=training,
        )
        if not training:
            # An infinite running variance has no right y: 0 · (x − mean) is as good as a refusal.
            infinite = np.isposinf(self.running_var)
            self.norm = replace(
                self.norm,
                state=np.where(infinite, UNJUDGED, self.norm.state),
                y_state=np.where(infinite, UNJUDGED, self.norm.y_state),
            )
        self.grads: Gradients | None = None
        self._dy = None if inputs.grad_output is None else flat(inputs.grad_output[-1])
        if self._dy is not None:
            dy = self._dy
            self.grads = gradients(dtype, x[-1], dy, statistics, case.eps, self.norm)
            self.gradient_bounds = self._gradient_bounds(self.grads, x[-1], dy)
        self._x = x[-1]
        condition = max((_condition(batch) for batch in self.batches), default=1.0)
        if not training:
            condition = _condition(moments(dtype, x[-1]))
        largest = float(np.max(statistics.largest, initial=0.0, where=self.norm.state == OK))
        with np.errstate(invalid="ignore"):
            capped = (bounds.ill_conditioned(self.norm, dtype) > bounds.CAP).any()
        self.facts = Facts(
            case.mode,
            condition,
            ill_conditioned=bool(capped and training),
            extreme=training and _squares_leave_range(largest, case.statistics_dtype),
        )

    def _running_moments(self, x: Array) -> Moments:
        def exact(values: Doubles) -> list[tuple[int, int] | None]:
            return [float(v).as_integer_ratio() if math.isfinite(v) else None for v in values]

        # Only float64 reaches exponents that need scaling.
        largest = np.zeros(x.shape[1])
        if self.case.dtype == "float64":
            for image in x:
                finite = np.where(np.isfinite(image), np.abs(image), 0.0)
                largest = np.maximum(largest, finite.max(axis=1, initial=0.0))
        return Moments(
            self.case.n,
            exact(self.running_mean),
            exact(self.running_var),
            size=np.abs(self.running_mean),
            largest=np.maximum(largest, np.abs(self.running_mean)),
        )

    def _gradient_bounds(self, grads: Gradients, x: Array, dy: Array) -> GradientBounds:
        norm, dtype = self.norm, self.case.dtype
        magnitude, weighted = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for _, (xs, dys) in slabs(dtype, x, dy):
            _weighted(
                xs,
                dys,
                norm.training,
                norm.line,
                grads.tangent,
                norm.rate,
                norm.size * norm.rate,
                magnitude,
                weighted,
            )
        return bounds.gradient_bounds(
            norm, grads, magnitude, weighted, dtype, self.case.parameter_dtype
        )

    def _statistics_bounds(self, batch: Moments) -> bounds.StatisticsBounds:
        norm = normalization(
            batch.mean,
            batch.var,
            batch.largest,
            batch.size,
            self.case.eps,
            self.weight,
            self.bias,
            n=batch.n,
            training=True,
        )
        return bounds.statistics_bounds(norm, batch.size, self.case.eps, self.case.dtype)

    def measure(
        self, outputs: Mapping[str, Array], declared: Declarations
    ) -> dict[str, Measurement]:
        """Measurement of every returned quantity that has a reference, y first."""
        case = self.case
        result = {}
        for name in QUANTITIES:
            if name not in outputs:
                continue
            got = outputs[name]
            if name == "y":
                result[name] = measure_y(case, self._x, flat(got), self.norm, self.running_mean)
            elif name == "grad_input":
                if self.grads is not None and self._dy is not None:
                    result[name] = measure_grad_input(
                        case,
                        self._x,
                        self._dy,
                        flat(got),
                        self.norm,
                        self.grads,
                        self.gradient_bounds,
                    )
            else:
                measurement = self._measure_channels(name, got, declared)
                if measurement is not None:
                    result[name] = measurement
        for name in {"batch_mean", "running_mean"} & result.keys():
            weight = 1.0 if name == "batch_mean" else self.case.momentum or 1 / self.case.steps
            rounded = self._rounded(result[name], weight)
            result[name] = replace(result[name], rounded=rounded)
        return result

    def _rounded(self, mean: Measurement, weight: float) -> bool:
        """Whether a wrong mean is near enough to the right one for rounding to be the cause.

        weight: of the batch's mean in it.
        """
        error, worst = mean.max_abs_error, mean.worst
        if error is None or worst is None or mean.nonfinite or worst.value == -worst.reference:
            return False
        size = self.norm.size / self.norm.line.scale
        return error <= weight * float(size[worst.index[0]]) / 4

    def difference(self, name: str, first: Array, second: Array) -> tuple[float, float]:
        """The largest |first − second| of y or batch_mean, also in units of twice its tight bound."""
        case, norm = self.case, self.norm
        if name == "y":
            return difference_of_y(case, self._x, flat(first), flat(second), norm)
        batch = bounds.statistics_bounds(norm, self.batches[-1].size, case.eps, case.dtype)
        tight = 2 * batch.mean_tight
        a, b = first.astype(np.float64), second.astype(np.float64)
        with np.errstate(invalid="ignore"):
            # A constant channel has a mean also where eps = 0 leaves it without a y.
            undefined = norm.state == NONFINITE
            same = (a == b) | (np.isnan(a) & np.isnan(b)) | undefined
            error = np.where(same, 0.0, np.abs(a - b))
            error = np.where(np.isfinite(error), error, math.inf)
            ratio = np.where(same, 0.0, error / (2 * tight))
        return float(error.max(initial=0.0)), float(ratio.max(initial=0.0))

    def _measure_channels(
        self, name: str, got: Array, declared: Declarations
    ) -> Measurement | None:
        case, norm = self.case, self.norm
        statistics = case.statistics_dtype
        params = case.parameter_dtype
        if name in ("running_mean", "running_var"):
            return self._measure_running(name, got, declared)
        if name in ("grad_weight", "grad_bias"):
            if self.grads is None or case.affine is None:
                return None
            if case.n == 0:
                zero = Pair(np.zeros(case.channels), np.zeros(case.channels))
                exact = Allowance(np.full(case.channels, 2 * FORMATS[params].smallest), None)
                return measure_channels(got, zero, exact, np.zeros(case.channels, np.int64), params)
            right = self.grads.grad_weight if name == "grad_weight" else self.grads.grad_bias
            allowance = getattr(self.gradient_bounds, name)
            # grad_bias is a plain sum: no variance spoils it.
            state = norm.state if name == "grad_weight" else np.zeros_like(norm.state)
            return measure_channels(got, right, allowance, state, params)
        if case.mode != "training" or case.n == 0:
            return None
        batch = bounds.statistics_bounds(norm, self.batches[-1].size, case.eps, case.dtype)
        state = np.where(norm.state == UNJUDGED, OK, norm.state)
        if name == "batch_mean":
            return measure_channels(got, norm.mean, bounds.mean_allowance(batch), state, statistics)
        if name == "batch_var":
            return measure_channels(got, norm.var, bounds.var_allowance(batch), state, statistics)
        allowance = bounds.invstd_allowance(norm, case.dtype)
        return measure_channels(got, norm.invstd, allowance, norm.state, statistics)

    def _measure_running(self, name: str, got: Array, declared: Declarations) -> Measurement:
        case = self.case
        is_mean = name == "running_mean"
        start = self.running_mean if is_mean else self.running_var
        fresh = np.zeros(case.channels, np.int64)
        if case.mode == "inference" or case.n == 0:
            return measure_unchanged(got.astype(np.float64), start)
        correction = 0 if is_mean else declared.running_var_correction
        right, allowance = self._running(is_mean, correction, declared.running_update)
        measurement = measure_channels(got, right, allowance, fresh, case.parameter_dtype)
        if case.n == 1 and not is_mean and not measurement.sound:
            # With one value per channel the unbiased variance is undefined: it may also stay as it was.
            stay = Pair(start, np.zeros(case.channels))
            other = measure_channels(got, stay, allowance, fresh, case.parameter_dtype)
            return other if other.sound else measurement
        return measurement

    def _running(self, is_mean: bool, correction: int, update: str) -> tuple[Pair, Allowance]:
        """The right running mean or variance by one convention and its allowance, formed once."""
        key = (is_mean, correction, update)
        if key not in self._averages:
            case = self.case
            start = self.running_mean if is_mean else self.running_var
            factor = Fraction(case.n, max(case.n - correction, 1))
            weights = [step_weight(case.momentum, step) for step in range(1, case.steps + 1)]
            if update == "caffe":
                # Scaled sums with a factor blob, from zero: what was there before the first step is gone.
                weights = _caffe_weights(case)
            exact = [batch.mean if is_mean else batch.var for batch in self.batches]
            limits = []
            for batch, values in zip(self.batches, exact, strict=True):
                b = self._statistics_bounds(batch)
                statistic = np.array([math.nan if v is None else nearest(*v) for v in values])
                limits.append((statistic, b.mean if is_mean else b.var))
            allowance = bounds.running_allowance(
                start, limits, [float(w) for w in weights], float(factor), case.parameter_dtype
            )
            right = running_statistics(start, exact, weights, factor)
            self._averages[key] = right, allowance
        return self._averages[key]


@njit(cache=True, nogil=True)
def _weighted(
    x: Any,
    dy: Any,
    training: bool,
    line: Line,
    tangent: Tangent,
    rate: Any,
    size: Any,
    magnitude: Any,
    weighted: Any,
) -> None:
    """Adds Σ|dy| and Σ|dy| q (training) or Σ|dy| (|x| + |m|) invstd per channel, times tangent.scale."""
    images, channels, plane = x.shape
    for image in range(images):
        for c in range(channels):
            for s in range(plane):
                v = np.float64(x[image, c, s]) * line.scale[c]
                g = abs(np.float64(dy[image, c, s])) * tangent.scale[c]
                ax = abs(v) * rate[c]
                magnitude[c] += g
                if training:
                    weighted[c] += g * bounds.sensitivity(
                        ax, abs(v - line.m0[c]) * rate[c], size[c]
                    )
                else:
                    weighted[c] += g * (ax + size[c])


def _caffe_weights(case: Case) -> list[Fraction]:
    """Weights with which R ← (1 − w) R + w v yields Caffe's average, Σ f^(t−k) v_k / Σ f^(t−k).

    f is 1 − momentum, and 1 where momentum is null.
    """
    decay = 1 - Fraction(0 if case.momentum is None else case.momentum)
    total, weights = Fraction(0), []
    for _ in range(case.steps):
        total = total * decay + 1
        weights.append(1 / total)
    return weights


def _condition(batch: Moments) -> float:
    """Largest condition number of the variance over the channels with finite values; nan if there is none."""
    worst = math.nan
    for mean, var in zip(batch.mean, batch.var, strict=True):
        if mean is None or var is None:
            continue
        if var[0] == 0:
            return math.inf
        kappa = math.sqrt(1 + nearest(mean[0] ** 2 * var[1], mean[1] ** 2 * var[0]))
        worst = kappa if math.isnan(worst) else max(worst, kappa)
    return worst


def _squares_leave_range(largest: float, dtype: str) -> bool:
    """Whether the square of max |x| is beyond the dtype's normal numbers, at either end."""
    if not (math.isfinite(largest) and largest > 0):
        return False
    form = FORMATS[dtype]
    exponent = 2 * math.frexp(largest)[1]
    return exponent > form.max_exponent or exponent < form.min_exponent
