"""What every backend on CuPy shares: whether CuPy can run here, what it runs on, and the way there and back.

Requires CuPy 13.3 or later with NVRTC, CUDA's headers and, for `gemm`, cuBLAS.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from .. import layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]
    Device = Any  # cupy.ndarray, where cupy is

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
            cublas_version()
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


def cublas_version() -> str:
    """Such as "13.2.0"."""
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
        "cublas": None if _no_toolkit("gemm") else cublas_version(),
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
