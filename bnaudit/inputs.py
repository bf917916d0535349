"""Case → Inputs: the tensors that every backend and the reference get, bit for bit."""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bnaudit.distributions import Distribution, Elements
from bnaudit.scenario import Case
from bnaudit.worker.rounding import round_to, storage

Array: TypeAlias = npt.NDArray[Any]

ROLES = {"x": 0, "weight": 1, "bias": 2, "running_mean": 3, "running_var": 4, "grad_output": 5}
"""Tensors in the order in which they are digested, and their number in the Philox key."""

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

    Memory stays at a few chunks per thread beyond the files' own pages. Raises OSError where the folder
    has no room, and distributions.FileError where a file of values has gone since it was checked.
    """
    sources = {
        "x": case.input,
        "weight": case.affine and case.affine.weight,
        "bias": case.affine and case.affine.bias,
        "running_mean": case.running.mean,
        "running_var": case.running.var,
        "grad_output": case.grad_output if case.backward else None,
    }
    digest = hashlib.sha256()
    tensors: dict[str, Array | None] = {}
    files = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name, role in ROLES.items():
            source = sources[name]
            if source is None:
                tensors[name] = None
                continue
            path = folder / f"{name}.npy"
            files[name] = str(path)
            if name in ("x", "grad_output"):
                shape = (case.steps, *case.shape)
                pages = _generate(source, path, shape, case.dtype, case.seed, role, digest, pool)
                
            else:
                ...
    return Inputs(**tensors, sha256=digest.hexdigest(), files=files)
