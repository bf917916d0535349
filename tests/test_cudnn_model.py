"""The models of cuDNN 4 and 5: what the second running tensor holds, and what cuDNN refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends._cudnn import Cudnn, cudnn_v4, cudnn_v5

Array = npt.NDArray[Any]


def drawn(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def run(layer: Cudnn, x: Array, **options: Any) -> dict[str, Array]:
    one = np.ones(x.shape[1], x.dtype)
    options = {
        "training": True, "momentum": 0.25, "eps": 1e-5, "weight": None, "bias": None,
        "running_mean": one, "running_var": 2 * one, **options,
    }  # fmt: skip
    return layer(x, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_version_4_averages_invstd_and_version_5_the_unbiased_variance(dtype: str) -> None:
    x = drawn((5, 3, 4, 4), dtype)
    four, five = run(cudnn_v4, x), run(cudnn_v5, x)
    for name in ("y", "batch_mean", "batch_var", "invstd", "running_mean"):
        np.testing.assert_array_equal(four[name], five[name])
    rtol = 1e-6 if dtype == "float32" else 1e-14
    np.testing.assert_allclose(four["running_var"], 0.75 * 2 + 0.25 * four["invstd"], rtol=rtol)
    unbiased = five["batch_var"] * 80 / 79
    np.testing.assert_allclose(five["running_var"], 0.75 * 2 + 0.25 * unbiased, rtol=rtol)


@pytest.mark.parametrize("layer", [cudnn_v4, cudnn_v5])
def test_inference_takes_its_own_running_tensor(layer: Cudnn) -> None:
    x = drawn((5, 3, 4, 4), "float64")
    trained = run(layer, x, momentum=1.0)
    left = {name: trained[name] for name in ("running_mean", "running_var")}
    y = run(layer, x, training=False, **left)["y"]
    tolerance = 1e-14 if layer is cudnn_v4 else 1 / 79
    np.testing.assert_allclose(y, trained["y"], rtol=tolerance)


def test_a_snapshot_of_one_version_is_wrong_in_the_other() -> None:
    x = 10 * drawn((5, 3, 4, 4), "float64")
    trained = run(cudnn_v4, x, momentum=1.0)
    left = {name: trained[name] for name in ("running_mean", "running_var")}
    y = run(cudnn_v5, x, training=False, **left)["y"]
    assert np.abs(y).max() > 20 * np.abs(trained["y"]).max()


@pytest.mark.parametrize("layer", [cudnn_v4, cudnn_v5])
def test_what_cudnn_refuses_is_said(layer: Cudnn) -> None:
    x = drawn((2, 3), "float32")
    with pytest.raises(NotImplementedError, match="no eps below 1e-05"):
        run(layer, x, eps=9e-6)
    with pytest.raises(NotImplementedError, match="no backward pass for inference"):
        run(layer, x, training=False, grad_output=x)
    with pytest.raises(NotImplementedError, match="no empty batch"):
        run(layer, x[:0])
