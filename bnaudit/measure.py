"""Deviation of one returned quantity from the right answer, element by element.

y and grad_input are compared as the reference is formed, block by block, so that nothing of the size of
the tensor is stored. Values that are not finite are counted before anything is subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from bnaudit import bounds
from bnaudit.bounds import FORMATS, Allowance, ElementBounds, Format, GradientBounds
from bnaudit.certified import (
    INFINITY_BITS,
    MAGNITUDE,
    NONFINITE,
    OK,
    UNJUDGED,
    Array,
    Doubles,
    Gradients,
    Line,
    Normalization,
    Pair,
    Tangent,
    bits_of,
    from_bits,
    grad_input_element,
    line_of,
    slabs,
    tangent_of,
    y_element,
)
from bnaudit.scenario import Case
from bnaudit.worker.rounding import round_to, widen

OCTAVES, LOWEST, BINS = 2, -20, 22
"""A histogram of T: bins of two octaves from 2^-20 to 2^20, one for what is smaller, one for what is larger."""

BLOCK = 512
"""Elements compared at a time: eight float64 buffers of this size stay in the first-level cache."""


@dataclass(frozen=True)
class Worst:
    """Where T is largest: the place in (N, C, *) order, what was returned there and what is right.

    Where only the rule of constants is broken (T <= 1), the constant that is farthest off instead.
    """

    index: tuple[int, ...]
    value: float
    reference: float


@dataclass(frozen=True)
class Measurement:
    """One quantity's deviation from the reference, over all judged elements.

    max_abs_error, max_ulp_error: in the quantity's own unit and in units in the last place of the right
    value. max_sigma_error: |error| / |weight|, for y. bound_ratio, tight_ratio: T and T0 (see bounds).
    floor: what rounding the mean alone costs at the worst element's channel. nonfinite: elements that
    are finite where the right value is not, or the other way round. constant_misses, constant_error:
    elements that must equal the bias and do not, and by how much at most, in units of |weight|; None where
    nothing is constant.
    poor: elements with T > 30 and fewer than 8 good bits. unjudged: channels in which nothing is defined;
    judged: whether there is any other. rounded: of means, whether the error is small enough for rounding to be
    its cause. histogram: of y and grad_input, how many elements have which T, in BINS. None: does not
    apply, or nothing to judge.
    """

    max_abs_error: float | None = None
    max_sigma_error: float | None = None
    max_ulp_error: float | None = None
    bound_ratio: float | None = None
    tight_ratio: float | None = None
    floor: float | None = None
    nonfinite: int = 0
    worst: Worst | None = None
    constant_misses: int | None = None
    constant_error: float | None = None
    poor: int = 0
    judged: bool = True
    unjudged: int = 0
    rounded: bool | None = None
    histogram: tuple[int, ...] | None = None

    @property
    def sound(self) -> bool:
        """Whether T is at most 1 and everything is finite that should be, where that is judged at all."""
        return self.bound_ratio is None or (self.bound_ratio <= 1 and self.nonfinite == 0)


class Tally(NamedTuple):
    """Running maxima per channel (C,), updated in place by the kernels.

    position: element n·S + s. histogram: (C, BINS), counts of T.
    """

    ratio: Doubles
    tight: Doubles
    error: Doubles
    ulps: Doubles
    position: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]
    poor: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]


def _tally(channels: int) -> Tally:
    ratio, tight, error, ulps = np.zeros((4, channels))
    position, nonfinite, poor = np.zeros((3, channels), np.int64)
    position -= 1
    histogram = np.zeros((channels, BINS), np.int64)
    return Tally(ratio, tight, error, ulps, position, nonfinite, poor, histogram)


class Output(NamedTuple):
    """What the kernels need to know of the output's format."""

    precision: int
    min_exponent: int
    largest: float
    roundoff: float


def _output(form: Format) -> Output:
    return Output(form.precision, form.min_exponent, form.largest, form.unit_roundoff)


