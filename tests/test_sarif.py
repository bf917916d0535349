"""SARIF: valid by the standard's schema whatever the report says; stable rules and fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from dangerous import TEXTS, hostile
from standins import facts, report, result, scenarios, typical

from bnaudit.consistency import Consistency
from bnaudit.render.sarif import RULES, sarif
from bnaudit.report import Report, SourcePlace
from bnaudit.verdict import CAUSES

SCHEMA = json.loads((Path(__file__).parent / "data" / "sarif-schema-2.1.0.json").read_text())
VALIDATOR = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
CASE = scenarios()[0].cases[0]


def read(made: Report) -> dict[str, Any]:
    """The only run, after an independent reader has found the log valid."""
    log = json.loads(sarif(made))
    VALIDATOR.validate(log)
    (run,) = log["runs"]
    assert isinstance(run, dict)
    for found in run["results"]:
        assert run["tool"]["driver"]["rules"][found["ruleIndex"]]["id"] == found["ruleId"]
    return run


def test_the_schema_refuses_what_is_no_sarif() -> None:
    log = json.loads(sarif(report()))
    log["runs"][0]["results"][0]["level"] = "grave"
    assert not VALIDATOR.is_valid(log)


def test_gated_findings_are_results_and_specimens_are_not() -> None:
    run = read(report())
    (found,) = run["results"]
    assert found["ruleId"] == "BN003"
    assert found["level"] == "error"
    assert "y[0,17,0,0] = -0.467, should be 0" in found["message"]["text"]
    assert found["properties"]["measured"]["worst"]["value_hex"] == (-0.467).hex()


def test_every_cause_is_a_rule_with_help() -> None:
    assert set(CAUSES) < set(RULES)
    rules = read(report())["tool"]["driver"]["rules"]
    assert all(len(rule["help"]["text"]) > 40 for rule in rules)
    assert len({rule["name"] for rule in rules}) == len(rules)


@pytest.mark.parametrize(
    ("status", "reason", "cause", "rule"),
    [
        ("fail", "y: off", "BN001 constant channel", "BN001"),
        ("fail", "y: off", None, "BN000"),
        ("fail", "contract: y has the wrong shape", None, "BN010"),
        ("crash", "died", None, "BN009"),
        ("timeout", "60 s", None, "BN009"),
        ("warn", "again", "BN008 not reproducible", "BN008"),
    ],
)
def test_a_finding_has_the_rule_of_its_cause(
    status: str, reason: str, cause: str | None, rule: str
) -> None:
    made = report(facts(CASE), result(CASE, status=status, reason=reason, cause=cause))
    (found,) = read(made)["results"]
    assert found["ruleId"] == rule
    assert found["level"] == ("warning" if status == "warn" else "error")


def location(made: Report) -> dict[str, Any]:
    where = read(made)["results"][0]["locations"][0]["physicalLocation"]
    return {**where["artifactLocation"], **where["region"]}


def test_a_finding_stands_at_the_scenario_or_at_the_plugin() -> None:
    made = report()
    cases = [case.model_copy(update={"file": "my scenarios/a.yaml"}) for case in made.cases]
    made = made.model_copy(update={"cases": cases})
    assert location(made) == {
        "uri": "my%20scenarios/a.yaml",
        "uriBaseId": "%SRCROOT%",
        "startLine": made.cases[0].line,
    }
    places = {"torch@cpu": SourcePlace(file="src/bn.py", line=12)}
    plugin = made.model_copy(update={"places": places})
    assert location(plugin) == {"uri": "src/bn.py", "uriBaseId": "%SRCROOT%", "startLine": 12}
    outside = {"torch@cpu": SourcePlace(file="/else/bn.py", line=1)}
    assert location(made.model_copy(update={"places": outside}))["uri"] == "file:///else/bn.py"


def fingerprints(made: Report) -> list[str]:
    return [found["partialFingerprints"]["bnauditFinding/v1"] for found in read(made)["results"]]


def test_fingerprints_survive_other_numbers_and_findings_and_tell_findings_apart() -> None:
    cases = scenarios()[0].cases
    one = report(facts(cases[1]), result(cases[1], status="fail"))
    more = report(
        facts(cases[0]),
        result(cases[0], status="crash"),
        facts(cases[1]),
        result(cases[1], status="fail", reason="another", seconds=9.0),
    )
    assert fingerprints(one)[0] in fingerprints(more)
    assert len(set(fingerprints(more))) == 2


def test_what_a_baseline_accepts_is_suppressed_with_the_reason() -> None:
    made = report(facts(CASE), result(CASE, status="fail"))
    known = made.results[0].model_copy(update={"accepted": "since 2016"})
    (found,) = read(made.model_copy(update={"results": [known]}))["results"]
    assert found["suppressions"][0]["justification"] == "since 2016"


def test_a_check_that_does_not_hold_is_a_result() -> None:
    checks = [
        Consistency(CASE, "torch@cpu", name, False, "why") for name in ("threads", "channels")
    ]
    made = report(facts(CASE), result(CASE), *checks)
    assert [found["ruleId"] for found in read(made)["results"]] == ["BN008", "BN011"]


def test_what_is_wrong_with_the_audit_itself_is_a_notification() -> None:
    made = report(*typical())
    bad = made.controls[0].model_copy(update={"ok": False})
    made = made.model_copy(update={"controls": [bad], "exit_code": 4, "verdict": "untrusted"})
    (invocation,) = read(made)["invocations"]
    assert invocation["executionSuccessful"] is False
    assert "must fail" in invocation["toolExecutionNotifications"][0]["message"]["text"]


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_text_stays_text(text: str) -> None:
    run = read(hostile(text))
    texts = [found["message"]["text"] for found in run["results"]]
    assert not any("](" in message for message in texts)
    if "](" not in text:
        assert all(text in message for message in texts)
