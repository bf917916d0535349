"""Planted faults × scenarios: what the shipped cases find, and what each file of them alone finds.

Faults and correct variants (`bnaudit.defects`) run in processes of the auditor's own, where all of them share
a case's inputs and reference; they are judged as any backend is.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bnaudit import __version__
from bnaudit.certified import check_environment
from bnaudit.defects import CORRECT, FAULTS, RESEMBLES
from bnaudit.defects.layer import Layer
from bnaudit.inputs import Array, make
from bnaudit.reference import Declarations, Reference
from bnaudit.scenario import Case, Scenario
from bnaudit.subject import CASE_FIELDS
from bnaudit.verdict import judge
from bnaudit.worker import execution
from bnaudit.worker.execution import Implementation, NoResult, Tensors
from bnaudit.worker.layout import bits

Kill: TypeAlias = tuple[str, str]
"""A fault, and a quantity in which it failed."""


@dataclass(frozen=True)
class Task:
    """One case, with the names of what runs on it."""

    case: Case
    faults: Sequence[str]
    variants: Sequence[str]


@dataclass
class Outcome:
    """What one case found.

    Attributes:
        case: its id.
        file: the scenario's file.
        kills: quantities that failed, by fault.
        flags: why a correct variant failed, by variant.
        errors: why a fault gave no outputs, by fault; which is no scenario's merit.
    """

    case: str
    file: str
    kills: dict[str, frozenset[str]] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def plan(
    scenarios: Sequence[Scenario],
    faults: Sequence[str] = tuple(FAULTS),
    variants: Sequence[str] = tuple(CORRECT),
) -> list[Task]:
    """All cases that a backend can run; without a variant where the yardstick that it resembles must fail."""
    return [
        Task(case, faults, [v for v in variants if RESEMBLES.get(v) not in excused])
        for scenario in scenarios
        for excused in [scenario.controls.must_fail]
        for case in scenario.cases
        if case.unsupported() is None
    ]


def run(tasks: Sequence[Task], scratch: Path, *, processes: int) -> Iterator[Outcome]:
    """Yields what each case found, as soon as it is done.

    Raises EnvironmentFaultError where no exact reference can be computed.
    """
    check_environment()
    # The longest first, so that no process is left with one at the end.
    ordered = sorted(tasks, key=lambda task: -task.case.steps * task.case.n * task.case.channels)
    # Not forked, because numba's threads would not be there. An interrupt is this process's affair.
    with ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        futures = [
            pool.submit(examine, task, scratch / f"case-{number}")
            for number, task in enumerate(ordered)
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def examine(task: Task, folder: Path) -> Outcome:
    """Runs one case; its inputs are in the folder meanwhile."""
    case = task.case
    outcome = Outcome(case.id, case.file)
    fields = {name: getattr(case, name) for name in CASE_FIELDS}
    folder.mkdir()
    try:
        inputs = make(case, folder)
        try:
            tensors = Tensors(fields, inputs.files, "numpy")
        except NoResult:
            return outcome  # bfloat16, without ml_dtypes
        reference = Reference(case, inputs)

        def outputs(layer: Layer) -> Mapping[str, Array]:
            return execution.run(Implementation(layer, "numpy"), fields, tensors).outputs

        def failures(found: Mapping[str, Array]) -> dict[str, str]:
            """Reasons, by quantity."""
            verdict = judge(
                case.thresholds, reference.measure(found, Declarations()), reference.facts
            )
            return {
                name: str(judged.reason)
                for name, judged in verdict.quantities.items()
                if judged.status == "fail"
            }

        right = outputs(Layer())
        for name in task.faults:
            try:
                found = outputs(FAULTS[name]())
            except NoResult as end:
                outcome.errors[name] = end.reason
                continue
            # What a fault leaves as it was needs no judgement.
            changed = {key: a for key, a in found.items() if not _same(a, right.get(key))}
            if failed := failures(changed):
                outcome.kills[name] = frozenset(failed)
        for name in task.variants:
            try:
                failed = failures(outputs(CORRECT[name]()))
            except NoResult as end:
                failed = {end.outcome: end.reason}
            if failed:
                outcome.flags[name] = "; ".join(f"{key}: {why}" for key, why in failed.items())
        return outcome
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _same(a: Array, b: Array | None) -> bool:
    return b is not None and a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


@dataclass(frozen=True)
class Matrix:
    """All outcomes together. files: those of the scenarios, in the order in which they were loaded."""

    faults: Sequence[str]
    variants: Sequence[str]
    files: Sequence[str]
    outcomes: Sequence[Outcome]

    @classmethod
    def of(cls, scenarios: Sequence[Scenario], outcomes: Sequence[Outcome]) -> Matrix:
        """The matrix of every fault and variant."""
        files = dict.fromkeys(str(scenario.cases[0].file) for scenario in scenarios)
        return cls(tuple(FAULTS), tuple(CORRECT), tuple(files), outcomes)

    @cached_property
    def kills(self) -> dict[str, dict[str, frozenset[str]]]:
        """Quantities that failed in some case, by fault and file."""
        found: dict[str, dict[str, frozenset[str]]] = {fault: {} for fault in self.faults}
        for outcome in self.outcomes:
            for fault, quantities in outcome.kills.items():
                files = found[fault]
                files[outcome.file] = files.get(outcome.file, frozenset()) | quantities
        return found

    @cached_property
    def alone(self) -> dict[str, list[Kill]]:
        """By file, what no other file found."""
        holders: dict[Kill, list[str]] = {}
        for fault, files in self.kills.items():
            for file, quantities in files.items():
                for quantity in quantities:
                    holders.setdefault((fault, quantity), []).append(file)
        return {
            file: sorted(kill for kill, files in holders.items() if files == [file])
            for file in self.files
        }

    @cached_property
    def survivors(self) -> list[str]:
        """Faults that no case found."""
        return [fault for fault in self.faults if not self.kills[fault]]

    @cached_property
    def flags(self) -> list[tuple[str, str, str]]:
        """Correct variants that failed: (variant, case, reason)."""
        return [
            (variant, outcome.case, reason)
            for outcome in self.outcomes
            for variant, reason in outcome.flags.items()
        ]

    @cached_property
    def errors(self) -> dict[str, list[str]]:
        """Why faults gave no outputs, by fault."""
        found: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            for fault, reason in outcome.errors.items():
                found.setdefault(fault, []).append(f"{outcome.case}: {reason}")
        return found

    @property
    def exit_code(self) -> int:
        """0 where every fault was found and no correct variant flagged, else 1."""
        return 1 if self.survivors or self.flags else 0

    def describe(self, fault: str) -> str:
        """What is wrong in it, and where it was so."""
        return str(FAULTS[fault].__doc__)

    def to_json(self) -> str:
        """Everything, for machines."""
        document = {
            "bnaudit_version": __version__,
            "cases": len(self.outcomes),
            "faults": {
                fault: {
                    "description": self.describe(fault),
                    "killed_by": {file: sorted(found) for file, found in files.items()},
                }
                for fault, files in self.kills.items()
            },
            "alone": {
                file: [{"fault": fault, "quantity": quantity} for fault, quantity in kills]
                for file, kills in self.alone.items()
            },
            "survivors": self.survivors,
            "flags": [
                {"variant": variant, "case": case, "reason": reason}
                for variant, case, reason in self.flags
            ],
            "errors": self.errors,
            "exit_code": self.exit_code,
        }
        return json.dumps(document, indent=1) + "\n"
