"""`gemm@cuda` and `gemm-tf32@cuda`: Caffe's GPU layer of April 2016 (BVLC/caffe d21772c0, batch_norm_layer.cu).

The same calls of cuBLAS on the same matrices, and between them kernels of the same definition. The layer's
steps are those of `_caffe`; numerically its own are

* the order of additions, which is cuBLAS's and may change with the shape, the GPU and the version;
* pow(d, 2) and pow(var + eps, 0.5), CUDA's powf, which need not be correctly rounded;
* x - mean, a gemm with one term per element that adds to x: rounded once, as long as TF32 is off;
* y·weight + bias, Caffe's Scale layer, one kernel that the compiler may fuse into one rounding;
* as in `_gemm`, running statistics that are exponential moving averages, and eps in the tensor's dtype.

With TF32 on, a gemm may round its operands to 11 bits: the mean, and the standard deviation.

Requires what `_cupy` does.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING

import numpy as np

from ._cupy import checked, compiled, cublas_version, to_device, to_host
from ._cupy import describe as describe  # of CuPy, whichever backend asks
from ._cupy import unavailable as unavailable
from ._numpy import empty_batch, update_running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..rounding import Array
    from ._cupy import Device, Outputs

DEFAULT_MATH = 0
TF32_TENSOR_OP_MATH = 3
"""cuBLAS's math modes (cublasMath_t), of which CuPy names only the first."""

CAFFE_KERNELS = """
#define ELEMENTWISE(name, expression, ...)                                                    \\
    template <typename T> __global__ void name(long long n, T* y, const T* x, __VA_ARGS__)    \\
    {                                                                                         \\
        long long step = (long long)gridDim.x * blockDim.x;                                   \\
        for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) \\
            y[i] = expression;                                                                \\
    }

ELEMENTWISE(add, x[i] + other[i], const T* other)
ELEMENTWISE(mul, x[i] * other[i], const T* other)
ELEMENTWISE(div, x[i] / other[i], const T* other)
ELEMENTWISE(add_scalar, x[i] + value, T value)
ELEMENTWISE(scal, x[i] * value, T value)
ELEMENTWISE(powx, pow(x[i], exponent), T exponent)
ELEMENTWISE(scale, x[i] * weight[i / spatial % channels],
            long long channels, long long spatial, const T* weight)
ELEMENTWISE(scale_bias, x[i] * weight[i / spatial % channels] + bias[i / spatial % channels],
            long long channels, long long spatial, const T* weight, const T* bias)
"""
"""Compiled with NVRTC's defaults, which are nvcc's: a product and a sum may be fused."""

CAFFE_THREADS = 512
"""A block's, for one element each."""


@functools.lru_cache(maxsize=None)
def _caffe_kernels(dtype: str) -> dict[str, Any]:
    """The kernels by name, for float32 or float64."""
    kind = {"float32": "float", "float64": "double"}[dtype]
    names = re.findall(r"^ELEMENTWISE\((\w+)", CAFFE_KERNELS, re.MULTILINE)
    return compiled(CAFFE_KERNELS, "caffe.cu", {name: "%s<%s>" % (name, kind) for name in names})


