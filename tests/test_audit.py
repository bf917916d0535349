"""The audit's loop, its controls and its exit codes, on subjects that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from correct import outputs

from bnaudit import audit, inputs
from bnaudit.audit import CaseFacts, ControlOutcome, Result, Selected, conclude, unmade
from bnaudit.inputs import Inputs
from bnaudit.reference import Declarations
from bnaudit.scenario import Case, Scenario, load
from bnaudit.subject import Reply

SCENARIO = """
name: {name}
description: Two cases.
input: {{distribution: normal, mean: [0, 5]}}
shape: [2, 3, 4]
"""


class Subject:
    """Answers with the right outputs, changed by `behave`."""

    name = "current"

    def __init__(self, behave: Callable[[str, Case, dict[str, Any]], Any] | None = None) -> None:
        self.behave = behave or (lambda backend, case, right: None)
        self.calls: list[tuple[str, str]] = []
        self.unavailable: dict[str, str] = {}

    def environment_of(self, backend: str) -> str:
        return self.name

    def describe(self, backends: Sequence[str]) -> dict[str, str | None]:
        return {name: self.unavailable.get(name) for name in backends}

    def run(self, backend: str, case: Case, inputs: Inputs) -> Any:
        self.calls.append((backend, case.id))
        right = outputs(case, inputs)
        reply = self.behave(backend, case, right)
        return reply or replying("done", outputs=right)


def replying(outcome: str, **known: Any) -> Any:
    fields: dict[str, Any] = {
        "reason": None,
        "detail": None,
        "outputs": {},
        "kernel": None,
        "seconds": 0.0,
        "declarations": Declarations(),
        **known,
    }
    return Reply(outcome=outcome, **fields)


def scenarios(folder: Path, *texts: str) -> list[Scenario]:
    path = folder / "scenarios.yaml"
    path.write_text("\n---\n".join(texts))
    return load([str(path)])


def run(
    folder: Path,
    loaded: list[Scenario],
    selection: list[Selected],
    subject: Subject,
    **options: Any,
) -> tuple[list[CaseFacts], list[Result], list[ControlOutcome]]:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    events = list(audit.run(loaded, selection, subject, scratch, **options))  # type: ignore[arg-type]
    assert list(scratch.iterdir()) == []

    def of(kind: type) -> list[Any]:
        return [event for event in events if isinstance(event, kind)]

    return of(CaseFacts), of(Result), of(ControlOutcome)


GATED = [Selected("torch@cpu", gated=True)]


def test_every_case_meets_every_backend(tmp_path: Path) -> None:
    loaded = scenarios(tmp_path, SCENARIO.format(name="a"))
    selection = [*GATED, Selected("welford@cpu", gated=False)]
    facts, results, controls = run(tmp_path, loaded, selection, Subject())
    assert [f.n for f in facts] == [8, 8]
    assert [(r.case.id, r.backend) for r in results] == [
        (case.id, backend.name) for case in loaded[0].cases for backend in selection
    ]
    assert {r.status for r in results} == {"pass"}
    assert controls == []


def test_identical_cases_of_two_scenarios_run_once_and_are_reported_twice(tmp_path: Path) -> None:
    loaded = scenarios(tmp_path, SCENARIO.format(name="a"), SCENARIO.format(name="b"))
    subject = Subject()
    _, results, _ = run(tmp_path, loaded, GATED, subject)
    assert len(results) == 4
    assert len(subject.calls) == 2


@pytest.mark.parametrize("outcome", ["crash", "timeout", "unsupported"])
def test_an_outcome_that_is_no_result_costs_only_its_own_row(tmp_path: Path, outcome: str) -> None:
    loaded = scenarios(tmp_path, SCENARIO.format(name="a"))

    def behave(backend: str, case: Case, right: dict[str, Any]) -> Any:
        return replying(outcome, reason="why") if "mean=0" in case.id else None

    _, results, _ = run(tmp_path, loaded, GATED, Subject(behave))
    assert [(r.status, r.reason) for r in results] == [(outcome, "why"), ("pass", None)]


def test_a_breach_of_the_contract_is_a_failure(tmp_path: Path) -> None:
    loaded = scenarios(tmp_path, SCENARIO.format(name="a"))
    subject = Subject(lambda backend, case, right: replying("contract", reason="no y"))
    _, results, _ = run(tmp_path, loaded, GATED, subject)
    assert {(r.status, r.reason) for r in results} == {("fail", "contract: no y")}


def test_a_result_that_is_not_repeatable_is_a_warn_that_says_so(tmp_path: Path) -> None:
    def behave(backend: str, case: Case, right: dict[str, Any]) -> Any:
        if "mean=5" in case.id:
            return replying("done", outputs=right, not_repeatable="y[0] was 1.0, then 2.0")
        return None

    loaded = scenarios(tmp_path, SCENARIO.format(name="a"))
    _, results, _ = run(tmp_path, loaded, GATED, Subject(behave))
    assert [(r.status, r.cause) for r in results] == [
        ("pass", None),
        ("warn", "BN008 not reproducible"),
    ]
    assert results[1].reason == "not repeatable: y[0] was 1.0, then 2.0"


def test_controls_run_with_their_scenario_and_answer_for_it(tmp_path: Path) -> None:
    text = (
        SCENARIO.format(name="a") + "controls: {must_fail: [one-pass@cpu], must_pass: [exact@cpu]}"
    )
    loaded = scenarios(tmp_path, text)

    def behave(backend: str, case: Case, right: dict[str, Any]) -> None:
        if backend == "one-pass@cpu" and "mean=5" in case.id:
            right["y"] += np.float32(1)

    _, results, controls = run(tmp_path, loaded, GATED, Subject(behave))
    assert [r.gated for r in results] == [True, False, False] * 2
    assert [(c.backend, c.expected, c.ok) for c in controls] == [
        ("one-pass@cpu", "fail", True),
        ("exact@cpu", "pass", True),
    ]
    _, _, controls = run(tmp_path, loaded, GATED, Subject())
    assert [c.ok for c in controls] == [False, True]


def test_a_crash_is_no_expected_failure(tmp_path: Path) -> None:
    text = (
        SCENARIO.format(name="a") + "controls: {must_fail: [one-pass@cpu], must_pass: [exact@cpu]}"
    )

    def behave(backend: str, case: Case, right: dict[str, Any]) -> Any:
        return None if backend == "torch@cpu" else replying("crash", reason="died")

    _, _, controls = run(tmp_path, scenarios(tmp_path, text), GATED, Subject(behave))
    assert [c.ok for c in controls] == [False, False]


def test_a_filtered_scenario_proves_nothing_about_its_controls(tmp_path: Path) -> None:
    text = SCENARIO.format(name="a") + "controls: {must_fail: [one-pass@cpu]}"
    _, results, controls = run(
        tmp_path,
        scenarios(tmp_path, text),
        GATED,
        Subject(),
        matches=lambda case, backend: "mean=5" in case,
    )
    assert {r.case.id for r in results} == {"a/mean=5"}
    assert controls == []


def test_a_control_runs_also_where_the_filter_leaves_its_backend_out(tmp_path: Path) -> None:
    text = SCENARIO.format(name="a") + "controls: {must_pass: [exact@cpu, welford@cpu]}"
    selection = [*GATED, Selected("welford@cpu", gated=True)]
    _, results, controls = run(
        tmp_path,
        scenarios(tmp_path, text),
        selection,
        Subject(),
        matches=lambda case, backend: "torch" in backend,
    )
    assert [c.ok for c in controls] == [True, True]
    assert {r.backend: r.gated for r in results} == {
        "torch@cpu": True,
        "welford@cpu": False,
        "exact@cpu": False,
    }


def test_inputs_that_cannot_be_made_cost_only_their_own_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = inputs.make

    def full(case: Case, folder: Path) -> Inputs:
        if "mean=0" in case.id:
            raise OSError(28, "No space left on device")
        return made(case, folder)

    monkeypatch.setattr(audit, "make", full)
    _, results, _ = run(tmp_path, scenarios(tmp_path, SCENARIO.format(name="a")), GATED, Subject())
    assert [r.status for r in results] == ["unsupported", "pass"]
    assert "No space left" in (results[0].reason or "")


def test_stop_early_ends_after_the_first_gated_failure(tmp_path: Path) -> None:
    def behave(backend: str, case: Case, right: dict[str, Any]) -> None:
        right["y"] += np.float32(1)

    loaded = scenarios(tmp_path, SCENARIO.format(name="a"))
    selection = [Selected("welford@cpu", gated=False), *GATED, Selected("exact@cpu", gated=True)]
    _, results, _ = run(tmp_path, loaded, selection, Subject(behave), stop_early=True)
    assert [r.backend for r in results] == ["welford@cpu", "torch@cpu"]


def test_a_case_that_may_not_fit_into_memory_is_unsupported_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = audit.available_memory()
    assert available is None or 2**20 < available < 2**50
    monkeypatch.setattr(audit, "available_memory", lambda: 2**31)
    huge = SCENARIO.format(name="a").replace("[2, 3, 4]", "[2, 3, 100000000]")
    facts, results, _ = run(tmp_path, scenarios(tmp_path, huge), GATED, Subject())
    assert {r.status for r in results} == {"unsupported"}
    assert results[0].reason == "may need 20 GiB of memory, and 2 GiB are available"
    assert {f.input_sha256 for f in facts} == {None}


def test_a_case_that_cannot_be_laid_out_is_unsupported_everywhere(tmp_path: Path) -> None:
    text = SCENARIO.format(name="a") + "memory_format: channels_last\n"
    facts, results, _ = run(tmp_path, scenarios(tmp_path, text), GATED, Subject())
    assert {r.status for r in results} == {"unsupported"}
    assert all(r.reason for r in results)
    assert {f.input_sha256 for f in facts} == {None}


def result(status: str, *, gated: bool = True, backend: str = "torch@cpu") -> Result:
    return Result(SimpleNamespace(id="case"), backend, "current", status, gated)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statuses", "options", "verdict", "code"),
    [
        (["pass", "unsupported"], {}, "pass", 0),
        (["pass", "warn"], {}, "warn", 0),
        (["pass", "warn"], {"fail_on": "warn"}, "fail", 1),
        (["pass", "fail"], {}, "fail", 1),
        (["pass", "fail"], {"fail_on": "never"}, "fail", 0),
        (["fail", "crash"], {}, "incomplete", 3),
        (["pass", "timeout"], {"fail_on": "never"}, "incomplete", 3),
        (["unavailable"], {"missing": ["torch@cpu"]}, "incomplete", 3),
        (["fail", "crash"], {"controls_ok": False}, "untrusted", 4),
        (["unsupported"], {}, "nothing-gated", 5),
        ([], {}, "nothing-gated", 5),
        (["pass"], {"controls_ok": False, "interrupted": True}, "interrupted", 130),
    ],
)
def test_exit_codes(statuses: list[str], options: dict[str, Any], verdict: str, code: int) -> None:
    found = conclude([result(s) for s in statuses], **{"controls_ok": True, **options})
    assert found == (verdict, code)


def test_specimens_alone_gate_nothing() -> None:
    found = conclude([result("fail", gated=False)], controls_ok=True)
    assert found == ("nothing-gated", 5)


def test_an_unavailable_backend_nobody_asked_for_is_no_fault() -> None:
    results = [result("pass"), result("unavailable", backend="torch@cuda")]
    assert conclude(results, controls_ok=True) == ("pass", 0)


@pytest.mark.parametrize("status", ["fail", "crash", "timeout", "warn"])
@pytest.mark.parametrize("fail_on", ["fail", "warn"])
def test_what_a_baseline_accepts_is_no_worse_than_a_warning(status: str, fail_on: str) -> None:
    known = replace(result(status), accepted="known")
    assert conclude([known], controls_ok=True, fail_on=fail_on) == ("warn", 0)
    assert conclude([known, result("fail")], controls_ok=True, fail_on=fail_on) == ("fail", 1)


@pytest.mark.parametrize(
    ("checks", "asked", "verdict", "code"),
    [
        ([], [], "pass", 0),
        ([("repeat", True, False)], ["repeat"], "pass", 0),
        ([("repeat", False, False)], ["repeat"], "fail", 1),
        ([("repeat", False, True)], [], "incomplete", 3),
        ([("repeat", None, False)], [], "pass", 0),
        ([("repeat", None, False)], ["repeat"], "incomplete", 3),
        ([("repeat", True, False), ("repeat", None, False)], ["repeat"], "pass", 0),
        ([], ["backends"], "incomplete", 3),
    ],
)
def test_checks_of_consistency_decide_on_the_exit_code(
    checks: list[tuple[str, bool | None, bool]], asked: list[str], verdict: str, code: int
) -> None:
    case = Any
    made = [SimpleNamespace(check=check, ok=ok, died=died) for check, ok, died in checks]
    results = [Result(case, "torch@cpu", "current", "pass", gated=True)]  # type: ignore[arg-type]
    found = conclude(results, controls_ok=True, checks=made, unmade=unmade(made, asked))
    assert found == (verdict, code)


def test_stop_early_ends_after_a_check_that_does_not_hold(tmp_path: Path) -> None:
    def behave(backend: str, case: Case, right: dict[str, Any]) -> None:
        right["y"] += np.float32(1e-6) * len(subject.calls)

    subject = Subject(behave)
    loaded = scenarios(tmp_path, SCENARIO.format(name="a"))
    options = {"stop_early": True, "checks": frozenset({"repeat"})}
    facts, results, _ = run(tmp_path, loaded, GATED, subject, **options)
    assert len(facts) == len(results) == 1
