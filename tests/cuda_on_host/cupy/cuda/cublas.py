"""gemv and gemm of cuBLAS: column-major matrices, at addresses, in the order of NumPy's additions."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from . import device, memory

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
DEFAULT_MATH, TF32_TENSOR_OP_MATH = 0, 3

modes = {"math": DEFAULT_MATH, "pointer": CUBLAS_POINTER_MODE_DEVICE}
"""The handle's; factors are in the device's memory until someone asks for the host's."""


class CUBLASError(RuntimeError):
    pass


def _check(handle: int, **rules: bool) -> None:
    if handle != device.HANDLE:
        raise CUBLASError("CUBLAS_STATUS_NOT_INITIALIZED")
    broken = [name for name, holds in rules.items() if not holds]
    if broken:
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: {broken}")


def getVersion(handle: int) -> int:  # noqa: N802 - CuPy's name
    _check(handle)
    return 130200


def getMathMode(handle: int) -> int:  # noqa: N802
    _check(handle)
    return modes["math"]


def setMathMode(handle: int, mode: int) -> None:  # noqa: N802
    _check(handle, mode=mode in (DEFAULT_MATH, TF32_TENSOR_OP_MATH))
    modes["math"] = mode


def getPointerMode(handle: int) -> int:  # noqa: N802
    _check(handle)
    return modes["pointer"]


def setPointerMode(handle: int, mode: int) -> None:  # noqa: N802
    _check(handle, mode=mode in (CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE))
    modes["pointer"] = mode


def _factor(address: int, dtype: Any) -> Any:
    """The number at an address in the host's memory."""
    if modes["pointer"] != CUBLAS_POINTER_MODE_HOST or memory.is_device(address):
        raise CUBLASError("CUBLAS_STATUS_EXECUTION_FAILED: a factor in the wrong memory")
    kind = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    return dtype(kind.from_address(address).value)


def _matrix(address: int, rows: int, columns: int, ld: int, dtype: Any) -> Any:
    size = np.dtype(dtype).itemsize
    return memory.view(address, (rows, columns), dtype, (size, size * ld))


def _vector(address: int, length: int, step: int, dtype: Any) -> Any:
    return memory.view(address, (length,), dtype, (step * np.dtype(dtype).itemsize,))


def _gemv(dtype: Any, handle: int, trans: int, m: int, n: int, alpha: int, a: int, lda: int,
          x: int, incx: int, beta: int, y: int, incy: int) -> None:  # fmt: skip
    _check(handle, trans=trans in (0, 1), m=m > 0, n=n > 0, lda=lda >= m, inc=min(incx, incy) > 0)
    matrix = _matrix(a, m, n, lda, dtype)
    matrix = matrix.T if trans == CUBLAS_OP_T else matrix
    result = _vector(y, matrix.shape[0], incy, dtype)
    _store(result, matrix @ _vector(x, matrix.shape[1], incx, dtype), alpha, beta, dtype)


def _gemm(dtype: Any, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int,
          a: int, lda: int, b: int, ldb: int, beta: int, c: int, ldc: int) -> None:  # fmt: skip
    _check(handle, trans=transa == transb == CUBLAS_OP_N, m=m > 0, n=n > 0, k=k > 0)
    _check(handle, lda=lda >= m, ldb=ldb >= k, ldc=ldc >= m)
    left, right = _matrix(a, m, k, lda, dtype), _matrix(b, k, n, ldb, dtype)
    if dtype == np.float32 and modes["math"] == TF32_TENSOR_OP_MATH:
        left, right = _tf32(left), _tf32(right)
    _store(_matrix(c, m, n, ldc, dtype), left @ right, alpha, beta, dtype)


def _store(result: Any, product: Any, alpha: int, beta: int, dtype: Any) -> None:
    """alpha · product + beta · result, which is not read where beta is 0."""
    factor = _factor(beta, dtype)
    with np.errstate(all="ignore"):
        product = _factor(alpha, dtype) * product
        result[...] = product if factor == 0 else product + factor * result


def _tf32(values: Any) -> Any:
    """float32 values rounded to 11 significant bits, to nearest and even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~np.uint32(0x1FFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def sgemv(*arguments: int) -> None:
    _gemv(np.float32, *arguments)


def dgemv(*arguments: int) -> None:
    _gemv(np.float64, *arguments)


def sgemm(*arguments: int) -> None:
    _gemm(np.float32, *arguments)


def dgemm(*arguments: int) -> None:
    _gemm(np.float64, *arguments)
