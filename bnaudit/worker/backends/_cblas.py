"""`caffe-2016-cblas`: Caffe's layer of 2016 on a CBLAS library of your choice, through ctypes.

The environment variable BNAUDIT_CBLAS names the library, by absolute path or soname; without it the system's is
taken (ctypes.util.find_library of cblas, blas and openblas, the first that has the functions). ?gemv,
?gemm, ?scal and ?axpy are called as Caffe's wrappers call them: row-major, gemv with lda = columns, gemm
with lda = 1 and ldb = ldc = columns, the inner dimension being 1. The order of additions is the library's
own and may change with the shape, the processor and the number of threads.

Every operand starts at a multiple of 64 bytes, because ATLAS chooses by the alignment where the factor
goes: a result does not depend on where memory happened to be free.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np

from ._blas import Blas
from ._caffe import Caffe2016

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

VARIABLE = "BNAUDIT_CBLAS"
FUNCTIONS = tuple("cblas_" + t + name for t in "sd" for name in ("gemv", "gemm", "scal", "axpy"))
ALIGNMENT = 64

ROW_MAJOR, NO_TRANS, TRANS = 101, 111, 112


class _Missing(Exception):  # noqa: N818 - an outcome
    """There is no library to call; the message says why, and what to do."""


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here, or None if there is a CBLAS library."""
    try:
        _library()
    except _Missing as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=None)
def _library() -> ctypes.CDLL:
    """Return the library that is asked for, or else the system's; raises _Missing."""
    asked = os.environ.get(VARIABLE)
    if asked:
        if os.sep in asked and not os.path.isabs(asked):  # a worker has a folder of its own
            raise _Missing("%s needs an absolute path or a soname, not %s" % (VARIABLE, asked))
        return _load(asked)
    for name in ("cblas", "blas", "openblas"):
        found = ctypes.util.find_library(name)
        if found is not None:
            try:
                return _load(found)
            except _Missing:  # Fortran's BLAS alone, for example
                continue
    text = "no CBLAS library was found (apt-get install libblas3, or name one in %s)"
    raise _Missing(text % VARIABLE)


def _load(name: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise _Missing("the CBLAS library %s cannot be loaded: %s" % (name, error)) from error
    for function in FUNCTIONS:
        if not hasattr(library, function):
            raise _Missing("%s is no CBLAS library: it has no %s" % (name, function))
        getattr(library, function).restype = None
    return library


@functools.lru_cache(maxsize=None)
def description() -> str:
    """Return which library is called: its file, where that can be told, and OpenBLAS's own account."""
    library = _library()
    name = library._name
    address = ctypes.cast(library.cblas_sgemv, ctypes.c_void_p).value or 0
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                start, stop = (int(bound, 16) for bound in line.split()[0].split("-"))
                if start <= address < stop:
                    name = line.split(None, 5)[5].strip()
    except OSError:  # another system than Linux
        pass
    try:
        library.openblas_get_config.restype = ctypes.c_char_p
        configuration = library.openblas_get_config().decode(errors="replace").strip()
    except AttributeError:
        return "CBLAS of %s" % name
    return "CBLAS of %s: %s" % (name, configuration)


def _aligned(array: Array) -> Array:
    """Return the array, or a copy, C-contiguous and at a multiple of ALIGNMENT."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = _zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _zeros(shape: Tuple[int, ...], dtype: Any) -> Array:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _call(name: str, dtype: Any, *arguments: Any) -> None:
    """Call cblas_?name: integers as int, floats as the dtype's, arrays by their address."""
    real = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    function = getattr(_library(), "cblas_%s%s" % ("s" if dtype == np.float32 else "d", name))
    passed: List[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            passed.append(ctypes.c_void_p(argument.ctypes.data))
        else:
            passed.append(real(argument) if isinstance(argument, float) else ctypes.c_int(argument))
    function(*passed)


def _gemv_of(transpose: int, matrix: Array, factor: float) -> Array:
    rows, columns = matrix.shape
    length, width = (columns, rows) if transpose == NO_TRANS else (rows, columns)
    ones = _aligned(np.ones(length, matrix.dtype))
    y = _zeros((width,), matrix.dtype)
    a = _aligned(matrix)
    layout = ROW_MAJOR, transpose, rows, columns
    _call("gemv", matrix.dtype, *layout, factor, a, columns, ones, 1, 0.0, y, 1)
    return y


def _gemv(matrix: Array, factor: float) -> Array:
    return _gemv_of(NO_TRANS, matrix, factor)


def _gemv_transposed(matrix: Array, factor: float = 1.0) -> Array:
    return _gemv_of(TRANS, matrix, factor)


def _rank_one(factor: float, column: Array, row: Array, beta: float, c: Array) -> Array:
    """Return factor · column · row + beta · c, in c."""
    rows, columns = c.shape
    a, b = _aligned(column), _aligned(row)
    layout = ROW_MAJOR, NO_TRANS, NO_TRANS, rows, columns, 1
    _call("gemm", c.dtype, *layout, factor, a, 1, b, columns, beta, c, columns)
    return c


def _outer(vector: Array, columns: int) -> Array:
    c = _zeros((vector.size, columns), vector.dtype)
    return _rank_one(1.0, vector, np.ones(columns, vector.dtype), 0.0, c)


def _axpby(alpha: float, x: Array, beta: float, y: Array) -> Array:
    total = _zeros(y.shape, y.dtype)
    total[...] = y
    a = _aligned(x)
    _call("scal", y.dtype, total.size, beta, total, 1)
    _call("axpy", y.dtype, total.size, alpha, a, 1, total, 1)
    return total


class _Cblas(Blas):
    """The two gemms that NumPy stands in for elsewhere are calls, too."""

    def repeat(self, vector: Array, images: int) -> Array:
        c = _zeros((images, vector.size), vector.dtype)
        return _rank_one(1.0, np.ones(images, vector.dtype), vector, 0.0, c).reshape(-1)

    def add_outer(self, matrix: Array, sign: int, vector: Array) -> Array:
        c = _zeros(matrix.shape, matrix.dtype)
        c[...] = matrix
        return _rank_one(float(sign), vector, np.ones(matrix.shape[1], matrix.dtype), 1.0, c)


CBLAS = _Cblas(_gemv, _gemv_transposed, _outer, _axpby)


class _Caffe2016(Caffe2016):
    def __call__(self, *arguments: Any, **options: Any) -> Dict[str, Any]:
        return {**super().__call__(*arguments, **options), "kernel": description()}


caffe_2016_cblas = _Caffe2016(CBLAS)
