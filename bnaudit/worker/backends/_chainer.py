"""Chainer 1.7's BatchNormalization of April 2016, as it computed on the CPU and on the GPU.

Source: chainer/chainer 4620d216, functions/normalization/batch_normalization.py and the link of that name;
cupy/core/core.pyx for the GPU. float32 only. What differs numerically from the textbook's two passes:

    var = mean((x - mean)²) + eps     y = gamma·((x - mean) / sqrt(var)) + beta

The running variance is the moving average of var·m/(m-1) with eps already in var, and inference adds none:
it divides by the root of what training left. Running statistics are judged as if eps were not in them.

chainer_2016       NumPy's mean, var and sum, in the order of the NumPy that is installed, on a C-contiguous x
chainer_2016_gpu   sums by blocks of up to 512 threads, the mean divided by m, the variance multiplied by
                   1/m; CuPy's kernels, in which nvcc may have fused gamma·x̂ + beta, are not fused here
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

import numpy as np

from ._blocks import block_sums
from ._numpy import channel_rows, empty_batch, expand

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

THREADS = 512
"""Most threads of a block in CuPy's reductions."""


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy is enough."""
    return None


class OnCpu:
    """Reductions of an (N, C, *) array to (C,) by NumPy."""

    def total(self, x: Array) -> Array:
        """Return the sums."""
        return x.sum(axis=_axes(x))

    def mean(self, x: Array) -> Array:
        """Return the means."""
        return x.mean(axis=_axes(x))

    def var(self, x: Array, mean: Array) -> Array:
        """Return the biased variances; NumPy forms the same mean again."""
        return x.var(axis=_axes(x))

    def average(self, values: Array, count: int) -> Array:
        """Return values / count, where the gradients are averaged."""
        return values / values.dtype.type(count)


class OnGpu(OnCpu):
    """The same by CuPy's reduction kernels of 2016."""

    def total(self, x: Array) -> Array:
        """Return the sums: as many threads as the next power of two holds, 512 at most."""
        rows = channel_rows(x)
        return block_sums(rows, min(THREADS, 1 << (rows.shape[1] - 1).bit_length()))

    def mean(self, x: Array) -> Array:
        """Return the means, each a quotient."""
        return self.total(x) / x.dtype.type(x.size // x.shape[1])

    def var(self, x: Array, mean: Array) -> Array:
        """Return the biased variances, each a product."""
        alpha = x.dtype.type(x.shape[1] / x.size)
        return alpha * self.total(np.square(x - expand(mean, x)))

    def average(self, values: Array, count: int) -> Array:
        """Return values · (1 / count)."""
        real = values.dtype.type
        return values * (real(1) / real(count))


def _axes(x: Array) -> Any:
    return (0, *range(2, x.ndim))


class Chainer2016:
    """The function and its link, with the reductions of one device."""

    widened = True

    def __init__(self, device: OnCpu) -> None:
        """Keep the device's reductions."""
        self.device = device

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
        """Run one step in float32; raises NotImplementedError for float64."""
        if x.dtype == np.float64:
            raise NotImplementedError("Chainer 1.7's batch_normalization takes float32 only")
        if x.shape[0] == 0:
            backward = grad_output is not None
            return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
        device, x = self.device, np.ascontiguousarray(x)
        count = x.size // x.shape[1]
        gamma = np.ones(x.shape[1], x.dtype) if weight is None else weight
        outputs = {}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if training:
                mean = device.mean(x)
                var = device.var(x, mean)
                outputs["batch_mean"], outputs["batch_var"] = mean, var
                var = var + x.dtype.type(eps)
                decay = 1 - momentum
                adjust = (1 - decay) * (count / max(count - 1.0, 1.0))
                outputs["running_mean"] = running_mean * decay + mean * (1 - decay)
                outputs["running_var"] = running_var * decay + var * adjust
            else:
                mean, var = running_mean, running_var
            std = np.sqrt(var)
            x_hat = (x - expand(mean, x)) / expand(std, x)
            y = x_hat if weight is None else expand(weight, x) * x_hat
            outputs["y"] = y if bias is None else y + expand(bias, x)
            if grad_output is not None:
                gy = np.ascontiguousarray(grad_output)
                gbeta, ggamma = device.total(gy), device.total(gy * x_hat)
                if weight is not None:
                    outputs["grad_weight"] = ggamma
                if bias is not None:
                    outputs["grad_bias"] = gbeta
                if training:
                    sums = x_hat * expand(ggamma, x) + expand(gbeta, x)
                    gy = gy - device.average(sums, count)
                outputs["grad_input"] = expand(gamma / std, x) * gy
        return outputs


chainer_2016 = Chainer2016(OnCpu())
chainer_2016_gpu = Chainer2016(OnGpu())
