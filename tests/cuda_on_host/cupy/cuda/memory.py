"""Allocations, and the addresses in them."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes)."
        )


class Memory:
    """An allocation, full of NaN: all bits are set."""

    def __init__(self, size: int) -> None:
        self.host = np.full(size, 0xFF, np.uint8)
        self.size = size
        self.ptr: int = self.host.ctypes.data
        _alive[self.ptr] = self


_alive: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


class MemoryPointer:
    def __init__(self, mem: Memory, offset: int) -> None:
        self.mem = mem
        self.ptr = mem.ptr + offset

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


def _allocation(address: int) -> Memory | None:
    alive = list(_alive.values())
    return next((a for a in alive if a.ptr <= address < a.ptr + a.size), None)


def is_device(address: int) -> bool:
    return _allocation(address) is not None


def view(address: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...]) -> Any:
    """What lies at an address of the device, as NumPy's array.

    Raises TypeError or ValueError where an element would lie outside of the allocation that is there.
    """
    memory = _allocation(address)
    if memory is None:
        raise ValueError(f"{address:#x} is not an address in the device's memory")
    return np.ndarray(shape, dtype, memory.host, address - memory.ptr, strides)
