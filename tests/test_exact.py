"""`exact` against rational arithmetic: every number it returns is the nearest there is."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from adversarial import CATEGORIES, Draw, channels, stored

from bnaudit.bounds import FORMATS
from bnaudit.worker.backends import _exact
from bnaudit.worker.rounding import DTYPES, round_to, statistics_dtype, storage, widen, widen64

Array = npt.NDArray[Any]
F0 = Fraction(0)


def fraction(value: Any) -> Fraction:
    return Fraction(float(value))


def on_grid(position: int, dtype: str) -> Fraction:
    """The numbers of a dtype in order, 0 at position 0; one past the largest stands for infinity."""
    magnitude = abs(position)
    form = FORMATS[dtype]
    exponent, rest = divmod(magnitude, 2 ** (form.precision - 1))
    whole = rest if exponent == 0 else rest + 2 ** (form.precision - 1)
    value: Fraction = whole * fraction(form.smallest) * 2 ** max(exponent - 1, 0)
    return value if position >= 0 else -value


def position(stored_value: Any, dtype: str) -> int:
    """Inverse of on_grid, from the storage of a dtype."""
    width = storage(dtype).itemsize
    bits = int(np.asarray(stored_value).view(f"u{width}"))
    sign = 1 << (8 * width - 1)
    return -(bits - sign) if bits & sign else bits


def compare(a: Fraction, square: Fraction, number: Fraction) -> int:
    """Sign of a / sqrt(square) - number, in integers only."""
    left, right = a * abs(a), number * abs(number) * square
    return (left > right) - (left < right)


def assert_nearest(
    got: Any, dtype: str, a: Fraction, square: Fraction = Fraction(1), b: Fraction = F0
) -> None:
    """The stored value `got` is a / sqrt(square) + b, rounded to nearest, ties to even."""
    value = float(widen64(np.asarray(got), dtype))
    assert not math.isnan(value)
    here = position(got, dtype)
    if value != -math.inf:
        below = (on_grid(here - 1, dtype) + on_grid(here, dtype)) / 2
        order = compare(a, square, below - b)
        assert order > 0 or (order == 0 and here % 2 == 0), f"{value!r} is too large"
    if value != math.inf:
        above = (on_grid(here + 1, dtype) + on_grid(here, dtype)) / 2
        order = compare(a, square, above - b)
        assert order < 0 or (order == 0 and here % 2 == 0), f"{value!r} is too small"


def parameters(count: int, dtype: str, seed: int) -> tuple[Array, Array]:
    """A weight and a bias for each channel, one of them 0 now and then, in the statistics dtype."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal(count), 10 * rng.standard_normal(count)
    weight[rng.random(count) < 0.1] = 0
    bias[rng.random(count) < 0.3] = 0
    kind = storage(statistics_dtype(dtype))
    return weight.astype(kind), bias.astype(kind)


def call(
    x: Array, dtype: str, weight: Array | None = None, bias: Array | None = None, **options: Any
) -> dict[str, Array]:
    """Runs exact on stored x and grad_output, and rounds y and grad_input as the worker does."""
    kind = storage(statistics_dtype(dtype))
    count = x.shape[1]
    running = options.pop("running", (np.zeros(count, kind), np.ones(count, kind)))
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, **options}
    if "grad_output" in options:
        options["grad_output"] = widen(options["grad_output"], dtype)
    outputs = _exact.exact(widen(x, dtype), weight, bias, *running, **options)
    for name in ("y", "grad_input"):
        if name in outputs:
            outputs[name] = round_to(outputs[name], dtype)
    return outputs


