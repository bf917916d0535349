"""What a person reads: rows, findings, controls and the verdict, at every width."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from standins import (
    CONSTANT,
    ENVIRONMENT,
    OFFSET,
    facts,
    judged,
    report,
    result,
    scenarios,
    typical,
    wrong,
)

from bnaudit.audit import ControlOutcome, Event
from bnaudit.consistency import Consistency, Disagreement
from bnaudit.measure import Worst
from bnaudit.render import words
from bnaudit.render.console import Layout, closing, counts, heading, opening, rows, verdict
from bnaudit.report import Environment, Report

WIDTHS = (40, 60, 80, 100, 120, 200)


def show(parts: Iterable[RenderableType], width: int = 80, *, color: bool = False) -> str:
    """What the parts look like on a terminal of this width."""
    file = io.StringIO()
    screen = Console(file=file, width=width, force_terminal=color, highlight=False, markup=False)
    for part in parts:
        screen.print(part)
    return file.getvalue()


def table(made: Report, width: int = 80, *, verbose: bool = False, color: bool = False) -> str:
    """The table as a run prints it: a scenario at a time."""
    cases = {case.id: case for case in made.cases}
    by_scenario: dict[str, list[str]] = {}
    for case in made.cases:
        by_scenario.setdefault(case.scenario, []).append(case.id)
    layout = Layout.fit(
        width,
        by_scenario,
        {r.backend for r in made.results},
        max(len(ids) for ids in by_scenario.values()),
    )
    lines: list[RenderableType] = [heading(layout)]
    for ids in by_scenario.values():
        own = [r for r in made.results if r.case in ids]
        lines += rows(layout, own, cases, verbose=verbose)
    return show(lines, width, color=color)


# --- the table -------------------------------------------------------------------------------------


def test_the_founding_story_is_seen_at_a_glance() -> None:
    assert table(report()) == (
        " scenario       backend         worst case           off by ×bound  status\n"
        " constant-      torch@cpu       3.3 channels_last   0.467 σ     91  FAIL 1/4\n"
        " channel        caffe-2016@cpu  3.3 contiguous     0.0321 σ   0.09 (fail 4/4)\n"
        "                welford@cpu, exact@cpu               1e-7 σ   0.02 (pass)\n"
    )


def test_a_scenario_that_is_green_has_rows_only_when_asked_for() -> None:
    assert "large-offset" not in table(report())
    text = table(report(), verbose=True)
    assert " large-offset   torch@cpu       10 4x8x16x16 " in text
    assert "torch@cuda      unavailable: no GPU\n" in text
    assert text.count("exact@cpu") == 1


def test_a_specimen_is_told_from_a_gated_backend_without_colour() -> None:
    lines = table(report()).splitlines()
    assert " FAIL 1/4" in next(line for line in lines if "torch@cpu" in line)
    assert "(fail 4/4)" in next(line for line in lines if "caffe-2016@cpu" in line)


def test_colour_says_the_same_as_the_text() -> None:
    plain, coloured = table(report()), table(report(), color=True)
    assert "\x1b[" not in plain
    assert "\x1b[1;31m FAIL 1/4" in coloured
    assert "\x1b[2m" in coloured
    assert "\x1b[1;31m(fail" not in coloured


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_of_the_table_is_wider_than_the_terminal(width: int, verbose: bool) -> None:
    long = CONSTANT.replace("constant-channel", "a-scenario-with-a-name-that-goes-on-and-on")
    (scenario,) = scenarios(long)
    made = report(
        *(facts(case) for case in scenario.cases),
        *(
            result(case, name, status)
            for case in scenario.cases
            for name, status in (
                ("torch@cpu", "fail"),
                ("two-pass-sequential@cpu", "timeout"),
                ("path/to/a/folder/my_batch_norm.py:my_batch_norm@cpu", "crash"),
                ("welford@cpu", "pass"),
                ("torch@cuda", "unavailable"),
            )
        ),
    )
    lines = table(made, width, verbose=verbose).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert not any(line.endswith(" ") for line in lines)
    if width >= 80:
        assert len(lines) == (6 if verbose else 5)
        starts = {line.index("FAIL") for line in lines if "FAIL" in line}
        assert starts == {lines[0].index("status")}


def test_wide_terminals_show_kernel_floor_and_condition_number() -> None:
    made = report(
        facts(scenarios()[0].cases[0], condition_number=2.5e7),
        result(
            scenarios()[0].cases[0],
            status="fail",
            kernel="native",
            quantities={"y": wrong(1.0, floor=0.05)},
        ),
    )
    head, row = table(made, 120).splitlines()
    assert head.split()[-4:] == ["floor", "condition", "status", "kernel"]
    assert row.split()[-5:] == ["0.05", "2.5e7", "FAIL", "1/1", "native"]
    assert "floor" not in table(made, 119)


def test_long_names_keep_their_telling_end() -> None:
    (scenario,) = scenarios(OFFSET)
    case = scenario.cases[0]
    made = report(
        facts(case),
        result(case, "two-pass-sequential@cpu", "fail"),
        result(case, "some/where/my_bn.py:batch_norm@cpu", "fail"),
    )
    text = table(made)
    assert "…@cpu" in text
    assert "…batch_norm@cpu" in text


def test_the_worst_case_is_the_one_farthest_off_in_y() -> None:
    (scenario,) = scenarios(OFFSET)
    small, large = scenario.cases
    made = report(
        facts(small),
        facts(large),
        result(small, status="fail", quantities={"y": wrong(0.5), "batch_mean": judged("fail")}),
        result(large, status="fail", quantities={"y": wrong(0.25, bound_ratio=1e6)}),
    )
    assert " 10 4x8x16x16 " in table(made)
    assert " 0.5 σ " in table(made)


def test_a_failure_beside_y_is_named() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    off = judged("fail", max_sigma_error=None, max_ulp_error=7123.4, bound_ratio=33.0)
    made = report(
        facts(case),
        result(case, status="fail", quantities={"y": judged(), "running_var": off}),
    )
    assert "running_var 10" in table(made)
    assert "7.1e3 ulp     33" in table(made)


def test_a_value_that_is_not_finite_is_shown_as_it_is() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    y = wrong(math.nan, nonfinite=3, max_sigma_error=None, worst=Worst((0, 0), math.nan, 0.5))
    made = report(facts(case), result(case, status="fail", quantities={"y": y}))
    assert "      nan " in table(made)
    assert "y[0,0] = nan, should be 0.5" in show(closing(made))


def test_crashes_and_timeouts_have_rows_without_numbers() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    made = report(facts(case), result(case, status="crash"), result(case, "torch@x", "timeout"))
    assert "CRASH 1/1" in table(made)
    assert "TIMEOUT 1/1" in table(made)
    assert "       -      - " in table(made)


# --- what follows it -------------------------------------------------------------------------------


def test_what_follows_the_table() -> None:
    assert show(closing(report())) == (
        " 1 scenario passes (-v lists it)\n"
        "\n"
        "[1] FAIL torch@cpu constant-channel value=3.3 channels_last 32x64x56x56\n"
        "    y[0,17,0,0] = -0.467, should be 0; must equal the bias and is off by 0.467 σ\n"
        "    also off: batch_mean 7.1e3 ulp\n"
        "    cause BN003 low-precision accumulation · contiguous only warns · welford@cpu\n"
        "    and exact@cpu pass\n"
        "\n"
        "[2] (fail) caffe-2016@cpu constant-channel value=100 contiguous 32x64x56x56:\n"
        "    y[0,17,0,0] = -0.00483, should be 0 (and 1 more finding, -v)\n"
        "\n"
        "controls 2/2 as expected\n"
        "20 of 26 ran: 14 pass, 1 warn, 5 fail (4 of them specimens); 6 unavailable\n"
        "(torch@cuda: no GPU)\n"
        "FAIL (exit 1)\n"
        "σ: standard deviations of y.  ×bound: 1 = worst a stable algorithm may do.\n"
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verbose", [False, True])
def test_nothing_after_the_table_is_wider_than_the_terminal(width: int, verbose: bool) -> None:
    case = scenarios()[0].cases[0]
    trace = "Traceback (most recent call last):\n" + "\n".join(f"  line {i} " * 9 for i in range(9))
    events = [*typical(), result(case, status="crash", detail=trace)]
    lines = show(closing(report(*events), verbose=verbose), width).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert not any(line.endswith(" ") for line in lines)


def test_one_finding_counts_its_cases() -> None:
    (scenario,) = scenarios(OFFSET)
    made = report(
        *(facts(case) for case in scenario.cases),
        *(
            result(case, status="fail", cause="BN003 x", quantities={"y": wrong(value)})
            for case, value in zip(scenario.cases, (0.1, 0.2), strict=True)
        ),
    )
    text = show(closing(made))
    assert text.count("FAIL torch@cpu") == 1
    assert "[1] FAIL torch@cpu large-offset mean=1e6 4x8x16x16\n    y[0,17,0,0] = 0.2" in text
    assert "cause BN003 x · the worst of 2 cases" in text


def test_verbose_shows_every_specimens_findings_in_full() -> None:
    text = show(closing(report(), verbose=True))
    assert "[2] (fail) caffe-2016@cpu constant-channel value=3.3 contiguous 32x64x56x56\n" in text
    assert (
        "[3] (fail) caffe-2016@cpu constant-channel value=3.3 channels_last 32x64x56x56\n" in text
    )
    assert "the worst of 2 cases" in text
    assert "kernel native contiguous" in text
    assert "-v" not in text


def test_a_crash_shows_its_reason_and_the_end_of_its_traceback() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    trace = "\n".join(f"line {number}" for number in range(20))
    crash = result(case, status="crash", reason="ValueError: no", detail=trace)
    made = report(facts(case), crash)
    text = show(closing(made))
    assert (
        "CRASH torch@cpu large-offset mean=10 4x8x16x16\n    ValueError: no\n    line 14\n" in text
    )
    assert "line 13" not in text
    assert "    line 0\n" in show(closing(made, verbose=True))


def test_numbers_that_look_alike_get_more_digits() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    y = wrong(100.000015, worst=Worst((0,), 100.000015, 100.0))
    made = report(facts(case), result(case, status="fail", quantities={"y": y}))
    assert "y[0] = 100.000015, should be 100;" in show(closing(made))


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "-"),
        (0.467123, 3, "0.467"),
        (-0.00483, 3, "-0.00483"),
        (5.5e-5, 2, "5.5e-5"),
        (0.000999, 3, "9.99e-4"),
        (0.00099999, 3, "1e-3"),
        (7123.4, 2, "7.1e3"),
        (99.9, 2, "1e2"),
        (91.0, 2, "91"),
        (1e100, 3, "1e100"),
        (0.0, 3, "0"),
        (-0.0, 3, "-0"),
        (math.inf, 3, "inf"),
        (-math.inf, 3, "-inf"),
        (math.nan, 3, "nan"),
    ],
)
def test_numbers_are_short(value: float | None, digits: int, text: str) -> None:
    assert words.number(value, digits) == text


@pytest.mark.parametrize(
    ("axes", "label", "brief"),
    [
        ("value=3.3", "value=3.3", "3.3"),
        ("input=constant(value=100.0)", "value=100", "100"),
        ("mean=1000000.0,std=1e-06", "mean=1e6 std=1e-6", "mean=1e6 std=1e-6"),
        ("input=normal(mean=10000.0)", "normal(mean=10000)", "mean=10000"),
        ("input=wide(low=-30,high=30)", "wide(low=-30,high=30)", "wide -30,30"),
        ("input=normal", "normal", "normal"),
        ("affine=(weight=-2,bias=0.5)", "affine=(weight=-2,bias=0.5)", "weight=-2,bias=0.5"),
        ("affine=null", "affine=null", "null"),
        ("backward=true,eps=1e-05", "backward eps=1e-5", "backward eps=1e-5"),
        ("backward=false", "no backward", "no backward"),
        ("", "", ""),
    ],
)
def test_a_case_is_told_by_its_axes(axes: str, label: str, brief: str) -> None:
    (case,) = report(facts(scenarios(OFFSET)[0].cases[0])).cases
    case = case.model_copy(update={"id": f"large-offset/{axes}" if axes else "large-offset"})
    assert words.label(case) == f"{label} 4x8x16x16".lstrip()
    assert words.brief(case, 80) == f"{brief} 4x8x16x16".lstrip()


def test_a_brief_case_has_as_many_parts_as_fit() -> None:
    case = report(*typical()).cases[3]
    assert words.brief(case, 80) == "3.3 channels_last 32x64x56x56"
    assert words.brief(case, 28) == "3.3 channels_last"
    assert words.brief(case, 16) == "3.3 32x64x56x56"
    assert words.brief(case, 3) == "3.3"


def test_a_specimen_is_represented_by_its_first_finding_in_y() -> None:
    (scenario,) = scenarios(CONSTANT)
    first, second, *_ = scenario.cases
    off = judged("fail", max_sigma_error=None)
    made = report(
        facts(first),
        facts(second),
        result(first, "caffe-2016@cpu", "fail", quantities={"y": judged(), "batch_var": off}),
        result(first, "gemm@cpu", "fail", quantities={"y": wrong(0.1)}),
        result(second, "caffe-2016@cpu", "fail", quantities={"y": wrong(0.2)}),
    )
    lines = [line for line in show(closing(made)).splitlines() if line.startswith("[")]
    assert [line.split()[:3] for line in lines] == [
        ["[2]", "(fail)", "gemm@cpu"],
        ["[3]", "(fail)", "caffe-2016@cpu"],
    ]


def test_a_control_that_misbehaved_is_named() -> None:
    bad = ControlOutcome("constant-channel", "caffe-2016@cpu", "fail", "0 of 4 failed", False)
    text = show(closing(report(*typical(), bad, verdict="untrusted", exit_code=4)))
    assert "controls 2/3 as expected\n" in text
    assert "  caffe-2016@cpu must fail in constant-channel: 0 of 4 failed\n" in text
    assert "UNTRUSTED (exit 4): a control did not behave, so nothing here can be trusted\n" in text


def test_reasons_for_what_is_unavailable_are_given_once() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    made = report(
        facts(case),
        result(case),
        result(case, "torch@cuda", "unavailable", reason="no GPU"),
        result(case, "torch-native@cuda", "unavailable", reason="no GPU"),
        result(case, "jax@cpu", "unavailable", reason="not installed"),
        result(case, "welford@cpu", "unsupported"),
    )
    assert counts(made) == (
        "1 of 5 ran: 1 pass; 1 unsupported; 3 unavailable (torch@cuda, torch-native@cuda: no GPU; "
        "jax@cpu: not installed)"
    )


@pytest.mark.parametrize(
    ("status", "name", "code", "text"),
    [
        ("pass", "pass", 0, "PASS (exit 0)"),
        ("warn", "warn", 0, "WARN (exit 0)"),
        ("warn", "fail", 1, "FAIL (exit 1: --fail-on warn)"),
        ("fail", "fail", 1, "FAIL (exit 1)"),
        ("fail", "fail", 0, "FAIL (exit 0: --fail-on never)"),
        ("crash", "incomplete", 3, "INCOMPLETE (exit 3): torch@cpu died in 1 case"),
        ("timeout", "incomplete", 3, "INCOMPLETE (exit 3): torch@cpu took too long in 1 case"),
        (
            "unavailable",
            "incomplete",
            3,
            "INCOMPLETE (exit 3): asked for and unavailable: torch@cpu",
        ),
        ("unavailable", "nothing-gated", 5, "NOTHING-GATED (exit 5): nothing ran"),
        (
            "pass",
            "interrupted",
            130,
            "INTERRUPTED (exit 130): this is what was measured until then",
        ),
    ],
)
def test_the_verdict_says_why(status: str, name: str, code: int, text: str) -> None:
    case = scenarios(OFFSET)[0].cases[0]
    made = report(facts(case), result(case, status=status), verdict=name, exit_code=code)
    if status == "unavailable":
        made = made.model_copy(update={"missing": {"torch@cpu": "no torch"}})
    assert verdict(made).plain == text


def test_specimens_alone_are_no_verdict() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    made = report(facts(case), result(case, "welford@cpu"), verdict="nothing-gated", exit_code=5)
    assert verdict(made).plain == "NOTHING-GATED (exit 5): only specimens ran"


def test_where_nothing_ran_the_reasons_stand_without_being_asked_for() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    refused = result(case, status="unsupported", reason="no such dtype")
    alone = report(facts(case), refused, verdict="nothing-gated", exit_code=5)
    assert "\n  1 unsupported: no such dtype\n" in show(closing(alone))
    beside = show(closing(report(facts(case), refused, result(case, "welford@cpu"))))
    assert "torch@cpu ran in no case: no such dtype\n" in beside
    assert "1 unsupported: " not in beside


def test_what_was_not_returned_is_not_judged_and_said_to_be_so() -> None:
    trained = OFFSET.replace("momentum: 0", "backward: true")
    first, second = scenarios(trained)[0].cases
    partly = {name: judged() for name in ("y", "running_mean", "running_var")}
    made = report(
        facts(first),
        result(first, "torch@cpu", quantities=partly),
        result(first, "welford@cpu"),
        facts(second),
        result(second, "torch@cpu"),
    )
    assert (
        "not judged, because torch@cpu did not return them: grad_input in 2 of 2 cases,\n"
        "running_mean in 1 of 2 cases and running_var in 1 of 2 cases\n"
    ) in show(closing(made))
    whole = {**partly, "grad_input": judged()}
    assert "not judged" not in show(closing(report(facts(first), result(first, quantities=whole))))


def test_dependences_and_disagreements_are_told_with_their_worst_cases() -> None:
    constant, offset = scenarios()
    pair = ("torch@cpu", "welford@cpu")
    events: list[Event] = []
    for case in (*constant.cases, *offset.cases):
        events += [facts(case), result(case)]
        events.append(Consistency(case, "torch@cpu", "repeat", True))
    last = constant.cases[-1]
    events += [
        Disagreement(constant.cases[0], "y", pair, 0.1, 3.0),
        Disagreement(last, "y", pair, 0.467, 470.0),
        Disagreement(offset.cases[0], "batch_mean", pair, 1e-7, 0.2),
        Consistency(last, "torch@cpu", "backends", False, "y differs"),
        Consistency(last, "torch@cpu", "threads", False, "with --threads 1 y[0] was 1, then 2"),
        Consistency(constant.cases[0], "torch@cpu", "threads", False, "something else"),
    ]
    made = report(*events)
    text = show(closing(made))
    assert (
        "disagreement: in 2 of 3 cases two gated backends differ by more than two good\n"
        "ones can\n"
        "  constant-channel value=3.3 channels_last 32x64x56x56: y of torch@cpu and\n"
        "  welford@cpu by 0.467, 4.7e2 times as much\n"
        "consistency 6/9 checks hold\n"
        "  threads torch@cpu constant-channel value=3.3 channels_last 32x64x56x56: with\n"
        "  --threads 1 y[0] was 1, then 2 (and in 1 more case)\n"
    ) in text
    verbose = " ".join(show(closing(made, verbose=True)).split())
    assert "3 times as much" in verbose
    assert "something else" in verbose


def test_what_is_not_repeatable_is_a_finding_also_where_it_is_sound() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    again = "not repeatable: y[0,0,0,0] was 1, then 2"
    cause = "BN008 not reproducible"
    sound = report(facts(case), result(case, status="warn", reason=again, cause=cause))
    text = show(closing(sound))
    assert "[1] WARN torch@cpu large-offset" in text
    assert f"    {again}\n    cause {cause}" in text
    reason = f"y: too far off; {again}"
    wrong_too = result(case, status="fail", reason=reason, quantities={"y": wrong(0.5)})
    text = show(closing(report(facts(case), wrong_too)))
    assert "y[0,17,0,0] = 0.5, should be 0" in text
    assert f"    {again}\n" in text


def test_a_check_that_was_not_made_is_listed_and_a_traceback_shown_when_verbose() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    events = [
        Consistency(case, "torch@cpu", "inference", None, "running_mean is not returned"),
        Consistency(case, "torch@cpu", "repeat", False, "it died", True, "Traceback: line 7"),
    ]
    made = report(facts(case), result(case), *events)
    text = show(closing(made))
    assert "consistency 0/1 checks hold\n" in text
    assert "inference torch@cpu: not made in 1 case: running_mean is not returned\n" in text
    assert "line 7" not in text
    assert "line 7" in show(closing(made, verbose=True))


def test_a_death_in_a_check_is_named() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    died = Consistency(case, "torch@cpu", "repeat", False, "the call ended", died=True)
    made = report(facts(case), result(case), died, verdict="incomplete", exit_code=3)
    assert verdict(made).plain == "INCOMPLETE (exit 3): torch@cpu died in 1 case"


def test_a_check_that_does_not_hold_is_the_reason_for_a_failure() -> None:
    case = scenarios(OFFSET)[0].cases[0]
    broken = Consistency(case, "torch@cpu", "repeat", False, "y[0] was 1, then 2")
    made = report(facts(case), result(case), broken)
    assert verdict(made).plain == "FAIL (exit 1): a check of consistency does not hold"


def test_the_opening_says_what_gates() -> None:
    environment = Environment.model_validate(ENVIRONMENT)
    first, second, third, *_ = show(opening(environment, 6, ["torch@cpu"], {}, True)).splitlines()
    assert first.endswith("Python 3.11.7, torch 2.13.0+cpu, 2 threads, 6 cases")
    assert second == "Gating: torch@cpu"
    assert "gate nothing" in third
    missing = {"my_bn.py:f@cpu": "my_bn.py defines no f"}
    text = show(opening(environment, 6, [], missing, False))
    assert "Gating: nothing" in text
    assert "my_bn.py:f@cpu is unavailable: my_bn.py defines no f" in text


def test_an_empty_report_can_be_shown() -> None:
    made = report(ControlOutcome("a", "b", "pass", "0 of 0 passed", False), verdict="untrusted")
    assert "0 of 0 ran\n" in show(closing(made))
