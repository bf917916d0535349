"""The environments that adapters are tested in: those of a bnaudit.yaml, as far as they have been built.

BNAUDIT_FRAMEWORKS names the file; `make frameworks` builds those of frameworks.yaml. What is missing is skipped
with the reason.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from correct import Array

from bnaudit import config
from bnaudit.building import Request
from bnaudit.environments import EnvironmentSpecError, read, resolve
from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.rounding import widen

VARIABLE = "BNAUDIT_FRAMEWORKS"

DTYPES = ("float16", "bfloat16", "float32", "float64")
HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half of a unit in the last place of 1."""

SHAPES = {2: "9, 3", 3: "4, 3, 7", 4: "4, 3, 5, 6", 5: "2, 3, 2, 3, 4"}
"""By rank."""

GRADIENTS = {"grad_input", "grad_weight", "grad_bias"}
RUNNING = {"running_mean", "running_var"}

ASYMMETRIC = {
    "input": "{distribution: normal, mean: 1.5}",
    "affine": "{weight: {distribution: normal, mean: 1}, bias: {distribution: normal}}",
    "running": "{mean: {distribution: normal}, var: {distribution: uniform, low: 0.5, high: 2}}",
    "momentum": "0.25",
    "eps": "7.62939453125e-06",  # 2 ** -17, which is an attribute in float32 as well
}
"""A scenario in which nothing can stand for something else."""


@functools.cache
def _specifications(file: str) -> dict[str, str]:
    return config.load(file).environments


def command(name: str) -> tuple[str, ...]:
    """What starts the environment's Python, or a skip."""
    file = os.environ.get(VARIABLE)
    if not file:
        pytest.skip(f"{VARIABLE} names no file of environments")
    spec = _specifications(file).get(name)
    if spec is None:
        pytest.skip(f"{file} has no environment {name}")
    try:
        found = read(name, spec)
    except EnvironmentSpecError as error:  # no such Python here
        pytest.skip(str(error))
    if isinstance(found, Request) and not found.is_built():
        pytest.skip(f"the environment {name} of {file} is not built (make frameworks)")
    if not isinstance(found, Request) and not Path(found.command[0]).exists():
        pytest.skip(f"there is no {found.command[0]}")
    return resolve(name, spec, lambda headline: nullcontext(lambda line: None)).command


class Environments:
    """Subjects by environment, each made when it is first asked for."""

    def __init__(self, scratch: Path) -> None:
        """scratch: where they exchange tensors."""
        self._scratch = scratch
        self._made: dict[str, Subject] = {}

    def __getitem__(self, name: str) -> Subject:
        """The environment's subject, or a skip."""
        if name not in self._made:
            self._made[name] = Subject(name=name, command=command(name), scratch=self._scratch)
        return self._made[name]

    def close(self) -> None:
        """Ends all workers."""
        for subject in self._made.values():
            subject.close()


@contextmanager
def environments() -> Iterator[Environments]:
    """All that tests ask for, closed at the end."""
    # What is on the auditor's own path is not meant for other Pythons.
    with scratch_folder() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        made = Environments(scratch)
        yield made
        made.close()


def fields(**changes: str) -> str:
    """A scenario's fields, those of ASYMMETRIC where nothing else is said."""
    return "".join(f"{name}: {text}\n" for name, text in {**ASYMMETRIC, **changes}.items())


def compare(
    reply: Reply,
    expected: dict[str, Array],
    dtype: str,
    *,
    computed: str | None = None,
    running: str | None = None,
) -> None:
    """Every output is within 64 half-ulps at 1, and as much of its size, of the right one.

    computed: the dtype whose ulps these are, if another than that of y. running: the dtype whose ulps the
    running statistics are held to, if they are larger.
    """
    for name, got in reply.outputs.items():
        right, near = expected[name], 64 * HALF[computed or dtype]
        if running is not None and name in RUNNING:
            near = max(near, HALF[running])
        if name in ("y", "grad_input"):
            got, right = widen(got, dtype), widen(right, dtype)
        np.testing.assert_allclose(got, right, atol=near, rtol=near, err_msg=name)
