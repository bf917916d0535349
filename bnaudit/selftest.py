"""Planted faults × the shipped scenarios: what this project's own cases find, and what only they find.

Faults and correct variants (`bnaudit.defects`) run in the auditor's own processes, one case at a time, on the
inputs and against the reference that all of them share; they are judged like any backend.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bnaudit.defects import CORRECT, FAULTS, RESEMBLES
from bnaudit.defects.layer import Layer
from bnaudit.inputs import Array, make
from bnaudit.measure import Declarations, Reference
from bnaudit.reference import check_environment
from bnaudit.scenario import Case, Scenario
from bnaudit.subject import CASE_FIELDS
from bnaudit.verdict import judge
from bnaudit.worker.execution import Implementation, NoResult, Tensors, run
from bnaudit.worker.layout import bits

Kill = tuple[str, str]
"""A fault and a quantity in which it failed."""


@dataclass(frozen=True)
class Outcome:
    """What one case found.

    Attributes:
        case: the case's id. scenario: its name. file: the scenario's file.
        kills: quantities that failed, by fault.
        flags: why a correct variant did not pass, by variant.
        errors: why a fault gave no outputs, by fault: no scenario's merit.
    """

    case: str
    scenario: str
    file: str
    kills: Mapping[str, frozenset[str]]
    flags: Mapping[str, str]
    errors: Mapping[str, str]


@dataclass(frozen=True)
class Matrix:
    """All outcomes together. faults: those that were planted. files: in the order in which they ran."""

    faults: Sequence[str]
    variants: Sequence[str]
    files: Sequence[str]
    outcomes: Sequence[Outcome]

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
    def survivors(self) -> list[str]:
        """Faults that no case found."""
        return [fault for fault in self.faults if not self.kills[fault]]

    @cached_property
    def flags(self) -> list[tuple[str, str, str]]:
        """Correct variants that did not pass: (variant, case, reason)."""
        return [
            (variant, outcome.case, reason)
            for outcome in self.outcomes
            for variant, reason in outcome.flags.items()
        ]

    @cached_property
    def alone(self) -> dict[str, list[Kill]]:
        """By file, what no other file found."""
        holders: dict[Kill, list[str]] = {}
        for fault, files in self.kills.items():
            for file, quantities in files.items():
                for quantity in quantities:
                    holders.setdefault((fault, quantity), []).append(file)
        found: dict[str, list[Kill]] = {file: [] for file in self.files}
        for kill in sorted(holders):
            if len(holders[kill]) == 1:
                found[holders[kill][0]].append(kill)
        return found

    @property
    def exit_code(self) -> int:
        """0 where every fault is found and no correct variant flagged, else 1."""
        return 1 if self.survivors or self.flags else 0


def plant(
    scenarios: Sequence[Scenario],
    faults: Sequence[str],
    variants: Sequence[str],
    scratch: Path,
    *,
    processes: int,
) -> Iterator[Outcome]:
    """Runs faults and correct variants on every case, and yields what each case found, as it is done.

    Raises EnvironmentFaultError where no exact reference can be computed.
    """
    check_environment()
    work = [
        (case, tuple(faults), tuple(v for v in variants if not _is_excused(scenario, v)))
        for scenario in scenarios
        for case in scenario.cases
        if case.unsupported() is None
    ]
    # The longest first, so that no process is left with one at the end.
    work.sort(key=lambda item: -item[0].steps * item[0].n * item[0].channels)
    context = multiprocessing.get_context("spawn")  # threads of numba do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [
            pool.submit(_examine, *item, scratch / f"case-{index}")
            for index, item in enumerate(work)
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _is_excused(scenario: Scenario, variant: str) -> bool:
    return RESEMBLES.get(variant) in scenario.controls.must_fail


def _examine(case: Case, faults: Sequence[str], variants: Sequence[str], folder: Path) -> Outcome:
    """One case on all faults and variants."""
    folder.mkdir()
    kills: dict[str, frozenset[str]] = {}
    flags: dict[str, str] = {}
    errors: dict[str, str] = {}
    try:
        inputs = make(case, folder)
        reference = Reference(case, inputs)
        fields = {name: getattr(case, name) for name in CASE_FIELDS}
        tensors = Tensors(fields, inputs.files, "numpy")
        right = run(Implementation(Layer(), "numpy"), fields, tensors).outputs
        for name in (*faults, *variants):
            try:
                layer = {**FAULTS, **CORRECT}[name]()
                outputs = run(Implementation(layer, "numpy"), fields, tensors).outputs
            except NoResult as end:
                if end.outcome != "unsupported":
                    (flags if name in CORRECT else errors)[name] = end.reason
                continue
            if name in FAULTS:
                # What a fault leaves as it was needs no judgement.
                outputs = {
                    quantity: array
                    for quantity, array in outputs.items()
                    if quantity not in right or not _equal(array, right[quantity])
                }
            verdict = judge(case, reference.measure(outputs, Declarations()), reference)
            failed = frozenset(q for q, j in verdict.quantities.items() if j.status == "fail")
            if name in CORRECT and verdict.status == "fail":
                flags[name] = str(verdict.reason)
            elif name in FAULTS and failed:
                kills[name] = failed
    except NoResult as end:
        if end.outcome != "unsupported":  # bfloat16 without ml_dtypes
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case.id, case.scenario, case.file, kills, flags, errors)


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and np.array_equal(bits(a), bits(b))
