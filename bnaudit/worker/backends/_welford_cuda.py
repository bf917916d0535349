"""`welford@cuda`: the kernels of batchnorm.cu on CuPy. `welford@cpu` returns the same bits.

Requires CuPy 13.3 or later with NVRTC and CUDA's headers.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from ..rounding import widen
from . import _cupy
from ._cupy import describe as describe  # of CuPy, whichever backend asks
from ._cupy import unavailable as unavailable
from ._numpy import THREADS, empty_batch, lanes_of, running_factors

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..rounding import Array
    from ._cupy import Device, Outputs

    Normalization = tuple[Device, Device, np.floating[Any]]  # mean, variance, eps

SOURCE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "batchnorm.cu")

OPTIONS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
"""What batchnorm.cu needs, NVRTC's defaults among it."""

TYPES = {
    "float16": ("__half", "float"),
    "uint16": ("__nv_bfloat16", "float"),
    "float32": ("float", "float"),
    "float64": ("double", "double"),
}
"""The kernels' T and A for the NumPy dtype that x is stored in."""

OF_ELEMENTS = ("moments", "normalize", "gradient_sums", "input_gradient")
OF_CHANNELS = ("statistics", "parameter_gradients")
"""The kernels with the parameters T and A, and those with A alone."""

LAYOUT = np.dtype([(name, np.int64) for name in ("positions", "image", "channel", "position")])
"""The kernels' struct of this name."""

NULL = np.uintp(0)

MOST_BLOCKS = 2**31 - 1
"""Blocks in a grid of one dimension, on every GPU."""


@functools.lru_cache(maxsize=None)
def _kernels(dtype: str) -> dict[str, Callable[..., None]]:
    """The kernels for x stored in a NumPy dtype, compiled in half a second."""
    element, real = TYPES[dtype]
    instances = {name: "%s<%s, %s>" % (name, element, real) for name in OF_ELEMENTS}
    instances.update((name, "%s<%s>" % (name, real)) for name in OF_CHANNELS)
    with open(SOURCE, encoding="utf-8") as file:
        return _cupy.compiled(file.read(), "batchnorm.cu", instances, OPTIONS)


def _placed(tensor: Device) -> tuple[Device, Array]:
    """The two arguments that a kernel takes for a tensor (N, C, *) in any of the memory formats."""
    rows = tensor.reshape(tensor.shape[0], tensor.shape[1], -1)  # in all of them a view
    strides = (stride // tensor.itemsize for stride in rows.strides)
    return rows, np.array((rows.shape[2], *strides), LAYOUT)


def _parameter(array: Array | None) -> Device:
    """Per-channel values on the device, exactly widened to A; null where there are none."""
    if array is None:
        return NULL
    bfloat16 = array.dtype == np.uint16
    return _cupy.to_device(widen(array, "bfloat16" if bfloat16 else array.dtype.name))


class _Batch:
    """x (N, C, *) on the device, N > 0, and the kernels that run over it.

    Methods take and return arrays on the device: tensors as they are stored, per-channel values in A.
    """

    def __init__(self, x: Array) -> None:
        """Copies x. Raises NotImplementedError for more blocks than a grid can have."""
        self.dtype = x.dtype.name
        self.real = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
        self.channels = x.shape[1]
        self.n = np.int64(x.size // self.channels)
        self.blocks = lanes_of(int(self.n)) // THREADS * self.channels
        if self.blocks > MOST_BLOCKS:
            raise NotImplementedError("%d blocks are more than a CUDA grid can have" % self.blocks)
        self.tensor = _cupy.to_device(x)
        self.x = (*_placed(self.tensor), self.n)  # the first arguments of all kernels of elements

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Runs a kernel to its end. A CUDA error is raised as RuntimeError, with the kernel's name."""
        from cupy.cuda import driver, runtime

        blocks = self.blocks if kernel in OF_ELEMENTS else self.channels
        try:
            _kernels(self.dtype)[kernel]((blocks,), (THREADS,), arguments)
            runtime.deviceSynchronize()
        except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            raise RuntimeError("kernel %s: %s" % (kernel, error)) from error

    def statistics(
        self, running_mean: Device, running_var: Device, momentum: float
    ) -> dict[str, Device]:
        """Batch statistics, and the running statistics, which are updated in place."""
        import cupy

        count_mean_m2 = 8 + 2 * self.real.itemsize  # bytes of the kernels' Moments<A>
        partial = cupy.empty((self.blocks, count_mean_m2), np.uint8)
        outputs = {
            "batch_mean": cupy.empty(self.channels, self.real),
            "batch_var": cupy.empty(self.channels, self.real),
            "running_mean": running_mean,
            "running_var": running_var,
        }
        factors = running_factors(self.real.type, int(self.n), momentum)
        self.launch("moments", *self.x, partial)
        self.launch("statistics", partial, self.n, *factors, *outputs.values())
        return outputs

    def normalize(self, by: Normalization, weight: Device, bias: Device) -> Device:
        """y."""
        import cupy

        y = cupy.empty_like(self.tensor)
        self.launch("normalize", *self.x, *by, weight, bias, *_placed(y))
        return y

    def gradients(
        self, grad_output: Device, by: Normalization, weight: Device, training: bool
    ) -> dict[str, Device]:
        """The gradients of x, weight and bias."""
        import cupy

        grad = _placed(grad_output)
        partial = cupy.empty((self.blocks, 2), self.real)  # the kernels' Sums<A>
        sums = [cupy.empty(self.channels, self.real) for _ in range(2)]
        self.launch("gradient_sums", *self.x, *grad, *by, partial)
        self.launch("parameter_gradients", partial, self.n, *sums)
        grad_input = cupy.empty_like(self.tensor)
        through_moments = sums if training else (NULL, NULL)
        self.launch(
            "input_gradient",
            *(*self.x, *grad, *by, weight, *through_moments, *_placed(grad_input)),
        )
        return {"grad_input": grad_input, "grad_weight": sums[0], "grad_bias": sums[1]}


def welford(
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
    """Runs one step; per-channel results are float32, or float64 where x is."""
    if x.shape[0] == 0:
        backward = grad_output is not None
        return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
    with _cupy.checked():
        batch = _Batch(x)
        outputs = {}
        mean, var = _parameter(running_mean), _parameter(running_var)
        if training:
            outputs = batch.statistics(mean, var, momentum)
            mean, var = outputs["batch_mean"], outputs["batch_var"]
        by = mean, var, batch.real.type(eps)
        scale = _parameter(weight)
        outputs["y"] = batch.normalize(by, scale, _parameter(bias))
        if grad_output is not None:
            gradient = _cupy.to_device(grad_output)
            outputs.update(batch.gradients(gradient, by, scale, training))
        host: Outputs = {name: _cupy.to_host(array) for name, array in outputs.items()}
    host["kernel"] = "batchnorm.cu<%s, %s>" % TYPES[batch.dtype]
    return host
