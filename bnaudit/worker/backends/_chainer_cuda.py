"""`chainer-2016@cuda`: BatchNormalization of Chainer 1.7.2 with the CuPy it came with.

Kernels of the same definition: mean = sum / n and var = (1/n)·sum of (x - mean)², float32 sums in the order
of CuPy's reduction; y = gamma·x_hat + beta in one kernel. eps is added to the variance in place, and so
becomes a part of the running variance; inference divides by the square root of that without adding eps once
more. Today's CuPy compiles its own kernels with -ftz=true, which the one of 2016 did not: subnormal numbers
are zero here.

Requires what `_cupy` does.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ._cupy import checked, to_device, to_host
from ._cupy import describe as describe  # of CuPy, whichever backend asks
from ._cupy import unavailable as unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..rounding import Array
    from ._cupy import Outputs


class _ChainerKernels(NamedTuple):
    mean: Any
    var: Any
    sum: Any
    normalize: Any
    grad_input: Any


@functools.lru_cache(maxsize=None)
def _chainer_kernels() -> _ChainerKernels:
    """CuPy's reductions of 2016 and the two elementwise kernels of Chainer's function."""
    from cupy import ElementwiseKernel, ReductionKernel

    mean = "y = a / (_in_ind.size() / _out_ind.size())"
    square = "(x - mean) * (x - mean)"
    normalize = "x_hat = (x - mean) / std; y = weight * x_hat + bias"
    inputs = "T grad, T x_hat, T weight, T std, T grad_weight, T grad_bias, T inv_count"
    grad = "dx = (weight / std) * (grad - (x_hat * grad_weight + grad_bias) * inv_count)"
    return _ChainerKernels(
        ReductionKernel("T x", "T y", "x", "a + b", mean, "0", "chainer_mean"),
        ReductionKernel(
            "T x, T mean, T alpha", "T y", square, "a + b", "y = alpha * a", "0", "chainer_var"
        ),
        ReductionKernel("T x", "T y", "x", "a + b", "y = a", "0", "chainer_sum"),
        ElementwiseKernel(
            "T x, T mean, T std, T weight, T bias", "T x_hat, T y", normalize, "chainer_fwd"
        ),
        ElementwiseKernel(inputs, "T dx", grad, "chainer_bwd"),
    )


@contextlib.contextmanager
def _without_cub() -> Iterator[None]:
    """CuPy's own reductions, instead of CUB's that it prefers since version 11, until the end of the block."""
    from cupy import _core

    before = _core.get_reduction_accelerators()
    _core.set_reduction_accelerators([])
    try:
        yield
    finally:
        _core.set_reduction_accelerators(before)


def chainer_2016(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Array | None = None,
) -> Outputs:
    """One step in float32, x in its strides; other dtypes and empty batches raise NotImplementedError."""
    if x.dtype != np.float32:
        raise NotImplementedError("Chainer's layer of 2016 is float32 only")
    if x.shape[0] == 0:
        raise NotImplementedError("Chainer's layer of 2016 divides by the batch's size, here 0")
    import cupy

    axes = (0, *range(2, x.ndim))
    by_channel = (-1,) + (1,) * (x.ndim - 2)
    count = x.size // x.shape[1]
    kernels = _chainer_kernels()
    outputs: Outputs = {}
    with checked(), _without_cub():
        device_x = to_device(x)
        if training:
            mean = kernels.mean(device_x, axis=axes)
            var = kernels.var(device_x, mean.reshape(by_channel), 1.0 / count, axis=axes)
            outputs["batch_mean"], outputs["batch_var"] = to_host(mean), to_host(var)
            var = var + eps
            moved = (outputs["batch_mean"], to_host(var), count, 1 - momentum)
            outputs.update(_chainer_running(running_mean, running_var, *moved))
        else:
            mean, var = to_device(running_mean), to_device(running_var)
        mean, std = mean.reshape(by_channel), cupy.sqrt(var).reshape(by_channel)
        ones, zeros = cupy.ones(std.shape, x.dtype), cupy.zeros(std.shape, x.dtype)
        slope = ones if weight is None else to_device(weight).reshape(by_channel)
        shift = zeros if bias is None else to_device(bias).reshape(by_channel)
        x_hat, y = kernels.normalize(device_x, mean, std, slope, shift)
        outputs["y"] = to_host(y)
        if grad_output is not None:
            grad = to_device(grad_output)
            grad_bias = kernels.sum(grad, axis=axes)
            grad_weight = kernels.sum(grad * x_hat, axis=axes)
            outputs["grad_weight"], outputs["grad_bias"] = to_host(grad_weight), to_host(grad_bias)
            if training:
                sums = (grad_weight.reshape(by_channel), grad_bias.reshape(by_channel))
                dx = kernels.grad_input(grad, x_hat, slope, std, *sums, 1.0 / count)
            else:
                dx = (slope / std) * grad
            outputs["grad_input"] = to_host(dx)
    outputs["kernel"] = "reductions of CuPy %s, without CUB" % cupy.__version__
    return outputs


def _chainer_running(
    running_mean: Array, running_var: Array, mean: Array, var: Array, count: int, decay: float
) -> Outputs:
    """The running statistics, moved towards the mean and the unbiased `var`, which contains eps."""
    keep, new = np.float32(decay), np.float32(1 - decay)
    adjusted = np.float32((1 - decay) * (count / max(count - 1.0, 1.0)))
    return {
        "running_mean": running_mean * keep + mean * new,
        "running_var": running_var * keep + var * adjusted,
    }
