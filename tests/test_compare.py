"""What changed between two reports: which pairs are made, what a regression is, and how it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from rich.console import Console
from standins import ENVIRONMENT, facts, judged, report, result, scenarios, typical, wrong

from bnaudit import __version__
from bnaudit.audit import CaseFacts, ControlOutcome, Result
from bnaudit.cli import main
from bnaudit.compare import Change, Comparison, ComparisonError, compare, json_schema
from bnaudit.consistency import Consistency
from bnaudit.measure import Worst
from bnaudit.render.comparison import FEW, comparison, markdown
from bnaudit.report import Report
from bnaudit.writer import Writer

CONSTANT, OFFSET = scenarios()
CASE = CONSTANT.cases[0]
SCHEMA = Draft202012Validator(json_schema())


def single(status: str = "pass", backend: str = "torch@cpu", **changed: Any) -> Report:
    """A report of one result of one case."""
    return report(facts(CASE), result(CASE, backend, status, **changed))


def of(**quantities: Any) -> Report:
    """A report of one result with these quantities; its status is that of the worst."""
    order = ("pass", "warn", "fail")
    status = max((judged.status for judged in quantities.values()), key=order.index)
    return single(status, quantities=quantities)


def only(found: Comparison) -> Change:
    """The one change; the comparison is valid by its schema."""
    SCHEMA.validate(json.loads(found.model_dump_json()))
    assert len(found.changes) == 1
    return found.changes[0]


def kind(old: Report, new: Report, **options: Any) -> tuple[str, bool]:
    change = only(compare(old, new, **options))
    return change.kind, change.regression


def shown(found: Comparison, new: Report, width: int = 80) -> str:
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        for part in comparison(found, {case.id: case for case in new.cases}):
            console.print(part)
    return capture.get()


# --- what a change is ------------------------------------------------------------------------------


def test_a_report_compared_with_itself_is_empty_and_passes() -> None:
    same = report()
    found = compare(same, same)
    assert not found.changes
    assert not found.caveats
    assert not found.notes
    assert found.compared == found.unchanged > 0
    assert (found.verdict, found.exit_code) == ("same", 0)


def test_numbers_that_are_nan_equal_themselves() -> None:
    worst = Worst((0, 0, 0, 0), math.nan, 1.0)
    broken = of(y=judged("fail", label="broken", nonfinite=3, bound_ratio=math.nan, worst=worst))
    assert not compare(broken, broken).changes


@pytest.mark.parametrize(
    ("before", "after", "expected", "regression"),
    [
        ("pass", "warn", "regressed", True),
        ("pass", "fail", "newly failing", True),
        ("warn", "fail", "newly failing", True),
        ("pass", "crash", "newly failing", True),
        ("fail", "crash", "regressed", True),
        ("timeout", "crash", "regressed", True),
        ("crash", "timeout", "improved", False),
        ("crash", "pass", "newly passing", False),
        ("fail", "pass", "newly passing", False),
        ("warn", "pass", "improved", False),
        ("pass", "unsupported", "newly unsupported", True),
        ("warn", "unavailable", "newly unavailable", True),
        ("fail", "unsupported", "newly unsupported", False),
        ("crash", "unavailable", "newly unavailable", False),
        ("unavailable", "fail", "newly running", False),
        ("unsupported", "pass", "newly running", False),
    ],
)
def test_a_worse_status_is_a_regression(
    before: str, after: str, expected: str, regression: bool
) -> None:
    errors = {"pass": 0.1, "warn": 0.2, "fail": 2.0}

    def made(status: str) -> Report:
        measured = {"y": judged(status, bound_ratio=errors[status])} if status in errors else {}
        return single(status, quantities=measured)

    found = compare(made(before), made(after))
    assert (only(found).kind, only(found).regression) == (expected, regression)
    assert (found.exit_code == 1) == (found.verdict == "regression") == regression


@pytest.mark.parametrize("status", ["crash", "timeout", "unsupported", "unavailable"])
def test_the_same_status_without_numbers_is_no_change(status: str) -> None:
    assert not compare(single(status), single(status, reason="in other words")).changes


@pytest.mark.parametrize(
    ("growth", "tight", "expected"),
    [
        (4.0, 1.01, "regressed"),
        (3.9, 1.01, "changed within bounds"),
        (4.0, 1.0, "changed within bounds"),
        (4.0, math.nan, "regressed"),
    ],
)
def test_growth_is_a_regression_from_the_factor_on_where_the_tight_bound_is_left(
    growth: float, tight: float, expected: str
) -> None:
    old = of(y=judged("warn", bound_ratio=0.1, tight_ratio=0.3))
    new = of(y=judged("warn", bound_ratio=0.1 * growth, tight_ratio=tight))
    assert kind(old, new)[0] == expected


def test_the_factor_can_be_chosen() -> None:
    old = of(y=judged("warn", bound_ratio=0.1, tight_ratio=2))
    new = of(y=judged("warn", bound_ratio=0.2, tight_ratio=4))
    assert kind(old, new, factor=2) == ("regressed", True)
    assert kind(old, new, factor=2.1) == ("changed within bounds", False)
    assert kind(new, old, factor=2) == ("improved", False)


@pytest.mark.parametrize(("ratio", "regression"), [(0.99, False), (1.01, True)])
def test_without_a_tight_bound_the_other_one_decides(ratio: float, regression: bool) -> None:
    old = of(batch_var=judged("fail", bound_ratio=0.1, tight_ratio=None))
    new = of(batch_var=judged("fail", bound_ratio=ratio, tight_ratio=None))
    assert kind(old, new)[1] == regression


@pytest.mark.parametrize(("floor", "regression"), [(2e-4, False), (1e-4, False), (9e-5, True)])
def test_what_rounding_the_mean_alone_costs_is_no_regression(
    floor: float, regression: bool
) -> None:
    old = of(y=judged(bound_ratio=0.01, max_abs_error=1e-6))
    noise = {"bound_ratio": 0.5, "tight_ratio": 9, "max_abs_error": 1e-4, "floor": floor}
    assert kind(old, of(y=judged("warn", **noise)))[1] == regression


def test_values_that_are_not_finite_are_never_noise() -> None:
    new = of(y=judged("fail", label="broken", nonfinite=1, max_abs_error=None, floor=1.0))
    assert kind(of(y=judged()), new) == ("newly failing", True)


def test_one_worse_quantity_outweighs_a_better_one() -> None:
    old = of(y=judged("fail", bound_ratio=9), batch_var=judged("pass", bound_ratio=0.1))
    new = of(y=judged("pass", bound_ratio=0.1), batch_var=judged("fail", bound_ratio=9))
    change = only(compare(old, new))
    assert (change.kind, change.regression) == ("regressed", True)  # it failed before, elsewhere
    assert [q.name for q in change.quantities] == ["batch_var", "y"]
    assert [q.kind for q in change.quantities] == ["newly failing", "newly passing"]


def test_a_stricter_threshold_alone_is_no_regression() -> None:
    found = compare(of(y=judged("pass")), of(y=judged("fail")))
    assert not found.changes
    assert "only the scenario's thresholds differ" in found.notes[0]
    better = of(y=judged("fail", bound_ratio=0.01, max_abs_error=1e-8, max_ulp_error=0.1))
    assert kind(of(y=judged("pass")), better)[1] is False


def test_identical_statistics_are_told_apart_from_statistics_that_changed() -> None:
    old = of(y=judged(), batch_mean=judged(), batch_var=judged())
    new_y = judged("fail", bound_ratio=2)
    assert only(
        compare(old, of(y=new_y, batch_mean=judged(), batch_var=judged()))
    ).statistics_identical
    moved = of(y=new_y, batch_mean=judged(), batch_var=judged(max_ulp_error=0.6))
    assert not only(compare(old, moved)).statistics_identical
    assert not only(compare(of(y=judged()), of(y=new_y))).statistics_identical


def test_results_that_stop_repeating_are_a_regression() -> None:
    unsteady = single(
        "warn",
        quantities={"y": judged("pass")},
        reason="not repeatable: y[0,0,0,0] was 1, then 2",
        cause="BN008 not reproducible",
    )
    assert kind(single(), unsteady) == ("regressed", True)
    assert kind(unsteady, single()) == ("improved", False)


# --- semantics -------------------------------------------------------------------------------------

BN006 = "BN006 running-statistics semantics"


def test_a_running_statistic_alone_that_fails_is_a_change_of_semantics() -> None:
    sound = {"y": judged(), "batch_mean": judged(), "batch_var": judged()}
    biased = judged("fail", bound_ratio=22, max_abs_error=1e-3)
    old = single(quantities={**sound, "running_var": judged()})
    new = single("fail", quantities={**sound, "running_var": biased}, cause=BN006)
    assert kind(old, new) == ("semantics changed", True)
    assert kind(new, old) == ("semantics changed", False)
    worse = {**sound, "batch_var": judged("warn", bound_ratio=0.9)}
    both = single("fail", quantities={**worse, "running_var": biased}, cause=BN006)
    assert kind(old, both) == ("newly failing", True)


def test_an_output_that_moved_as_well_is_no_change_of_semantics_alone() -> None:
    sound, off = judged(), judged("fail", bound_ratio=9, max_abs_error=1.0)
    old = single("fail", quantities={"y": off, "batch_mean": sound, "running_var": sound})
    new = {"y": sound, "batch_mean": sound, "running_var": off}
    assert kind(old, single("fail", quantities=new, cause=BN006)) == ("regressed", True)


def test_without_batch_statistics_an_equal_output_shows_a_change_of_semantics() -> None:
    biased = judged("fail", bound_ratio=22, max_abs_error=1e-3)
    old = of(y=judged(), running_var=judged())
    assert kind(old, of(y=judged(), running_var=biased))[0] == "semantics changed"
    other = judged(max_ulp_error=0.6)
    assert kind(old, of(y=other, running_var=biased))[0] == "newly failing"


def test_a_declared_convention_that_moved_is_a_change_of_semantics_but_no_regression() -> None:
    old = of(running_var=judged(worst=Worst((3,), 1.25, 1.25)))
    new = of(running_var=judged(worst=Worst((3,), 1.2, 1.2)))
    assert kind(old, new) == ("semantics changed", False)
    elsewhere = of(running_var=judged(worst=Worst((4,), 1.2, 1.2)))
    assert kind(old, elsewhere) == ("changed within bounds", False)


# --- judgement by today's rules --------------------------------------------------------------------


def aged(made: Report) -> Report:
    return made.model_copy(update={"bnaudit_version": "0.0.1"})


def test_older_reports_are_judged_by_todays_rules_where_numbers_decide() -> None:
    lenient = aged(of(y=judged("pass", bound_ratio=2.0)))
    change = only(compare(lenient, of(y=judged("fail", bound_ratio=2.1))))
    assert (change.old_status, change.new_status) == ("fail", "fail")
    assert change.kind == "changed within bounds"
    tight = aged(of(y=judged("pass", tight_ratio=1.5)))
    assert only(compare(tight, of(y=judged("warn", tight_ratio=1.6)))).old_status == "warn"


def test_what_a_report_does_not_hold_keeps_its_older_judgement_and_that_is_said() -> None:
    harmful = wrong(0.5, bound_ratio=0.5)  # a constant's rule, of which a report has no number
    found = compare(aged(single("fail", quantities={"y": harmful})), single())
    assert only(found).old_status == "fail"
    assert any("judged by bnaudit 0.0.1" in note for note in found.notes)
    assert not compare(single(), single()).notes


# --- pairs -----------------------------------------------------------------------------------------


def test_cases_are_paired_by_key_whatever_they_are_called() -> None:
    renamed = CASE.model_copy(update={"id": "other/name", "scenario": "other"})
    new = report(facts(renamed), result(renamed, status="fail", quantities={"y": wrong(1.0)}))
    change = only(compare(single(), new))
    assert (change.old_case, change.case, change.scenario) == (CASE.id, "other/name", "other")


def test_of_several_cases_with_one_key_those_of_the_same_name_are_paired() -> None:
    twin = CASE.model_copy(update={"id": "a-twin", "scenario": "a-twin"})
    events: list[CaseFacts | Result] = [
        facts(CASE),
        result(CASE, status="fail", quantities={"y": wrong(1.0)}),
        facts(twin),
        result(twin),
    ]
    assert not compare(report(*events), report(*events[2:], *events[:2])).changes
    assert compare(report(*events), single("fail")).old.only_cases == ["a-twin"]


def test_other_inputs_are_an_error_of_the_case_and_not_a_change() -> None:
    other = report(
        facts(CASE, input_sha256="cd" * 32),
        result(CASE, status="fail"),
        facts(OFFSET.cases[0]),
        result(OFFSET.cases[0]),
    )
    old = report(facts(CASE), result(CASE), facts(OFFSET.cases[0]), result(OFFSET.cases[0]))
    found = compare(old, other)
    assert not found.changes
    assert [error.case for error in found.errors] == [CASE.id]
    assert (found.verdict, found.exit_code) == ("incomplete", 3)
    assert CASE.id in "".join(shown(found, other).replace("\n", "").split(" "))
    unmade = report(facts(CASE, input_sha256=None), result(CASE, status="unsupported"))
    assert compare(single(), unmade).changes[0].kind == "newly unsupported"


def test_what_only_one_report_has_is_listed() -> None:
    other = OFFSET.cases[0]
    new = report(facts(CASE), result(CASE), facts(other), result(other), result(CASE, "exact@cpu"))
    found = compare(single(), new)
    assert found.new.only_cases == [other.id]
    assert found.new.only_backends == ["exact@cpu"]
    assert not found.old.only_cases
    text = shown(found, new)
    assert "only in NEW: 1 case: large-offset/" in text
    assert "only in NEW: 1 backend: exact@cpu" in text


def test_reports_with_nothing_in_common_say_so() -> None:
    found = compare(single(), single(backend="exact@cpu"))
    assert (found.verdict, found.exit_code) == ("nothing-in-common", 5)
    absent = compare(single("unavailable"), single("unavailable"))
    assert (absent.verdict, absent.exit_code) == ("nothing-in-common", 5)


def test_backends_of_other_names_are_compared_on_request() -> None:
    old, new = single(), single("fail", "exact@cpu", quantities={"y": wrong(1.0)}, gated=True)
    for name in ("torch", "torch@cpu"):
        change = only(compare(old, new, renamed={name: "exact"}))
        assert (change.old_backend, change.backend) == ("torch@cpu", "exact@cpu")
    cuda = single(backend="torch@cuda")
    assert compare(cuda, new, renamed={"torch": "exact"}).compared == 1
    both = report(
        facts(CASE), result(CASE), result(CASE, "exact@cpu", "fail", quantities={"y": wrong(1.0)})
    )
    found = compare(both, both, renamed={"torch": "exact"})
    assert only(found).old_backend == "torch@cpu"
    assert found.compared == 1  # exact@cpu is taken, and no longer its own counterpart
    assert found.old.only_backends == ["exact@cpu"]


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ({"tensorflow": "torch"}, "OLD has no backend 'tensorflow'; it has torch@cpu, torch@cuda"),
        ({"torch@cpu": "jax"}, "NEW has no backend 'jax'"),
        ({"torch@gpu": "torch"}, "OLD has no backend 'torch@gpu'"),
    ],
)
def test_a_name_that_a_report_does_not_have_is_an_error(
    renamed: dict[str, str], message: str
) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare(report(), report(), renamed=renamed)


def with_environments(*pairs: tuple[str, str], **changed: Any) -> Report:
    """Results of torch@cpu: the environment of each, and its status."""
    writer = Writer(None, ["bnaudit", "run"])
    writer.add_case(facts(CASE))
    for name, status in pairs:
        writer.add_environment({**ENVIRONMENT, "name": name, **changed})
        writer.add_result(result(CASE, status=status, environment=name))
    return writer.finish("pass", 0)


def test_environments_matter_only_where_a_backend_ran_in_several() -> None:
    assert not compare(
        with_environments(("old", "pass")), with_environments(("new", "pass"))
    ).changes
    two = with_environments(("a", "pass"), ("b", "fail"))
    assert compare(two, two).compared == 2
    assert not compare(two, two).changes
    found = compare(two, with_environments(("b", "fail")))
    assert found.compared == 1
    assert found.old.only_backends == ["torch@cpu in a"]
    assert compare(two, with_environments(("c", "pass"))).verdict == "nothing-in-common"


def test_specimens_regress_without_failing_the_comparison() -> None:
    old = single(backend="gemm@cpu")
    new = single("fail", "gemm@cpu", quantities={"y": wrong(1.0)})
    found = compare(old, new)
    assert only(found).regression
    assert found.exit_code == 0
    assert compare(old, new, fail_on="change").exit_code == 0
    assert "(gemm@cpu)" in shown(found, new)
    assert "specimens" in shown(found, new)


@pytest.mark.parametrize(
    ("fail_on", "worse", "otherwise"), [("regression", 1, 0), ("change", 1, 1), ("never", 0, 0)]
)
def test_the_exit_code_follows_fail_on(fail_on: Any, worse: int, otherwise: int) -> None:
    regressed = single("fail", quantities={"y": wrong(1.0)})
    changed = of(y=judged(max_ulp_error=0.6))
    assert compare(single(), regressed, fail_on=fail_on).exit_code == worse
    assert compare(single(), changed, fail_on=fail_on).exit_code == otherwise
    for new, code in ((regressed, worse), (changed, otherwise)):
        usual = code == (new is regressed)
        text = shown(compare(single(), new, fail_on=fail_on), new)
        assert (f"(exit {code})" if usual else f"(exit {code}: --fail-on {fail_on})") in text
    assert compare(single(), single(), fail_on=fail_on).exit_code == 0


# --- caveats ---------------------------------------------------------------------------------------

GPU = {"name": "H100", "driver": "580", "cuda": "13.0", "cudnn": None}


@pytest.mark.parametrize(
    ("changed", "what", "before", "after"),
    [
        ({"threads": 4}, "threads", "2", "4"),
        (
            {"cpu": {"model": "A processor", "isa": "AVX512F"}},
            "instruction sets",
            "FMA3 AVX2",
            "AVX512F",
        ),
        (
            {"cpu": {"model": "Another", "isa": "FMA3 AVX2"}},
            "processor",
            "A processor",
            "Another",
        ),
        ({"devices": [GPU]}, "GPU", None, "H100 driver 580 cuda 13.0"),
        ({"flags": {"tf32": True}}, "flag tf32", "False", "True"),
        ({"packages": {"numpy": "2.4.6", "torch": "3.0"}}, "torch", "2.13.0+cpu", "3.0"),
        ({"packages": {"numpy": "2.4.6"}}, "torch", "2.13.0+cpu", None),
        ({"python": "3.12.0"}, "Python", "3.11.7", "3.12.0"),
    ],
)
def test_what_else_differs_stands_first(
    changed: dict[str, Any], what: str, before: str | None, after: str | None
) -> None:
    new = with_environments(("new", "pass"), **changed)
    found = compare(with_environments(("old", "pass")), new)
    assert [(c.what, c.old, c.new) for c in found.caveats] == [(what, before, after)]
    line = f"{what}: {before or 'none'} → {after or 'none'}"
    assert line in shown(found, new)
    assert f"- {line}" in markdown(found, {})


def test_an_older_bnaudit_an_interrupted_run_and_lost_quantities_are_told() -> None:
    old = report(
        facts(CASE), result(CASE, quantities={"y": judged(), "running_var": judged()})
    ).model_copy(update={"bnaudit_version": "0.0.1", "verdict": "interrupted"})
    found = compare(old, single())
    assert [(c.what, c.old, c.new) for c in found.caveats] == [("bnaudit", "0.0.1", __version__)]
    assert "OLD is from an interrupted run" in found.notes
    assert "torch@cpu no longer returns running_var (1 case)" in found.notes


# --- what is shown ---------------------------------------------------------------------------------


def worse() -> Report:
    """The typical report, in which torch@cpu fails where it passed, far from the mean."""
    events = [
        result(
            event.case, status="fail", quantities={"y": wrong(0.25)}, cause="BN003 low-precision"
        )
        if isinstance(event, Result)
        and event.backend == "torch@cpu"
        and event.case.scenario == "large-offset"
        else event
        for event in typical()
    ]
    return report(*events)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_every_case_of_a_regression_is_named(width: int) -> None:
    new = worse()
    found = compare(report(), new)
    text = shown(found, new, width)
    assert "newly failing 2" in text
    assert "large-offset, torch@cpu" in text
    for mean in ("10", "1e6"):
        assert f"  mean={mean} 4x8x16x16" in text
    assert "1e-7 → 0.25 σ" in text
    assert "pass → FAIL" in text
    last = "REGRESSION (exit 1): NEW is worse in 2 results of torch@cpu"
    assert " ".join(text.split()).endswith(last)
    assert max(map(len, text.splitlines())) <= width


def test_the_markdown_says_the_same_in_a_table() -> None:
    new = worse()
    text = markdown(compare(report(), new), {case.id: case for case in new.cases})
    assert text.startswith("## bnaudit compare: regression\n")
    rows = [line for line in text.splitlines() if line.startswith("| large-offset")]
    assert len(rows) == 2
    assert all(line.count("|") == 9 and "pass → FAIL" in line for line in rows)


def test_markdown_cannot_be_broken_by_names() -> None:
    old = single(backend="a|b<c>.py:f@cpu")
    new = single("crash", "a|b<c>.py:f@cpu", reason="line\nline | `more`")
    row = markdown(compare(old, new), {CASE.id: new.cases[0]}).splitlines()[-1]
    assert row.replace("\\|", "").count("|") == 9
    assert "a\\|b\\<c>.py" in row


def test_of_what_is_no_regression_only_a_few_are_shown() -> None:
    cases = [CASE.model_copy(update={"id": f"s/{i}", "seed": i}) for i in range(FEW + 3)]

    def made(quantity: Any) -> Report:
        events: list[CaseFacts | Result] = []
        for case in cases:
            status = quantity.status
            events += [facts(case), result(case, status=status, quantities={"y": quantity})]
        return report(*events)

    old, better = made(wrong(1.0)), made(judged())
    assert "and 3 more" in shown(compare(old, better), better)
    assert "more" not in shown(compare(better, old), old)


def test_the_worst_stand_first_and_specimens_last() -> None:
    cases = [CASE.model_copy(update={"id": f"s/{i}", "seed": i}) for i in range(4)]
    off = [wrong(1.0, bound_ratio=9), wrong(2.0, bound_ratio=99), judged(max_ulp_error=0.6)]

    def made(*quantities: Any) -> Report:
        events: list[CaseFacts | Result] = []
        for case, quantity in zip(cases, quantities, strict=True):
            backend = "gemm@cpu" if case is cases[3] else "torch@cpu"
            status = quantity.status
            events.append(facts(case))
            events.append(result(case, backend, status, quantities={"y": quantity}))
        return report(*events)

    found = compare(
        made(*[judged()] * 4), made(off[2], off[0], off[1], wrong(3.0, bound_ratio=999))
    )
    assert [change.case for change in found.changes] == ["s/2", "s/1", "s/0", "s/3"]
    backwards = compare(worse(), report())
    assert {change.kind for change in backwards.changes} == {"newly passing"}
    assert backwards.exit_code == 0


# --- checks and controls ---------------------------------------------------------------------------


def checked(ok: bool | None, case: Any = CASE) -> Report:
    """A report in which the number of threads does not matter, or does."""
    reason = None if ok else "y differs in 3 elements"
    return report(facts(case), result(case), Consistency(case, "torch@cpu", "threads", ok, reason))


def controlled(ok: bool) -> Report:
    outcome = ControlOutcome("constant-channel", "exact@cpu", "pass", f"{int(ok)} of 1 passed", ok)
    return report(facts(CASE), result(CASE), outcome)


@pytest.mark.parametrize("made", [checked, controlled])
def test_a_check_or_a_control_that_no_longer_holds_is_a_regression(made: Any) -> None:
    held, broken = made(True), made(False)
    found = compare(held, broken)
    SCHEMA.validate(json.loads(found.model_dump_json()))
    ((check,), changes) = (found.checks, found.changes)
    assert (check.regression, changes, found.verdict, found.exit_code) == (
        True,
        [],
        "regression",
        1,
    )
    text = shown(found, broken)
    assert "checks that no longer hold 1" in text
    assert "NEW is worse: a check no longer holds" in text
    assert f"- {check.backend} {check.check}, {check.case}" in markdown(
        found, {case.id: case for case in broken.cases}
    )
    back = compare(broken, held)
    assert (back.checks[0].regression, back.verdict, back.exit_code) == (False, "changed", 0)
    assert "checks that hold now 1" in shown(back, held)
    assert not compare(broken, broken).checks


def test_a_check_that_was_not_made_or_has_other_inputs_is_no_change() -> None:
    assert not compare(checked(None), checked(False)).checks
    assert not compare(single(), checked(False)).checks
    other = report(
        facts(CASE, input_sha256="cd" * 32),
        result(CASE),
        Consistency(CASE, "torch@cpu", "threads", False, "y differs"),
    )
    assert not compare(checked(True), other).checks


# --- the command -----------------------------------------------------------------------------------

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Invoke:
    """Runs the command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(list(arguments))
        return int(exit_info.value.code or 0), *capsys.readouterr()

    return run


