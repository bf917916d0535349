"""`caffe-2016` against bits of the layer on the real ATLAS, and against the thread's figures."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _caffe

Array = npt.NDArray[Any]


def train(
    x: Array, step: int = 1, momentum: float | None = 0.001, **options: Any
) -> dict[str, Array]:
    zero = np.zeros(x.shape[1], x.dtype)
    options = {"weight": None, "bias": None, "eps": 1e-5, **options}
    return _caffe.caffe_2016(
        x, running_mean=zero, running_var=zero + 1, training=True, momentum=momentum, step=step,
        **options,
    )  # fmt: skip


def infer(x: Array, running_mean: Array, running_var: Array, **options: Any) -> dict[str, Array]:
    options = {"weight": None, "bias": None, "eps": 1e-5, **options}
    return _caffe.caffe_2016(
        x, running_mean=running_mean, running_var=running_var, training=False, momentum=0.1,
        **options,
    )  # fmt: skip


def bits(values: Array) -> set[int]:
    return {int(b) for b in np.ravel(values).view(f"u{values.dtype.itemsize}")}


def test_the_founding_case_has_the_thread_s_bits() -> None:
    x = np.full((1, 1, 3, 3), 100, np.float32)
    got = train(x)
    assert bits(got["batch_mean"]) == {0x42C80002}
    assert bits(got["batch_var"]) == {0x2F800000}
    assert got["batch_var"][0] == 2.0**-32
    assert bits(np.sqrt(got["batch_var"] + np.float32(1e-5))) == {0x3B4F3ED5}
    assert bits(got["y"]) == {0xBB9E1CAF}
    assert [bits(blob) for blob in _caffe.caffe_2016.blobs] == [
        {0x42C80002},
        {0x2F900000},
        {0x3F800000},
    ]
    assert bits(got["running_mean"]) == {0x42C80002}
    assert bits(got["running_var"]) == {0x2F900000}
    y = infer(x, got["running_mean"], got["running_var"])["y"]
    assert bits(y) == {0xBB9E1CA0}


def drawn(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Uniform in [-1/2, 1/2): integer arithmetic only, so the same everywhere."""
    h = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(1 + seed * 1000003)
    h *= np.uint64(0x9E3779B97F4A7C15)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    values: Array = (h >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5
    return values.astype(dtype).reshape(shape)


# Recorded from the layer's own sequence of cblas_?gemv, ?gemm, ?scal and ?axpy on ATLAS 3.10.3 (Debian
# 3.10.3-13, amd64), two training steps with f = 0.9, backward and inference. The shapes reach every branch
# of the model: rows of up to 14, of 15 and more, fewer than four rows, rows left over from fours, the
# factor first or last, and each block width with a remainder.
ATLAS = [
    ((4, 3, 3, 3), "69fc395a7de04641", "9449829e9839dc48"),
    ((2, 5, 2, 7), "c4a9df2741a25836", "606e245bf7fe405b"),
    ((9, 2, 15), "b9c48ca3df2be1ee", "d668be44dfb6469c"),
    ((1, 3, 100), "cccf5ae0d45d3105", "1c9cf19ef28a841d"),
    ((1, 2, 20001), "8fa5cf4f30923c36", "f78b3ce5edbeb7a0"),
    ((5, 7, 16), "22bf241c1ce840a6", "0eb7d5c8a5eb6107"),
    ((4, 5, 20), "8c0c34521b084169", "0a315fadc06ce0a1"),
    ((30, 3, 7, 7), "135fe42080b320fe", "9d3d17cc948823cd"),
    ((6, 3, 19, 19), "74daec35433eafb0", "375b16402e1ac0f3"),
    ((2, 2, 725), "eec641aa703f8d8d", "e2dd5c7cc597d9c0"),
    ((3, 3, 722), "afd188979df73db7", "45d05b8fcb83c19e"),
    ((2, 3, 1443), "be934e6aac6e27ed", "aa14f9de8ed04868"),
    ((3, 3, 6555), "02253fecf5c090db", "90196e2095c9c43b"),
    ((1, 5, 13107), "1d229db96265da67", "36fceceb0cf45e85"),
    ((2, 4, 485), "337687f2e24346d9", "8d945a064e32dffd"),
    ((1, 7, 3275), "c6049eba78cbb78e", "5ffc946d129a5d70"),
    ((3, 8, 3277), "d75e54285cfb7ca7", "c87954fc3d314ea0"),
    ((4, 5, 8000), "954c5dd9d3669a8a", "ff26ef963d438857"),
    ((300, 3), "170814955f42343c", "82da886ec2d65fd0"),
    ((17, 6, 1), "f88f8f476c77101c", "efe712a661c25802"),
]


@pytest.mark.parametrize(("shape", "single", "double"), ATLAS)
def test_the_whole_layer_has_the_bits_it_has_on_atlas(
    shape: tuple[int, ...], single: str, double: str
) -> None:
    for dtype, expected in (("float32", single), ("float64", double)):
        for step in (1, 2):
            x = drawn(shape, dtype, step) + np.dtype(dtype).type(3)
            dy = drawn(shape, dtype, step + 10)
            got = train(x, step, momentum=0.1, grad_output=dy)
        names = ("y", "batch_mean", "batch_var", "running_mean", "running_var", "grad_input")
        arrays = [got[name] for name in names]
        arrays.append(infer(x, got["running_mean"], got["running_var"])["y"])
        digest = hashlib.sha256()
        for array in arrays:
            digest.update((np.ascontiguousarray(array) + array.dtype.type(0)).tobytes())
        assert digest.hexdigest()[:16] == expected, dtype


def test_running_statistics_are_quotients_of_the_blobs_whatever_they_were_before() -> None:
    x = drawn((4, 3, 5), "float64", 1)
    means, variances = [], []
    for step in (1, 2, 3):
        got = train(x * step + step, step, momentum=0.25)
        means.append(got["batch_mean"])
        variances.append(got["batch_var"] * 20 / 19)
    total = 1 + 0.75 + 0.75**2
    for name, batch in (("running_mean", means), ("running_var", variances)):
        expected = (0.75**2 * batch[0] + 0.75 * batch[1] + batch[2]) / total
        np.testing.assert_allclose(got[name], expected, rtol=1e-14)
    again = train(x, 1, momentum=0.25)
    np.testing.assert_array_equal(again["running_mean"], again["batch_mean"])


def test_the_same_step_again_leaves_the_same_running_statistics() -> None:
    x = drawn((4, 3, 5), "float64", 1)
    for step in (1, 2, 3):
        once, again = (train(x * step, step, momentum=0.25) for _ in range(2))
        assert all(once[name].tobytes() == again[name].tobytes() for name in once)
    np.testing.assert_allclose(
        again["running_mean"], x.mean(axis=(0, 2)) * (0.75**2 + 0.75 * 2 + 3) / 2.3125, rtol=1e-13
    )


def test_without_momentum_the_running_mean_is_the_average_of_the_batches() -> None:
    x = drawn((4, 3, 5), "float64", 1)
    batches = []
    for step in (1, 2, 3):
        got = train(x * step, step, momentum=None)
        batches.append(got["batch_mean"])
    np.testing.assert_allclose(got["running_mean"], np.mean(batches, axis=0), rtol=1e-14)


def test_eps_and_the_moving_average_fraction_are_floats_also_in_double() -> None:
    x = np.zeros((2, 1, 4))
    x[0, 0, 0] = 1e-3
    got = train(x)
    deviation = x - got["batch_mean"]
    std = np.sqrt(got["batch_var"] + np.float64(np.float32(1e-5)))
    np.testing.assert_array_equal(got["y"], deviation / std)
    train(x, 2)
    assert _caffe.caffe_2016.blobs[2][0] == 1 + np.float64(np.float32(0.999))


def test_gradients_are_those_of_the_layer() -> None:
    x, dy = drawn((6, 4, 7), "float64", 1), drawn((6, 4, 7), "float64", 2)
    weight, bias = np.array([1.0, -2.0, 0.5, 0.0]), np.array([0.0, 1.0, 2.0, 3.0])
    got = train(x, weight=weight, bias=bias, grad_output=dy, eps=0.25)

    def per_channel(values: Array) -> Array:
        return values[None, :, None]

    axes = (0, 2)
    std = np.sqrt(x.var(axis=axes) + 0.25)
    xhat = (x - per_channel(x.mean(axis=axes))) / per_channel(std)
    np.testing.assert_allclose(got["y"], xhat * per_channel(weight) + per_channel(bias), rtol=1e-12)
    g = dy * per_channel(weight)
    dx = g - per_channel(g.mean(axis=axes)) - per_channel((g * xhat).mean(axis=axes)) * xhat
    np.testing.assert_allclose(got["grad_input"], dx / per_channel(std), atol=1e-14)
    np.testing.assert_allclose(got["grad_weight"], (dy * xhat).sum(axis=axes), rtol=1e-12)
    np.testing.assert_allclose(got["grad_bias"], dy.sum(axis=axes), rtol=1e-12)

    frozen = infer(x, weight, bias + 1, weight=weight, bias=bias, grad_output=dy, eps=0.25)
    expected = g / per_channel(np.sqrt(bias + 1.25))
    np.testing.assert_allclose(frozen["grad_input"], expected, rtol=1e-14)


def test_memory_format_changes_nothing() -> None:
    x = drawn((3, 4, 5, 6), "float32", 1)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    a, b = train(x, grad_output=x), train(last, grad_output=last)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_one_value_per_channel_gives_the_bias() -> None:
    x = drawn((1, 3), "float32", 1)
    got = train(x, weight=np.ones(3, np.float32), bias=np.arange(3, dtype=np.float32))
    assert got["y"].tolist() == [[0, 1, 2]]
    assert got["running_var"].tolist() == [0, 0, 0]


def test_an_empty_batch_leaves_everything_as_it_was() -> None:
    x = np.zeros((0, 2, 3), np.float32)
    got = train(x, grad_output=x)
    assert got["y"].shape == got["grad_input"].shape == (0, 2, 3)
    assert (got["running_mean"].tolist(), got["running_var"].tolist()) == ([0, 0], [1, 1])


def test_overflow_and_not_a_number_are_silent() -> None:
    x = np.full((2, 2, 5), np.float32(3e38))
    x[0, 0, 0] = np.nan
    got = train(x, grad_output=x)
    assert np.isnan(got["y"][:, 0]).all()
    assert not np.isnan(got["batch_mean"][1])