def rational_rows(x: Array, dtype: str) -> list[list[Fraction]]:
    wide = widen64(x, dtype)
    return [[fraction(v) for v in wide[:, c].ravel()] for c in range(x.shape[1])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", CATEGORIES)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 60])
def test_everything_in_training_is_correctly_rounded(draw: Draw, dtype: str, n: int) -> None:
    x = channels(draw, dtype, n, 3, seed=1)
    dy = channels(CATEGORIES[0], dtype, n, 3, seed=2)
    weight, bias = parameters(3, dtype, n)
    statistics = statistics_dtype(dtype)
    eps, momentum = 1e-5, 0.3
    running = (bias, abs(weight))
    got = call(x, dtype, weight, bias, running=running, momentum=momentum, eps=eps, grad_output=dy)
    for c, (xs, dys) in enumerate(
        zip(rational_rows(x, dtype), rational_rows(dy, dtype), strict=True)
    ):
        mean = sum(xs, F0) / n
        var = sum(((v - mean) ** 2 for v in xs), F0) / n
        w, b, square = fraction(weight[c]), fraction(bias[c]), var + Fraction(eps)
        assert_nearest(got["batch_mean"][c], statistics, mean)
        assert_nearest(got["batch_var"][c], statistics, var)
        assert_nearest(got["invstd"][c], statistics, Fraction(1), square)
        keep, new = 1 - Fraction(momentum), Fraction(momentum)
        assert_nearest(got["running_mean"][c], statistics, keep * b + new * mean)
        unbiased = var * n / max(n - 1, 1)
        assert_nearest(got["running_var"][c], statistics, keep * abs(w) + new * unbiased)
        total = sum(dys, F0)
        product = sum((g * (v - mean) for g, v in zip(dys, xs, strict=True)), F0)
        assert_nearest(got["grad_bias"][c], statistics, total)
        assert_nearest(got["grad_weight"][c], statistics, product, square)
        y, dx = got["y"][:, c].ravel(), got["grad_input"][:, c].ravel()
        for i, (v, g) in enumerate(zip(xs, dys, strict=True)):
            assert_nearest(y[i], dtype, w * (v - mean), square, b)
            slope = g - total / n - (v - mean) * product / (n * square)
            assert_nearest(dx[i], dtype, w * slope, square)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", CATEGORIES)
def test_everything_in_inference_is_correctly_rounded(draw: Draw, dtype: str) -> None:
    n = 24
    x = channels(draw, dtype, n, 4, seed=3)
    dy = channels(CATEGORIES[0], dtype, n, 4, seed=4)
    weight, bias = parameters(4, dtype, 5)
    wide = widen64(x, dtype)
    kind = storage(statistics_dtype(dtype))
    means = np.array([0, wide[0, 1, 0], 1e3, 0]).astype(kind)
    variances = np.array([1, 0, 1e-6, 4]).astype(kind)
    for eps in (1e-5, 0.0):
        got = call(
            x, dtype, weight, bias, running=(means, variances), training=False, eps=eps,
            grad_output=dy,
        )  # fmt: skip
        assert "running_mean" not in got
        rows = zip(rational_rows(x, dtype), rational_rows(dy, dtype), strict=True)
        for c, (xs, dys) in enumerate(rows):
            mean, square = fraction(means[c]), fraction(variances[c]) + Fraction(eps)
            y, dx = got["y"][:, c].ravel(), got["grad_input"][:, c].ravel()
            if square == 0:
                assert np.isnan(widen64(y, dtype)).all()
                continue
            w, b = fraction(weight[c]), fraction(bias[c])
            product = sum((g * (v - mean) for g, v in zip(dys, xs, strict=True)), F0)
            assert_nearest(got["grad_weight"][c], statistics_dtype(dtype), product, square)
            for i, (v, g) in enumerate(zip(xs, dys, strict=True)):
                assert_nearest(y[i], dtype, w * (v - mean), square, b)
                assert_nearest(dx[i], dtype, w * g, square)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elements_whose_bias_cancels_are_correctly_rounded(dtype: str) -> None:
    x = channels(CATEGORIES[0], dtype, 64, 1, seed=5)
    y = call(x, dtype)["y"]
    # The bias is minus the rounded first element: what is left there is its rounding error.
    weight, bias = np.ones(1, y.dtype), -y[0, :1, 0]
    got = call(x, dtype, weight, bias)["y"].ravel()
    (xs,) = rational_rows(x, dtype)
    mean = sum(xs, F0) / 64
    square = sum(((v - mean) ** 2 for v in xs), F0) / 64 + Fraction(1e-5)
    for value, v in zip(got, xs, strict=True):
        assert_nearest(value, dtype, v - mean, square, fraction(bias[0]))
    assert 0 < abs(got[0]) < 2.0**-20


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fast_path_agrees_with_integers_everywhere(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.concatenate([channels(draw, dtype, 400, 2, seed=6) for draw in CATEGORIES], axis=1)
    dy = channels(CATEGORIES[0], dtype, 400, x.shape[1], seed=7)
    weight, bias = parameters(x.shape[1], dtype, 8)
    zero, one = np.zeros_like(weight), np.ones_like(weight)

    def run() -> dict[str, Array]:
        return _exact.exact(
            widen(x, dtype), weight, bias, zero, one,
            training=True, momentum=0.1, eps=1e-5, grad_output=widen(dy, dtype),
        )  # fmt: skip

    fast = run()
    monkeypatch.setattr(_exact, "ERROR", math.inf)
    slow = run()
    for name, values in fast.items():
        assert values.tobytes() == slow[name].tobytes(), name


def test_the_fast_path_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    undecided: list[int] = []

    def count(result: Array, flags: Array, *rest: Any) -> None:
        undecided.append(int(flags.sum()))

    monkeypatch.setattr(_exact, "_settle", count)
    for dtype in DTYPES:
        x = channels(CATEGORIES[1], dtype, 2000, 3, seed=9)
        call(x, dtype, grad_output=channels(CATEGORIES[0], dtype, 2000, 3, seed=9))
    assert undecided == [0] * 8


def test_double_double_errors_stay_below_their_bounds() -> None:
    rng = np.random.default_rng(3)
    high = rng.uniform(-2, 2, (2, 2000)) * 2.0 ** rng.integers(-60, 60, (2, 2000))
    high[1, ::2] = -high[0, ::2] * (1 + rng.integers(-2, 3, 1000) * 2.0**-52)  # cancellation
    low = high * rng.uniform(-1, 1, (2, 2000)) * 2.0**-54
    a, b = (high[0], low[0]), (high[1], low[1])
    for operation, units in ((_exact._add, 4), (_exact._multiply, 7)):
        result = operation(a, b)
        for i in range(2000):
            left, right = (fraction(p[0][i]) + fraction(p[1][i]) for p in (a, b))
            exact = left + right if units == 4 else left * right
            error = fraction(result[0][i]) + fraction(result[1][i]) - exact
            assert abs(error) <= units * Fraction(2) ** -106 * abs(exact)


def test_a_mean_that_no_three_numbers_hold_is_still_exact() -> None:
    big, tiny = 2.0**1000, 2.0**-1000
    x = np.array([2 * big, 2 * big, tiny, 4 * big]).reshape(4, 1)
    weight, bias = np.array([2.0**1020]), np.zeros(1)
    y = call(x, "float64", weight, bias)["y"]
    xs = [fraction(v) for v in x[:, 0]]
    mean = sum(xs, F0) / 4
    square = sum(((v - mean) ** 2 for v in xs), F0) / 4 + Fraction(1e-5)
    assert y[0, 0] < 0
    assert_nearest(y[0, 0], "float64", fraction(weight[0]) * (xs[0] - mean), square)


def test_sums_are_exact_over_the_whole_range_of_float64() -> None:
    rng = np.random.default_rng(0)
    a = np.ldexp(rng.uniform(-1, 1, 40000), rng.integers(-1074, 1024, 40000))
    b = rng.permutation(a)
    assert _exact.exact_sum(a) == sum(map(fraction, a), F0)
    assert _exact.exact_sum(a, b) == sum(
        (fraction(p) * fraction(q) for p, q in zip(a, b, strict=True)), F0
    )
    full = np.full(10**6, 2.0 - 2.0**-52)
    assert _exact.exact_sum(full, -full) == -(10**6) * fraction(full[0]) ** 2


@pytest.mark.parametrize("value", [0.1, 3.3, 1e8, 5e-324, 1.7e308, -0.0])
def test_a_constant_channel_gives_exactly_the_bias(value: float) -> None:
    x = np.full((2, 1, 5), value)
    got = call(x, "float64", np.array([3.0]), np.array([0.7]), grad_output=np.ones_like(x))
    assert (got["y"] == 0.7).all()
    assert got["batch_mean"][0] == value
    assert got["batch_var"][0] == 0
    assert (got["grad_input"] == 0).all()


def test_a_value_that_is_not_finite_spoils_its_channel_in_training() -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 2)).astype(np.float32)
    clean = call(x, "float32", grad_output=x)
    x[1, 1, 0] = np.inf
    got = call(x, "float32", grad_output=x)
    for name, values in got.items():
        channel = 1 if values.ndim == 3 else 0
        assert np.isnan(np.take(values, 1, channel)).all(), name
        others = np.delete(values, 1, channel)
        assert others.tobytes() == np.delete(clean[name], 1, channel).tobytes(), name


