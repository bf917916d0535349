"""Report of several environments → the part of one, as if it had been run there alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from bnaudit.audit import conclude
from bnaudit.environments import CURRENT
from bnaudit.report import RAN, Report, ResultRecord, Status, Summary, number_findings


def side(report: Report, environment: str, command: str) -> Report:
    """What ran in an environment, with the backends' names as they are there.

    command: what is said to have made it.

    Left out are specimens, which ran in the auditor's own interpreter, and what was found between
    backends. Controls are kept: they tell whether the audit can be trusted.
    """
    prefix = f"{environment}:"
    own = [
        result.model_copy(
            update={"backend": result.backend.removeprefix(prefix), "environment": CURRENT}
        )
        for result in report.results
        if result.environment == environment
    ]
    numbers = number_findings(own, {case.id: case for case in report.cases})
    results = [
        result.model_copy(update={"finding": number})
        for result, number in zip(own, numbers, strict=True)
    ]
    missing = {
        name.removeprefix(prefix): why
        for name, why in report.missing.items()
        if name.startswith(prefix)
    }
    verdict, code = conclude(results, controls_ok=True, missing=missing)
    if report.verdict in ("interrupted", "untrusted"):
        verdict, code = report.verdict, report.exit_code
    return report.model_copy(
        update={
            "command": command,
            "environments": [
                place.model_copy(update={"name": CURRENT})
                for place in report.environments
                if place.name == environment
            ],
            "results": results,
            "disagreements": [],
            "consistency": [],
            "missing": missing,
            "summary": _summary(len(report.cases), results),
            "verdict": verdict,
            "exit_code": code,
        }
    )


def _summary(cases: int, results: Sequence[ResultRecord]) -> Summary:
    counts = Counter(result.status for result in results)
    return Summary.model_validate(
        {
            "cases": cases,
            "results": len(results),
            "ran": sum(counts[status] for status in get_args(Status) if status in RAN),
            **{name: counts[name] for name in get_args(Status)},
        }
    )
