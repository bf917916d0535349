"""The yardsticks do what their names say: order of additions, errors, edges."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _numpy

Array = npt.NDArray[Any]

YARDSTICKS = {
    "one-pass": _numpy.one_pass,
    "two-pass": _numpy.two_pass,
    "two-pass-sequential": _numpy.two_pass_sequential,
    "welford": _numpy.welford,
    "welford-regions-64": _numpy.welford_regions_64,
    "welford-regions-1024": _numpy.welford_regions_1024,
    "welford-sequential": _numpy.welford_sequential,
    "shifted": _numpy.shifted,
}
EXACT_ON_CONSTANTS = (
    *("welford", "welford-regions-64", "welford-regions-1024", "welford-sequential", "shifted"),
)
every = pytest.mark.parametrize("name", YARDSTICKS)
both = pytest.mark.parametrize("dtype", ["float32", "float64"])


def drawn(shape: tuple[int, ...], dtype: str, seed: int = 0, offset: float = 0) -> Array:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return (values + offset).astype(dtype)


def run(name: str, x: Array, **options: Any) -> dict[str, Array]:
    count = x.shape[1]
    options = {
        "weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": 1e-5,
        "running_mean": np.zeros(count, x.dtype), "running_var": np.ones(count, x.dtype), **options,
    }  # fmt: skip
    return YARDSTICKS[name](x, **options)


def per_channel(values: Array, rank: int) -> Array:
    return values.reshape((1, -1) + (1,) * (rank - 2))


# --- sums -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000])
def test_pairwise_sums_stay_within_the_error_of_a_balanced_tree(n: int, dtype: str) -> None:
    rows = drawn((3, n), dtype, offset=1)
    depth, u = math.ceil(math.log2(n)), np.finfo(dtype).eps / 2
    for row, total in zip(rows, _numpy.pairwise(rows), strict=True):
        exact = math.fsum(row)
        assert abs(float(total) - exact) <= 1.01 * depth * u * math.fsum(abs(row)) + 1e-300


def test_pairwise_sums_add_the_second_half_to_the_first() -> None:
    big = np.float32(2.0**30)
    # Adding 1 to 2^30 is lost, so what is left counts the ones that were not joined with it in time.
    row = np.ones((1, 8), np.float32)
    row[0, 0], row[0, 4] = big, -big
    assert _numpy.pairwise(row)[0] == 6  # 0 and 4 meet first
    row = np.ones((1, 8), np.float32)
    row[0, 0], row[0, 1] = big, -big
    assert _numpy.pairwise(row)[0] == 0  # 0 and 1 meet last
    row = np.ones((1, 5), np.float32)
    row[0, 2], row[0, 0] = big, -big
    assert _numpy.pairwise(row)[0] == 2  # 2 has no partner among five and meets 0 next


@both
def test_sequential_sums_are_one_chain(dtype: str) -> None:
    rows = drawn((2, 500), dtype, offset=3)
    for row, total in zip(rows, _numpy.sequential(rows), strict=True):
        chain = row[0]
        for value in row[1:]:
            chain = chain + value
        assert total == chain
        assert chain.dtype == np.dtype(dtype)


# --- mean and variance ------------------------------------------------------------------------------


@every
@both
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 3), (3, 2, 2, 5), (4, 2, 65), (2, 2, 2, 3, 6)])
def test_moments_are_close_to_exact_on_well_conditioned_channels(
    name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    x = drawn(shape, dtype, offset=0.5)
    got = run(name, x)
    n = x.size // shape[1]
    u = np.finfo(dtype).eps / 2
    for c in range(shape[1]):
        values = [Fraction(float(v)) for v in x[:, c].ravel()]
        mean = sum(values) / n
        var = sum((v - mean) ** 2 for v in values) / n
        size = float(sum(abs(v) for v in values) / n)
        assert abs(float(got["batch_mean"][c]) - float(mean)) <= 4 * (n + 4) * u * size
        square = float(var + mean * mean + (values[0] - mean) ** 2)
        assert abs(float(got["batch_var"][c]) - float(var)) <= 4 * (n + 8) * u * square


def reduced(lanes: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
    """A block of 256 lanes reduced as warps of 32, then as 8 warps: second halves into first, None left out."""
    parts = [*lanes, *[None] * (256 - len(lanes))]
    for group in (32, 8):
        groups = [parts[k : k + group] for k in range(0, len(parts), group)]
        for half in (group // 2**k for k in range(1, group.bit_length())):
            groups = [
                [a if b is None else merge(a, b) for a, b in zip(g[:half], g[half:], strict=True)]
                for g in groups
            ]
        parts = [part for (part,) in groups]
    return parts[0]


@both
@pytest.mark.parametrize("n", [1, 2, 9, 31, 33, 65, 200, 255, 257, 1000, 16384, 16385, 33000])
def test_welford_deals_to_lanes_in_blocks_of_256_and_merges_them_in_trees(
    n: int, dtype: str
) -> None:
    x, dy = drawn((1, 1, n), dtype, offset=10), drawn((1, 1, n), dtype, 1, offset=1)
    real = np.dtype(dtype).type
    blocks = math.ceil(n / (256 * 64))
    lanes, sums = [], []
    for lane in range(min(n, 256 * blocks)):
        count, mean, m2, total = 0, real(0), real(0), real(0)
        for value, g in zip(
            x[0, 0, lane :: 256 * blocks], dy[0, 0, lane :: 256 * blocks], strict=True
        ):
            count += 1
            delta = value - mean
            mean = mean + delta / real(count)
            m2 = m2 + delta * (value - mean)
            total = total + g
        assert count <= 64
        lanes.append((count, mean, m2))
        sums.append(total)

    def merge(a: Any, b: Any) -> Any:
        (na, mean_a, m2_a), (nb, mean_b, m2_b) = a, b
        share, delta = real(nb) / real(na + nb), mean_b - mean_a
        m2 = (m2_a + m2_b) + delta * delta * (real(na) * share)
        return na + nb, mean_a + delta * share, m2

    def add(a: Any, b: Any) -> Any:
        return a + b

    def whole(parts: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
        return reduced(
            [reduced(parts[k : k + 256], merge) for k in range(0, len(parts), 256)], merge
        )

    got = run("welford", x, bias=np.zeros(1, dtype), grad_output=dy)
    _, mean, m2 = whole(lanes, merge)
    assert (got["batch_mean"][0], got["batch_var"][0]) == (mean, m2 / real(n))
    assert got["grad_bias"][0] == whole(sums, add)


@both
@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 129, 640, 700])
def test_regions_are_runs_of_elements_whose_neighbours_are_merged(n: int, dtype: str) -> None:
    x = drawn((n, 1), dtype, offset=100)
    real = x.dtype.type

    def recurrence(values: Array) -> tuple[int, Any, Any]:
        mean = m2 = real(0)
        for count, value in enumerate(values, 1):
            delta = value - mean
            mean += delta / real(count)
            m2 += delta * (value - mean)
        return len(values), mean, m2

    def merge(a: tuple[int, Any, Any], b: tuple[int, Any, Any]) -> tuple[int, Any, Any]:
        count = a[0] + b[0]
        share, delta = real(b[0]) / real(count), b[1] - a[1]
        return count, a[1] + delta * share, (a[2] + b[2]) + delta * delta * (real(a[0]) * share)

    regions = [recurrence(x[start : start + 64, 0]) for start in range(0, n, 64)]
    while len(regions) > 1:
        pairs = zip(regions[::2], regions[1::2], strict=False)
        regions = [*(merge(a, b) for a, b in pairs), *regions[len(regions) & ~1 :]]
    _, mean, m2 = regions[0]
    got = run("welford-regions-64", x)
    assert (got["batch_mean"][0], got["batch_var"][0]) == (mean, m2 / real(n))


@both
def test_compiled_welford_has_the_bits_of_the_recurrence(dtype: str) -> None:
    rows = drawn((3, 100), dtype, offset=5)
    compiled, plain = np.zeros((2, 3), dtype), np.zeros((2, 3), dtype)
    _numpy._compiled_recurrence()(rows, *compiled)
    _numpy._welford_recurrence(rows, *plain)
    assert compiled.tobytes() == plain.tobytes()


def test_one_pass_loses_the_variance_of_a_large_offset_and_the_others_do_not() -> None:
    x = drawn((8, 4, 28, 28), "float32", offset=1e4)
    right = x.astype(np.float64).var(axis=(0, 2, 3))
    error = {name: np.abs(run(name, x)["batch_var"] - right).max() for name in YARDSTICKS}
    assert error["one-pass"] > 1
    assert max(error[name] for name in ("two-pass", "welford", "shifted")) < 1e-3


def test_shifted_fails_when_the_first_element_is_an_outlier() -> None:
    x = drawn((1, 1, 100_000), "float32")
    x[0, 0, 0] = 1e6
    exact = x.astype(np.float64)
    y = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    error = {name: np.abs(run(name, x)["y"] - y).max() for name in ("shifted", "two-pass")}
    assert error["shifted"] > 100 * error["two-pass"]


# --- constant channels: the rows of the seed thread's table ------------------------------------------

VALUES = (1, 10, 100, 1000, 0.1, 3.3, 12345.678)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (8, 4, 28, 28), (3, 1, 777)])
@pytest.mark.parametrize("value", [*VALUES, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("name", EXACT_ON_CONSTANTS)
def test_welford_and_shifted_give_exactly_the_bias_on_constants(
    name: str, value: float, shape: tuple[int, ...]
) -> None:
    x = np.full(shape, value, np.float32)
    bias = np.full(shape[1], np.float32(0.7))
    got = run(name, x, weight=bias, bias=bias)
    assert (got["batch_mean"] == np.float32(value)).all()
    assert (got["batch_var"] == 0).all()
    assert (got["y"] == np.float32(0.7)).all()


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (8, 4, 28, 28)])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["one-pass", "two-pass"])
def test_pairwise_sums_of_the_tabled_constants_are_exact_or_an_ulp_off(
    name: str, value: float, shape: tuple[int, ...]
) -> None:
    mean = run(name, np.full(shape, value, np.float32))["batch_mean"]
    assert (np.abs(mean - np.float32(value)) <= np.spacing(np.float32(value))).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            (1, 1, 3, 3),
            [
                ("1", "0"),
                ("10", "0"),
                ("100", "0"),
                ("1000", "0"),
                ("0.100000009", "-2.35608e-06"),
                ("3.29999971", "7.53946e-05"),
                ("12345.6787", "-0.295067"),
            ],
        ),
        (
            (8, 4, 28, 28),
            [
                ("1", "0"),
                ("10", "0"),
                ("100", "0"),
                ("1000", "0"),
                ("0.0999990255", "0.000308647"),
                ("3.3000536", "-0.0169613"),
                ("12344.8242", "0.999977"),
            ],
        ),
    ],
)
def test_sequential_two_pass_gives_the_tabled_means_and_outputs(
    shape: tuple[int, ...], expected: list[tuple[str, str]]
) -> None:
    found = []
    for value in VALUES:
        got = run("two-pass-sequential", np.full(shape, value, np.float32))
        (mean,) = np.unique(got["batch_mean"])
        y = got["y"].ravel()
        found.append((f"{mean:.9g}", f"{y[np.abs(y).argmax()]:.6g}"))
    assert found == expected


# --- the layer --------------------------------------------------------------------------------------


@every
@both
def test_outputs_and_gradients_agree_with_the_formulas(name: str, dtype: str) -> None:
    shape = (4, 3, 5, 7)
    x, dy = drawn(shape, dtype, 1, offset=1), drawn(shape, dtype, 2)
    weight, bias = drawn((3,), dtype, 3), drawn((3,), dtype, 4)
    before = drawn((3,), dtype, 5), np.abs(drawn((3,), dtype, 6))
    got = run(
        name, x, weight=weight, bias=bias, running_mean=before[0], running_var=before[1],
        grad_output=dy, momentum=0.25,
    )  # fmt: skip
    assert {value.dtype for value in got.values()} == {np.dtype(dtype)}

    exact, g, axes = x.astype(np.longdouble), dy.astype(np.longdouble), (0, 2, 3)
    mean, var = exact.mean(axis=axes), exact.var(axis=axes)
    std = per_channel(np.sqrt(var + 1e-5), 4)
    xhat = (exact - per_channel(mean, 4)) / std
    w = per_channel(weight, 4)
    slope = (
        g - per_channel(g.mean(axis=axes), 4) - per_channel((g * xhat).mean(axis=axes), 4) * xhat
    )
    expected = {
        "y": xhat * w + per_channel(bias, 4),
        "batch_mean": mean,
        "batch_var": var,
        "running_mean": 0.75 * before[0] + 0.25 * mean,
        "running_var": 0.75 * before[1] + 0.25 * var * 140 / 139,
        "grad_input": w * slope / std,
        "grad_weight": (g * xhat).sum(axis=axes),
        "grad_bias": g.sum(axis=axes),
    }
    assert got.keys() == expected.keys()
    for quantity, right in expected.items():
        assert got[quantity].shape == right.shape
        error = np.abs(got[quantity] - right).max()
        assert error <= 500 * np.finfo(dtype).eps, quantity


@every
@both
def test_inference_uses_the_running_statistics_and_leaves_them(name: str, dtype: str) -> None:
    x, dy = drawn((4, 3, 5), dtype), drawn((4, 3, 5), dtype, 1)
    weight, bias = drawn((3,), dtype, 2), drawn((3,), dtype, 3)
    mean, var = drawn((3,), dtype, 4), np.abs(drawn((3,), dtype, 5))
    got = run(
        name, x, weight=weight, bias=bias, running_mean=mean, running_var=var, training=False,
        grad_output=dy,
    )  # fmt: skip
    assert got.keys() == {"y", "grad_input", "grad_weight", "grad_bias"}
    invstd = 1 / np.sqrt(var + x.dtype.type(1e-5))
    xhat = (x - mean[:, None]) * invstd[:, None]
    np.testing.assert_array_equal(got["y"], xhat * weight[:, None] + bias[:, None])
    np.testing.assert_array_equal(got["grad_input"], dy * (invstd * weight)[:, None])
    tolerance = {"rtol": 0, "atol": 50 * np.finfo(dtype).eps}
    np.testing.assert_allclose(got["grad_weight"], (dy * xhat).sum(axis=(0, 2)), **tolerance)
    np.testing.assert_allclose(got["grad_bias"], dy.sum(axis=(0, 2)), **tolerance)


@every
def test_gradients_are_returned_for_the_parameters_there_are(name: str) -> None:
    x, one = drawn((4, 3, 5), "float32"), np.ones(3, np.float32)
    assert {"grad_weight", "grad_bias"}.isdisjoint(run(name, x, grad_output=x))
    assert "grad_bias" not in run(name, x, weight=one, grad_output=x)
    assert "grad_input" not in run(name, x, weight=one)


@every
def test_memory_format_changes_nothing(name: str) -> None:
    x = drawn((3, 4, 5, 6), "float32")
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    gaps = np.full((3, 4, 5, 12), np.nan, np.float32)[..., ::2]
    gaps[...] = x
    a = run(name, x, grad_output=x)
    for strided in (last, gaps):
        b = run(name, strided, grad_output=strided)
        assert all(a[quantity].tobytes() == b[quantity].tobytes() for quantity in a)


@every
@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 1, 9), (1, 3, 9)])
def test_inputs_stay_as_they_are(name: str, shape: tuple[int, ...]) -> None:
    x, one = drawn(shape, "float32"), np.ones(shape[1], np.float32)
    given = {
        "weight": one.copy(), "bias": one.copy(), "running_mean": one.copy(),
        "running_var": one.copy(), "grad_output": x.copy(),
    }  # fmt: skip
    before = x.copy()
    run(name, x, **given)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(given.pop("grad_output"), before)
    assert all((values == 1).all() for values in given.values())


@every
def test_one_value_per_channel_gives_the_bias(name: str) -> None:
    x, bias = drawn((1, 3), "float32"), np.arange(3, dtype=np.float32)
    got = run(name, x, bias=bias, grad_output=x)
    assert got["y"].tolist() == [[0, 1, 2]]
    assert got["grad_input"].tolist() == [[0, 0, 0]]
    np.testing.assert_allclose(got["running_var"], 0.9, rtol=1e-6)


@every
def test_an_empty_batch_leaves_everything_as_it_was(name: str) -> None:
    x, one = np.zeros((0, 2, 3), np.float32), np.ones(2, np.float32)
    got = run(name, x, weight=one, bias=one, grad_output=x)
    assert got["y"].shape == got["grad_input"].shape == (0, 2, 3)
    assert (got["running_mean"].tolist(), got["running_var"].tolist()) == ([0, 0], [1, 1])
    assert got["grad_weight"].tolist() == got["grad_bias"].tolist() == [0, 0]
    assert run(name, x, training=False).keys() == {"y"}


@every
def test_a_value_that_is_not_finite_spoils_its_channel_silently(name: str) -> None:
    x = drawn((4, 3, 100), "float32")
    clean = run(name, x, grad_output=x)
    for bad in (np.nan, np.inf):
        x[2, 1, 7] = bad
        got = run(name, x, grad_output=x)
        assert np.isnan(got["y"][:, 1]).all()
        for quantity in ("y", "grad_input"):
            assert (got[quantity][:, ::2] == clean[quantity][:, ::2]).all()


@every
def test_squares_that_overflow_do_so_silently(name: str) -> None:
    x = drawn((2, 2, 100), "float32") * np.float32(1e20)
    assert not (np.isfinite(run(name, x)["batch_var"])).any()


@every
def test_yardsticks_take_widened_16_bit_values(name: str) -> None:
    assert YARDSTICKS[name].widened


def test_only_sequential_welford_needs_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(_numpy.unavailable(f"{name}@cpu") is None for name in YARDSTICKS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = {name for name in YARDSTICKS if _numpy.unavailable(f"{name}@cpu")}
    assert missing == {"welford-sequential"}
    assert "pip install numba" in str(_numpy.unavailable("welford-sequential@cpu"))