PLUGIN = """
import numpy as np

def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    axes, shape = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    mean, var = MOMENTS(x, axes)
    n = x.size // x.shape[1]
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * CORRECTION - running_var)
    y = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    kinds = running_mean.dtype
    return {"y": y.astype(x.dtype), "batch_mean": mean.astype(kinds), "batch_var": var.astype(kinds)}

def in_float64(x, axes):
    return x.mean(axes, dtype=np.float64), x.var(axes, dtype=np.float64)

def serially(x, axes):
    rows = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    def average(values):
        return np.add.accumulate(values, axis=1, dtype=np.float32)[:, -1] / np.float32(rows.shape[1])
    mean = average(rows)
    return mean, average((rows - mean[:, None]) ** 2)
"""

SCENARIO = """
name: planted
description: Two inputs of which one is hard on sums.
input: [{distribution: constant, value: 3.3}, {distribution: normal}]
shape: [4, 8, 28, 28]
memory_format: [contiguous, channels_last]
affine: null
"""


@pytest.fixture
def audited(invoke: Invoke, tmp_path: Path) -> Callable[..., str]:
    """Runs a plug-in of which MOMENTS and CORRECTION are replaced; returns the report's name."""
    (tmp_path / "s.yaml").write_text(SCENARIO)

    def run(name: str, moments: str = "in_float64", correction: str = "n / (n - 1)") -> str:
        plugin = PLUGIN.replace("MOMENTS", moments).replace("CORRECTION", correction)
        (tmp_path / "bn.py").write_text(plugin)
        code, _, err = invoke("run", "s.yaml", "-q", "-b", "bn.py:batch_norm", "--json", name)
        assert code in (0, 1), err
        return name

    return run


