"""Report of several environments → the part of one, as if it had been run there alone."""

from __future__ import annotations

from collections import Counter

from bnaudit.audit import conclude
from bnaudit.environments import CURRENT
from bnaudit.findings import numbered
from bnaudit.report import Report, Summary, counted


def side(report: Report, environment: str, command: str) -> Report:
    """What ran in an environment, with the backends' names as they are there.

    command: what is said to have made it.

    Left out are specimens, which ran in the auditor's own interpreter, and what was found between
    backends. Controls are kept: they tell whether the audit can be trusted.
    """
    prefix = f"{environment}:"
    results = [
        result.model_copy(
            update={"backend": result.backend.removeprefix(prefix), "environment": CURRENT}
        )
        for result in report.results
        if result.environment == environment
    ]
    missing = {
        name.removeprefix(prefix): why
        for name, why in report.missing.items()
        if name.startswith(prefix)
    }
    verdict, code = conclude(results, controls_ok=True, missing=missing)
    if report.verdict in ("interrupted", "untrusted"):
        verdict, code = report.verdict, report.exit_code
    counts = counted(len(report.cases), Counter(result.status for result in results))
    return report.model_copy(
        update={
            "command": command,
            "environments": [
                place.model_copy(update={"name": CURRENT})
                for place in report.environments
                if place.name == environment
            ],
            "results": numbered(results, {case.id: case for case in report.cases}, "fail"),
            "disagreements": [],
            "consistency": [],
            "missing": missing,
            "summary": Summary.model_validate(counts),
            "verdict": verdict,
            "exit_code": code,
        }
    )
