"""Memory formats: where a tensor's elements lie, and whether anything else was written to.

"contiguous" is C order (N, C, *). "channels_last" is (N, *, C) in memory. "strided" is C order with every
second element left out, 3 elements into an allocation whose gaps hold NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .rounding import Array

OFFSET = 3
STEP = 2
BLOCK = 1 << 20
"""Elements compared at a time."""


def bits(array: Array) -> Array:
    """The array's bit patterns, as unsigned integers of the same size in the same place."""
    pattern: Array = array.view("u%d" % array.dtype.itemsize)
    return pattern


def lay_out(values: Array, memory_format: str) -> Array:
    """A writable copy of `values`, of shape (N, C, *), in the memory format. uint16 is bfloat16's bits."""
    laid: Array
    if memory_format == "contiguous":
        laid = np.empty(values.shape, values.dtype)
    elif memory_format == "channels_last":
        shape = values.shape[:1] + values.shape[2:] + values.shape[1:2]
        laid = np.moveaxis(np.empty(shape, values.dtype), -1, 1)
    else:
        memory = np.full(OFFSET + STEP * values.size, _nan(values.dtype), values.dtype)
        laid = _elements(memory, values.shape)
    laid[...] = values
    return laid


def _elements(memory: Array, shape: tuple[int, ...]) -> Array:
    """The "strided" tensor in a one-dimensional allocation; its strides skip also where a length is 1."""
    elements: Array = memory[OFFSET:].reshape((*shape, STEP))[..., 0]
    return elements


def allocation(array: Array) -> Array | None:
    """The one-dimensional array, gaps included, that a "strided" tensor is a part of; None for others."""
    memory = array.base
    if not isinstance(memory, np.ndarray) or memory.ndim != 1 or memory.dtype != array.dtype:
        return None
    if memory.size != OFFSET + STEP * array.size:
        return None
    # A tensor of several steps may lie in as much memory, but not like this.
    laid = _elements(memory, array.shape)
    alike = laid.ctypes.data == array.ctypes.data and laid.strides == array.strides
    return memory if alike else None


def changed_gap(laid: Array) -> int | None:
    """Where in the allocation of a "strided" tensor a gap no longer holds its NaN, or None.

    Counted in elements from the tensor's first; negative in front of it.
    """
    memory = allocation(laid)
    assert memory is not None  # noqa: S101 - lay_out made it
    touched = bits(memory) != bits(np.full(1, _nan(laid.dtype), laid.dtype))
    touched[OFFSET::STEP] = False  # the elements
    return int(touched.argmax()) - OFFSET if touched.any() else None


def _nan(dtype: np.dtype[Any]) -> float:
    return 0x7FC0 if dtype == np.uint16 else np.nan


def first_change(
    array: Array, source: Array, convert: Callable[[Array], Array]
) -> tuple[int, ...] | None:
    """Index of the first element, in C order, whose bits are not those of `convert(source)`, or None."""
    rows = max(1, BLOCK // max(1, source[:1].size))
    for start in range(0, len(source), rows):
        block = slice(start, start + rows)
        differs = bits(array[block]) != bits(convert(source[block]))
        if differs.any():
            index = np.unravel_index(int(differs.argmax()), differs.shape)
            return (start + int(index[0]), *map(int, index[1:]))
    return None
