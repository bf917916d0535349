"""JUnit XML: valid by Jenkins' schema whatever the report says, and red exactly where the report is."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import xmlschema
from dangerous import TEXTS, hostile
from standins import facts, report, result, scenarios

from bnaudit.audit import conclude
from bnaudit.render.junit import junit
from bnaudit.report import Report

SCHEMA = xmlschema.XMLSchema(str(Path(__file__).parent / "data" / "junit-10.xsd"))
CASE = scenarios()[0].cases[0]


def read(made: Report) -> ElementTree.Element:
    """The document, after an independent reader has found it valid."""
    text = junit(made)
    SCHEMA.validate(text)
    return ElementTree.fromstring(text)


def kinds(root: ElementTree.Element, suite: str) -> dict[str, str | None]:
    """What each test of a suite ended as: failure, error, skipped, or None."""
    tests = root.findall(f"testsuite[@name='{suite}']/testcase")
    return {test.get("name", ""): test[0].tag if len(test) else None for test in tests}


def of(status: str, backend: str = "torch@cpu", **changed: object) -> Report:
    made = report(facts(CASE), result(CASE, backend, status, reason="a reason"))
    record = made.results[0].model_copy(update=changed)
    return made.model_copy(update={"results": [record]})


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("pass", None),
        ("warn", None),
        ("fail", "failure"),
        ("crash", "error"),
        ("timeout", "error"),
        ("unsupported", "skipped"),
        ("unavailable", "skipped"),
    ],
)
def test_a_status_is_what_ci_calls_it(status: str, kind: str | None) -> None:
    assert kinds(read(of(status)), "torch@cpu") == {CASE.id: kind}


def test_every_result_is_there_once() -> None:
    made = report()
    root = read(made)
    for backend in {r.backend for r in made.results}:
        assert list(kinds(root, backend)) == [r.case for r in made.results if r.backend == backend]


@pytest.mark.parametrize("status", ["fail", "crash", "timeout", "unavailable"])
def test_what_is_skipped_says_why(status: str) -> None:
    (skipped,) = read(of(status, "exact@cpu")).iter("skipped")
    assert "a reason" in skipped.get("message", "")
    (skipped,) = read(of(status, accepted="we know")).iter("skipped")
    assert status in skipped.get("message", "")
    assert status == "unavailable" or "accepted: we know" in skipped.get("message", "")


def test_a_warning_fails_only_where_it_fails_the_run() -> None:
    made = of("warn")
    assert kinds(read(made), "torch@cpu") == {CASE.id: None}
    assert "a reason" in (read(made).findtext("testsuite[@name='torch@cpu']/system-out") or "")
    strict = made.model_copy(update={"fail_on": "warn"})
    assert kinds(read(strict), "torch@cpu") == {CASE.id: "failure"}


def test_a_failure_has_the_evidence() -> None:
    (failure,) = read(report()).iter("failure")
    assert failure.get("message", "").startswith("y[0,17,0,0] = -0.467, should be 0")
    assert failure.get("type") == "BN003 low-precision accumulation"
    assert "contiguous only warns" in (failure.text or "")


def test_what_the_audit_says_of_itself_is_a_suite() -> None:
    made = report()
    assert set(kinds(read(made), "audit").values()) == {None}
    bad = made.controls[0].model_copy(update={"ok": False})
    ended = {"controls": [bad], "missing": {"torch@cuda": "no GPU"}, "verdict": "interrupted"}
    assert [*kinds(read(made.model_copy(update=ended)), "audit").values()] == [
        "failure",
        "error",
        "error",
    ]


@pytest.mark.parametrize("fail_on", ["fail", "warn"])
def test_it_is_red_exactly_where_the_exit_code_is(fail_on: str) -> None:
    for status in ("pass", "warn", "fail", "crash", "timeout", "unsupported"):
        for accepted in (None, "known"):
            made = of(status, accepted=accepted)
            verdict, code = conclude(made.results, controls_ok=True, fail_on=fail_on)
            made = made.model_copy(update={"verdict": verdict, "fail_on": fail_on})
            root = read(made)
            red = [*root.iter("failure"), *root.iter("error")]
            assert bool(red) == (code != 0), (status, accepted)


def test_counts_are_those_of_the_tests() -> None:
    for suite in read(hostile("text")).iter("testsuite"):
        for count, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(count, "")) == len(suite.findall(f"testcase/{kind}"))
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_text_stays_text(text: str) -> None:
    made = hostile(text)
    root = read(made)
    known = {element.tag for element in read(report()).iter()} | {"error"}
    assert {element.tag for element in root.iter()} <= known
    assert all(e.get("type") for tag in ("error", "failure") for e in root.iter(tag))
    if all(sign.isprintable() for sign in text):
        messages = [e.get("message") for e in root.iter("error")]
        assert not text or text in messages
