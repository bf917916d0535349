"""Between the worker's tensors and those of frameworks whose channels come last.

Such frameworks hold bfloat16 as ml_dtypes.bfloat16, which they bring along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array


def native(array: Any) -> Any:
    """The array with bfloat16's bits (uint16) as ml_dtypes.bfloat16, in the same memory; None stays None."""
    if array is None or array.dtype != np.uint16:
        return array
    import ml_dtypes

    return array.view(ml_dtypes.bfloat16)


def stored(array: Any) -> Array:
    """The array (anything that NumPy takes) with bfloat16 as its bits in uint16."""
    array = np.asarray(array)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def channels_last(array: Any) -> Any:
    """(N, C, *) as stored -> a new (N, *, C) array in C order, as `native`; None stays None."""
    if array is None:
        return None
    return np.array(np.moveaxis(native(array), 1, -1), order="C")


def channels_first(array: Any) -> Array:
    """(N, *, C) -> (N, C, *), in the same memory, as `stored`."""
    return np.moveaxis(stored(array), -1, 1)
