"""Compares an emulated order of additions with the CBLAS library that BNAUDIT_CBLAS names, in this process.

python real_blas.py ORDER EVERY, with ORDER a name in bnaudit.worker.backends._blas and EVERY 1 for all shapes,
2 for every other one and so on, prints one JSON object:
{"library": text, "compared": number, "different": ["what, where", …]}. OpenBLAS chooses its kernels when it
is loaded, so that each of them needs a process of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bnaudit.worker.backends import _blas
from bnaudit.worker.backends._caffe import Caffe2016, in_both, in_first, in_second
from bnaudit.worker.backends._cblas import CBLAS, _aligned, _library, description

ROWS = (*range(1, 10), 12, 13, 33, 65)
COLUMNS = (*range(1, 36), 47, 48, 49, 63, 64, 65, 100, 481, 719, 784, 2049, 4095, 4096, 4103, 8196)
SHAPES = (
    (1, 1, 3, 3), (4, 3, 3, 3), (2, 5, 2, 7), (9, 2, 15), (1, 3, 100), (1, 2, 20001), (5, 7, 16), (4, 5, 20),
    (30, 3, 7, 7), (6, 3, 19, 19), (2, 2, 725), (3, 3, 6555), (300, 3), (17, 6, 1), (2, 32, 9), (3, 64, 4, 4),
    (8, 70, 5, 5), (40, 39, 3), (24, 20, 2), (1, 33, 30), (8, 4, 28, 28),
)  # fmt: skip


def products(order: _blas.Blas, dtype: str, every: int) -> Iterator[tuple[str, bool]]:
    """Whether each product has the library's bits, over a grid of shapes and then over random ones."""
    random = np.random.default_rng(1)
    shapes = list(itertools.product(ROWS, COLUMNS))
    for _ in range(60):
        rows = int(2 ** random.uniform(0, 11))
        shapes.append((rows, int(2 ** random.uniform(0, min(17, 20 - np.log2(rows))))))
    for rows, columns in shapes[::every]:
        matrix = (random.standard_normal((rows, columns)) + 3).astype(dtype)
        for factor in (1.0, 1.0 / (3 * rows * columns)):
            place = f"{rows}x{columns} {dtype} factor {factor:.3g}"
            same = np.array_equal(order.gemv(matrix, factor), CBLAS.gemv(matrix, factor))
            yield "gemv " + place, same
            mine = order.gemv_transposed(matrix, factor)
            yield (
                "gemv_transposed " + place,
                np.array_equal(mine, CBLAS.gemv_transposed(matrix, factor)),
            )


def magnitudes(dtype: str, every: int) -> Iterator[tuple[str, bool]]:
    """Whether ATLAS's ?asum has the library's bits."""
    random = np.random.default_rng(3)
    real = ctypes.c_float if dtype == "float32" else ctypes.c_double
    function = getattr(_library(), "cblas_sasum" if dtype == "float32" else "cblas_dasum")
    function.restype = real
    for length in range(1, 200, every):
        values = _aligned(random.standard_normal(length).astype(dtype))
        theirs = function(
            ctypes.c_int(length), ctypes.c_void_p(values.ctypes.data), ctypes.c_int(1)
        )
        yield f"asum {length} {dtype}", float(_blas.atlas_asum(values)) == theirs


def layers(order: _blas.Blas, dtype: str, every: int) -> Iterator[tuple[str, bool]]:
    """Whether three training steps, inference and both backward passes have the library's bits."""
    for shape, factors, affine in itertools.product(
        SHAPES[::every], (in_first, in_second, in_both), (True, False)
    ):
        results = []
        for blas in (order, CBLAS):
            layer: Any = Caffe2016(blas, factors)
            random = np.random.default_rng(2)
            zero = np.zeros(shape[1], dtype)
            for step in (1, 2, 3):
                x = (random.standard_normal(shape) + 3).astype(dtype)
                grad, weight = random.standard_normal(shape), random.standard_normal(shape[1])
                parameters = (weight.astype(dtype), zero + 1) if affine else (None, None)
                options = {"momentum": 0.1, "eps": 1e-5, "grad_output": grad.astype(dtype)}
                got = layer(x, *parameters, zero, zero, training=True, step=step, **options)
            left = got["running_mean"], got["running_var"]
            inferred = layer(x, *parameters, *left, training=False, **options)
            results.append({**got, **{"inference " + name: inferred[name] for name in inferred}})
        mine, theirs = results
        for name in mine:
            place = f"{name} {shape} {dtype} {factors.__name__}{' affine' if affine else ''}"
            yield place, np.array_equal(mine[name], theirs[name])


def main(name: str, every: int) -> None:
    order = getattr(_blas, name)
    dtypes = ("float32",) if order is _blas.OPENBLAS_HASWELL else ("float32", "float64")
    compared = []
    for dtype in dtypes:
        compared += [*products(order, dtype, every), *layers(order, dtype, every)]
        if order is _blas.ATLAS:
            compared += magnitudes(dtype, every)
    different = [place for place, same in compared if not same]
    report = {"library": description(), "compared": len(compared), "different": different}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
