"""Results → findings: which results are one finding, its number, and the worst of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bnaudit.report import CaseRecord, FailOn, Quantity, Report, ResultRecord
from bnaudit.verdict import CAUSES, DEVIATIONS, FAILED, RAN

FORMAT_FAULT = f"BN007 {CAUSES['BN007']}"


def number_findings(
    results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord], fail_on: FailOn = "fail"
) -> list[int | None]:
    """The finding of each result, from 1; None for those that passed, or warn without a cause.

    fail_on: with "warn", every gated warning is one.
    Results of one scenario, backend, memory format, status and cause are one finding, accepted ones
    another. Gated findings come first, then accepted ones, each kind in the order in which the results came.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, result in enumerate(results):
        strict = fail_on == "warn" and result.gated and result.status == "warn"
        if result.status in FAILED or result.cause is not None or strict:
            case = cases[result.case]
            group = (
                2 if not result.gated else 0 if result.accepted is None else 1,
                result.accepted,
                case.scenario,
                result.backend,
                result.environment,
                case.memory_format,
                result.status,
                result.cause,
            )
            groups.setdefault(group, []).append(position)
    numbers: list[int | None] = [None] * len(results)
    gated_first = sorted(groups, key=lambda group: int(str(group[0])))
    for number, members in enumerate(gated_first, 1):
        for position in groups[members]:
            numbers[position] = number
    return numbers


def numbered(
    results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord], fail_on: FailOn
) -> list[ResultRecord]:
    """The results with what only all of them together tell: faults of the memory format, and findings."""
    named = name_format_faults(results, cases)
    numbers = number_findings(named, cases, fail_on)
    return [
        result.model_copy(update={"finding": number})
        for result, number in zip(named, numbers, strict=True)
    ]


def name_format_faults(
    results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord]
) -> list[ResultRecord]:
    """The results, with BN007 as the cause where it is the memory format.

    That is where nothing else explains why y fails the bounds, and the same values in the contiguous format
    pass or only warn.
    """
    twins = {case.id: _without_format(case) for case in cases.values()}
    sound = {
        (twins[result.case], result.backend, result.environment)
        for result in results
        if result.status in ("pass", "warn") and cases[result.case].memory_format == "contiguous"
    }
    named = []
    for result in results:
        if _may_be_of_the_format(result, cases[result.case]):
            is_one = (twins[result.case], result.backend, result.environment) in sound
            result = result.model_copy(update={"cause": FORMAT_FAULT if is_one else None})
        named.append(result)
    return named


def _without_format(case: CaseRecord) -> str:
    return case.model_dump_json(exclude={"id", "key", "memory_format"})


def _may_be_of_the_format(result: ResultRecord, case: CaseRecord) -> bool:
    return (
        case.memory_format != "contiguous"
        and result.cause in (None, FORMAT_FAULT)
        and result.label in ("degraded", "broken")
        and "y" in result.quantities
        and result.quantities["y"].status == "fail"
    )


class Finding(NamedTuple):
    """A numbered finding: its worst result, that one's case, and all of its results as they came."""

    number: int
    worst: ResultRecord
    case: CaseRecord
    results: list[ResultRecord]


def clusters(report: Report) -> list[Finding]:
    """The findings by number."""
    cases = {case.id: case for case in report.cases}
    found: dict[int, list[ResultRecord]] = {}
    for result in report.results:
        if result.finding is not None:
            found.setdefault(result.finding, []).append(result)
    ordered = []
    for position, results in sorted(found.items()):
        worst = worst_result(results)
        ordered.append(Finding(position, worst, cases[worst.case], results))
    return ordered


def fails(report: Report, result: ResultRecord) -> bool:
    """Whether the result is one of those for which the report is red."""
    bad = DEVIATIONS if report.fail_on == "warn" else FAILED
    return result.gated and result.accepted is None and result.status in bad


def worst_result(results: Iterable[ResultRecord]) -> ResultRecord:
    """The worst of the results that ran: by status, then by y, in standard deviations, then by bound."""

    def severity(result: ResultRecord) -> tuple[float, ...]:
        name, quantity = worst_quantity(result)
        if quantity is None:
            return (RAN.index(result.status), 0, 0, 0)
        sigma = math.inf if quantity.nonfinite else quantity.max_sigma_error
        return (
            RAN.index(result.status),
            name == "y",
            comparable(sigma),
            comparable(quantity.bound_ratio),
        )

    return max((r for r in results if r.status in RAN), key=severity)


def worst_quantity(result: ResultRecord) -> tuple[str, Quantity | None]:
    """The quantity that decides a result's status: y if it is one of those, else the farthest off."""
    if not result.quantities:
        return "", None
    return max(
        result.quantities.items(),
        key=lambda item: (
            RAN.index(item[1].status),
            item[0] == "y",
            comparable(item[1].bound_ratio),
        ),
    )


def comparable(value: float | None) -> float:
    """For comparisons: what does not apply is 0, NaN is the largest."""
    if value is None:
        return 0.0
    return math.inf if math.isnan(value) else value
