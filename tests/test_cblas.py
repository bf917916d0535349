"""`caffe-2016-cblas`: the calls are Caffe's, and a library that cannot be used is named in one sentence."""

from __future__ import annotations

import ctypes.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _cblas

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """The library is looked for once per process: here, once per test."""
    _cblas._library.cache_clear()
    _cblas.description.cache_clear()
    yield
    _cblas._library.cache_clear()
    _cblas.description.cache_clear()


def drawn(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def run(x: Array, **options: Any) -> dict[str, Any]:
    zero = np.zeros(x.shape[1], x.dtype)
    options = {
        "weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": 1e-5,
        "running_mean": zero, "running_var": zero + 1, **options,
    }  # fmt: skip
    return _cblas.caffe_2016_cblas(x, **options)


@pytest.fixture
def library() -> str:
    reason = _cblas.unavailable("caffe-2016-cblas@cpu")
    if reason is not None:
        pytest.skip(reason)
    return _cblas.description()


# --- the calls, without a library -------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each call as text: arrays as their number of elements; what is computed stays zero."""
    made: list[str] = []

    def record(name: str, dtype: Any, *arguments: Any) -> None:
        shown = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.dtype == dtype
                assert argument.flags.c_contiguous
                assert argument.ctypes.data % 64 == 0
                shown.append(f"[{argument.size}]")
            else:
                shown.append(f"{argument:.6g}")
        made.append(f"{name} {' '.join(shown)}")

    monkeypatch.setattr(_cblas, "_call", record)
    monkeypatch.setattr(_cblas, "description", lambda: "none")
    return made


def test_a_training_step_makes_caffe_s_calls(calls: list[str]) -> None:
    run(drawn((2, 3, 4)), momentum=0.001)
    sums = ["101 111 6 4 {} [24] 4 [4] 1 0 [6] 1", "101 112 2 3 1 [6] 3 [2] 1 0 [3] 1"]
    statistics = [f"gemv {sums[0].format(0.125)}", f"gemv {sums[1]}"]
    repeat = "gemm 101 111 111 2 3 1 1 [2] 1 [3] 3 0 [6] 3"
    average = ["scal 3 0.999 [3] 1", "axpy 3 {} [3] 1 [3] 1"]
    assert calls == [
        *statistics,
        repeat,
        "gemm 101 111 111 6 4 1 -1 [6] 1 [4] 4 1 [24] 4",
        *statistics,
        average[0],
        average[1].format("1"),
        average[0],
        average[1].format("1.14286"),
        repeat,
        "gemm 101 111 111 6 4 1 1 [6] 1 [4] 4 0 [24] 4",
    ]


def test_backward_makes_caffe_s_calls(calls: list[str]) -> None:
    x = drawn((2, 3, 4))
    run(x)
    forward = len(calls)
    run(x, grad_output=x)
    sums = ["gemv 101 111 6 4 1 [24] 4 [4] 1 0 [6] 1", "gemv 101 112 2 3 1 [6] 3 [2] 1 0 [3] 1"]
    repeat = "gemm 101 111 111 2 3 1 1 [2] 1 [3] 3 0 [6] 3"
    assert calls[2 * forward :] == [
        *sums,
        repeat,
        "gemm 101 111 111 6 4 1 1 [6] 1 [4] 4 0 [24] 4",
        *sums,
        repeat,
        "gemm 101 111 111 6 4 1 1 [6] 1 [4] 4 1 [24] 4",
        "scal 24 -0.125 [24] 1",
        "axpy 24 1 [24] 1 [24] 1",
    ]


# --- a library --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_product_is_what_it_is_called(library: str, dtype: str) -> None:
    random = np.random.default_rng(1)
    matrix = random.integers(-8, 9, (5, 7)).astype(dtype)
    five, seven = matrix[:, 0], matrix[0]
    for factor in (1.0, 0.25):
        np.testing.assert_array_equal(_cblas.CBLAS.gemv(matrix, factor), factor * matrix.sum(1))
        found = _cblas.CBLAS.gemv_transposed(matrix, factor)
        np.testing.assert_array_equal(found, factor * matrix.sum(0))
    np.testing.assert_array_equal(_cblas.CBLAS.outer(five, 3), np.outer(five, np.ones(3)))
    np.testing.assert_array_equal(_cblas.CBLAS.repeat(seven, 3), np.tile(seven, 3))
    found = _cblas.CBLAS.add_outer(matrix, -1, five)
    np.testing.assert_array_equal(found, matrix - five[:, None])
    found = _cblas.CBLAS.axpby(0.5, seven, 0.25, 2 * seven)
    np.testing.assert_array_equal(found, seven)


def test_nothing_that_is_passed_is_changed(library: str) -> None:
    matrix, vector = np.ones((5, 7), np.float32), np.ones(5, np.float32)
    _cblas.CBLAS.add_outer(matrix, -1, vector)
    _cblas.CBLAS.axpby(0.5, vector, 0.25, vector)
    assert (matrix == 1).all()
    assert (vector == 1).all()


def test_the_result_says_which_library_ran(library: str) -> None:
    kernel = run(drawn((2, 3, 4)))["kernel"]
    assert kernel == library
    assert kernel.startswith("CBLAS of ")
    if sys.platform == "linux":
        path = kernel.removeprefix("CBLAS of ").split(": ")[0]
        assert Path(path).is_file()


def test_the_environment_variable_names_the_library(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library.removeprefix("CBLAS of ").split(": ")[0]
    if not Path(path).is_file():
        pytest.skip("this system does not tell where a library is")
    _cblas._library.cache_clear()
    monkeypatch.setenv("BNAUDIT_CBLAS", path)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert _cblas.unavailable("caffe-2016-cblas@cpu") is None
    assert _cblas.description() == library


def test_without_a_library_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNAUDIT_CBLAS", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    reason = "no CBLAS library was found (apt-get install libblas3, or name one in BNAUDIT_CBLAS)"
    assert _cblas.unavailable("caffe-2016-cblas@cpu") == reason


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNAUDIT_CBLAS", "/nowhere/libcblas.so")
    reason = _cblas.unavailable("caffe-2016-cblas@cpu")
    assert reason is not None
    assert reason.startswith("the CBLAS library /nowhere/libcblas.so cannot be loaded: ")


def test_a_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNAUDIT_CBLAS", "./libcblas.so")
    reason = "BNAUDIT_CBLAS needs an absolute path or a soname, not ./libcblas.so"
    assert _cblas.unavailable("caffe-2016-cblas@cpu") == reason


def test_a_library_without_cblas_is_named_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ctypes.util.find_library("m")
    if other is None:
        pytest.skip("this system has no libm to load")
    monkeypatch.setenv("BNAUDIT_CBLAS", other)
    expected = f"{other} is no CBLAS library: it has no cblas_sgemv"
    assert _cblas.unavailable("caffe-2016-cblas@cpu") == expected
    monkeypatch.delenv("BNAUDIT_CBLAS")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: other)
    reason = _cblas.unavailable("caffe-2016-cblas@cpu")
    assert reason is not None
    assert reason.startswith("no CBLAS library was found")
