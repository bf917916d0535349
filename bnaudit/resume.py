"""An interrupted report → what need not be run again: its complete cases, as events of the audit.

A report is continued by the same bnaudit, on the same scenarios and in the same environments. A case is taken
over with all of its results, or run again: where it was cut short, and where other backends are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from typing import Any

from bnaudit import __version__
from bnaudit.audit import CaseFacts, Event, Result, Selected
from bnaudit.consistency import Consistency, Disagreement
from bnaudit.report import Environment, Report, ResultRecord, restored
from bnaudit.scenario import Case, Scenario
from bnaudit.verdict import Judged


class ResumeError(Exception):
    """The report cannot be continued; the message says what differs."""


class Earlier:
    """What came of the complete cases of a report: an `audit.Earlier`."""

    def __init__(self, report: Report, checks: Collection[str]) -> None:
        """checks: those of consistency that the new run makes; if they are others, every case is run."""
        self._cases = {case.id: case for case in report.cases}
        if report.verdict == "interrupted" and report.cases:
            del self._cases[report.cases[-1].id]  # it may have been cut short
        if {check.check for check in report.consistency} != {*checks}:
            self._cases = {}
        self._report = report
        self._results: dict[str, dict[str, ResultRecord]] = {}
        for result in report.results:
            self._results.setdefault(result.case, {})[result.backend] = result

    def __call__(self, case: Case, backends: Sequence[Selected]) -> list[Event] | None:
        """The events of a case, as they were; None where it has to be run."""
        record = self._cases.get(case.id)
        known = self._results.get(case.id, {})
        if record is None or [(b.name, b.gated) for b in backends] != [
            (name, result.gated) for name, result in known.items()
        ]:
            return None
        facts = None if record.input_sha256 is None else record.facts()
        return [
            CaseFacts(case, case.n, record.input_sha256, facts),
            *(_result(case, result) for result in known.values()),
            *self._further(case),
        ]

    def _further(self, case: Case) -> Iterator[Event]:
        for found in self._report.disagreements:
            if found.case == case.id:
                yield Disagreement(**{**dict(found), "case": case})
        for check in self._report.consistency:
            if check.case == case.id:
                yield Consistency(**{**dict(check), "case": case})


def earlier(
    report: Report,
    scenarios: Sequence[Scenario],
    environments: Sequence[Environment],
    checks: Collection[str],
) -> Earlier:
    """What need not be run again. Raises ResumeError where report and run are not of the same things."""
    if report.bnaudit_version != __version__:
        raise ResumeError(f"it was written by bnaudit {report.bnaudit_version}, not {__version__}")
    keys = {case.id: case.key for scenario in scenarios for case in scenario.cases}
    changed = [case.id for case in report.cases if keys.get(case.id) != case.key]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ResumeError(f"the scenarios are not the same: {changed[0]}{others}")
    olds = {environment.name: environment for environment in report.environments}
    news = {environment.name: environment for environment in environments}
    for name in {**olds, **news}:
        if name not in olds or name not in news:
            raise ResumeError(
                f"the environment {name} is only in the {'old' if name in olds else 'new'} run"
            )
        old, new = _flat(olds[name].model_dump()), _flat(news[name].model_dump())
        for field in {**old, **new}:
            if old.get(field) != new.get(field):
                raise ResumeError(
                    f"the environments are not the same: in {name} {field} was {old.get(field)}, and "
                    f"is {new.get(field)}"
                )
    return Earlier(report, checks)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """packages.torch, cpu.isa and so on."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def _result(case: Case, record: ResultRecord) -> Result:
    quantities = {name: restored(quantity, Judged) for name, quantity in record.quantities.items()}
    names = {field.name for field in fields(Result)}
    known = {name: value for name, value in dict(record).items() if name in names}
    return Result(
        **{**known, "case": case, "finding": None, "accepted": None, "quantities": quantities}
    )
