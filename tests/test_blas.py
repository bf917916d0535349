"""The emulated orders of additions against exact sums and, where they are installed, the real libraries."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnaudit.worker.backends import _blas
from bnaudit.worker.backends._blocks import block_sums

Array = npt.NDArray[Any]

ORDERS = {
    "ATLAS": _blas.ATLAS,
    "REFERENCE": _blas.REFERENCE,
    "OPENBLAS_NEHALEM": _blas.OPENBLAS_NEHALEM,
    "OPENBLAS_SANDYBRIDGE": _blas.OPENBLAS_SANDYBRIDGE,
    "OPENBLAS_HASWELL": _blas.OPENBLAS_HASWELL,
}


def integers(rows: int, columns: int, dtype: str) -> Array:
    random = np.random.default_rng([rows, columns])
    return random.integers(-8, 9, (rows, columns)).astype(dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ORDERS]
    + [(name, "float64") for name in ORDERS if name != "OPENBLAS_HASWELL"],
)
def test_every_element_is_added_once(name: str, dtype: str) -> None:
    order = ORDERS[name]
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 33):
        for columns in (*range(1, 34), 65, 1031, 4101, 8210):
            matrix = integers(rows, columns, dtype)
            for factor in (1.0, 0.25):
                expected = factor * matrix.sum(axis=1)
                np.testing.assert_array_equal(order.gemv(matrix, factor), expected)
                expected = factor * matrix.sum(axis=0)
                np.testing.assert_array_equal(order.gemv_transposed(matrix, factor), expected)


def test_blocks_of_threads_add_every_element_once() -> None:
    for threads in (1, 2, 16, 256, 512):
        for columns in (1, 2, 9, 255, 256, 257, 512, 1025):
            rows = integers(3, columns, "float32")
            np.testing.assert_array_equal(block_sums(rows, threads), rows.sum(axis=1))


def test_a_block_of_two_threads_adds_every_other_element_first() -> None:
    rows = np.array([[2**24, 1, 1, -(2**24), 1]], np.float32)
    # 2²⁴ + 1 + 1: each 1 is lost beside 2²⁴. 1 - 2²⁴ is not.
    assert block_sums(rows, 2) == np.float32(2**24) + np.float32(1 - 2**24)
    assert block_sums(rows, 1) == 1


def test_haswell_says_why_it_has_no_float64() -> None:
    with pytest.raises(NotImplementedError, match="in float32 only"):
        _blas.OPENBLAS_HASWELL.gemv(np.ones((2, 2)), 1.0)
    with pytest.raises(NotImplementedError, match="in float32 only"):
        _blas.OPENBLAS_HASWELL.gemv_transposed(np.ones((2, 2)))


def assert_rounded_once(a: float, x: float, y: float) -> None:
    (found,) = _blas._fused(a, np.array([x], np.float32), np.array([y], np.float32))
    exact = Fraction(a) * Fraction(x) + Fraction(y)
    error = abs(Fraction(float(found)) - exact)
    even = int(found.view(np.uint32)) % 2 == 0
    for limit in (-np.inf, np.inf):
        other = abs(Fraction(float(np.nextafter(found, np.float32(limit)))) - exact)
        assert error < other or (error == other and even)


singles = st.floats(-(2.0**60), 2.0**60, width=32)


@given(singles, singles, singles)
def test_a_fused_multiply_add_rounds_once(a: float, x: float, y: float) -> None:
    assert_rounded_once(a, x, y)


@given(st.integers(0, 1000), st.integers(0, 1000), st.sampled_from([1.0, -1.0]))
def test_a_fused_multiply_add_sees_how_a_near_tie_falls(k: int, j: int, sign: float) -> None:
    # k²·2⁻⁷⁰ short of half a unit in the last place of y, or half a unit where k is 0.
    ulp = 2.0**-23
    assert_rounded_once(sign * 2.0**-24 * (1 + k * ulp), 1 - k * ulp, 1 + j * ulp)


def test_float64_alone_would_round_a_near_tie_twice() -> None:
    a, x, y = (
        np.float32(value) for value in (2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, 1 + 2.0**-23)
    )
    twice = np.float32(np.float64(a) * np.float64(x) + np.float64(y))
    assert twice > y
    assert _blas._fused(float(a), x[None], y[None]) == y


def test_a_fused_multiply_add_keeps_what_is_no_number() -> None:
    x = np.array([np.inf, np.nan, 1], np.float32)
    y = np.array([1, 1, -np.inf], np.float32)
    with np.errstate(invalid="ignore"):
        found = _blas._fused(0.5, x, y)
    np.testing.assert_array_equal(found, np.array([np.inf, np.nan, -np.inf], np.float32))


# --- the real libraries -----------------------------------------------------------------------------


class Library(NamedTuple):
    """A library of Debian's, the order it must have, and OpenBLAS's name for the core it is forced to."""

    order: str
    package: str
    pattern: str
    core: str | None = None


OPENBLAS = "libopenblas0-pthread", "usr/lib/*/openblas-pthread/libopenblas.so.0"
LIBRARIES = [
    Library("ATLAS", "libatlas3-base", "usr/lib/*/atlas/libblas.so.3"),
    Library("REFERENCE", "libblas3", "usr/lib/*/blas/libblas.so.3"),
    Library("OPENBLAS_NEHALEM", *OPENBLAS, "Nehalem"),
    Library("OPENBLAS_SANDYBRIDGE", *OPENBLAS, "Sandybridge"),
    Library("OPENBLAS_HASWELL", *OPENBLAS, "Haswell"),
]


@functools.cache
def compare(library: Library, order: str, every: int) -> dict[str, Any]:
    found = sorted(Path("/").glob(library.pattern))
    if not found:
        pytest.skip(f"{library.package} is not installed (apt-get install {library.package})")
    environment = {**os.environ, "BNAUDIT_CBLAS": str(found[0]), "OPENBLAS_NUM_THREADS": "1"}
    if library.core is not None:
        environment["OPENBLAS_CORETYPE"] = library.core
    script = Path(__file__).with_name("real_blas.py")
    done = subprocess.run(
        [sys.executable, str(script), order, str(every)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    if library.core is not None:
        for needed in ("OpenBLAS 0.3.21", library.core):
            if needed not in report["library"]:
                pytest.skip(f"compared with {needed}'s bits, and this is {report['library']}")
    return report


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.order)
def test_the_emulated_order_has_the_library_s_bits(library: Library) -> None:
    report = compare(library, library.order, 1)
    assert report["compared"] > 4000
    assert report["different"] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.order)
def test_the_comparison_tells_the_orders_apart(library: Library) -> None:
    other = "REFERENCE" if library.order != "REFERENCE" else "ATLAS"
    different = compare(library, other, 10)["different"]
    assert any(place.startswith("gemv ") for place in different)
    assert any(place.startswith("batch_mean ") for place in different)
