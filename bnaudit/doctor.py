"""What an audit would run on here, and what is missing with the command that installs it."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bnaudit import __version__
from bnaudit.certified import EnvironmentFaultError, check_environment
from bnaudit.subject import Subject, scratch_folder
from bnaudit.worker.backends import BACKENDS

PACKAGES = ("numpy", "numba", "llvmlite", "pydantic", "pyyaml", "rich", "click")
"""Distributions that the auditor itself runs on."""

OPTIONAL: dict[str, tuple[tuple[str, ...], str, str]] = {
    "torch": (("torch",), "PyTorch's backends", "pip install 'bnaudit[torch]'"),
    "CuPy": (
        ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "the backends on CuPy (welford@cuda, gemm@cuda, chainer-2016@cuda)",
        "pip install 'bnaudit[cuda13]'",
    ),
    "Triton": (
        ("triton",),
        "torch-compile@cuda and plug-ins written in Triton",
        "pip install triton",
    ),
    "ml_dtypes": (("ml_dtypes",), "bfloat16 in NumPy plug-ins", "pip install ml_dtypes"),
    "safetensors": (
        ("safetensors",),
        ".safetensors files in scenarios",
        "pip install 'bnaudit[safetensors]'",
    ),
}
"""What is needed only for some things: its distributions, for what, and how to get it."""

CUDA_13 = 13000
"""The driver that CUDA 13 needs, as cuDriverGetVersion gives it."""


@dataclass(frozen=True)
class Entry:
    """One thing looked at. remedy: the command that supplies what is missing. is_fault: no audit can run."""

    topic: str
    finding: str
    remedy: str | None = None
    is_fault: bool = False


def examine(threads: int) -> list[Entry]:
    """Looks at this interpreter, its packages and the machine, as a worker with `threads` threads sees them.

    Raises SubjectError where no worker runs.
    """
    with scratch_folder() as scratch, Subject(threads=threads, scratch=scratch) as subject:
        reasons = subject.describe(list(BACKENDS))
        found = subject.environment()
        place = f"{scratch.parent}, {shutil.disk_usage(scratch).free / 2**30:.1f} GiB free"
    available = sum(reason is None for reason in reasons.values())
    entries = [
        Entry("bnaudit", f"{__version__}, in {Path(__file__).parent}"),
        Entry("interpreter", f"Python {found['python']}, {found['executable']}"),
        Entry("platform", found["platform"]),
        Entry("processor", f"{found['cpu']['model']}: {found['cpu']['isa']}"),
        _floating_point(),
        Entry("BLAS", found["blas"] or "unknown"),
        Entry("threads", f"{found['threads']} for the backends, {os.cpu_count()} processors"),
        Entry("scratch", place),
        Entry("packages", ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)),
    ]
    driver = _driver()
    for name, (distributions, purpose, command) in OPTIONAL.items():
        if driver is not None and driver < CUDA_13:
            command = command.replace("cuda13", "cuda12")
        versions = [version for d in distributions if (version := _version(d))]
        missing = f"not installed; needed for {purpose}"
        entries.append(
            Entry(name, ", ".join(versions)) if versions else Entry(name, missing, command)
        )
    flags = ", ".join(f"{name} {value}" for name, value in found["flags"].items() if value != "")
    if flags:
        entries.append(Entry("flags", flags))
    if driver is None:
        entries.append(Entry("CUDA driver", "none: the system has no libcuda.so.1"))
    else:
        entries.append(Entry("CUDA driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}"))
    for device in found["devices"]:
        software = [f"{key} {device[key]}" for key in ("driver", "cuda", "cudnn") if device[key]]
        entries.append(Entry("GPU", f"{device['name']}: {', '.join(software)}"))
    for name in ("torch@cuda", "welford@cuda"):
        if reasons[name] is not None:
            entries.append(Entry("GPU", f"not for {name}: {reasons[name]}"))
    entries.append(
        Entry("backends", f"{available} of {len(reasons)} available (bnaudit list says why)")
    )
    return entries


def _floating_point() -> Entry:
    try:
        check_environment()
    except EnvironmentFaultError as error:
        return Entry("arithmetic", str(error), is_fault=True)
    return Entry("arithmetic", "IEEE 754: rounds to nearest, keeps subnormal numbers, exact FMA")


def _driver() -> int | None:
    """The newest CUDA that the NVIDIA driver supports, 13000 for 13.0; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
