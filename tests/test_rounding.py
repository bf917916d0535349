"""Rounding once: checked against exact fractions, and exhaustively where a dtype has 16 bits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnaudit.worker.rounding import (
    DTYPES,
    round_to,
    statistics_dtype,
    storage,
    widen,
    widen64,
)

Array = npt.NDArray[Any]

FORMATS = {  # precision, smallest normal exponent, largest exponent
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}
HALVES = ("float16", "bfloat16")
LARGEST_BITS = {"float16": 0x7BFF, "bfloat16": 0x7F7F}


def nearest(value: float, dtype: str) -> float:
    """The nearest value of the dtype, ties to even, by exact arithmetic."""
    if value == 0 or not math.isfinite(value):
        return value
    precision, smallest, largest = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, smallest)
    quantum = Fraction(2) ** (exponent - precision + 1)
    rounded = round(Fraction(value) / quantum) * quantum
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def rounded(values: Any, dtype: str) -> Array:
    return widen64(round_to(np.asarray(values), dtype), dtype)


def positive_halves(dtype: str) -> tuple[Array, Array]:
    """Bits and values of all finite values ≥ 0 of a 16-bit dtype, in order."""
    bits = np.arange(LARGEST_BITS[dtype] + 1, dtype=np.uint16)
    return bits, widen64(bits.view(storage(dtype)), dtype)


def bits_of(values: Array, dtype: str) -> npt.NDArray[np.uint16]:
    return round_to(values, dtype).view(np.uint16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [0, 1])
def test_every_midpoint_of_a_16_bit_dtype_goes_to_even_and_its_neighbours_to_the_nearest(
    dtype: str, sign: int
) -> None:
    bits, values = positive_halves(dtype)
    middle = (values[:-1] + values[1:]) / 2
    minus, flag = 1.0 - 2 * sign, np.uint16(sign << 15)
    even = bits[:-1] + (bits[:-1] & np.uint16(1))
    np.testing.assert_array_equal(bits_of(minus * middle, dtype), even | flag)
    for toward, neighbour in ((0.0, bits[:-1]), (math.inf, bits[1:])):
        close = np.nextafter(middle, toward)
        np.testing.assert_array_equal(bits_of(minus * close, dtype), neighbour | flag)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_of_a_16_bit_dtype_survives_widening_and_rounding(dtype: str) -> None:
    stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(storage(dtype))
    for wide in (widen(stored, dtype), widen64(stored, dtype)):
        again = round_to(wide, dtype)
        number = ~np.isnan(wide)
        np.testing.assert_array_equal(again.view(np.uint16)[number], stored.view(np.uint16)[number])
        assert np.isnan(widen(again, dtype)[~number]).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_exceeds_the_range_by_half_a_step_becomes_an_infinity(dtype: str) -> None:
    largest = positive_halves(dtype)[1][-1]
    precision, _, exponent = FORMATS[dtype]
    edge = largest + 2.0 ** (exponent - precision)
    assert rounded(np.nextafter(edge, 0.0), dtype) == largest
    for value in (edge, 3.4e38, 3.5e38, 1e300, math.inf):
        assert rounded(value, dtype) == math.inf
        assert rounded(-value, dtype) == -math.inf


@pytest.mark.parametrize(
    ("dtype", "value", "right"),
    [
        ("bfloat16", 1 + 2**-8 + 2**-40, 1.0078125),
        ("bfloat16", 1 + 2**-7 + 2**-8 - 2**-40, 1.0078125),
        ("float16", 1 + 2**-11 + 2**-40, 1 + 2**-10),
        ("float16", 2**-25 + 2**-60, 2**-24),
        ("bfloat16", 2**-134 + 2**-180, 2**-133),
        ("bfloat16", -(2**-134) - 2**-180, -(2**-133)),
    ],
)
def test_a_value_that_two_roundings_get_wrong_is_rounded_once(
    dtype: str, value: float, right: float
) -> None:
    assert rounded(value, dtype) == right == nearest(value, dtype)
    with np.errstate(under="ignore"):
        twice = rounded(np.float32(value), dtype)
    assert twice != right, "this value does not tell one rounding from two"


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(allow_nan=False))
def test_any_float64_rounds_as_exact_arithmetic_says(dtype: str, value: float) -> None:
    got = float(rounded([value], dtype)[0])
    assert got == nearest(value, dtype)
    assert math.copysign(1, got) == math.copysign(1, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_values_across_all_exponents_round_as_exact_arithmetic_says(
    dtype: str, source: type[np.floating[Any]]
) -> None:
    rng = np.random.default_rng(2016)
    precision, smallest, largest = FORMATS[dtype]
    exponents = rng.integers(smallest - precision - 2, largest + 2, 2000)
    # A few bits more than the dtype has, so that ties and near-ties are common.
    significands = rng.integers(2**precision, 2 ** (precision + 1), 2000) + rng.choice(
        [0, 0.25, 0.5, 0.75, 0.5 + 2**-20, 0.5 - 2**-20], 2000
    )
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(significands, exponents - precision).astype(source)
    got = rounded(values, dtype)
    want = np.array([nearest(float(v), dtype) for v in values])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_signed_zero_stay_what_they_are(dtype: str) -> None:
    payload = np.array([0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF], np.uint64).view(np.float64)
    assert np.isnan(rounded(payload, dtype)).all()
    payload32 = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(rounded(payload32, dtype)).all()
    assert np.signbit(rounded([0.0, -0.0, -(2.0**-1074)], dtype)).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_shapes_are_kept_and_strides_do_not_matter(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.linspace(-3, 3, max(math.prod(shape), 1))[: math.prod(shape)].reshape(shape)
    result = round_to(values, dtype)
    assert (result.shape, result.dtype) == (shape, storage(dtype))
    np.testing.assert_array_equal(round_to(values.T, dtype), np.transpose(result))
    assert widen(result, dtype).dtype == np.dtype(statistics_dtype(dtype))
    assert widen64(result, dtype).dtype == np.float64
