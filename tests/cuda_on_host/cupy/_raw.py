"""Kernels in CUDA C++, compiled for the host by g++ with cuda_on_host.h; their arguments are checked."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import ndarray

HERE = Path(__file__).resolve().parents[1]

CPU = Path("/proc/cpuinfo")
FUSED = CPU.exists() and "fma" in CPU.read_text().split()  # of an x86; others need no option for it

OPTIONS = {
    "-fmad=false": ["-ffp-contract=off"],
    "-fmad=true": ["-ffp-contract=fast", *(["-mfma"] if FUSED else [])],
    "-ftz=false": [],
    "-prec-div=true": [],
    "-prec-sqrt=true": [],
}
"""g++'s options for NVRTC's; others are refused."""

descending = False
"""Run the last thread of a block first."""


@functools.cache
def _cache() -> Path:
    """The folder of the compiled libraries, which are named by what they were compiled from."""
    if "CUDA_ON_HOST_CACHE" in os.environ:
        return Path(os.environ["CUDA_ON_HOST_CACHE"])
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def compile_library(source: str, options: tuple[str, ...], instances: tuple[str, ...]) -> Path:
    """A shared library with the instances of the source's kernels. Raises ValueError with g++'s message."""
    if not any(option.startswith("-fmad=") for option in options):
        options = ("-fmad=true", *options)  # NVRTC's default
    flags = [flag for option in options for flag in OPTIONS[option]]
    text = '#include "cuda_on_host.h"\n#line 1 "kernels.cu"\n' + source + "\n"
    for number, instance in enumerate(instances):
        text += f"CUDA_ON_HOST_KERNEL({number}, {instance})\n"
    headers = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    digest = hashlib.sha256(repr((text, flags, headers)).encode()).hexdigest()[:16]
    library = _cache() / f"{digest}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++17", "-O2", *flags, "-Wall", "-Wextra", "-Werror", f"-I{HERE}"]
        command += ["-U_FORTIFY_SOURCE"]  # which takes a jump from fiber to fiber for an attack
        command += ["-x", "c++", "-", "-shared", "-fPIC", "-o", str(made)]
        compiled = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if compiled.returncode:
            raise ValueError(compiled.stderr)
        made.rename(library)
    return library


class Function:
    """A kernel's instance: number `symbol` in a library."""

    def __init__(self, library: ctypes.CDLL, symbol: str) -> None:
        parameters = library["parameters_" + symbol]
        parameters.restype = ctypes.c_char_p
        self._parameters = parameters().decode().split()
        self._launch = library["launch_" + symbol]
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_bool)

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
        """Launches and waits. Raises TypeError for arguments that CUDA would have read as something else."""
        ((blocks,), (threads,)) = (grid, block)
        if not (0 < blocks < 2**31 and 0 < threads <= 1024):
            raise ValueError(f"invalid configuration: {blocks} blocks of {threads} threads")
        if len(args) != len(self._parameters):
            raise TypeError(f"{len(args)} arguments for {self._parameters}")
        values = [_value(arg, kind) for arg, kind in zip(args, self._parameters, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        error = self._launch(blocks, threads, pointers, descending).decode()
        if error:
            raise RuntimeError(error)


def _value(argument: Any, kind: str) -> Any:
    """The bytes that are passed for a parameter, which the kernel declares as `kind`."""
    value: Any
    if kind.startswith("*") and isinstance(argument, ndarray):
        found, value = _pointee(argument, kind), np.array(argument.data.ptr, np.uintp)
    elif kind.startswith("*") and isinstance(argument, np.uintp) and argument == 0:
        found, value = kind, np.array(argument)
    elif isinstance(argument, np.ndarray) and argument.size == 1 and argument.dtype.fields:
        found, value = f"V{argument.itemsize}", argument
    elif isinstance(argument, np.generic):
        found, value = argument.dtype.str[1:], np.array(argument)
    else:
        raise TypeError(f"Unsupported type {type(argument)}")
    if found != kind:
        raise TypeError(f"an argument is {found}, the parameter {kind}")
    return value


def _pointee(array: ndarray, kind: str) -> str:
    """What an array's elements are; a matrix's rows are the structs that they have room for."""
    if kind.startswith("*V") and len(array.shape) == 2:
        return f"*V{array.shape[1] * array.dtype.itemsize}"
    return f"*{array.dtype.str[1:]}"
