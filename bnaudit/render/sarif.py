"""Report → SARIF 2.1.0, as code scanning reads it: one result for each finding of a gated backend.

A pure function of the report. A finding stands at the plug-in's function or, for other backends, at the
scenario; paths are relative to %SRCROOT%, the folder in which the audit ran. Controls that do not behave, and
what could not run, are notifications of the tool.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import quote

from bnaudit.findings import Finding, clusters, fails, worst_quantity
from bnaudit.render.evidence import Neighbours, Place, evidence, place
from bnaudit.render.words import count, label
from bnaudit.report import ConsistencyRecord, Report
from bnaudit.verdict import CAUSES, DIED

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


class Rule(NamedTuple):
    """What a rule is called, and what its reader can do about it."""

    name: str
    short: str
    help: str


UNEXPLAINED, DEATH, CONTRACT, DEPENDS = "BN000", "BN009", "BN010", "BN011"

RULES = {
    UNEXPLAINED: Rule(
        "Deviation",
        "a deviation without a cause that bnaudit knows",
        "The result is farther from the right one than a stable algorithm may be, and the pattern of the "
        "deviations fits no known cause. Compare the statistics with those of a backend that passes.",
    ),
    "BN001": Rule(
        "ConstantChannel",
        CAUSES["BN001"],
        "The normalized output of a channel that holds one value is exactly the bias. The statistics are "
        "sound here and the output is not: do not fold mean and scale into one affine map before the mean "
        "is subtracted; subtract first, then scale.",
    ),
    "BN002": Rule(
        "CancellationInVariance",
        CAUSES["BN002"],
        "E[x²] − E[x]² loses all digits where the mean is large beside the deviation. Sum squared "
        "deviations from the mean (two passes), or use Welford's update with Chan's merges.",
    ),
    "BN003": Rule(
        "LowPrecisionAccumulation",
        CAUSES["BN003"],
        "The mean itself is wrong: one accumulator of few bits took too many values. Accumulate in "
        "float64, or in float32 by blocks, pairs or a tree, also in other memory formats.",
    ),
    "BN004": Rule(
        "OverflowOrUnderflow",
        CAUSES["BN004"],
        "Squares leave the range of the dtype in which they are formed. Convert before squaring, and "
        "subtract the mean first.",
    ),
    "BN005": Rule(
        "NonFiniteOutput",
        CAUSES["BN005"],
        "NaN or infinity stands where the right value is finite, or the reverse. Look for a negative "
        "variance under the root, a division by n - 1 at n = 1, and eps lost in half precision.",
    ),
    "BN006": Rule(
        "RunningStatistics",
        CAUSES["BN006"],
        "The batch statistics are right and the running ones are not: check which operand momentum "
        "weights, biased or unbiased variance, and what one value per channel does. A deliberate "
        "convention is declared with running_var_correction.",
    ),
    "BN007": Rule(
        "MemoryFormat",
        CAUSES["BN007"],
        "The same values are right in the contiguous format and wrong in this one, beyond rounding: "
        "check strides, channel indices and the elements left over at the end of a vector.",
    ),
    "BN008": Rule(
        "NotReproducible",
        CAUSES["BN008"],
        "The same tensors gave other bits in a second call or with another number of threads: a race, "
        "atomic additions, memory that was not written, or a split of sums that follows the threads.",
    ),
    DEATH: Rule(
        "Died",
        "crash or timeout",
        "The backend raised, died or took too long on a valid input. The message has its last words.",
    ),
    CONTRACT: Rule(
        "Contract",
        "not what a backend returns",
        "A shape, dtype or quantity is not what the contract of a BatchNorm says, or an input was changed.",
    ),
    DEPENDS: Rule(
        "Dependence",
        "the result depends on what it must not",
        "Another channel, the order of the batch or the mode changed the result, or two sound backends "
        "are too far apart. bnaudit probe shows in which order a backend adds.",
    ),
}
"""By id. Ids and names are stable: code scanning tracks alerts by them."""

NOT_REPRODUCIBLE_CHECKS = ("repeat", "threads")


def sarif(report: Report) -> str:
    """The report as a SARIF log with one run."""
    neighbours = Neighbours(report)
    results = [
        _result(report, finding, neighbours) for finding in clusters(report) if finding.worst.gated
    ]
    results += [_inconsistent(report, record) for record in _broken_checks(report)]
    log = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "bnaudit",
                        "semanticVersion": report.bnaudit_version,
                        "rules": [_rule(name, rule) for name, rule in RULES.items()],
                    }
                },
                "invocations": [
                    {
                        "commandLine": report.command,
                        "exitCode": report.exit_code,
                        "executionSuccessful": report.exit_code in (0, 1),
                        "toolExecutionNotifications": [
                            {"level": "error", "message": {"text": _message(text)}}
                            for text in _faults(report)
                        ],
                    }
                ],
                "originalUriBaseIds": {
                    "%SRCROOT%": {"description": {"text": "The folder in which the audit ran."}}
                },
                "columnKind": "unicodeCodePoints",
                "results": results,
                "properties": {"verdict": report.verdict},
            }
        ],
    }
    return json.dumps(log, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _rule(name: str, rule: Rule) -> dict[str, Any]:
    return {
        "id": name,
        "name": rule.name,
        "shortDescription": {"text": rule.short},
        "fullDescription": {"text": rule.help},
        "help": {"text": rule.help},
        "properties": {"tags": ["numerics", "batchnorm"]},
    }


def _result(report: Report, finding: Finding, neighbours: Neighbours) -> dict[str, Any]:
    worst, case = finding.worst, finding.case
    rule = _rule_of(finding)
    lines = [f"{worst.status} {worst.backend} {case.scenario} {label(case)}", *evidence(worst)]
    lines += [line for line in (worst.cause, worst.waiver) if line]
    lines += neighbours.comparisons(worst)
    if len(finding.results) > 1:
        lines.append(f"the worst of {count(len(finding.results), 'case')}")
    identity = (case.scenario, worst.backend, worst.environment, case.memory_format)
    name, quantity = worst_quantity(worst)
    made = _located(
        rule,
        "warning" if worst.status == "warn" and not fails(report, worst) else "error",
        lines,
        place(report, worst.backend, case),
        (*identity, worst.status),
    )
    made["properties"] = {
        "finding": finding.number,
        "backend": worst.backend,
        "case": worst.case,
        "status": worst.status,
        "kernel": worst.kernel,
        "quantity": name or None,
        "measured": None if quantity is None else quantity.model_dump(mode="json"),
    }
    if worst.accepted is not None:
        made["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": worst.accepted}
        ]
    return made


def _rule_of(finding: Finding) -> str:
    worst = finding.worst
    if worst.status in DIED:
        return DEATH
    if worst.cause is not None and worst.cause[:5] in RULES:
        return worst.cause[:5]
    return CONTRACT if (worst.reason or "").startswith("contract: ") else UNEXPLAINED


def _broken_checks(report: Report) -> list[ConsistencyRecord]:
    """Of each backend, check and scenario the first that does not hold."""
    scenarios = {case.id: case.scenario for case in report.cases}
    first: dict[tuple[str, ...], ConsistencyRecord] = {}
    for record in report.consistency:
        if record.ok is False:
            first.setdefault((record.backend, record.check, scenarios[record.case]), record)
    return list(first.values())


def _inconsistent(report: Report, record: ConsistencyRecord) -> dict[str, Any]:
    case = next(case for case in report.cases if case.id == record.case)
    where = place(report, record.backend, case)
    rule = "BN008" if record.check in NOT_REPRODUCIBLE_CHECKS else DEPENDS
    lines = [
        f"{record.check} {record.backend} {case.scenario} {label(case)}",
        record.reason or "no reason given",
    ]
    identity = (case.scenario, record.backend, record.check)
    return _located(DEATH if record.died else rule, "error", lines, where, identity)


def _located(
    rule: str, level: str, lines: list[str], where: Place, identity: tuple[str, ...]
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([rule, *identity]).encode()).hexdigest()
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": level,
        "message": {"text": _message("\n".join(lines))},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": _artifact(where.file),
                    "region": {"startLine": max(where.line, 1)},
                }
            }
        ],
        "partialFingerprints": {"bnauditFinding/v1": digest},
    }


def _artifact(file: str) -> dict[str, str]:
    path = PurePath(file)
    if path.is_absolute():
        return {"uri": f"file://{quote(path.as_posix())}"}
    return {"uri": quote(path.as_posix()), "uriBaseId": "%SRCROOT%"}


def _message(text: str) -> str:
    """Plain text in which nothing is taken for a link."""
    return text.replace("](", "] (")


def _faults(report: Report) -> Iterator[str]:
    for control in report.controls:
        if not control.ok:
            yield (
                f"{control.backend} must {control.expected} in {control.scenario}: "
                f"{control.observed}; nothing here can be trusted"
            )
    for name, why in report.missing.items():
        yield f"{name} was asked for and is unavailable: {why}"
    for check in report.unmade:
        yield f"{check} was asked for and made in no case"
    if report.verdict in ("interrupted", "nothing-gated"):
        yield report.verdict
