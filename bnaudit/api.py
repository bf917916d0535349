"""The audit for a test suite of one's own: cases, their inputs, and the verdict on what came of them.

import bnaudit, pytest

@pytest.mark.parametrize("case", bnaudit.cases("smoke"))
def test_batch_norm(case):
    inputs = case.inputs()
    y = my_batch_norm(inputs.x, inputs.weight, inputs.bias, eps=case.eps)
    bnaudit.judge(case, y).check()
"""

from __future__ import annotations

import functools
import shutil
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal, NamedTuple

import numpy as np

from bnaudit import inputs as making
from bnaudit import scenario, verdict
from bnaudit.certified import check_environment
from bnaudit.inputs import Array
from bnaudit.reference import Declarations, Reference
from bnaudit.verdict import Judged
from bnaudit.worker.execution import RUNNING, NoResult, Tensors, checked_outputs

KEPT = 4
"""Cases whose inputs and reference stay in memory, so that asking twice costs nothing."""


class DeviationError(AssertionError):
    """A result that is not good enough; the message is the finding."""


class Step(NamedTuple):
    """The tensors of one training step: (N, C, *) in the case's dtype and memory format."""

    x: Array
    grad_output: Array | None


@dataclass(frozen=True)
class Inputs:
    """What a BatchNorm is called with.

    Attributes:
        x: (N, C, *) in the case's dtype and memory format; of several steps the last.
        weight: (C,) in the dtype of the parameters; None without affine parameters.
        bias: like weight.
        running_mean: (C,) in the dtype of the parameters, before the first step.
        running_var: like running_mean.
        grad_output: like x; None without a backward pass.
        steps: x and grad_output of every step; several only where `case.steps` says so.
    """

    x: Array
    weight: Array | None
    bias: Array | None
    running_mean: Array
    running_var: Array
    grad_output: Array | None
    steps: tuple[Step, ...]


class Case(scenario.Case):
    """One case of a scenario: its fields are those of scenario files, all resolved."""

    @property
    def __name__(self) -> str:
        """The id, by which pytest names the test."""
        return self.id

    def __str__(self) -> str:
        """The id."""
        return self.id

    def inputs(self) -> Inputs:
        """Fresh tensors, which may be written to; the same bits at every call.

        bfloat16 is ml_dtypes.bfloat16. Raises NotImplementedError where that is not installed.
        """
        try:
            tensors = Tensors(self.model_dump(), _prepared(self).inputs.files, "numpy")
        except NoResult as end:
            raise NotImplementedError(end.reason) from end
        steps = tuple(
            Step(tensors.given("x", step), tensors.get("grad_output", step))
            for step in range(self.steps)
        )
        return Inputs(
            steps[-1].x,
            tensors.get("weight", 0),
            tensors.get("bias", 0),
            tensors.given("running_mean", 0),
            tensors.given("running_var", 0),
            steps[-1].grad_output,
            steps,
        )


@dataclass(frozen=True)
class Result:
    """The verdict on one case. status: "pass", "warn" or "fail"; README.md explains labels and causes."""

    case: Case
    status: str
    label: str | None
    reason: str | None
    cause: str | None
    quantities: Mapping[str, Judged]

    def check(self, *, fail_on: Literal["fail", "warn"] = "fail") -> None:
        """Raises DeviationError for a fail; for a warn, too, if fail_on is "warn"."""
        if self.status == "fail" or self.status == fail_on:
            raise DeviationError(str(self))

    def __str__(self) -> str:
        """The finding in a few lines."""
        lines = [f"{self.status} {self.case.id}"]
        if self.reason:
            lines.append(self.reason)
        for name, quantity in self.quantities.items():
            worst = quantity.worst
            if quantity.status != "pass" and worst is not None:
                place = ",".join(map(str, worst.index))
                lines.append(f"{name}[{place}] = {worst.value!r}, should be {worst.reference!r}")
        if self.cause:
            lines.append(f"cause {self.cause}")
        return "\n".join(lines)


def cases(*paths: str | PathLike[str]) -> list[Case]:
    """The cases of scenario files, folders of them and shipped scenarios; of all shipped ones without a path.

    Combinations that no implementation can run (channels_last of a matrix) are left out. Raises
    scenario.ScenarioError.
    """
    return [
        Case.model_construct(**dict(case))
        for loaded in scenario.load([fspath(path) for path in paths])
        for case in loaded.cases
        if case.unsupported() is None
    ]


def judge(
    case: Case,
    outputs: Any,
    *,
    running_var_correction: Literal[0, 1] = 1,
    running_update: Literal["ema", "caffe"] = "ema",
) -> Result:
    """Compares outputs with the certified reference.

    outputs: y, or a dict of y and what else there is: batch_mean, batch_var, invstd, running_mean,
    running_var (after the last step), grad_input, grad_weight, grad_bias. y and grad_input have the shape
    and dtype of x (bfloat16 as ml_dtypes or torch have it, or as its bits in uint16); arrays, or tensors of
    any framework that NumPy reads. What is missing is not judged.
    running_var_correction: 1 if the running variance is the unbiased one, 0 if it is the biased one.
    running_update: "caffe" for sums with a factor of their own instead of an exponential average.
    """
    prepared = _prepared(case)
    given = outputs if isinstance(outputs, Mapping) else {"y": outputs}
    tensors = Tensors(case.model_dump(), prepared.inputs.files, "stored")
    try:
        arrays = {
            name: value if isinstance(value, str) else _to_numpy(value)
            for name, value in given.items()
            if value is not None
        }
        checked = checked_outputs(tensors, arrays)
        for name in RUNNING:
            if name in arrays:
                checked[name] = tensors.take_back_channels(name, arrays[name])
    except NoResult as end:
        return Result(case, "fail", None, f"contract: {end.reason}", None, {})
    declared = Declarations(running_var_correction, running_update)
    measured = prepared.reference.measure(checked, declared)
    found = verdict.judge(case.thresholds, measured, prepared.reference.facts)
    return Result(case, found.status, found.label, found.reason, found.cause, found.quantities)


def _to_numpy(value: Any) -> Array:
    """A tensor as a NumPy array on the host; bfloat16 as its bits in uint16."""
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.view(sys.modules["torch"].int16)
            return np.asarray(value).view(np.uint16)
    array = np.asarray(value)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class _Prepared:
    """A case's inputs, in files of a folder that is removed with them, and its reference."""

    def __init__(self, case: scenario.Case) -> None:
        self.folder = Path(mkdtemp(prefix="bnaudit-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.inputs = making.make(case, self.folder)
        self._case = case

    @functools.cached_property
    def reference(self) -> Reference:
        check_environment()
        return Reference(self._case, self.inputs)


_PREPARED: dict[str, _Prepared] = {}
"""By the case's key, the one used last at the end."""


def _prepared(case: scenario.Case) -> _Prepared:
    found = _PREPARED.pop(case.key, None) or _Prepared(case)
    _PREPARED[case.key] = found
    while len(_PREPARED) > KEPT:
        del _PREPARED[next(iter(_PREPARED))]
    return found
