"""Report → JUnit XML, as GitHub, GitLab and Jenkins read it.

A suite for each backend with a test for each of its cases, one for what the audit says of itself. A deviation
is a failure, a crash or a timeout an error. What does not make the report red is skipped, with the reason:
what did not run, what a baseline accepts, and specimens that deviate. Elements and
attributes are valid by Jenkins' schema and those that Ant's asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from bnaudit.findings import fails
from bnaudit.render.evidence import Neighbours, evidence
from bnaudit.report import CaseRecord, Environment, Report, ResultRecord
from bnaudit.verdict import DIED, FAILED, RAN

AUDIT = "audit"
"""The suite of what the audit says of itself."""


class _Test(NamedTuple):
    """One test. kind: failure, error, skipped, or None where it passed."""

    suite: str
    group: str
    name: str
    seconds: float
    kind: str | None = None
    type: str = ""
    message: str = ""
    text: str = ""
    remark: str = ""


def junit(report: Report) -> str:
    """The report as a document of JUnit XML."""
    suites: dict[str, list[_Test]] = {}
    for test in (*_results(report), *_consistency(report), *_audit(report)):
        suites.setdefault(test.suite, []).append(test)
    environments = {result.backend: result.environment for result in report.results}
    places = {environment.name: environment for environment in report.environments}
    root = ElementTree.Element("testsuites")
    for number, (name, tests) in enumerate(suites.items()):
        place = places.get(environments.get(name, ""))
        root.append(_suite(report, number, name, tests, place))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, "unicode")}\n'


def _results(report: Report) -> Iterator[_Test]:
    cases = {case.id: case for case in report.cases}
    neighbours = Neighbours(report)
    for result in report.results:
        yield _test(report, result, cases[result.case], neighbours)


def _test(report: Report, result: ResultRecord, case: CaseRecord, neighbours: Neighbours) -> _Test:
    test = _Test(
        suite=result.backend,
        group=f"{result.backend}.{case.scenario}",
        name=result.case,
        seconds=result.seconds or 0.0,
    )
    lines = list(evidence(result))
    reason = result.reason or (lines[0] if lines else result.status)
    if result.status not in RAN:
        return test._replace(kind="skipped", message=f"{result.status}: {reason}")
    if result.accepted is not None:
        return test._replace(
            kind="skipped", message=f"{result.status}, accepted: {result.accepted}", text=reason
        )
    if fails(report, result):
        lines += [line for line in (result.cause, result.waiver, result.detail) if line]
        lines += [*neighbours.comparisons(result), f"{case.file}:{case.line}"]
        return test._replace(
            kind="error" if result.status in DIED else "failure",
            type=result.cause or result.status,
            message=lines[0],
            text="\n".join(lines),
        )
    if result.status in FAILED:  # of a specimen
        return test._replace(kind="skipped", message=f"not gated: {result.status}: {reason}")
    return test._replace(remark=reason if result.status == "warn" else "")


def _consistency(report: Report) -> Iterator[_Test]:
    cases = {case.id: case for case in report.cases}
    for record in report.consistency:
        test = _Test(
            suite=record.backend,
            group=f"{record.backend}.{cases[record.case].scenario}",
            name=f"{record.check}: {record.case}",
            seconds=0.0,
        )
        reason = record.reason or "no reason given"
        if record.ok is None:
            yield test._replace(kind="skipped", message=f"not made: {reason}")
        elif record.ok:
            yield test
        else:
            yield test._replace(
                kind="error" if record.died else "failure",
                type=f"consistency {record.check}",
                message=reason,
                text="\n".join(filter(None, (reason, record.detail))),
            )


def _audit(report: Report) -> Iterator[_Test]:
    def test(name: str, message: str | None, kind: str = "error") -> _Test:
        known = _Test(AUDIT, f"bnaudit.{AUDIT}", name, 0.0)
        if message is None:
            return known
        return known._replace(kind=kind, type=kind, message=message, text=message)

    for control in report.controls:
        name = f"{control.backend} must {control.expected} in {control.scenario}"
        yield test(name, None if control.ok else control.observed, "failure")
    for name, why in report.missing.items():
        yield test(f"{name} is available", why)
    for check in report.unmade:
        yield test(f"{check} was checked", "asked for and made in no case")
    ended = report.verdict if report.verdict in ("interrupted", "nothing-gated") else None
    yield test("the audit is complete", ended)


def _suite(
    report: Report, number: int, name: str, tests: Sequence[_Test], place: Environment | None
) -> ElementTree.Element:
    kinds = [test.kind for test in tests]
    suite = ElementTree.Element(
        "testsuite",
        {
            "id": str(number),
            "name": _text(name),
            "package": "bnaudit",
            "timestamp": report.started[:19],
            "hostname": "localhost",
            "tests": str(len(tests)),
            "failures": str(kinds.count("failure")),
            "errors": str(kinds.count("error")),
            "skipped": str(kinds.count("skipped")),
            "time": f"{sum(test.seconds for test in tests):.3f}",
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(report, place):
        ElementTree.SubElement(properties, "property", name=key, value=_text(value))
    for test in tests:
        suite.append(_element(test))
    remarks = [f"{test.name}: {test.remark}" for test in tests if test.remark]
    ElementTree.SubElement(suite, "system-out").text = _text("\n".join(remarks))
    ElementTree.SubElement(suite, "system-err").text = ""
    return suite


def _element(test: _Test) -> ElementTree.Element:
    element = ElementTree.Element(
        "testcase",
        name=_text(test.name),
        classname=_text(test.group),
        time=f"{test.seconds:.3f}",
    )
    if test.kind is not None:
        attributes = {"message": _text(test.message)}
        if test.type:
            attributes["type"] = _text(test.type)
        ElementTree.SubElement(element, test.kind, attributes).text = _text(test.text)
    return element


def _properties(report: Report, place: Environment | None) -> Iterator[tuple[str, str]]:
    yield "bnaudit", report.bnaudit_version
    yield "command", report.command
    yield "verdict", report.verdict
    if place is not None:
        yield "environment", place.name
        yield "versions", place.summary()
        yield "platform", place.platform
        yield "instruction sets", place.cpu.isa or "unknown"
        yield "threads", str(place.threads)


def _text(text: str) -> str:
    """The text with those characters escaped that XML 1.0 cannot have."""
    return "".join(sign if _is_xml(ord(sign)) else f"\\x{ord(sign):02x}" for sign in text)


def _is_xml(code: int) -> bool:
    return (
        code in (0x9, 0xA, 0xD)
        or 0x20 <= code <= 0xD7FF
        or 0xE000 <= code <= 0xFFFD
        or 0x10000 <= code <= 0x10FFFF
    )
