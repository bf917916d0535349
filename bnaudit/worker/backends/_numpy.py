"""The calibrated yardsticks: textbook BatchNorms whose errors are known in advance.

All compute in the dtype of x (float32 for 16-bit cases, which arrive widened exactly; float64 for
float64) and round after every operation. They share the normalization (x - mean) * invstd * weight +
bias and the gradients, and differ numerically in this only:

one_pass               E[x²] - E[x]², pairwise sums
two_pass               mean, then the mean of (x - mean)²; pairwise sums
two_pass_sequential    the same with one serial chain of additions per sum
welford                one Welford recurrence per lane of at most 64 elements, lanes merged by Chan's
                       formula in a tree: the bits of batchnorm.cu, whose header says more
welford_regions        one Welford recurrence per run of 64 (or 1024) consecutive elements, neighbours
                       merged by Chan's formula in a balanced tree
welford_sequential     one Welford recurrence over the whole channel
shifted                one_pass on x - x_1, with x_1 the channel's first element

Variance algorithms: Chan, Golub and LeVeque, The American Statistician 37 (1983) 242-247.
NumPy alone, except welford_sequential, whose serial division needs Numba.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Lanes = Tuple[Array, ...]  # what is reduced: the last axis of each counts lanes
    Merge = Callable[[Lanes, Lanes], None]

WARP, WARPS, LONGEST = 32, 8, 64
"""Of batchnorm.cu: threads of a warp, warps of a block, and the longest Welford recurrence of a thread."""

THREADS = WARP * WARPS


def unavailable(name: str) -> Optional[str]:
    """Return why the yardstick `name` (without or with @cpu) cannot run here, or None if it can."""
    if name.split("@")[0] == "welford-sequential" and importlib.util.find_spec("numba") is None:
        return "numba is not installed in this environment (pip install numba)"
    return None


# --- sums of rows: (C, n) -> (C,) -------------------------------------------------------------------


def pairwise(rows: Array) -> Array:
    """Sum each row as a balanced tree that adds the second half to the first: depth ceil(log2 n)."""
    n = rows.shape[1]
    while n > 1:
        half = (n + 1) // 2
        left = rows[:, :half].copy()
        left[:, : n - half] += rows[:, half:]
        rows, n = left, half
    return rows[:, 0]


def sequential(rows: Array) -> Array:
    """Sum each row from left to right, rounding after every addition."""
    # accumulate stores every partial sum in the rows' dtype, so it can neither reorder nor widen.
    return np.add.accumulate(rows, axis=1)[:, -1]


# --- mean and biased variance of rows: (C, n) -> (C,), (C,) -----------------------------------------


def _one_pass(rows: Array) -> Tuple[Array, Array]:
    n = rows.dtype.type(rows.shape[1])
    mean = pairwise(rows) / n
    return mean, pairwise(rows * rows) / n - mean * mean


def _two_pass(rows: Array) -> Tuple[Array, Array]:
    n = rows.dtype.type(rows.shape[1])
    mean = pairwise(rows) / n
    return mean, pairwise(np.square(rows - mean[:, None])) / n


def _two_pass_sequential(rows: Array) -> Tuple[Array, Array]:
    n = rows.dtype.type(rows.shape[1])
    mean = sequential(rows) / n
    return mean, sequential(np.square(rows - mean[:, None])) / n


def _shifted(rows: Array) -> Tuple[Array, Array]:
    first = rows[:, :1]
    mean, var = _one_pass(rows - first)
    return first[:, 0] + mean, var


def _welford(rows: Array) -> Tuple[Array, Array]:
    """Mean and biased variance with the operations of batchnorm.cu's `moments` and `statistics`."""
    channels, n = rows.shape
    real = rows.dtype.type
    lanes = lanes_of(n)
    mean = np.zeros((channels, min(n, lanes)), rows.dtype)
    m2 = np.zeros_like(mean)
    count = np.zeros(mean.shape[1], np.int64)
    for start in range(0, n, lanes):
        x = rows[:, start : start + lanes]
        active = x.shape[1]
        _update(mean[:, :active], m2[:, :active], x, start // lanes + 1)
        count[:active] += 1
    _, mean, m2 = _merge_lanes((count, mean, m2), _merge_moments)
    return mean[:, 0], m2[:, 0] / real(n)


def _welford_regions(length: int, rows: Array) -> Tuple[Array, Array]:
    channels, n = rows.shape
    regions = -(-n // length)
    mean = np.zeros((channels, regions), rows.dtype)
    m2 = np.zeros_like(mean)
    for place in range(min(n, length)):
        x = rows[:, place::length]  # the last region may end before the others
        _update(mean[:, : x.shape[1]], m2[:, : x.shape[1]], x, place + 1)
    count = np.minimum(n - length * np.arange(regions), length)
    lanes: Lanes = (count, mean, m2)
    while lanes[0].size > 1:
        left = tuple(part[..., ::2].copy() for part in lanes)
        _merge_moments(left, tuple(part[..., 1::2] for part in lanes))
        lanes = left
    _, mean, m2 = lanes
    return mean[:, 0], m2[:, 0] / rows.dtype.type(n)


def _update(mean: Array, m2: Array, x: Array, count: int) -> None:
    """Welford's update of every lane by its element x, the lane's number `count`."""
    delta = x - mean
    mean += delta / x.dtype.type(count)
    m2 += delta * (x - mean)


def _lane_sums(rows: Array) -> Array:
    """Sum each row with the operations of batchnorm.cu's `gradient_sums` and `parameter_gradients`."""
    channels, n = rows.shape
    lanes = lanes_of(n)
    total = np.zeros((channels, min(n, lanes)), rows.dtype)
    for start in range(0, n, lanes):
        x = rows[:, start : start + lanes]
        total[:, : x.shape[1]] += x
    return _merge_lanes((total,), _merge_sums)[0][:, 0]


def lanes_of(n: int) -> int:
    """Number of lanes that a channel of n elements is dealt to, in turn: whole blocks of threads."""
    return THREADS * -(-n // (THREADS * LONGEST))


def _merge_lanes(lanes: Lanes, merge: Merge) -> Lanes:
    """Reduce lanes to one: in blocks of threads, then the blocks, dealt to the threads of one more block.

    merge(a, b) merges b into the first lanes of a, as many as b has.
    """
    blocks = _merge_blocks(lanes, merge)
    threads = tuple(part[..., :THREADS] for part in blocks)
    for start in range(THREADS, blocks[0].shape[-1], THREADS):
        merge(threads, tuple(part[..., start : start + THREADS] for part in blocks))
    return _merge_blocks(threads, merge)


def _merge_blocks(lanes: Lanes, merge: Merge) -> Lanes:
    """Reduce the lanes of every block to one: first within its warps, then across them.

    Only the last block may be short of lanes, at its end. Lanes that are not there are not merged.
    """
    for group in (WARP, WARPS):
        while group > 1:
            half = group // 2
            places = np.arange(lanes[0].shape[-1])
            if places.size > half:
                left = places[places % group < half]
                right = left[left + half < places.size] + half
                lower = tuple(part.take(right, -1) for part in lanes)
                lanes = tuple(part.take(left, -1) for part in lanes)
                merge(lanes, lower)
            group = half
    return lanes


def _merge_moments(a: Lanes, b: Lanes) -> None:
    """Chan's formula."""
    count_b, mean_b, m2_b = b
    count_a, mean_a, m2_a = (part[..., : count_b.size] for part in a)
    real = mean_a.dtype.type
    count = count_a + count_b
    share = count_b.astype(real) / count.astype(real)
    delta = mean_b - mean_a
    mean_a += delta * share
    m2_a += m2_b
    m2_a += delta * delta * (count_a.astype(real) * share)
    count_a[...] = count


def _merge_sums(a: Lanes, b: Lanes) -> None:
    a[0][..., : b[0].shape[-1]] += b[0]


def _welford_recurrence(rows: Array, mean: Array, m2: Array) -> None:
    """Update mean and m2, both zero at first, by every element of their row in turn."""
    real = rows.dtype.type
    for c in range(rows.shape[0]):
        m, s = mean[c], m2[c]
        for i in range(rows.shape[1]):
            x = rows[c, i]
            delta = x - m
            m += delta / real(i + 1)
            s += delta * (x - m)
        mean[c], m2[c] = m, s


@functools.lru_cache(maxsize=None)
def _compiled_recurrence() -> Callable[[Array, Array, Array], None]:
    """Compile the recurrence on first use (0.2 s), and import Numba only then.

    Not with cache=True: Numba's files name the module they were compiled in, and this one is loaded
    as bnaudit.worker as well as bnaudit_worker, of which only one may be importable.
    """
    import numba

    return numba.njit(_welford_recurrence)


def _welford_sequential(rows: Array) -> Tuple[Array, Array]:
    mean = np.zeros(rows.shape[0], rows.dtype)
    m2 = np.zeros_like(mean)
    _compiled_recurrence()(rows, mean, m2)
    return mean, m2 / rows.dtype.type(rows.shape[1])


# --- the layer --------------------------------------------------------------------------------------


def channel_rows(x: Array) -> Array:
    """Return x, (N, C, *) in any strides, as C contiguous rows of n elements, N before the rest."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(x.shape[1], -1)


def from_rows(rows: Array, shape: Tuple[int, ...]) -> Array:
    """Undo `channel_rows`, as a view."""
    return rows.reshape((shape[1], shape[0], *shape[2:])).swapaxes(0, 1)


def running_factors(real: Any, n: int, momentum: float) -> Tuple[Any, Any, Any]:
    """What running statistics, the batch's, and its biased variance are multiplied by, in the type `real`."""
    return real(1 - momentum), real(momentum), real(n / (n - 1) if n > 1 else 1)


def expand(vector: Array, x: Array) -> Array:
    """Return a per-channel vector (C,) as (1, C, 1, ...), to go with x (N, C, *)."""
    return vector.reshape((1, -1) + (1,) * (x.ndim - 2))


def update_running(
    running_mean: Array, running_var: Array, mean: Array, var: Array, n: int, momentum: float
) -> Dict[str, Array]:
    """Move the running statistics by `momentum` towards the batch's mean and unbiased variance."""
    real = mean.dtype.type
    old, new, correction = running_factors(real, n, momentum)
    return {
        "running_mean": running_mean.astype(real) * old + mean * new,
        "running_var": running_var.astype(real) * old + (var * correction) * new,
    }


def empty_batch(
    x: Array,
    weight: Optional[Array],
    bias: Optional[Array],
    running_mean: Array,
    running_var: Array,
    training: bool,
    backward: bool,
) -> Dict[str, Array]:
    """Outputs for N = 0: y empty, running statistics as they were, zero parameter gradients."""
    outputs = {"y": np.empty(x.shape, x.dtype)}
    if training:
        outputs["running_mean"], outputs["running_var"] = running_mean.copy(), running_var.copy()
    if backward:
        outputs["grad_input"] = np.empty(x.shape, x.dtype)
        if weight is not None:
            outputs["grad_weight"] = np.zeros(x.shape[1], x.dtype)
        if bias is not None:
            outputs["grad_bias"] = np.zeros(x.shape[1], x.dtype)
    return outputs


class Yardstick:
    """A BatchNorm with the plug-in's signature around one algorithm for mean and variance.

    Args:
        moments: rows (C, n) -> batch mean and biased variance, (C,) each.
        total: rows (C, n) -> sums (C,), the order of the gradients' sums.
    """

    widened = True

    def __init__(
        self, moments: Callable[[Array], Tuple[Array, Array]], total: Callable[[Array], Array]
    ) -> None:
        """Keep the two functions that tell this yardstick from the others."""
        self.moments = moments
        self.total = total

    def __call__(
        self,
        x: Array,
        weight: Optional[Array],
        bias: Optional[Array],
        running_mean: Array,
        running_var: Array,
        *,
        training: bool,
        momentum: float,
        eps: float,
        grad_output: Optional[Array] = None,
    ) -> Dict[str, Array]:
        """Normalize x, (N, C, *); everything is computed and returned in the dtype of x.

        Returns y; in training batch_mean, batch_var (biased) and the running statistics; with a
        grad_output grad_input and, where there are such parameters, grad_weight and grad_bias.
        """
        if x.shape[0] == 0:
            return empty_batch(
                x, weight, bias, running_mean, running_var, training, grad_output is not None
            )
        real = x.dtype.type
        rows = channel_rows(x)
        n = rows.shape[1]
        outputs = {}
        # Squares of large values overflow here as they do in the algorithm: silently.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if training:
                mean, var = self.moments(rows)
                outputs["batch_mean"], outputs["batch_var"] = mean, var
                outputs.update(update_running(running_mean, running_var, mean, var, n, momentum))
            else:
                mean, var = running_mean.astype(real), running_var.astype(real)
            invstd = real(1) / np.sqrt(var + real(eps))
            xhat = (rows - mean[:, None]) * invstd[:, None]
            y = xhat if weight is None else xhat * weight.astype(real)[:, None]
            y = y if bias is None else y + bias.astype(real)[:, None]
            outputs["y"] = from_rows(y, x.shape)
            if grad_output is not None:
                grad = channel_rows(grad_output)
                grad_bias, grad_weight = self.total(grad), self.total(grad * xhat)
                if weight is not None:
                    outputs["grad_weight"] = grad_weight
                if bias is not None:
                    outputs["grad_bias"] = grad_bias
                if training:
                    grad = grad - (grad_bias / real(n))[:, None]
                    grad -= xhat * (grad_weight / real(n))[:, None]
                slope = invstd if weight is None else invstd * weight.astype(real)
                outputs["grad_input"] = from_rows(grad * slope[:, None], x.shape)
        return outputs


one_pass = Yardstick(_one_pass, pairwise)
two_pass = Yardstick(_two_pass, pairwise)
two_pass_sequential = Yardstick(_two_pass_sequential, sequential)
welford = Yardstick(_welford, _lane_sums)
welford_regions_64 = Yardstick(functools.partial(_welford_regions, 64), pairwise)
welford_regions_1024 = Yardstick(functools.partial(_welford_regions, 1024), pairwise)
welford_sequential = Yardstick(_welford_sequential, sequential)
shifted = Yardstick(_shifted, pairwise)