@njit(cache=True, nogil=True, inline="always")
def ulp(value: float, precision: int, min_exponent: int) -> float:
    """Unit in the last place of a finite value in a format."""
    exponent = max(((bits_of(value) & MAGNITUDE) >> 52) - 1023, min_exponent)
    biased = exponent - (precision - 1) + 1023
    return from_bits(biased << 52 if biased > 0 else 1 << (51 + biased))


@njit(cache=True, nogil=True)
def _compare(
    c: int,
    start: int,
    m: int,
    got: Any,
    high: Any,
    low: Any,
    allowed: Any,
    tight: Any,
    coarse: Any,
    error: Any,
    ratio: Any,
    output: Output,
    tally: Tally,
) -> None:
    """Compares m elements with high + low and raises channel c's tally. All buffers are float64 blocks."""
    limit = output.largest * (1.0 + 0.5 * output.roundoff)
    top_ratio = top_tight = top_error = top_ulps = mismatches = 0
    for i in range(m):
        value, right = got[i], high[i]
        finite = bits_of(value) & MAGNITUDE < INFINITY_BITS
        expected = bits_of(right) & MAGNITUDE < INFINITY_BITS
        # An infinity of the right sign is right where the reference may round to it.
        reach = abs(right) + allowed[i]
        rounds_up = limit <= reach < math.inf and value == math.copysign(math.inf, right)
        difference = abs((value - right) - low[i])
        wrong = finite != expected and not rounds_up
        e = difference if finite and expected else (math.inf if wrong else 0.0)
        error[i] = e
        mismatches += 1 if wrong else 0
        counted = 0.0 if wrong else e
        # Where nothing is wrong the allowance may be undefined, as for an infinite x; where something
        # is, an infinite allowance forgives nothing.
        ratio[i] = 0.0 if e == 0.0 else e / allowed[i] if allowed[i] < math.inf else math.inf
        top_ratio = max(top_ratio, bits_of(ratio[i]) & MAGNITUDE)
        top_tight = max(top_tight, bits_of(e / tight[i] if e != 0.0 else 0.0) & MAGNITUDE)
        top_error = max(top_error, bits_of(counted))
        top_ulps = max(
            top_ulps, bits_of(counted / ulp(right, output.precision, output.min_exponent))
        )
    for i in range(m):
        exponent = ((bits_of(ratio[i]) & MAGNITUDE) >> 52) - 1023  # that of NaN is the largest
        tally.histogram[c, min(max((exponent - LOWEST) // OCTAVES + 1, 0), BINS - 1)] += 1
    tally.nonfinite[c] += mismatches
    tally.tight[c] = max(tally.tight[c], from_bits(top_tight))
    tally.error[c] = max(tally.error[c], from_bits(top_error))
    tally.ulps[c] = max(tally.ulps[c], from_bits(top_ulps))
    worst = from_bits(top_ratio)
    if math.isnan(worst):
        worst = math.inf
    if not worst <= bounds.POOR:
        for i in range(m):
            if not ratio[i] <= bounds.POOR and not error[i] <= coarse[i]:
                tally.poor[c] += 1
    if tally.position[c] < 0 or not worst <= tally.ratio[c]:
        tally.ratio[c] = worst
        for i in range(m):
            if bits_of(ratio[i]) & MAGNITUDE == top_ratio:
                tally.position[c] = start + i
                break


@njit(cache=True, nogil=True)
def _count_finite(c: int, start: int, m: int, got: Any, tally: Tally) -> None:
    """Where the right result is not finite: a finite value is a mismatch."""
    for i in range(m):
        if math.isfinite(got[i]):
            if tally.nonfinite[c] == 0:
                tally.position[c] = start + i
                tally.ratio[c] = tally.tight[c] = math.inf
            tally.nonfinite[c] += 1
            tally.histogram[c, BINS - 1] += 1
        else:
            tally.histogram[c, 0] += 1


@njit(cache=True, nogil=True)
def _compare_y(
    x: Any,
    y: Any,
    offset: int,
    training: bool,
    state: Any,
    line: Line,
    weight: Any,
    limits: ElementBounds,
    output: Output,
    tally: Tally,
) -> None:
    """Compares y with the reference; x, y: (N, C, S) float32 or float64, `offset` elements into a channel."""
    images, channels, plane = x.shape
    got, high, low = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    allowed, tight, coarse = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    error, ratio = np.empty(BLOCK), np.empty(BLOCK)
    for image in range(images):
        for c in range(channels):
            if state[c] == UNJUDGED:
                continue
            own, rate = line_of(line, c), limits.rate[c]
            gamma, beta = abs(weight[c]), abs(own.bias)
            base, wide, size, cap = limits.base[c], limits.wide[c], limits.size[c], limits.cap[c]
            tight_base, tight_slope = limits.tight_base[c], limits.tight[c]
            for s in range(0, plane, BLOCK):
                m = min(BLOCK, plane - s)
                start = offset + image * plane + s
                y_row, x_row = y[image, c, s : s + m], x[image, c, s : s + m]
                for i in range(m):
                    got[i] = y_row[i]
                if state[c] == NONFINITE:
                    _count_finite(c, start, m, got, tally)
                    continue
                for i in range(m):
                    v = np.float64(x_row[i])
                    right, rest, distance = y_element(v, own)
                    high[i], low[i] = right, rest
                    xh = abs(distance) * rate
                    allowed[i], tight[i] = bounds.y_allowances(
                        training,
                        abs(v * own.scale) * rate,
                        xh,
                        abs(right),
                        limits.rounding,
                        base,
                        wide,
                        size,
                        tight_base,
                        tight_slope,
                        cap,
                    )
                    coarse[i] = 2.0**-bounds.POOR_BITS * (gamma * max(1.0, xh) + beta)
                _compare(
                    c, start, m, got, high, low, allowed, tight, coarse, error, ratio, output, tally
                )


@njit(cache=True, nogil=True)
def _compare_grad_input(
    x: Any,
    dy: Any,
    dx: Any,
    offset: int,
    training: bool,
    state: Any,
    line: Line,
    tangent: Tangent,
    limits: GradientBounds,
    output: Output,
    tally: Tally,
) -> None:
    """Compares grad_input with the reference; arguments as in _compare_y."""
    images, channels, plane = x.shape
    got, high, low = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    allowed, error, ratio = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    coarse = np.full(BLOCK, math.inf)
    for image in range(images):
        for c in range(channels):
            if state[c] == UNJUDGED:
                continue
            own, ours, rate = line_of(line, c), tangent_of(tangent, c), limits.rate[c]
            for s in range(0, plane, BLOCK):
                m = min(BLOCK, plane - s)
                start = offset + image * plane + s
                dx_row, dy_row = dx[image, c, s : s + m], dy[image, c, s : s + m]
                x_row = x[image, c, s : s + m]
                for i in range(m):
                    got[i] = dx_row[i]
                if state[c] == NONFINITE:
                    _count_finite(c, start, m, got, tally)
                    continue
                for i in range(m):
                    # In inference the gradient does not depend on x, which may even be infinite.
                    v = np.float64(x_row[i]) if training else 0.0
                    g = np.float64(dy_row[i])
                    right, rest, distance = grad_input_element(v, g, own, ours)
                    high[i], low[i] = right, rest
                    allowed[i] = bounds.grad_input_allowance(
                        training,
                        abs(v * own.scale) * rate,
                        abs(distance) * rate,
                        abs(g * ours.scale),
                        abs(right),
                        c,
                        limits,
                        ours.up,
                        ours.lift,
                    )
                _compare(
                    c,
                    start,
                    m,
                    got,
                    high,
                    low,
                    allowed,
                    allowed,
                    coarse,
                    error,
                    ratio,
                    output,
                    tally,
                )


@njit(cache=True, nogil=True)
def _constants(
    x: Any,
    y: Any,
    everywhere: bool,
    constant: Any,
    mean: Any,
    expected: Any,
    offset: int,
    misses: Any,
    error: Any,
    position: Any,
    seen: Any,
) -> None:
    """Counts elements that must equal the bias and do not, and finds their largest |y − bias|, per channel.

    In training those are whole channels (`everywhere`), in inference elements that equal the mean.
    """
    images, channels, plane = x.shape
    for image in range(images):
        for c in range(channels):
            if not constant[c]:
                continue
            right = expected[c]
            for s in range(plane):
                if everywhere or x[image, c, s] == mean[c]:
                    seen[c] += 1
                    value = y[image, c, s]
                    if value != right:
                        misses[c] += 1
                        difference = abs(np.float64(value) - right)
                        if math.isnan(difference):
                            difference = math.inf
                        if difference > error[c]:
                            error[c] = difference
                            position[c] = offset + image * plane + s


@njit(cache=True, nogil=True)
def _differ_y(
    x: Any,
    first: Any,
    second: Any,
    training: bool,
    state: Any,
    line: Line,
    limits: ElementBounds,
    error: Any,
    ratio: Any,
) -> None:
    """Raises error and ratio, (C,), to the largest |first − second|, also in units of twice its tight bound."""
    images, channels, plane = x.shape
    for image in range(images):
        for c in range(channels):
            if state[c] != OK:
                continue
            own, rate = line_of(line, c), limits.rate[c]
            base, wide, size, cap = limits.base[c], limits.wide[c], limits.size[c], limits.cap[c]
            tight_base, tight_slope = limits.tight_base[c], limits.tight[c]
            for s in range(plane):
                a, b = np.float64(first[image, c, s]), np.float64(second[image, c, s])
                if a == b or (math.isnan(a) and math.isnan(b)):
                    continue
                difference = abs(a - b)
                if not difference < math.inf:  # one of them is not finite
                    error[c] = ratio[c] = math.inf
                    continue
                v = np.float64(x[image, c, s])
                right, _, distance = y_element(v, own)
                _, tight = bounds.y_allowances(
                    training,
                    abs(v * own.scale) * rate,
                    abs(distance) * rate,
                    abs(right),
                    limits.rounding,
                    base,
                    wide,
                    size,
                    tight_base,
                    tight_slope,
                    cap,
                )
                error[c] = max(error[c], difference)
                ratio[c] = max(ratio[c], difference / (2.0 * tight))


# --- from kernels to measurements ------------------------------------------------------------------


def _index(case: Case, channel: int, position: int) -> tuple[int, ...]:
    plane = math.prod(case.shape[2:])
    image, s = divmod(position, plane)
    inner = np.unravel_index(s, case.shape[2:]) if case.shape[2:] else ()
    return (image, channel, *(int(i) for i in inner))


def flat(tensor: Array) -> Array:
    """An (N, C, *) tensor as (N, C, S)."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1], math.prod(tensor.shape[2:]))


def _summary(tally: Tally, state: npt.NDArray[np.int64]) -> tuple[int | None, dict[str, Any]]:
    """The worst channel and the fields that are plain maxima over the judged channels."""
    judged = np.flatnonzero((state != UNJUDGED) & (tally.position >= 0))
    if judged.size == 0:
        return None, {"judged": bool((state != UNJUDGED).any())}
    # A T that is not a number counts as infinite; argmax takes the first of equals.
    ratio = np.where(np.isnan(tally.ratio), math.inf, tally.ratio)
    worst = int(judged[np.argmax(ratio[judged])])
    return worst, {
        "max_abs_error": float(tally.error[judged].max()),
        "max_ulp_error": float(tally.ulps[judged].max()),
        "bound_ratio": float(ratio[judged].max()),
        "nonfinite": int(tally.nonfinite.sum()),
        "poor": int(tally.poor.sum()),
        "unjudged": int((state == UNJUDGED).sum()),
        "histogram": tuple(map(int, tally.histogram.sum(axis=0))),
    }


def measure_y(
    case: Case, x: Array, y: Array, norm: Normalization, running_mean: Array
) -> Measurement:
    """Deviation of y. x, y: (N, C, S) in the case's storage; running_mean: (C,) in its own values."""
    form = FORMATS[case.dtype]
    limits = bounds.y_bounds(norm, case.dtype)
    tally = _tally(x.shape[1])
    expected = widen(round_to(norm.bias, case.dtype), case.dtype).astype(np.float64)
    candidates = norm.y_state == OK
    if norm.training:
        candidates &= norm.constant
    misses, seen = np.zeros(x.shape[1], np.int64), np.zeros(x.shape[1], np.int64)
    error, place = np.zeros(x.shape[1]), np.zeros(x.shape[1], np.int64)
    plane = x.shape[2]
    for first, (xs, ys) in slabs(case.dtype, x, y):
        _compare_y(
            xs,
            ys,
            first * plane,
            norm.training,
            norm.y_state,
            norm.line,
            norm.weight,
            limits,
            _output(form),
            tally,
        )
        if candidates.any():
            _constants(
                xs,
                ys,
                norm.training,
                candidates,
                running_mean,
                expected,
                first * plane,
                misses,
                error,
                place,
                seen,
            )
    worst, fields = _summary(tally, norm.y_state)
    if worst is None:
        return Measurement(**fields)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.abs(norm.weight)
        sigma = np.where(tally.error > 0, tally.error / gain, 0.0)
        harm = np.where(error > 0, error / gain, 0.0)
    position = int(tally.position[worst])
    if fields["bound_ratio"] <= 1 and misses.any():
        # The bound finds no fault: what there is to show is the constant that is farthest off.
        worst = int(np.argmax(harm))
        position = int(place[worst])
    image, s = divmod(position, plane)
    return Measurement(
        **fields,
        tight_ratio=float(tally.tight.max()),
        max_sigma_error=float(sigma.max()),
        floor=float(bounds.floor(norm, case.dtype)[worst]),
        worst=Worst(
            _index(case, worst, position),
            float(widen(y[image, worst, s : s + 1], case.dtype)[0]),
            _y_value(norm, worst, float(widen(x[image, worst, s : s + 1], case.dtype)[0])),
        ),
        constant_misses=int(misses.sum()) if seen.any() else None,
        constant_error=float(harm.max()) if seen.any() else None,
    )


def difference_of_y(
    case: Case, x: Array, first: Array, second: Array, norm: Normalization
) -> tuple[float, float]:
    """The largest |first − second|, and the largest in units of twice the tight bound; all (N, C, S)."""
    limits = bounds.y_bounds(norm, case.dtype)
    error, ratio = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for _, (xs, a, b) in slabs(case.dtype, x, first, second):
        _differ_y(xs, a, b, norm.training, norm.y_state, norm.line, limits, error, ratio)
    return float(error.max(initial=0.0)), float(ratio.max(initial=0.0))


def _y_value(norm: Normalization, c: int, x: float) -> float:
    return float(y_element(x, line_of(norm.line, c))[0]) if norm.y_state[c] == OK else math.nan


def measure_grad_input(
    case: Case,
    x: Array,
    dy: Array,
    dx: Array,
    norm: Normalization,
    grads: Gradients,
    limits: GradientBounds,
) -> Measurement:
    """Deviation of grad_input; tensors (N, C, S) in the case's storage."""
    tally = _tally(x.shape[1])
    for first, (xs, dys, dxs) in slabs(case.dtype, x, dy, dx):
        _compare_grad_input(
            xs,
            dys,
            dxs,
            first * x.shape[2],
            norm.training,
            grads.state,
            norm.line,
            grads.tangent,
            limits,
            _output(FORMATS[case.dtype]),
            tally,
        )
    worst, fields = _summary(tally, grads.state)
    if worst is None:
        return Measurement(**fields)
    position = int(tally.position[worst])
    image, s = divmod(position, x.shape[2])
    here = (image, worst, slice(s, s + 1))
    reference = math.nan
    if grads.state[worst] == OK:
        value = float(widen(x[here], case.dtype)[0]) if norm.training else 0.0
        g = float(widen(dy[here], case.dtype)[0])
        own, ours = line_of(norm.line, worst), tangent_of(grads.tangent, worst)
        reference = float(grad_input_element(value, g, own, ours)[0])
    return Measurement(
        **fields,
        worst=Worst(
            _index(case, worst, position), float(widen(dx[here], case.dtype)[0]), reference
        ),
    )


def measure_channels(
    got: Array, right: Pair, allowance: Allowance, state: npt.NDArray[np.int64], dtype: str
) -> Measurement:
    """Deviation of a per-channel quantity, got: (C,) float. `dtype`: the statistics dtype."""
    form = FORMATS[dtype]
    judged = state != UNJUDGED
    if not judged.any():
        return Measurement(judged=False)
    value = got.astype(np.float64)
    with np.errstate(all="ignore"):
        finite, expected = np.isfinite(value), np.isfinite(right.high)
        expected &= state == OK
        # An overflow of the statistics dtype is an error of the value only where it need not happen.
        limit = form.largest * (1 + form.unit_roundoff / 2)
        rounds_up = np.isinf(value) & (np.sign(value) == np.sign(right.high))
        reach = np.abs(right.high) + allowance.allowed
        rounds_up &= (reach >= limit) & (reach < math.inf)
        wrong = judged & (finite != expected) & ~(expected & rounds_up)
        error = np.where(finite & expected, np.abs((value - right.high) - right.low), 0.0)
        error = np.where(wrong, math.inf, error)
        # Where nothing is wrong the allowance may be undefined, as it follows from the reference; where
        # something is, an infinite allowance forgives nothing.
        ratio = np.where(allowance.allowed < math.inf, error / allowance.allowed, math.inf)
        ratio = np.where(judged & (error != 0), ratio, 0.0)
        ulps = np.array([ulp(v, form.precision, form.min_exponent) for v in right.high.tolist()])
        counted = np.where(wrong | ~judged, 0.0, error)
        max_ulp_error = float(np.where(counted > 0, counted / ulps, 0.0).max())
    worst = int(np.argmax(np.where(np.isnan(ratio), math.inf, ratio)))
    tight = None
    if allowance.tight is not None:
        with np.errstate(all="ignore"):
            tight = float(np.where(judged & (error != 0), error / allowance.tight, 0.0).max())
    return Measurement(
        max_abs_error=float(counted.max()),
        max_ulp_error=max_ulp_error,
        bound_ratio=float(ratio[worst]) if not math.isnan(ratio[worst]) else math.inf,
        tight_ratio=tight,
        nonfinite=int(wrong.sum()),
        worst=Worst((worst,), float(value[worst]), float(right.high[worst])),
    )


def measure_unchanged(got: Doubles, start: Doubles) -> Measurement:
    """Running statistics that must be as they were, bit for bit; any NaN is as good as another."""
    same = (got == start) & (np.signbit(got) == np.signbit(start))
    moved = ~(same | (np.isnan(got) & np.isnan(start)))
    worst = int(np.argmax(moved))
    with np.errstate(invalid="ignore"):
        error = np.where(moved & np.isfinite(got - start), np.abs(got - start), 0.0)
    return Measurement(
        max_abs_error=float(error.max()),
        max_ulp_error=math.inf if moved.any() else 0.0,
        bound_ratio=math.inf if moved.any() else 0.0,
        nonfinite=int((moved & (np.isfinite(got) != np.isfinite(start))).sum()),
        worst=Worst((worst,), float(got[worst]), float(start[worst])),
    )
