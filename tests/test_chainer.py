"""Chainer of 2016: eps is in the running variance, inference adds none, and the two orders of reduction."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends._chainer import Chainer2016, chainer_2016, chainer_2016_gpu

Array = npt.NDArray[Any]

DEVICES = {"cpu": chainer_2016, "gpu": chainer_2016_gpu}


def drawn(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def run(layer: Chainer2016, x: Array, mean: Array, var: Array, **options: Any) -> dict[str, Array]:
    options = {
        "training": True,
        "momentum": 0.1,
        "eps": 0.5,
        "weight": None,
        "bias": None,
        **options,
    }
    return layer(x, running_mean=mean, running_var=var, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_the_running_variance_holds_eps_and_bessel_s_correction_of_it(device: str) -> None:
    x, one = drawn((5, 3, 4)), np.ones(3, np.float32)
    got = run(DEVICES[device], x, one, 2 * one)
    n = 20
    batch = x.astype(np.float64)
    expected = 0.9 * 2 + 0.1 * (batch.var(axis=(0, 2)) + 0.5) * n / (n - 1)
    np.testing.assert_allclose(got["running_var"], expected, rtol=1e-6)
    np.testing.assert_allclose(got["running_mean"], 0.9 + 0.1 * batch.mean(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(got["batch_var"], batch.var(axis=(0, 2)), rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_inference_adds_no_eps(device: str) -> None:
    x, dy = drawn((5, 3, 4)), drawn((5, 3, 4), 1)
    mean, var = drawn((3,)), drawn((3,), 1) ** 2 + 1
    weight, bias = drawn((3,), 2), drawn((3,), 3)
    got = run(
        DEVICES[device], x, mean, var, training=False, weight=weight, bias=bias, grad_output=dy
    )

    def wide(values: Array) -> Array:
        return values.astype(np.float64)[None, :, None]

    x_hat = (x - wide(mean)) / np.sqrt(wide(var))
    np.testing.assert_allclose(got["y"], x_hat * wide(weight) + wide(bias), atol=1e-5)
    np.testing.assert_allclose(got["grad_input"], dy * wide(weight / np.sqrt(var)), atol=1e-5)
    np.testing.assert_allclose(got["grad_weight"], (dy * x_hat).sum(axis=(0, 2)), rtol=1e-4)
    zero = run(DEVICES[device], x, mean, np.zeros(3, np.float32), training=False)
    assert not np.isfinite(zero["y"]).any()


def test_on_the_cpu_the_sums_are_numpy_s() -> None:
    x, zero = drawn((7, 3, 9, 5)), np.zeros(3, np.float32)
    got = run(chainer_2016, x, zero, zero)
    axes = (0, 2, 3)
    np.testing.assert_array_equal(got["batch_mean"], x.mean(axis=axes))
    np.testing.assert_array_equal(got["batch_var"], x.var(axis=axes))


def threads_of(x: Array) -> Array:
    """The sums of one channel by a block of threads, written out: (n,) -> ()."""
    threads = 1
    while threads < min(x.size, 512):
        threads *= 2
    sums = [np.float32(0)] * threads
    for index, value in enumerate(x):
        sums[index % threads] += value
    while threads > 1:
        threads //= 2
        sums = [sums[j] + sums[j + threads] for j in range(threads)]
    return np.array(sums[0])


@pytest.mark.parametrize("n", [1, 2, 3, 9, 16, 17, 511, 512, 513, 1500])
def test_on_the_gpu_a_block_of_up_to_512_threads_adds(n: int) -> None:
    x, zero = drawn((n, 2)), np.zeros(2, np.float32)
    got = run(chainer_2016_gpu, x, zero, zero, grad_output=x, weight=zero + 1, bias=zero)
    for c in range(2):
        channel = x[:, c]
        mean = threads_of(channel) / np.float32(n)
        assert got["batch_mean"][c] == mean
        assert got["batch_var"][c] == np.float32(1 / n) * threads_of((channel - mean) ** 2)
        assert got["grad_bias"][c] == threads_of(channel)


def test_gradients_are_divided_on_the_cpu_and_multiplied_on_the_gpu() -> None:
    # With gamma and x̂ 0 but for one element, sums / 3 and sums · fl(1/3) are what is left.
    x = np.zeros((3, 1), np.float32)
    dy = np.array([[5], [0], [0]], np.float32)
    zero = np.zeros(1, np.float32)
    got = {
        name: run(layer, x, zero, zero, grad_output=dy, eps=1.0) for name, layer in DEVICES.items()
    }
    five, third = np.float32(5), np.float32(1) / np.float32(3)
    assert got["cpu"]["grad_input"][1, 0] == -(five / np.float32(3))
    assert got["gpu"]["grad_input"][1, 0] == -(five * third)
    assert five / np.float32(3) != five * third