def test_a_value_that_is_not_finite_stays_alone_in_inference() -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 2)).astype(np.float32)
    weight, bias = np.array([1, -2, 3], np.float32), np.zeros(3, np.float32)
    clean = call(x, "float32", weight, bias, training=False)["y"]
    x[1, 1, 0], x[0, 2, 1] = np.inf, np.nan
    got = call(x, "float32", weight, bias, training=False)["y"]
    assert got[1, 1, 0] == -np.inf
    assert np.isnan(got[0, 2, 1])
    touched = ~np.isfinite(x)
    assert got[~touched].tobytes() == clean[~touched].tobytes()


def test_no_variance_and_no_eps_give_no_number() -> None:
    got = call(np.ones((3, 1, 2)), "float64", eps=0.0)
    assert np.isnan(got["y"]).all()
    assert np.isnan(got["invstd"]).all()
    assert got["batch_mean"][0] == 1


def test_planted_statistics_without_eps_are_exact() -> None:
    spread = np.tile([-0.5, 0.5], 512).reshape(16, 1, 64)
    got = call(stored(100 + spread, "float16"), "float16", eps=0.0)
    assert (got["y"].astype(np.float64) == 2 * spread).all()


def test_bfloat16_is_rounded_once() -> None:
    # y = x - mean + bias = 1 + 2^-8 + 2^-40, just above the middle between two bfloat16 numbers.
    x = stored(np.array([[1.0]]), "bfloat16")
    bias = np.array([2.0**-8], np.float32)
    running = (np.array([-(2.0**-40)], np.float32), np.ones(1, np.float32))
    got = call(
        x, "bfloat16", np.ones(1, np.float32), bias, running=running, training=False, eps=0.0
    )
    assert widen64(got["y"], "bfloat16") == 1.0078125


