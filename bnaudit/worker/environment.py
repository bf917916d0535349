"""What a worker runs on: interpreter, processor, BLAS, threads, packages, devices, numerical settings."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from typing import TYPE_CHECKING

import numpy as np

from .backends import BACKENDS

if TYPE_CHECKING:
    from typing import Any

PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "ml_dtypes",
    "torch",
    "triton",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "onnxruntime",
    "onnx",
    "chainer",
    "mxnet",
    "mlx",
    "tinygrad",
    "paddlepaddle",
    "jax",
    "jaxlib",
    "flax",
    "dm-haiku",
    "openvino",
    "opencv-python-headless",
    "ncnn",
    "nnabla",
    "tensorflow",
    "tensorflow-cpu",
    "mindspore",
    "megengine",
    "keras",
)
"""Distributions whose version can change a result."""

ISA = ("FMA3", "AVX2", "AVX512F", "AVX512_SKX", "AVX512_ICL", "AVX512_SPR", "ASIMD", "SVE", "VSX")
"""Instruction sets, by NumPy's names, that kernels choose their code by."""


def describe(library: str) -> dict[str, Any]:
    """The environment, with devices and flags of `library` where that is loaded."""
    found: dict[str, Any] = {"devices": [], "flags": {}}
    modules = {backend.module for backend in BACKENDS.values() if backend.library == library}
    for name in sorted(modules):
        module: Any = sys.modules.get("%s.backends.%s" % (__package__, name))
        if hasattr(module, "describe"):
            found = module.describe()
            break  # of one library, all say the same
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "pythonpath": None if sys.flags.ignore_environment else os.environ.get("PYTHONPATH"),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "isa": _isa()},
        "blas": _blas(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "packages": _packages(),
        "devices": found["devices"],
        "flags": found["flags"],
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _isa() -> str:
    core: Any = getattr(np, "_core", None) or np.core  # renamed in NumPy 2
    features = getattr(core._multiarray_umath, "__cpu_features__", {})  # since NumPy 1.18
    return " ".join(name for name in ISA if features.get(name))


def _blas() -> str | None:
    """Name and version of the BLAS under NumPy and, of an OpenBLAS, the kernels that it chose here."""
    build: Any = getattr(np.__config__, "CONFIG", {}).get("Build Dependencies", {}).get("blas", {})
    kernels = _openblas_kernels()
    name = build.get("name") or ("openblas" if kernels else None)
    return " ".join(part for part in (name, build.get("version"), kernels) if part) or None


def _openblas_kernels() -> str | None:
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            paths = {line.split(None, 5)[-1].strip() for line in lines if "openblas" in line}
    except OSError:
        return None  # not Linux
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        for symbol in ("scipy_openblas_get_corename64_", "openblas_get_corename"):
            if hasattr(library, symbol):
                get = getattr(library, symbol)
                get.restype = ctypes.c_char_p
                return str(get().decode())
    return None


def _version(package: str) -> str | None:
    """The version of an installed distribution, from the name of its folder of metadata."""
    pattern = re.compile(
        re.escape(package).replace("\\-", "[-_]") + r"-([^-]+)\.(dist|egg)-info$", re.IGNORECASE
    )
    for folder in sys.path:
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            found = pattern.match(name)
            if found is not None:
                return found.group(1)
    return None


def _packages() -> dict[str, str | None]:
    try:
        from importlib import metadata
    except ImportError:  # Python 3.7
        return {name: _version(name) for name in PACKAGES}
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
