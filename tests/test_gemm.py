"""`gemm` against float64 and extended precision: the sequence, whatever the BLAS's order of additions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _gemm

Array = npt.NDArray[Any]

DTYPES = ("float32", "float64")
SHAPES = [(1, 1, 3, 3), (4, 3), (2, 5, 7), (8, 4, 14, 14), (3, 2, 4, 3, 5), (1, 6, 1, 1)]


def drawn(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def run(x: Array, **options: Any) -> dict[str, Array]:
    count = x.shape[1]
    options = {
        "weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": 1e-5,
        "running_mean": np.zeros(count, x.dtype), "running_var": np.ones(count, x.dtype), **options,
    }  # fmt: skip
    return _gemm.gemm(x, **options)


def per_channel(values: Array, rank: int) -> Array:
    return values.reshape((1, -1) + (1,) * (rank - 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_agree_with_the_formulas(shape: tuple[int, ...], dtype: str) -> None:
    x, dy = drawn(shape, dtype), drawn(shape, dtype, 1)
    weight, bias = drawn((shape[1],), dtype, 2), drawn((shape[1],), dtype, 3)
    before = drawn((shape[1],), dtype, 4), np.abs(drawn((shape[1],), dtype, 5))
    got = run(
        x, weight=weight, bias=bias, running_mean=before[0], running_var=before[1],
        grad_output=dy, eps=0.1, momentum=0.25,
    )  # fmt: skip
    assert {value.dtype for value in got.values()} == {np.dtype(dtype)}

    axes = (0, *range(2, x.ndim))
    n = x.size // shape[1]
    u = float(np.finfo(dtype).eps)
    exact, g = x.astype(np.longdouble), dy.astype(np.longdouble)
    mean, var = exact.mean(axis=axes), exact.var(axis=axes)
    std = per_channel(np.sqrt(var + 0.1), x.ndim)
    xhat = (exact - per_channel(mean, x.ndim)) / std
    w = per_channel(weight.astype(np.longdouble), x.ndim)
    slope = g - per_channel(g.mean(axis=axes), x.ndim)
    slope = slope - per_channel((g * xhat).mean(axis=axes), x.ndim) * xhat
    expected = {
        "y": xhat * w + per_channel(bias, x.ndim),
        "batch_mean": mean,
        "batch_var": var,
        "running_mean": 0.75 * before[0] + 0.25 * mean,
        "running_var": 0.75 * before[1] + 0.25 * var * n / max(n - 1, 1),
        "grad_input": w * slope / std,
        "grad_weight": (g * xhat).sum(axis=axes),
        "grad_bias": g.sum(axis=axes),
    }
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert got[name].shape == right.shape
        assert np.abs(got[name] - right).max() <= 4 * (n + 10) * u, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_uses_the_running_statistics_and_leaves_them(dtype: str) -> None:
    x, dy = drawn((4, 3, 5), dtype), drawn((4, 3, 5), dtype, 1)
    mean, var = drawn((3,), dtype, 2), np.abs(drawn((3,), dtype, 3))
    got = run(x, running_mean=mean, running_var=var, training=False, grad_output=dy)
    std = np.sqrt(var + x.dtype.type(1e-5))[:, None]
    assert got.keys() == {"y", "grad_input"}
    np.testing.assert_array_equal(got["y"], (x - mean[:, None]) / std)
    np.testing.assert_array_equal(got["grad_input"], dy / std)


def test_the_factor_is_in_the_first_gemv() -> None:
    x = np.full((1, 1, 3, 3), 100, np.float32)
    got = run(x)
    ninth = np.full(9, 1 / 9, np.float32)
    assert got["batch_mean"][0] == np.dot(x.reshape(1, 9), ninth)[0]
    # Nine equal prescaled terms add up to one of three numbers, in whatever order.
    assert got["batch_mean"][0] in (100, np.float32(100.000008), np.float32(100.000015))


def test_a_constant_that_adds_up_exactly_gives_the_bias() -> None:
    x = np.full((4, 2, 8), np.float32(3.0))
    assert (run(x, bias=np.array([1, 2], np.float32))["y"] == np.array([[1], [2]])).all()


def test_gradients_are_returned_for_the_parameters_there_are() -> None:
    x = drawn((4, 3, 5), "float32")
    one = np.ones(3, np.float32)
    assert {"grad_weight", "grad_bias"}.isdisjoint(run(x, grad_output=x))
    assert "grad_bias" not in run(x, weight=one, grad_output=x)
    assert "grad_input" not in run(x, weight=one)


def test_memory_format_changes_nothing() -> None:
    x = drawn((3, 4, 5, 6), "float32")
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    a, b = run(x, grad_output=x), run(last, grad_output=last)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_inputs_stay_as_they_are() -> None:
    x, one = drawn((4, 3, 5), "float32"), np.ones(3, np.float32)
    given = {
        "weight": one.copy(),
        "bias": one.copy(),
        "running_mean": one.copy(),
        "grad_output": x.copy(),
    }
    before = x.copy()
    run(x, **given)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(given["grad_output"], before)
    assert all((given[name] == 1).all() for name in ("weight", "bias", "running_mean"))


def test_one_value_per_channel_gives_the_bias() -> None:
    got = run(drawn((1, 3), "float32"), bias=np.arange(3, dtype=np.float32))
    assert got["y"].tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(got["running_var"], 0.9, rtol=1e-6)


def test_an_empty_batch_leaves_everything_as_it_was() -> None:
    x = np.zeros((0, 2, 3), np.float32)
    got = run(x, grad_output=x)
    assert got["y"].shape == got["grad_input"].shape == (0, 2, 3)
    assert (got["running_mean"].tolist(), got["running_var"].tolist()) == ([0, 0], [1, 1])


def test_overflow_and_not_a_number_are_silent() -> None:
    x = np.full((2, 2, 5), np.float32(3e38))
    x[0, 0, 0] = np.nan
    got = run(x, grad_output=x)
    assert np.isnan(got["y"][:, 0]).all()
