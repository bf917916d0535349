"""What all systems of 2016 have in common, on harmless data: BatchNorm's formulas, in every form of input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _caffe, _cblas, _chainer, _cudnn, _mxnet, _nvcaffe

Array = npt.NDArray[Any]

SYSTEMS: dict[str, Callable[..., dict[str, Any]]] = {
    "caffe-2016": _caffe.caffe_2016,
    "caffe-2016-gemv2": _caffe.caffe_2016_gemv2,
    "caffe-2016-split": _caffe.caffe_2016_split,
    "caffe-2016-reference": _caffe.caffe_2016_reference,
    "caffe-2016-openblas-nehalem": _caffe.caffe_2016_openblas_nehalem,
    "caffe-2016-openblas-sandybridge": _caffe.caffe_2016_openblas_sandybridge,
    "caffe-2016-openblas-haswell": _caffe.caffe_2016_openblas_haswell,
    "caffe-2016-cblas": _cblas.caffe_2016_cblas,
    "borisgin-0.15": _nvcaffe.borisgin_0_15,
    "bn-apr20": _nvcaffe.bn_apr20,
    "nvcaffe-0.15": _nvcaffe.nvcaffe_0_15,
    "bn-may4": _nvcaffe.bn_may4,
    "chainer-2016": _chainer.chainer_2016,
    "chainer-2016-gpu": _chainer.chainer_2016_gpu,
    "mxnet-2016": _mxnet.mxnet_2016,
    "mxnet-2016-gpu": _mxnet.mxnet_2016_gpu,
    "mxnet-2016-fix-gamma": _mxnet.mxnet_2016_fix_gamma,
    "cudnn-v4": _cudnn.cudnn_v4,
    "cudnn-v5": _cudnn.cudnn_v5,
}
SINGLE_ONLY = ("caffe-2016-openblas-haswell", "chainer", "mxnet")

CASES = [
    (name, dtype)
    for name in SYSTEMS
    for dtype in ("float32", "float64")
    if dtype == "float32" or not name.startswith(SINGLE_ONLY)
]


@pytest.fixture(autouse=True)
def _skip_without_a_library(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params.get("name") == "caffe-2016-cblas":
        reason = _cblas.unavailable("caffe-2016-cblas@cpu")
        if reason is not None:
            pytest.skip(reason)


def drawn(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def run(name: str, x: Array, **options: Any) -> dict[str, Any]:
    zero = np.zeros(x.shape[1], x.dtype)
    options = {
        "weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": 1e-5,
        "running_mean": zero, "running_var": zero + 1, **options,
    }  # fmt: skip
    if getattr(SYSTEMS[name], "counts_steps", False):
        options.setdefault("step", 1)
    return SYSTEMS[name](x, **options)


def per_channel(values: Array, rank: int) -> Array:
    return values.reshape((1, -1) + (1,) * (rank - 2))


@pytest.mark.parametrize("shape", [(4, 3), (6, 5, 3, 3), (2, 3, 20, 20), (40, 2, 4, 1)])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_training_follows_the_formulas(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    x, dy = drawn(shape, dtype) + np.dtype(dtype).type(1), drawn(shape, dtype, 1)
    weight = drawn((shape[1],), dtype, 2)
    if name == "mxnet-2016-fix-gamma":  # any other gamma is wrong, by design
        weight = np.ones_like(weight)
    bias = drawn((shape[1],), dtype, 3)
    got = run(name, x, weight=weight, bias=bias, grad_output=dy, eps=0.1)
    kernel = got.pop("kernel", None)
    assert kernel is None or isinstance(kernel, str)
    assert {value.dtype for value in got.values()} == {np.dtype(dtype)}

    exact, g = x.astype(np.longdouble), dy.astype(np.longdouble)
    axes = (0, *range(2, x.ndim))
    mean, var = exact.mean(axis=axes), exact.var(axis=axes)
    std = per_channel(np.sqrt(var + np.longdouble(0.1)), x.ndim)
    x_hat = (exact - per_channel(mean, x.ndim)) / std
    slope = g - per_channel(g.mean(axis=axes), x.ndim)
    slope = slope - per_channel((g * x_hat).mean(axis=axes), x.ndim) * x_hat
    w = per_channel(weight.astype(np.longdouble), x.ndim)
    expected = {
        "y": x_hat * w + per_channel(bias, x.ndim),
        "batch_mean": mean,
        "batch_var": var,
        "grad_input": w * slope / std,
        "grad_weight": (g * x_hat).sum(axis=axes),
        "grad_bias": g.sum(axis=axes),
    }
    if name == "mxnet-2016-fix-gamma":
        assert "grad_weight" not in got
        del expected["grad_weight"]
    n = x.size // shape[1]
    # Of eps, some keep the float32 only, also in float64.
    tolerance = 1e-5 if dtype == "float32" else 1e-7
    for quantity, right in expected.items():
        scale = n if quantity in ("grad_weight", "grad_bias") else 1
        np.testing.assert_allclose(
            got[quantity], right.astype(np.float64), rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_without_parameters_it_is_as_with_ones_and_zeros(name: str, dtype: str) -> None:
    x, dy = drawn((5, 3, 4, 4), dtype), drawn((5, 3, 4, 4), dtype, 1)
    one = np.ones(3, np.dtype(dtype))
    plain = run(name, x, grad_output=dy)
    affine = run(name, x, weight=one, bias=one - 1, grad_output=dy)
    assert "grad_weight" not in plain
    assert "grad_bias" not in plain
    for quantity, value in plain.items():
        np.testing.assert_array_equal(value, affine[quantity])


@pytest.mark.parametrize("name", SYSTEMS)
def test_memory_format_changes_nothing(name: str) -> None:
    x, dy = drawn((3, 4, 5, 6), "float32"), drawn((3, 4, 5, 6), "float32", 1)

    def channels_last(values: Array) -> Array:
        last: Array = np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        return last

    def spaced(values: Array) -> Array:
        wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan, values.dtype)
        view: Array = wide[..., ::2]
        view[...] = values
        return view

    expected = run(name, x, grad_output=dy)
    for change in (channels_last, spaced):
        got = run(name, change(x), grad_output=change(dy))
        for quantity, value in expected.items():
            np.testing.assert_array_equal(got[quantity], value)


@pytest.mark.parametrize("name", SYSTEMS)
def test_inputs_are_left_as_they_are(name: str) -> None:
    x, dy = drawn((3, 4, 5, 6), "float32"), drawn((3, 4, 5, 6), "float32", 1)
    vectors = [drawn((4,), "float32", seed) ** 2 for seed in range(4)]
    arrays = [x, dy, *vectors]
    before = [array.copy() for array in arrays]
    run(
        name, x, weight=vectors[0], bias=vectors[1], running_mean=vectors[2],
        running_var=vectors[3], grad_output=dy,
    )  # fmt: skip
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("name", SYSTEMS)
def test_overflow_and_not_a_number_are_silent(name: str) -> None:
    x = np.full((2, 3, 5, 1), np.float32(3e38))
    x[0, 0, 0] = np.nan
    x[:, 2] = drawn((2, 5, 1), "float32")
    got = run(name, x, grad_output=x)
    assert np.isnan(got["batch_mean"][0])
    assert np.isfinite(got["batch_mean"][2])
    assert np.isnan(got["y"][:, 0]).all()
    assert np.isfinite(got["y"][:, 2]).all()


@pytest.mark.parametrize("name", [name for name in SYSTEMS if not name.startswith("cudnn")])
def test_an_empty_batch_leaves_everything_as_it_was(name: str) -> None:
    x = np.zeros((0, 2, 3, 1), np.float32)
    got = run(name, x, grad_output=x)
    assert got["y"].shape == got["grad_input"].shape == x.shape
    assert (got["running_mean"].tolist(), got["running_var"].tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name.startswith(SINGLE_ONLY)])
def test_where_there_was_no_float64_it_says_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match="float32 only"):
        run(name, np.zeros((2, 3, 4, 4)))
