"""BatchNorms in which nothing is wrong, and which no scenario may flag."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnaudit.defects.layer import Array, Call, Layer
from bnaudit.worker.backends._numpy import channel_rows, pairwise, welford


class Float64Statistics(Layer):
    """Every operation in float64, each result rounded once."""


class CorrectedTwoPass(Layer):
    """The statistics dtype throughout, and the variance corrected by the mean's error.

    Chan, Golub and LeVeque, The American Statistician 37(3), 1983, equation 1.7.
    """

    def read(self, call: Call, tensor: Array) -> Array:
        """In float32, unless the case is float64."""
        return channel_rows(tensor).astype(call.statistics_dtype)

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Both passes, and the correction of either."""
        n = rows.dtype.type(call.n)
        mean = pairwise(rows) / n
        deviations = rows - mean[:, None]
        error = pairwise(deviations) / n
        var = pairwise(np.square(deviations)) / n - error * error
        return mean + error, np.maximum(var, 0)

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """The same average in the form that moves by the difference's share."""
        old = old.astype(new.dtype)
        return old + new.dtype.type(call.momentum) * (new - old)


class WelfordTree(CorrectedTwoPass):
    """Welford's recurrence in lanes that Chan's formula merges in a tree, in the statistics dtype."""

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """Those of the yardstick welford@cpu."""
        found: tuple[Any, Any] = welford.moments(rows)
        return found
