"""MXNet of 2016: statistics that move in backward, fix_gamma, and an inference that cancels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends._mxnet import (
    MxNet2016,
    mxnet_2016,
    mxnet_2016_fix_gamma,
    mxnet_2016_gpu,
)

Array = npt.NDArray[Any]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def run(layer: MxNet2016, x: Array, **options: Any) -> dict[str, Array]:
    one = np.ones(x.shape[1], np.float32)
    options = {
        "training": True, "momentum": 0.1, "eps": 1e-3, "weight": None, "bias": None,
        "running_mean": one, "running_var": 2 * one, **options,
    }  # fmt: skip
    return layer(x, **options)


@pytest.mark.parametrize("layer", [mxnet_2016, mxnet_2016_gpu])
def test_the_running_statistics_move_in_backward(layer: MxNet2016) -> None:
    x = drawn((5, 3, 4, 4))
    forward = run(layer, x)
    assert forward["running_mean"].tolist() == [1, 1, 1]
    assert forward["running_var"].tolist() == [2, 2, 2]
    got = run(layer, x, grad_output=x)
    kept = np.float32(0.9)
    new = np.float32(1) - kept
    np.testing.assert_array_equal(got["running_mean"], kept + got["batch_mean"] * new)
    np.testing.assert_array_equal(got["running_var"], 2 * kept + got["batch_var"] * new)
    assert layer.running_var_correction == 0


def chained(x: Array) -> Array:
    """The sum of one channel (N, H, W), written out."""
    total = np.float32(0)
    for plane in x:
        part = np.float32(0)
        for value in plane.ravel():
            part += value
        total += part
    return np.array(total)


def test_on_the_cpu_a_plane_is_a_chain_and_so_are_the_images() -> None:
    x = drawn((5, 2, 4, 7))
    got = run(mxnet_2016, x)
    scale = np.float32(2) / np.float32(x.size)
    for c in range(2):
        mean = scale * chained(x[:, c])
        assert got["batch_mean"][c] == mean
        assert got["batch_var"][c] == scale * chained((x[:, c] - mean) ** 2)


def test_on_the_gpu_256_threads_add() -> None:
    # 300 elements: 2²⁴ and -2²⁴ 256 apart meet in one thread before anything else is added to them.
    x = np.ones((300, 1, 1, 1), np.float32)
    x[3], x[259] = 2**24, -(2**24)
    got = run(mxnet_2016_gpu, x)
    assert got["batch_mean"] == np.float32(1 / 300) * np.float32(298)
    assert run(mxnet_2016, x)["batch_mean"] != got["batch_mean"]


def test_inference_is_one_product_and_one_sum() -> None:
    x, mean, var = drawn((5, 3, 4, 4)), drawn((3,), 1), drawn((3,), 2) ** 2
    weight, bias = drawn((3,), 3), drawn((3,), 4)
    options = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    got = run(mxnet_2016, x, training=False, **options)
    std = np.sqrt(var + np.float32(1e-3))
    slope, shift = weight / std, bias - weight * mean / std
    expected = slope[None, :, None, None] * x + shift[None, :, None, None]
    np.testing.assert_array_equal(got["y"], expected)
    # A large mean cancels: of 1e5 and a deviation of 1, y keeps a few bits.
    far = np.float32(1e5)
    options = {"running_mean": mean + far, "running_var": var + 1}
    near = run(mxnet_2016, x + far, training=False, **options)["y"]
    exact = ((x + far) - (mean + far)[None, :, None, None]) / np.sqrt(var + 1.001)[
        None, :, None, None
    ]
    assert 1e-3 < np.abs(near - exact).max() < 0.1


def test_fix_gamma_ignores_gamma_in_training_and_nowhere_else() -> None:
    x, dy = drawn((5, 3, 4, 4)), drawn((5, 3, 4, 4), 1)
    two = np.full(3, 2, np.float32)
    free = run(mxnet_2016, x, grad_output=dy, weight=two / 2, bias=two)
    fixed = run(mxnet_2016_fix_gamma, x, grad_output=dy, weight=two / 2, bias=two)
    assert "grad_weight" not in fixed
    for name in fixed:
        np.testing.assert_array_equal(fixed[name], free[name])

    # With gamma 2, y is unchanged; what goes back through mean and variance counts double.
    wrong = run(mxnet_2016_fix_gamma, x, grad_output=dy, weight=two, bias=two)
    np.testing.assert_array_equal(wrong["y"], fixed["y"])
    std = np.sqrt(free["batch_var"] + np.float32(1e-3))[None, :, None, None]
    direct = dy / std
    through = fixed["grad_input"] - direct
    np.testing.assert_allclose(wrong["grad_input"], direct + 2 * through, atol=1e-5)
    assert np.abs(wrong["grad_input"] - fixed["grad_input"]).max() > 0.05

    both = [
        run(layer, x, training=False, weight=two, bias=two)["y"]
        for layer in (mxnet_2016, mxnet_2016_fix_gamma)
    ]
    np.testing.assert_array_equal(both[0], both[1])


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 4, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(NotImplementedError, match="2 or 4 dimensions"):
        run(mxnet_2016, np.zeros(shape, np.float32))


def test_inference_has_no_backward_pass() -> None:
    x = drawn((2, 3))
    with pytest.raises(NotImplementedError, match="no backward pass in inference"):
        run(mxnet_2016, x, training=False, grad_output=x)