def test_a_planted_loss_of_precision_is_found_and_its_cases_are_named(
    invoke: Invoke, audited: Callable[..., str], tmp_path: Path
) -> None:
    old, new = audited("old.json"), audited("new.json", moments="serially")
    code, out, err = invoke("compare", old, new, "--json", "found.json", "--markdown", "found.md")
    assert (code, err) == (1, "")
    assert "newly failing 2" in out
    for memory_format in ("contiguous", "channels_last"):
        assert f"  value=3.3 {memory_format} 4x8x28x28" in out.splitlines() or (
            f"  constant(value=3.3) {memory_format} 4x8x28x28" in out.splitlines()
        )
    document = json.loads((tmp_path / "found.json").read_text())
    SCHEMA.validate(document)
    worst = [change for change in document["changes"] if change["kind"] == "newly failing"]
    assert {change["cause"] for change in worst} == {"BN003 low-precision accumulation"}
    assert (tmp_path / "found.md").read_text().count("| planted |") == len(document["changes"])
    assert invoke("compare", new, old)[0] == 0


def test_a_planted_biased_running_variance_is_called_a_change_of_semantics(
    invoke: Invoke, audited: Callable[..., str]
) -> None:
    code, out, _ = invoke("compare", audited("old.json"), audited("new.json", correction="1"))
    assert code == 1
    assert "semantics changed 2" in out
    assert "newly failing" not in out
    assert "running_var" in out


