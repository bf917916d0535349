"""What an audit would run on here, and what is missing with the command that installs it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bnaudit import __version__
from bnaudit.reference import EnvironmentFaultError, check_environment
from bnaudit.subject import Subject, scratch_folder
from bnaudit.worker.backends import BACKENDS

PACKAGES = ("numpy", "numba", "llvmlite", "pydantic", "pyyaml", "rich", "click")
"""Distributions that the auditor itself runs on."""

OPTIONAL = {
    "torch": ("PyTorch's backends", "pip install 'bnaudit[torch]'"),
    "ml_dtypes": ("bfloat16 in NumPy plug-ins", "pip install ml_dtypes"),
    "safetensors": (".safetensors files in scenarios", "pip install 'bnaudit[safetensors]'"),
}
"""Distributions that are needed only for some things: for what, and how to get them."""


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
    for name, (purpose, command) in OPTIONAL.items():
        version = _version(name)
        if version is not None:
            entries.append(Entry(name, version))
        else:
            entries.append(Entry(name, f"not installed; needed for {purpose}", command))
    flags = ", ".join(f"{name} {value}" for name, value in found["flags"].items())
    if flags:
        entries.append(Entry("torch flags", flags))
    for device in found["devices"]:
        software = [f"{key} {device[key]}" for key in ("driver", "cuda", "cudnn") if device[key]]
        entries.append(Entry("GPU", f"{device['name']}: {', '.join(software)}"))
    if not found["devices"]:
        entries.append(Entry("GPU", f"none usable: {reasons['torch@cuda'] or 'none found'}"))
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
