"""Channels that have broken BatchNorms, drawn at random: fourteen categories for every dtype and length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bnaudit.bounds import FORMATS
from bnaudit.worker.rounding import round_to

Doubles = npt.NDArray[Any]
Draw = Callable[[np.random.Generator, int, str], Doubles]


def _exponents(dtype: str) -> tuple[int, int]:
    """Exponents that are safe to draw values from: no overflow, subnormals included."""
    form = FORMATS[dtype]
    return form.min_exponent - form.precision + 1, form.max_exponent - 1


def normal(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    return rng.standard_normal(n)


def large_offset(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    top = 10.0 ** rng.integers(1, 4 if dtype == "float16" else 9)
    return top + rng.standard_normal(n)


def constant(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    return np.full(n, rng.choice([0.1, 3.3, 100.0, 12345.678, -7e-5, 0.0]))


def nearly_constant(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    x = np.full(n, 3.3)
    x[rng.integers(n)] *= 1 + 2.0 ** (1 - FORMATS[dtype].precision)
    return x


def outlier_first(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    x = rng.standard_normal(n)
    x[0] = 1e4
    return x


def mixed_exponents(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    low, high = _exponents(dtype)
    return np.ldexp(rng.uniform(-1, 1, n), rng.integers(low, high + 1, n))


def subnormal(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    form = FORMATS[dtype]
    return rng.integers(-(2**6), 2**6, n) * form.smallest


def largest(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    return np.asarray(FORMATS[dtype].largest * rng.choice([-1.0, 1.0, 0.75, 0.5], n))


def cancel(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    x = rng.standard_normal(n)
    half = n // 2
    x[half : 2 * half] = -x[:half]
    return x


def cancel_mixed(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    x = mixed_exponents(rng, n, dtype)
    half = n // 2
    x[half : 2 * half] = -x[:half]
    return x


def powers_of_two(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    low, high = _exponents(dtype)
    return np.asarray(np.ldexp(rng.choice([-1.0, 1.0], n), rng.integers(low, high + 1, n)))


def tie(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    """Means that lie near halfway between two numbers."""
    p = FORMATS[dtype].precision
    return 1.0 + rng.integers(0, 3, n) * 2.0 ** (1 - p)


def lognormal(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    return np.exp(2 * rng.standard_normal(n))


def sparse(rng: np.random.Generator, n: int, dtype: str) -> Doubles:
    return np.asarray(np.where(rng.random(n) < 0.1, rng.standard_normal(n), 0.0))


CATEGORIES: tuple[Draw, ...] = (
    normal,
    large_offset,
    constant,
    nearly_constant,
    outlier_first,
    mixed_exponents,
    subnormal,
    largest,
    cancel,
    cancel_mixed,
    powers_of_two,
    tie,
    lognormal,
    sparse,
)


def stored(values: Doubles, dtype: str) -> npt.NDArray[Any]:
    """The values rounded once to the storage of a dtype, clipped to its finite range."""
    limit = FORMATS[dtype].largest
    return round_to(np.clip(values, -limit, limit), dtype)


def channels(draw: Draw, dtype: str, n: int, count: int, seed: int) -> npt.NDArray[Any]:
    """An (N, C, S) tensor of `count` channels of n values, split over axes 0 and 2 as n allows."""
    rng = np.random.default_rng([seed, n, CATEGORIES.index(draw), list(FORMATS).index(dtype)])
    images = math.gcd(n, 4)
    values = np.stack([draw(rng, n, dtype) for _ in range(count)])
    tensor = stored(values, dtype).reshape(count, images, n // images)
    return np.ascontiguousarray(tensor.transpose(1, 0, 2))
