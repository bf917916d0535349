"""Findings in plain text: by how much a result is off, where, and what does better.

What every format says in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bnaudit.findings import worst_quantity
from bnaudit.render.words import axes, listed, number
from bnaudit.report import CaseRecord, Quantity, Report, ResultRecord
from bnaudit.verdict import NOT_REPEATABLE

VERBS = {"pass": ("passes", "pass"), "warn": ("only warns", "only warn")}
"""What a better sibling of a failing case does: one, several."""

MANY_ULPS = 1e9
"""More units in the last place than this say nothing: the right value is next to 0."""


class Place(NamedTuple):
    """Where a person looks first: the plug-in's function, or the scenario."""

    file: str
    line: int


def place(report: Report, backend: str, case: CaseRecord) -> Place:
    """Where the plug-in stands; where the backend is none, or nobody knows, the case's scenario."""
    source = report.places.get(backend)
    return Place(case.file, case.line) if source is None else Place(source.file, source.line)


class Neighbours:
    """The same case in other memory formats and on other backends."""

    def __init__(self, report: Report) -> None:
        """report: all that there is to compare with."""
        self.cases = {case.id: case for case in report.cases}
        self._results = {(r.case, r.backend, r.environment): r for r in report.results}
        self._twins: dict[tuple[object, ...], list[CaseRecord]] = {}
        for case in report.cases:
            self._twins.setdefault(self._twin_key(case), []).append(case)
        self._specimens = {r.backend: r.environment for r in report.results if not r.gated}

    def _twin_key(self, case: CaseRecord) -> tuple[object, ...]:
        own = axes(case)
        own.pop("memory_format", None)
        return (case.scenario, *own.items())

    def comparisons(self, result: ResultRecord, most: int | None = 3) -> list[str]:
        """Such as "contiguous only warns" and "exact@cpu passes"; only where others do better.

        most: names of passing backends at most, None for all.
        """
        case = self.cases[result.case]
        better = {"pass": (), "warn": ("pass",)}.get(result.status, tuple(VERBS))
        texts = []
        formats: dict[str, list[str]] = {}
        for twin in self._twins[self._twin_key(case)]:
            other = self._results.get((twin.id, result.backend, result.environment))
            if other is not None and other.status in better:
                formats.setdefault(other.status, []).append(twin.memory_format)
        for status, names in formats.items():
            texts.append(f"{listed(names)} {VERBS[status][len(names) > 1]}")
        passing = [
            backend
            for backend, environment in self._specimens.items()
            if (other := self._results.get((case.id, backend, environment))) is not None
            and other.status == "pass"
        ][:most]
        if passing:
            texts.append(f"{listed(passing)} {VERBS['pass'][len(passing) > 1]}")
        return texts


def evidence(result: ResultRecord) -> Iterator[str]:
    """What is wrong, in sentences: the worst element first."""
    name, quantity = worst_quantity(result)
    reason = result.reason or ""
    if quantity is None or quantity.worst is None or result.status == "warn":
        if reason:
            yield reason
        return
    value, right = _apart(quantity.worst.value, quantity.worst.reference)
    index = ",".join(str(i) for i in quantity.worst.index)
    text = f"{name}[{index}] = {value}, should be {right}"
    if quantity.reason:
        text += f"; {quantity.reason}"
    yield text
    others = [
        f"{other} {off_by(other, found)}"
        for other, found in result.quantities.items()
        if other != name and found.status == "fail"
    ]
    if others:
        yield f"also off: {', '.join(others)}"
    _, again, difference = reason.partition(NOT_REPEATABLE)
    if again:
        yield again + difference


def _apart(value: float, reference: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to tell them apart, three at least."""
    for digits in (3, 6, 9, 17):
        texts = number(value, digits), number(reference, digits)
        if texts[0] != texts[1]:
            break
    return texts


def off_by(name: str, quantity: Quantity | None) -> str:
    """How far off: y in standard deviations, a per-channel quantity in ulp, grad_input as it is."""
    if quantity is None:
        return "-"
    if quantity.nonfinite and quantity.worst is not None:
        return number(quantity.worst.value, 2)
    if name == "y" and quantity.max_sigma_error is not None:
        sigma = quantity.max_sigma_error
        return f"{number(sigma, 3 if sigma >= 1e-3 else 2)} σ"
    ulps = quantity.max_ulp_error
    if name not in ("y", "grad_input") and ulps is not None and ulps <= MANY_ULPS:
        return f"{number(ulps, 2)} ulp"
    return number(quantity.max_abs_error, 3)


def bound(quantity: Quantity | None) -> str:
    """T, such as 91; "-" where there is none."""
    return number(None if quantity is None else quantity.bound_ratio, 2)
