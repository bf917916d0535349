"""Case → Inputs: the tensors that every backend and the reference get, bit for bit."""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bnaudit.distributions import Distribution, Elements
from bnaudit.scenario import Case
from bnaudit.worker.rounding import round_to, storage

Array: TypeAlias = npt.NDArray[Any]

ROLES = {"x": 0, "weight": 1, "bias": 2, "running_mean": 3, "running_var": 4, "grad_output": 5}
"""Number of each tensor in the Philox key; they are digested in this order."""

CHUNK = 1 << 16
"""Elements generated at a time: their 4 MiB of random words stay in cache."""

THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case, read-only, in storage dtypes (bfloat16 as its bits in uint16).

    Attributes:
        x: (steps, N, C, *), in the case's dtype.
        weight: (C,), in the dtype of the parameters; None without affine parameters.
        bias: like weight.
        running_mean: (C,), in the dtype of the parameters, before the first step.
        running_var: like running_mean.
        grad_output: (steps, N, C, *), in the case's dtype; None without a backward pass.
        sha256: hex digest of the tensors' C-order little-endian bytes, in the order of ROLES.
        files: .npy file of each tensor that there is, by name.
    """

    x: Array
    weight: Array | None
    bias: Array | None
    running_mean: Array
    running_var: Array
    grad_output: Array | None
    sha256: str
    files: dict[str, str]


def make(case: Case, folder: Path) -> Inputs:
    """Generates the inputs of a case into .npy files in an existing folder.

    Beyond the pages of those files it needs a few chunks of memory for each thread. Raises OSError where
    the folder has no room, and distributions.FileError where a file of values is no longer readable.
    """
    batch, per_channel = case.shape, (1, case.channels)
    plan: dict[str, tuple[Distribution, str, int, tuple[int, ...]]] = {
        "x": (case.input, case.dtype, case.steps, batch),
        "running_mean": (case.running.mean, case.parameter_dtype, 1, per_channel),
        "running_var": (case.running.var, case.parameter_dtype, 1, per_channel),
    }
    if case.affine is not None:
        plan["weight"] = (case.affine.weight, case.parameter_dtype, 1, per_channel)
        plan["bias"] = (case.affine.bias, case.parameter_dtype, 1, per_channel)
    if case.backward:
        plan["grad_output"] = (case.grad_output, case.dtype, case.steps, batch)

    digest = hashlib.sha256()
    tensors: dict[str, Array] = {}
    files: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name, role in ROLES.items():
            if name not in plan:
                continue
            source, dtype, steps, shape = plan[name]
            path = folder / f"{name}.npy"
            stored = (case.channels,) if shape is per_channel else (steps, *shape)
            tensor = _allocate(path, stored, storage(dtype))
            rows = tensor.reshape(steps, math.prod(shape))
            _generate(rows, source, shape, dtype, (case.seed, role << 32), pool, digest)
            tensor.flags.writeable = False
            tensors[name], files[name] = tensor, str(path)
    return Inputs(
        tensors["x"],
        tensors.get("weight"),
        tensors.get("bias"),
        tensors["running_mean"],
        tensors["running_var"],
        tensors.get("grad_output"),
        digest.hexdigest(),
        files,
    )


def _generate(
    rows: Array,
    source: Distribution,
    shape: tuple[int, ...],
    dtype: str,
    key: tuple[int, int],
    pool: Executor,
    digest: hashlib._Hash,
) -> None:
    """Fills rows (steps, elements) chunk by chunk, digesting each chunk while later ones are made."""
    steps, size = rows.shape

    def fill(place: tuple[int, int]) -> Array:
        step, start = place
        stop = min(start + CHUNK, size)
        elements = Elements(start, stop, shape, dtype, (key[0], key[1] + step))
        rows[step, start:stop] = round_to(source.sample(elements), dtype)
        return rows[step, start:stop]

    for chunk in pool.map(fill, product(range(steps), range(0, size, CHUNK))):
        digest.update(chunk.astype(chunk.dtype.newbyteorder("<"), copy=False).data)


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A new .npy file, mapped into memory."""
    if math.prod(shape) == 0:  # nothing to map
        empty = np.empty(shape, dtype)
        np.save(path, empty)
        return empty
    tensor: Array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A full disk is an error here, and a SIGBUS once pages are written.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return tensor
