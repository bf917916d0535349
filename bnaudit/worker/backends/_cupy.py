"""BatchNorms on CuPy, and what every backend on CuPy shares.

`gemm` and `gemm_tf32`: Caffe's GPU layer of April 2016 (BVLC/caffe d21772c0, batch_norm_layer.cu), the
same calls of cuBLAS on the same matrices, and between them kernels of the same definition. The layer's
steps are those of `_caffe`; numerically its own are

* the order of additions, which is cuBLAS's and may change with the shape, the GPU and the version;
* pow(d, 2) and pow(var + eps, 0.5), CUDA's powf, which need not be correctly rounded;
* x - mean, a gemm with one term per element that adds to x: rounded once, as long as TF32 is off;
* y·weight + bias, Caffe's Scale layer, one kernel that the compiler may fuse into one rounding;
* as in `_gemm`, running statistics that are exponential moving averages, and eps in the tensor's dtype.

With TF32 on, a gemm may round its operands to 11 bits: the mean, and the standard deviation.

`chainer_2016`: BatchNormalization of Chainer 1.7.2 with the CuPy it came with, through kernels of the same
definition. mean = sum / n and var = (1/n)·sum of (x - mean)², float32 sums in the order of CuPy's reduction;
y = gamma·x_hat + beta in one kernel. eps is added to the variance in place, and so becomes a part of the
running variance; inference divides by the square root of that without adding eps once more. Today's CuPy
compiles its own kernels with -ftz=true, which the one of 2016 did not: subnormal numbers are zero here.

Requires CuPy 13.3 or later with NVRTC, CUDA's headers and, for `gemm`, cuBLAS.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .. import layout
from ._numpy import empty_batch, update_running

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]
    Device = Any  # cupy.ndarray, where cupy is

DEFAULT_MATH = 0
TF32_TENSOR_OP_MATH = 3
"""cuBLAS's math modes (cublasMath_t), of which CuPy names only the first."""


# --- what is here -----------------------------------------------------------------------------------


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run here, or None. On a GPU, compiles a small kernel to find out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns of a second CuPy that is installed
            import cupy  # noqa: F401 - whether it can be imported is the question
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return "CuPy cannot be imported: %s" % error
        return _missing()
    except ImportError as error:  # a shared library is missing or broken; CuPy wraps the message
        return "CuPy cannot be imported: %s" % (error.__cause__ or error)
    return _no_gpu() or _no_toolkit(name) or (_no_tf32() if "tf32" in name else None)


