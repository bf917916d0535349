"""A stand-in for CuPy without a GPU, for tests: a folder to put in front of sys.path or PYTHONPATH.

It offers what bnaudit's backends use of CuPy 13 and 14, and nothing else: what is not here fails. "Device"
memory is host memory, fresh memory is full of NaN, and every address that a kernel or cuBLAS gets has to
lie in an allocation that is alive. As in CuPy, NumPy's arrays and the device's do not mix.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from . import cuda
from .cuda.memory import Memory, MemoryPointer

__version__ = "14.2.0"


class ndarray:  # noqa: N801 - CuPy's name
    """An array in the "device's" memory: with the address and the strides that its kernels are given."""

    __array_ufunc__ = None  # NumPy's arrays leave an operation with this one to it, which refuses
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        shape: int | tuple[int, ...],
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: tuple[int, ...] | None = None,
        order: str = "C",
    ) -> None:
        assert order == "C"
        dtype = np.dtype(dtype)
        if memptr is None:
            assert strides is None
            memptr = MemoryPointer(Memory(int(np.prod(shape)) * dtype.itemsize), 0)
        self.data = memptr
        # NumPy refuses what does not lie inside the buffer.
        memory = memptr.mem.host
        self._host: Any = np.ndarray(shape, dtype, memory, memptr.ptr - memptr.mem.ptr, strides)

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)

    def get(self, stream: None = None, order: str = "C") -> Any:
        """A copy in the host's memory."""
        return self._host.copy(order)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use .get()")

    def reshape(self, *shape: Any) -> ndarray:
        reshaped = self._host.reshape(*shape)
        if np.shares_memory(reshaped, self._host) or not self.size:
            return self._view(reshaped)
        return _from_host(reshaped)

    def _view(self, host: Any) -> ndarray:
        offset = host.ctypes.data - self.data.ptr
        return ndarray(host.shape, host.dtype, self.data + offset, host.strides)

    def _operate(self, operation: Callable[[Any, Any], Any], other: object) -> ndarray:
        with np.errstate(all="ignore"):
            return _from_host(operation(self._host, _operand(other)))

    def __add__(self, other: object) -> ndarray:
        return self._operate(operator.add, other)

    def __sub__(self, other: object) -> ndarray:
        return self._operate(operator.sub, other)

    def __mul__(self, other: object) -> ndarray:
        return self._operate(operator.mul, other)

    def __truediv__(self, other: object) -> ndarray:
        return self._operate(operator.truediv, other)


def _operand(value: object) -> Any:
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, (int, float, np.number)):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _from_host(host: Any) -> ndarray:
    """A new array of the same strides with a copy of the values."""
    by_stride = np.argsort([-stride for stride in host.strides], kind="stable")
    array = empty(tuple(host.shape[axis] for axis in by_stride), host.dtype)
    strides = [0] * host.ndim
    for place, axis in enumerate(by_stride):
        strides[axis] = array.strides[place]
    array = ndarray(host.shape, host.dtype, array.data, tuple(strides))
    array._host[...] = host
    return array


def empty(shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
    return ndarray(shape, dtype)


def empty_like(prototype: ndarray) -> ndarray:
    """As NumPy's: the prototype's order of axes, without its gaps."""
    return _from_host(np.empty_like(prototype._host))


def zeros(shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
    return _from_host(np.zeros(shape, dtype))


def ones(shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
    return _from_host(np.ones(shape, dtype))


def asarray(a: Any) -> ndarray:
    """A copy of a NumPy array, C-contiguous where it is not F-contiguous, or the device's array itself."""
    if isinstance(a, ndarray):
        return a
    return _from_host(a if a.flags.f_contiguous else np.ascontiguousarray(a))


def ascontiguousarray(a: ndarray) -> ndarray:
    return a if a.flags.c_contiguous else _from_host(np.ascontiguousarray(a._host))


def sqrt(x: ndarray) -> ndarray:
    with np.errstate(all="ignore"):
        return _from_host(np.sqrt(x._host))


# At the end, because they are built on the arrays above.
from . import _core  # noqa: E402
from ._kernels import ElementwiseKernel, ReductionKernel  # noqa: E402

__all__ = ["ElementwiseKernel", "ReductionKernel", "_core", "cuda"]