def test_rounding_to_odd_keeps_what_is_representable() -> None:
    assert _exact.to_odd(Fraction(3, 4)) == 0.75
    third = _exact.to_odd(Fraction(1, 3))
    assert np.float64(third).view(np.int64) & 1
    assert abs(Fraction(third) - Fraction(1, 3)) < Fraction(2) ** -54
    just_above = _exact.to_odd(1 + Fraction(1, 10**40))
    just_below = _exact.to_odd(1 - Fraction(1, 10**40))
    assert (just_above, just_below) == (1 + 2.0**-52, 1 - 2.0**-53)


def test_memory_format_changes_nothing() -> None:
    x = np.random.default_rng(2).standard_normal((3, 4, 5, 6)).astype(np.float32)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    a, b = call(x, "float32", grad_output=x), call(last, "float32", grad_output=last)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_an_empty_batch_leaves_everything_as_it_was() -> None:
    x = np.zeros((0, 2, 3), np.float32)
    one = np.ones(2, np.float32)
    got = call(x, "float32", one, one, grad_output=x)
    assert got["y"].shape == got["grad_input"].shape == (0, 2, 3)
    assert got["running_mean"].tolist() == [0, 0]
    assert got["running_var"].tolist() == [1, 1]
    assert got["grad_weight"].tolist() == got["grad_bias"].tolist() == [0, 0]


def test_too_many_elements_are_refused() -> None:
    with pytest.raises(
        NotImplementedError, match="takes up to 1000000 elements, these are 1000001"
    ):
        call(np.zeros((1, 1, 10**6 + 1), np.float32), "float32")
