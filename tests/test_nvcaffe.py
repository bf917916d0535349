"""The layers of April and May 2016: what running statistics become, and when variance is clipped."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _nvcaffe
from bnaudit.worker.backends._nvcaffe import (
    NvCaffe,
    bn_apr20,
    bn_may4,
    borisgin_0_15,
    nvcaffe_0_15,
)

Array = npt.NDArray[Any]

VERSIONS = {
    "borisgin-0.15": borisgin_0_15,
    "bn-apr20": bn_apr20,
    "nvcaffe-0.15": nvcaffe_0_15,
    "bn-may4": bn_may4,
}


def train(
    layer: NvCaffe, x: Array, mean: Array, var: Array, step: int, **options: Any
) -> dict[str, Array]:
    options = {"momentum": 0.001, "eps": 1e-5, "weight": None, "bias": None, **options}
    return layer(x, running_mean=mean, running_var=var, training=True, step=step, **options)


def used_variance(got: dict[str, Array], x: Array) -> Array:
    """The variance that y was normalized by, from the elements farthest from the mean."""
    centred = x - got["batch_mean"].reshape(1, -1, 1, 1)
    ratio = (centred / got["y"]).swapaxes(0, 1).reshape(x.shape[1], -1)
    farthest = np.abs(centred).swapaxes(0, 1).reshape(x.shape[1], -1).argmax(axis=1)
    values: Array = ratio[np.arange(len(ratio)), farthest].astype(np.float64) ** 2 - 1e-5
    return values


# After 200 batches of N(0, 1): running variance before, what the batch with one channel 100 times as wide and
# one a thousandth as wide is normalized by, and running variance after.
CLIPPED = {
    "borisgin-0.15": ("0.17770329 0.17832552", (8075.0186, 7.8256886e-07), "8.25244 0.1781472"),
    "bn-apr20": ("0.17770329 0.17832552", (0.710813, 0.0445814), None),
    "nvcaffe-0.15": ("0.7410472 0.84774786", (6.141779, 0.21193697), "0.74644786 0.84711206"),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_an_extreme_batch_after_a_warm_up_meets_the_clip(name: str) -> None:
    random = np.random.default_rng(7)
    mean = var = before = np.zeros(2, np.float32)
    for step in range(1, 202):
        x = random.standard_normal((4, 2, 5, 5)).astype(np.float32)
        if step == 201:
            x *= np.array([100, 1e-3], np.float32).reshape(1, 2, 1, 1)
        got = train(VERSIONS[name], x, mean, var, step)
        before, mean, var = var, got["running_mean"], got["running_var"]
    text, used, after = CLIPPED[name]
    assert list(map(str, got["batch_var"])) == ["8075.0186", "7.8256886e-07"]
    assert " ".join(map(str, before)) == text
    np.testing.assert_allclose(used_variance(got, x), used, rtol=1e-5)
    if after is not None:
        assert " ".join(map(str, var)) == after


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", VERSIONS)
def test_the_clip_begins_with_the_201st_forward_and_to_the_bit(name: str, dtype: str) -> None:
    random = np.random.default_rng(1)
    x = (random.standard_normal((4, 3, 5, 5)) * [[[[50]], [[0.01]], [[1]]]]).astype(dtype)
    zero = np.zeros(3, dtype)
    running = np.array([1.5, 0.75, 1.0], dtype)
    free = train(VERSIONS[name], x, zero, running, 200)
    late = train(VERSIONS[name], x, zero, running, 201)
    batch, real = free["batch_var"], np.dtype(dtype).type
    average = ((real(1.5) + real(0.75)) + real(1.0)) / real(3)
    upper = {"bn-apr20": 4 * running, "nvcaffe-0.15": 4 * (average + running)}.get(name)
    clipped = batch if upper is None else np.clip(batch, running / 4, upper)
    assert (clipped != batch).tolist() == [upper is not None, upper is not None, False]
    f = real(np.float32(0.999))
    for got, var in ((free, batch), (late, clipped)):
        np.testing.assert_array_equal(got["batch_var"], batch)
        np.testing.assert_array_equal(got["running_var"], (real(1) - f) * var + f * running)
        inv = VERSIONS[name].invert(var + real(np.float32(1e-5))).reshape(1, 3, 1, 1)
        centred = x - got["batch_mean"].reshape(1, 3, 1, 1)
        np.testing.assert_array_equal(got["y"], centred * inv)


def test_on_april_20_the_clipped_variance_is_at_least_eps() -> None:
    x = np.random.default_rng(1).standard_normal((4, 1, 3)).astype(np.float32) * np.float32(1e-4)
    zero = np.zeros(1, np.float32)
    eps = np.float32(1e-3)
    got = train(bn_apr20, x, zero, zero, 201, eps=1e-3, momentum=1.0)
    assert got["running_var"] == eps
    unclipped = train(bn_apr20, x, zero, zero, 200, eps=1e-3, momentum=1.0)
    assert unclipped["running_var"] < eps


@pytest.mark.parametrize("name", VERSIONS)
def test_the_first_forward_replaces_or_moves_the_running_statistics(name: str) -> None:
    x = np.full((1, 1, 3, 3), 100, np.float32)
    zero = np.zeros(1, np.float32)
    got = train(VERSIONS[name], x, zero, zero, 1)
    (mean,) = got["running_mean"]
    assert str(mean) == ("100.0" if name in ("nvcaffe-0.15", "bn-may4") else "0.09999871")
    assert got["running_var"] == 0
    second = train(VERSIONS[name], x, got["running_mean"], got["running_var"], 2)
    f = np.float32(0.999)
    assert second["running_mean"] == (np.float32(1) - f) * np.float32(100) + f * mean


def test_scale_s_default_of_0_makes_every_output_0() -> None:
    x = np.random.default_rng(1).standard_normal((4, 2, 3)).astype(np.float32)
    zero = np.zeros(2, np.float32)
    assert not train(nvcaffe_0_15, x, zero, zero, 1, weight=zero, bias=zero)["y"].any()


def test_the_running_variance_is_biased() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 2))
    zero = np.zeros(3)
    got = train(nvcaffe_0_15, x, zero, zero, 1)
    np.testing.assert_array_equal(got["running_var"], got["batch_var"])
    np.testing.assert_allclose(got["running_var"], x.var(axis=(0, 2)), rtol=1e-14)
    assert nvcaffe_0_15.running_var_correction == 0


def test_without_momentum_the_running_statistics_are_averages() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 2))
    mean, var = np.full(3, 7.0), np.full(3, 7.0)
    batches = []
    for step in (1, 2, 3):
        got = train(borisgin_0_15, x * step, mean, var, step, momentum=None)
        mean, var = got["running_mean"], got["running_var"]
        batches.append(got["batch_var"])
    np.testing.assert_allclose(var, np.mean(batches, axis=0), rtol=1e-6)


@pytest.mark.parametrize("name", VERSIONS)
def test_inference_uses_the_running_statistics_and_training_s_backward(name: str) -> None:
    random = np.random.default_rng(1)
    x, dy = random.standard_normal((6, 4, 7)), random.standard_normal((6, 4, 7))
    mean, var = random.standard_normal(4), random.random(4) + 0.5
    got = VERSIONS[name](
        x, None, None, mean, var, training=False, momentum=0.1, eps=0.25, grad_output=dy
    )
    std = np.sqrt(var + 0.25)[None, :, None]
    x_hat = (x - mean[None, :, None]) / std
    np.testing.assert_allclose(got["y"], x_hat, rtol=1e-12)

    def means(values: Array) -> Array:
        averages: Array = values.mean(axis=(0, 2), keepdims=True)
        return averages

    expected = (dy - means(dy) - means(dy * x_hat) * x_hat) / std
    np.testing.assert_allclose(got["grad_input"], expected, rtol=1e-10, atol=1e-13)
    assert set(got) == {"y", "grad_input"}


def test_the_power_is_rounded_once_and_the_reciprocal_root_twice() -> None:
    values = np.random.default_rng(1).random(500).astype(np.float32)
    wrong = []
    for invert in (_nvcaffe.power, _nvcaffe.reciprocal_root):
        found = invert(values)
        assert found.dtype == np.float32
        count = 0
        for value, inverse in zip(values, found, strict=True):
            lower, upper = (
                (Fraction(float(inverse)) + Fraction(float(np.nextafter(inverse, limit)))) / 2
                for limit in (np.float32(0), np.float32(np.inf))
            )
            count += not lower**2 * Fraction(float(value)) <= 1 <= upper**2 * Fraction(float(value))
        wrong.append(count)
    assert wrong[0] == 0
    assert wrong[1] > 20


def test_the_power_of_what_has_no_root_is_silent() -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _nvcaffe.power(np.array([0, np.nan, np.inf], np.float32))
    np.testing.assert_array_equal(found, np.array([np.inf, np.nan, 0], np.float32))