def _apply(kernel: str, x: Device, *others: Any) -> Device:
    """A kernel's y of x's shape. others: contiguous arrays, sizes as int, and factors as float, as a T."""
    import cupy

    types = {int: np.int64, float: x.dtype.type}
    arguments = [types[type(other)](other) if type(other) in types else other for other in others]
    y = cupy.empty(x.shape, x.dtype)
    blocks = min(-(-x.size // CAFFE_THREADS), 2**31 - 1)
    function = _caffe_kernels(x.dtype.name)[kernel]
    function((blocks,), (CAFFE_THREADS,), (np.int64(x.size), y, x, *arguments))
    return y


class _Blob:
    """Caffe's products for blobs of N images, C channels and S values each: row-major (N·C, S) matrices.

    cuBLAS reads a row-major matrix as its transpose, and so is asked for the transposed product.
    """

    def __init__(self, images: int, channels: int, spatial: int, dtype: np.dtype[Any]) -> None:
        """Makes the vectors of ones that Caffe sums and repeats with."""
        import cupy
        from cupy.cuda import cublas, device

        self.images, self.channels, self.spatial = images, channels, spatial
        self._ones_images = cupy.ones(images, dtype)
        self._ones_spatial = cupy.ones(spatial, dtype)
        self._handle = device.get_cublas_handle()
        self._cublas = cublas
        self._letter = {"float32": "s", "float64": "d"}[dtype.name]

    def sums(self, blob: Device, factor: float = 1) -> Device:
        """factor · the sum of each channel, (C,): a gemv over S that carries the factor, one over N."""
        by_image = self._gemv(self._cublas.CUBLAS_OP_T, blob, factor, self._ones_spatial)
        by_image = by_image.reshape(self.images, self.channels)
        return self._gemv(self._cublas.CUBLAS_OP_N, by_image, 1, self._ones_images)

    def spread(self, vector: Device, factor: float = 1, onto: Device | None = None) -> Device:
        """factor · a vector (C,) repeated to a blob's size; where there is `onto`, added to it in place."""
        by_image = self._outer(self._ones_images, vector)
        return self._outer(by_image.reshape(-1), self._ones_spatial, factor, onto)

    def _gemv(self, operation: int, matrix: Device, factor: float, vector: Device) -> Device:
        """factor · matrix · vector with CUBLAS_OP_T, factor · matrixᵀ · vector with CUBLAS_OP_N."""
        import cupy

        rows, columns = matrix.shape
        length = rows if operation == self._cublas.CUBLAS_OP_T else columns
        product = cupy.empty(length, matrix.dtype)
        alpha, beta = np.array(factor, matrix.dtype), np.array(0, matrix.dtype)
        gemv = getattr(self._cublas, self._letter + "gemv")
        a = (alpha.ctypes.data, matrix.data.ptr, columns)
        y = (beta.ctypes.data, product.data.ptr, 1)
        gemv(self._handle, operation, columns, rows, *a, vector.data.ptr, 1, *y)
        return product

    def _outer(
        self, column: Device, row: Device, factor: float = 1, onto: Device | None = None
    ) -> Device:
        """factor · column · row, a gemm with an inner dimension of 1; added to `onto` in place."""
        import cupy

        rows, columns = column.size, row.size
        product = cupy.empty((rows, columns), row.dtype) if onto is None else onto
        alpha, beta = np.array(factor, row.dtype), np.array(0 if onto is None else 1, row.dtype)
        gemm = getattr(self._cublas, self._letter + "gemm")
        plain = self._cublas.CUBLAS_OP_N
        a = (alpha.ctypes.data, row.data.ptr, columns)
        b = (column.data.ptr, 1)
        c = (beta.ctypes.data, product.data.ptr, columns)
        gemm(self._handle, plain, plain, columns, rows, 1, *a, *b, *c)
        return product


@contextlib.contextmanager
def _cublas_modes(math_mode: int) -> Iterator[None]:
    """The math mode, and factors read from the host's memory, until the end of the block."""
    from cupy.cuda import cublas, device

    handle = device.get_cublas_handle()
    before = cublas.getMathMode(handle), cublas.getPointerMode(handle)
    try:
        cublas.setMathMode(handle, math_mode)
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
        yield
    finally:
        cublas.setMathMode(handle, before[0])
        cublas.setPointerMode(handle, before[1])


def gemm(x: Array, *tensors: Any, **options: Any) -> Outputs:
    """Caffe's GPU layer with TF32 off; dtypes but float32 and float64 raise NotImplementedError."""
    return _caffe_gpu(DEFAULT_MATH, x, *tensors, **options)


def gemm_tf32(x: Array, *tensors: Any, **options: Any) -> Outputs:
    """Caffe's GPU layer with TF32 on; dtypes but float32 raise NotImplementedError."""
    if x.dtype == np.float64:
        raise NotImplementedError("TF32 is a mode of float32 products")
    return _caffe_gpu(TF32_TENSOR_OP_MATH, x, *tensors, **options)


def _caffe_gpu(
    math_mode: int,
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
    """One step, all in the dtype of x, which is copied to a contiguous (N·C, S) matrix."""
    if x.dtype not in (np.float32, np.float64):
        raise NotImplementedError("Caffe's layer is float32 or float64: there is no cublasHgemv")
    if x.shape[0] == 0:
        backward = grad_output is not None
        return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
    images, channels = x.shape[:2]
    count = x.size // channels
    outputs: Outputs = {}
    with checked(), _cublas_modes(math_mode):
        blob = _Blob(images, channels, count // images, x.dtype)
        centred = _as_matrix(x, blob)  # once the mean is subtracted
        if training:
            mean = blob.sums(centred, 1.0 / count)
            centred = blob.spread(mean, -1, onto=centred)
            var = blob.sums(_apply("powx", centred, 2.0), 1.0 / count)
            batch_mean, batch_var = to_host(mean), to_host(var)
            outputs.update(
                update_running(running_mean, running_var, batch_mean, batch_var, count, momentum),
                batch_mean=batch_mean,
                batch_var=batch_var,
            )
        else:
            centred = blob.spread(to_device(running_mean), -1, onto=centred)
            var = to_device(running_var)
        std = blob.spread(_apply("powx", _apply("add_scalar", var, float(eps)), 0.5))
        y = normalized = _apply("div", centred, std)
        scale = () if weight is None else (channels, blob.spatial, to_device(weight))
        if bias is not None:
            y = _apply("scale_bias", normalized, *scale, to_device(bias))
        outputs["y"] = to_host(y).reshape(x.shape)
        if grad_output is not None:
            grad = _as_matrix(grad_output, blob)
            if scale:
                outputs["grad_weight"] = to_host(blob.sums(_apply("mul", grad, normalized)))
                outputs["grad_bias"] = to_host(blob.sums(grad))
                grad = _apply("scale", grad, *scale)
            if training:
                grad = _caffe_backward(grad, normalized, count, blob)
            outputs["grad_input"] = to_host(_apply("div", grad, std)).reshape(x.shape)
        letter, tf32 = "SD"[x.itemsize // 8], math_mode == TF32_TENSOR_OP_MATH
        text = "cublas%sgemv, cublas%sgemm, TF32 %s, cuBLAS %s"
        outputs["kernel"] = text % (letter, letter, "on" if tf32 else "off", cublas_version())
    return outputs


def _as_matrix(array: Array, blob: _Blob) -> Device:
    """An array (N, C, *) in any strides as a contiguous (N·C, S) matrix in memory of its own."""
    import cupy

    contiguous = cupy.ascontiguousarray(to_device(array))
    return contiguous.reshape(blob.images * blob.channels, blob.spatial)


def _caffe_backward(grad: Device, y: Device, count: int, blob: _Blob) -> Device:
    """grad - mean(grad) - mean(grad·y)·y, with the factor 1/count last, as axpby applied it."""
    dx = _apply("mul", y, blob.spread(blob.sums(_apply("mul", y, grad))))
    dx = blob.spread(blob.sums(grad), onto=dx)
    return _apply("add", _apply("scal", dx, -1.0 / count), grad)
