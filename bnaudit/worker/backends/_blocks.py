"""The order in which a block of GPU threads adds, computed on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def block_sums(rows: Array, threads: int) -> Array:
    """(C, n) -> (C,): each row summed by one block of threads, a power of two.

    Thread j adds the elements j, j + threads, … in turn; then the upper half of the threads' sums is added
    to the lower half until one is left.
    """
    channels, n = rows.shape
    rounds = -(-n // threads)
    dealt = np.zeros((channels, rounds * threads), rows.dtype)
    dealt[:, :n] = rows
    sums = np.add.accumulate(dealt.reshape(channels, rounds, threads), axis=1)[:, -1]
    while threads > 1:
        threads //= 2
        sums = sums[:, :threads] + sums[:, threads:]
    return sums[:, 0]
