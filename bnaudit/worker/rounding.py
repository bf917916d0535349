"""float64 → dtype, correctly rounded once, and back.

Casting float64 to a 16-bit dtype by way of float32 rounds twice: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes the bfloat16
1.0 although 1.0078125 is nearer (ml_dtypes and torch do this). Here the intermediate float32 is
rounded to odd, which leaves the second rounding as if it were the only one (Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    import numpy.typing as npt

    Array = npt.NDArray[Any]

DTYPES = ("float16", "bfloat16", "float32", "float64")

_STORAGE = {"float16": "f2", "bfloat16": "u2", "float32": "f4", "float64": "f8"}


def storage(dtype: str) -> np.dtype[Any]:
    """NumPy dtype that holds values of `dtype`; bfloat16 is held as its 16 bits, in uint16."""
    return np.dtype(_STORAGE[dtype])


def statistics_dtype(dtype: str) -> str:
    """Dtype of per-channel statistics and parameters for a tensor of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


def round_to(values: Array, dtype: str) -> Array:
    """Rounds float64 or float32 values to `dtype` once, to nearest, ties to even.

    Returns an array of the same shape in the storage of `dtype`. What exceeds the range becomes an
    infinity; a NaN stays one.
    """
    values = np.asarray(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype in ("float32", "float64"):
            return values.astype(storage(dtype))
        nearby = _round_to_odd(values)
        if dtype == "float16":
            rounded: Array = nearby.view(np.float32).astype(np.float16)
            return rounded
    # Half an ulp less one bit, plus the last kept bit: carries exactly where rounding goes up.
    half_even = np.uint32(0x7FFF) + ((nearby >> np.uint32(16)) & np.uint32(1))
    top = ((nearby + half_even) >> np.uint32(16)).astype(np.uint16)
    rounded = np.where(np.isnan(values), np.uint16(0x7FC0), top)  # a NaN could carry over into -0
    return rounded


def widen(array: Array, dtype: str) -> Array:
    """Values stored as `dtype`, exactly: float64 for float64, float32 for every other dtype."""
    if dtype == "bfloat16":
        widened: Array = (np.asarray(array).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    with np.errstate(invalid="ignore"):  # which a signalling NaN would raise
        return np.asarray(array).astype(statistics_dtype(dtype), copy=False)


def widen64(array: Array, dtype: str) -> Array:
    """Values stored as `dtype`, exactly, as float64."""
    with np.errstate(invalid="ignore"):
        return widen(array, dtype).astype(np.float64, copy=False)


def _round_to_odd(values: Array) -> npt.NDArray[np.uint32]:
    """Bits of the float32 values: exact ones as they are, of the two neighbours of others the odd one."""
    nearest = values.astype(np.float32)
    bits: npt.NDArray[np.uint32] = nearest.view(np.uint32)
    if values.dtype == np.float32:
        return bits
    # Magnitudes order like their bits, so one less is the neighbour towards zero.
    bits = bits - (np.abs(nearest) > np.abs(values)).astype(np.uint32)
    bits |= (nearest != values).astype(np.uint32)
    return bits