def _missing() -> str:
    """Why there is no CuPy, or why there need not be one; with the command for this machine's driver."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no GPU: there is no NVIDIA driver"
    version = ctypes.c_int()
    libcuda.cuDriverGetVersion(ctypes.byref(version))
    command = _command(version.value)
    return "CuPy is not installed in this environment (%s)" % command


def _command(driver: int) -> str:
    """The command that installs a CuPy for a driver, whose version is 13000 for CUDA 13.0."""
    return "pip install 'bnaudit[cuda%d]'" % (13 if driver >= 13000 else 12)


def _no_gpu() -> str | None:
    import cupy
    from cupy.cuda import runtime

    if runtime.is_hip:
        return "CuPy %s is built for ROCm, not for CUDA" % cupy.__version__
    driver, cuda = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        return "no GPU: there is no NVIDIA driver"
    if driver // 1000 < cuda // 1000:
        text = "the NVIDIA driver is one for CUDA %s, and CuPy %s is built for CUDA %s (%s)"
        return text % (_version(driver), cupy.__version__, _version(cuda), _command(driver))
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return "no GPU: %s" % error
    return None


def _no_toolkit(name: str) -> str | None:
    """What CuPy lacks of the CUDA toolkit: NVRTC, headers or cuBLAS."""
    import cupy

    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    command = "pip install 'cupy-cuda%dx[ctk]>=14'" % major
    try:
        to_host(cupy.zeros(1, np.float32) + 1)
    except Exception as error:  # whatever keeps CuPy from compiling
        return "CuPy compiles no kernel: %s (%s)" % (_first_line(error), command)
    if name.startswith("gemm"):
        try:
            _cublas_version()
        except Exception as error:
            return "CuPy loads no cuBLAS: %s (%s)" % (_first_line(error), command)
    return None


def _no_tf32() -> str | None:
    from cupy.cuda import runtime

    major = runtime.getDeviceProperties(0)["major"]
    if major < 8:
        return "TF32 needs a GPU of compute capability 8 or later, and this is one of %d" % major
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return "NVIDIA_TF32_OVERRIDE=0 switches TF32 off"
    return None


def _first_line(error: Exception) -> str:
    lines = [line for line in map(str.strip, str(error).splitlines()) if line.strip("=")]
    return lines[0] if lines else type(error).__name__


def _version(number: int) -> str:
    """13020, as CUDA counts its own versions, as "13.2"."""
    return "%d.%d" % (number // 1000, number % 1000 // 10)


def _cublas_version() -> str:
    from cupy.cuda import cublas, device

    number = cublas.getVersion(device.get_cublas_handle())
    return "%d.%d.%d" % (number // 10000, number // 100 % 100, number % 100)


def describe() -> dict[str, Any]:
    """Devices and settings of CuPy in this process, for a report; none where no backend can run."""
    if unavailable("cupy") is not None:
        return {"devices": [], "flags": {}}
    from cupy.cuda import nvrtc, runtime

    driver, cuda = _version(runtime.driverGetVersion()), _version(runtime.runtimeGetVersion())
    devices = []
    for index in range(runtime.getDeviceCount()):
        name = runtime.getDeviceProperties(index)["name"].decode()
        devices.append({"name": name, "driver": driver, "cuda": cuda, "cudnn": None})
    flags = {
        "nvrtc": "%d.%d" % nvrtc.getVersion(),
        "cublas": None if _no_toolkit("gemm") else _cublas_version(),
        "tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE"),
    }
    return {"devices": devices, "flags": flags}


# --- to the device and back -------------------------------------------------------------------------


def to_device(array: Array) -> Device:
    """A copy on the GPU with the same strides, of an array without gaps or one that layout.lay_out made.

    A "strided" array takes its whole allocation along, so that its gaps hold NaN there as well.
    """
    import cupy

    memory, offset = layout.allocation(array), layout.OFFSET * array.itemsize
    if memory is None:
        by_stride = np.argsort([-stride for stride in array.strides], kind="stable")
        memory, offset = array.transpose(by_stride).reshape(-1), 0
    pointer = cupy.asarray(memory).data + offset
    return cupy.ndarray(array.shape, array.dtype, pointer, array.strides)


def to_host(array: Device) -> Array:
    """The array in the host's memory, C-contiguous, once what computes it has ended.

    Raises CuPy's CUDARuntimeError for what went wrong on the device until then.
    """
    host: Array = array.get(order="C")
    return host


def compiled(
    source: str, filename: str, instances: Mapping[str, str], options: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Kernels by name, from the expressions that instantiate them, such as "normalize<float, float>".

    Not by cupy.RawModule, which appends -ftz=true to the options that it is given.
    """
    from cupy._core import core
    from cupy.cuda import compiler, function

    binary, symbols = compiler.compile_using_nvrtc(
        source,
        core.assemble_cupy_compiler_options(options),  # and where CUDA's headers are
        filename=filename,
        name_expressions=tuple(instances.values()),
    )
    module = function.Module()
    module.load(binary)
    return {name: module.get_function(symbols[instance]) for name, instance in instances.items()}


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Raises what goes wrong on the device until the end of the block; NotImplementedError for no memory."""
    import cupy

    try:
        yield
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.memory.OutOfMemoryError as error:
        total = cupy.cuda.runtime.memGetInfo()[1]
        text = "the case needs more GPU memory than the %.0f GiB there are"
        raise NotImplementedError(text % (total / 2**30)) from error


# --- Caffe's GPU layer ------------------------------------------------------------------------------

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
        outputs["kernel"] = text % (letter, letter, "on" if tf32 else "off", _cublas_version())
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


# --- Chainer's layer --------------------------------------------------------------------------------


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
