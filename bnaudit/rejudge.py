"""A saved result × thresholds → the verdict that today's rules give it, without running anything.

A report keeps all that a verdict depends on. Of one that was written before it did, statuses follow from T, T0
and the counts where these decide, and are its own otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from bnaudit.audit import Observed, conclude, control_outcome
from bnaudit.findings import FORMAT_FAULT, numbered
from bnaudit.measure import Measurement
from bnaudit.report import (
    CaseRecord,
    ControlRecord,
    FailOn,
    Quantity,
    Report,
    ResultRecord,
    Status,
    counted,
    quantity_record,
    restored,
)
from bnaudit.scenario import Thresholds as Limits
from bnaudit.verdict import NOT_REPEATABLE, RUN_STATUSES, Thresholds, judge


class Overrides(BaseModel):
    """Thresholds that take the place of a report's own.

    thresholds: of all scenarios, by quantity. scenarios: of single ones, by name; these win.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    thresholds: Limits = Limits()
    scenarios: dict[str, Limits] = {}

    def of(self, case: CaseRecord) -> dict[str, Thresholds]:
        """The thresholds of a case: its own where nothing takes their place."""
        merged: dict[str, Thresholds] = dict(case.thresholds)
        for limits in (self.thresholds, self.scenarios.get(case.scenario, Limits())):
            for quantity, own in limits.model_dump(exclude_unset=True).items():
                merged[quantity] = {**merged.get(quantity, {}), **own}
        return merged


def judged_again(
    report: Report, overrides: Overrides
) -> tuple[list[ResultRecord], list[ControlRecord]]:
    """All results and controls of a report as they are judged today, without a baseline.

    overrides: for what is gated. Specimens, by which the audit itself is judged, keep their scenarios'.
    """
    cases = {case.id: case for case in report.cases}
    own = [rejudged(result, cases[result.case]) for result in report.results]
    results = [
        rejudged(result, cases[result.case], overrides.of(cases[result.case]))
        if result.gated
        else same
        for result, same in zip(report.results, own, strict=True)
    ]
    controls = []
    for control in report.controls:
        observed = [
            Observed(
                r.case,
                cases[r.case].steps,
                r.status,
                {n: q.status for n, q in r.quantities.items()},
            )
            for r in own
            if r.backend == control.backend and cases[r.case].scenario == control.scenario
        ]
        outcome = control_outcome(control.scenario, control.backend, control.expected, observed)
        controls.append(ControlRecord.model_validate(outcome, from_attributes=True))
    cleared = [r.model_copy(update={"accepted": None, "waiver": None}) for r in results]
    return cleared, controls


def concluded(
    report: Report,
    results: Sequence[ResultRecord],
    controls: Sequence[ControlRecord],
    *,
    fail_on: FailOn,
    notes: Sequence[str] = (),
) -> Report:
    """The report with these results and controls in place of its own, and the verdict that follows."""
    verdict, code = conclude(
        results,
        controls_ok=all(control.ok for control in controls),
        missing=report.missing,
        checks=report.consistency,
        unmade=report.unmade,
        fail_on=fail_on,
        interrupted=report.verdict == "interrupted",
    )
    counts = counted(len(report.cases), Counter(result.status for result in results))
    return Report.model_validate(
        {
            **dict(report),
            "results": numbered(results, {case.id: case for case in report.cases}, fail_on),
            "controls": list(controls),
            "fail_on": fail_on,
            "notes": list(notes),
            "summary": counts,
            "verdict": verdict,
            "exit_code": code,
        }
    )


def is_complete(result: ResultRecord, case: CaseRecord) -> bool:
    """Whether the report kept all that the verdict depends on."""
    return case.extreme is not None and all(
        quantity.judged is not None for quantity in result.quantities.values()
    )


def rejudged(
    result: ResultRecord, case: CaseRecord, thresholds: Mapping[str, Thresholds] | None = None
) -> ResultRecord:
    """The result as it is judged today. thresholds: by quantity; those of its case where none are given.

    What died, was not run or broke the contract has no quantities, and stays what it is.
    """
    if not result.quantities:
        return result
    if not is_complete(result, case):
        return _by_numbers(result)
    verdict = judge(
        case.thresholds if thresholds is None else thresholds,
        {name: restored(quantity, Measurement) for name, quantity in result.quantities.items()},
        case.facts(),
        _not_repeatable(result),
    )
    quantities = {name: quantity_record(judged) for name, judged in verdict.quantities.items()}
    return result.model_copy(
        update={
            "status": verdict.status,
            "label": verdict.label,
            "reason": verdict.reason,
            "cause": verdict.cause or _cause_of_format(result, verdict.status),
            "quantities": quantities,
        }
    )


def _cause_of_format(result: ResultRecord, status: str) -> str | None:
    """BN007 follows from other results, see `findings.name_format_faults`, and cannot be seen in one."""
    return FORMAT_FAULT if status == "fail" and result.cause == FORMAT_FAULT else None


def _not_repeatable(result: ResultRecord) -> str | None:
    return (result.reason or "").partition(NOT_REPEATABLE)[2] or None


def _by_numbers(result: ResultRecord) -> ResultRecord:
    quantities = {
        name: quantity.model_copy(update={"status": _status(quantity)})
        for name, quantity in result.quantities.items()
    }
    statuses = [quantity.status for quantity in quantities.values()]
    if _not_repeatable(result) is not None:
        statuses.append("warn")
    status = max(statuses, key=RUN_STATUSES.index)
    return result.model_copy(update={"quantities": quantities, "status": status})


def _status(quantity: Quantity) -> Status:
    """By the numbers where they decide it; else as it was judged."""
    if quantity.label is None:
        return quantity.status
    if quantity.nonfinite or _exceeds(quantity.bound_ratio):
        return "fail"
    if _exceeds(quantity.tight_ratio):
        return max("warn", quantity.status, key=RUN_STATUSES.index)
    return quantity.status


def _exceeds(ratio: float | None) -> bool:
    return ratio is not None and not ratio <= 1