def test_the_same_kernel_run_twice_is_unchanged(
    invoke: Invoke, audited: Callable[..., str]
) -> None:
    code, out, _ = invoke("compare", audited("old.json"), audited("new.json"))
    assert code == 0
    assert "4 unchanged" in out
    assert "SAME (exit 0)" in out


def saved(path: Path, made: Report) -> str:
    path.write_text(made.model_dump_json(by_alias=True))
    return path.name


def test_json_and_markdown_go_to_stdout_on_request(invoke: Invoke, tmp_path: Path) -> None:
    name = saved(tmp_path / "a.json", report())
    code, out, err = invoke("compare", name, name, "--json", "-")
    assert code == 0
    assert json.loads(out)["changes"] == []
    assert "SAME" in err
    _, out, err = invoke("compare", name, name, "--markdown", "-")
    assert out.startswith("## bnaudit compare: same")
    assert "SAME" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "none.json"], "cannot read the report none.json"),
        (["a.json", "text.json"], "is not JSON"),
        (["a.json", "a.json", "--map", "torch"], "--map takes OLD=NEW, not 'torch'"),
        (["a.json", "a.json", "--map", "jax=torch"], "OLD has no backend 'jax'"),
        (["a.json", "a.json", "--factor", "nan"], "finite"),
        (["a.json", "a.json", "--factor", "0.5"], "0.5"),
        (["a.json", "a.json", "--json", "-", "--markdown", "-"], "only one of"),
        (["a.json", "a.json", "--json", "a.json/file"], "cannot write a.json/file"),
        (["a.json"], "NEW"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    invoke: Invoke, tmp_path: Path, arguments: list[str], message: str
) -> None:
    saved(tmp_path / "a.json", report())
    (tmp_path / "text.json").write_text("no json")
    code, _, err = invoke("compare", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_specimens_alone_are_nothing_in_common_where_a_backend_is_gated() -> None:
    case = scenarios()[0].cases[0]
    both = report(facts(case), result(case, "torch@cpu"), result(case, "welford@cpu"))
    specimen = report(facts(case), result(case, "welford@cpu"))
    found = compare(both, specimen)
    assert (found.verdict, found.exit_code) == ("nothing-in-common", 5)
    assert compare(specimen, specimen).verdict == "same"
