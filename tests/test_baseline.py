"""Baselines: what they accept, what is new or worse, and what is kept when one is written again."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from standins import ENVIRONMENT, facts, judged, report, result, scenarios

from bnaudit.baseline import Baseline, accept, load, write
from bnaudit.report import Environment, Report, ReportError, ResultRecord

TODAY = date(2026, 11, 23)
CASE = scenarios()[0].cases[0]


def of(status: str = "fail", backend: str = "torch@cpu", **ratios: float | None) -> Report:
    """A report of one result; ratios: T of its quantities, which have the result's status."""
    quantities = {name: judged(status, bound_ratio=ratio) for name, ratio in ratios.items()}
    return report(facts(CASE), result(CASE, backend, status, quantities=quantities))


def baseline(made: Report, folder: Path, **changed: Any) -> Baseline:
    """What is written of a report and read again, its entries changed."""
    write(made, folder / "baseline.yaml", None, TODAY, made.fail_on)
    found = load(folder / "baseline.yaml")
    entries = [entry.model_copy(update=changed) for entry in found.entries]
    return found.model_copy(update={"entries": entries})


def judge(known: Baseline, made: Report, today: date = TODAY) -> ResultRecord:
    cases = {case.id: case for case in made.cases}
    (only,), _ = accept(
        known, made.results, cases, made.environments, today=today, fail_on=made.fail_on
    )
    return only


@pytest.mark.parametrize(
    ("old", "new", "accepted"),
    [
        (1.5, 1.5, True),
        (1.5, 5.9, True),
        (1.5, 6.0, False),
        (1.5, 6.1, False),
        (0.01, 0.99, True),  # below the bound nothing is worse
        (0.01, 1.1, False),
        (91.0, 2.0, True),
        (None, 0.5, True),
        (None, 2.0, False),
        (2.0, None, True),
        (2.0, math.inf, False),
        (2.0, math.nan, False),
        (math.inf, math.inf, True),
        (math.nan, math.nan, True),
        (math.inf, 7.0, True),
        (math.nan, 7.0, False),
    ],
)
def test_t_may_grow_to_less_than_four_times(
    tmp_path: Path, old: float | None, new: float | None, accepted: bool
) -> None:
    found = judge(baseline(of(y=old), tmp_path), of(y=new))
    assert (found.accepted is not None) == accepted
    assert (found.waiver is None) == accepted
    assert found.status == "fail"


@pytest.mark.parametrize(
    ("old", "new", "accepted"),
    [
        (0.004, 0.0159, True),
        (0.004, 0.016, False),
        (1e-5, 9e-4, True),  # harmless as it is
        (0.004, math.inf, False),
        (math.inf, math.inf, True),
        (None, 0.5, True),  # an entry that does not know it
        (0.5, None, True),
    ],
)
def test_a_constant_may_be_off_by_less_than_four_times_as_much(
    tmp_path: Path, old: float | None, new: float | None, accepted: bool
) -> None:
    """T is below its bound all the while."""

    def made(error: float | None) -> Report:
        y = judged("fail", bound_ratio=0.1, constant_error=error)
        return report(facts(CASE), result(CASE, status="fail", quantities={"y": y}))

    found = judge(baseline(made(old), tmp_path), made(new))
    assert (found.accepted is not None) == accepted
    assert accepted or "of a constant channel is off by" in (found.waiver or "")


@pytest.mark.parametrize("new", ["warn", "fail", "timeout", "crash"])
@pytest.mark.parametrize("old", ["warn", "fail", "timeout", "crash"])
def test_no_worse_status_is_accepted_and_a_death_only_as_what_it_was(
    tmp_path: Path, old: str, new: str
) -> None:
    order = ("warn", "fail", "timeout", "crash")
    before, after = (of(status).model_copy(update={"fail_on": "warn"}) for status in (old, new))
    may_be = order.index(new) <= order.index(old)
    if new in ("timeout", "crash"):
        may_be = new == old
    assert (judge(baseline(before, tmp_path), after).accepted is not None) == may_be


def test_another_quantity_is_a_new_deviation(tmp_path: Path) -> None:
    known = baseline(of(y=2.0), tmp_path)
    assert (
        judge(known, of(y=2.0, grad_input=2.0)).waiver
        == "grad_input is worse than the baseline's pass"
    )
    assert judge(baseline(of(y=2.0, grad_input=2.0), tmp_path), of(y=2.0)).accepted


def test_a_broken_contract_is_no_known_deviation(tmp_path: Path) -> None:
    assert judge(baseline(of(y=2.0), tmp_path), of()).accepted is None


def test_other_inputs_backends_and_specimens_are_not_accepted(tmp_path: Path) -> None:
    known = baseline(of(y=2.0), tmp_path)
    other = report(
        facts(CASE, input_sha256="cd" * 32),
        result(CASE, status="fail", quantities={"y": judged("fail")}),
    )
    assert "another input" in (judge(known, other).waiver or "")
    assert judge(known, of(backend="torch-sync@cpu", y=2.0)).accepted is None
    specimen = baseline(of(y=2.0), tmp_path, backend="exact@cpu")
    assert judge(specimen, of(backend="exact@cpu", y=2.0)).accepted is None


def test_an_expired_waiver_fails_with_its_reason(tmp_path: Path) -> None:
    known = baseline(of(y=2.0), tmp_path, expires=TODAY, reason="until the next torch")
    assert judge(known, of(y=2.0)).accepted == "until the next torch"
    late = judge(known, of(y=2.0), date(2026, 11, 24))
    assert late.accepted is None
    assert late.waiver == "the waiver expired on 2026-11-23: until the next torch"


def test_passing_results_and_specimens_are_not_written(tmp_path: Path) -> None:
    assert baseline(of("pass"), tmp_path).entries == []
    assert baseline(of("warn", y=0.5), tmp_path).entries == []
    assert baseline(of(backend="exact@cpu", y=2.0), tmp_path).entries == []
    strict = of("warn", y=0.5).model_copy(update={"fail_on": "warn"})
    assert [entry.status for entry in baseline(strict, tmp_path).entries] == ["warn"]


def test_writing_again_keeps_reasons_dates_and_what_did_not_run_and_drops_what_passes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "deep" / "baseline.yaml"
    cases = scenarios()[0].cases[:3]
    made = report(*(e for c in cases for e in (facts(c), result(c, status="fail"))))
    assert write(made, path, None, TODAY) == 3
    reason = "1e5: \"010\" # 'no' é\n- two"
    earlier = load(path)
    given = {"reason": reason, "expires": date(2027, 1, 31)}
    entries = [entry.model_copy(update=given) for entry in earlier.entries]
    earlier = earlier.model_copy(update={"entries": entries})
    again = report(
        facts(cases[0]), result(cases[0], status="fail"), facts(cases[1]), result(cases[1])
    )
    write(again, path, earlier, date(2026, 12, 1))
    found = load(path)
    assert [entry.id for entry in found.entries] == [cases[0].id, cases[2].id]
    assert {entry.reason for entry in found.entries} == {reason}
    assert {entry.expires for entry in found.entries} == {date(2027, 1, 31)}


def test_what_is_no_longer_needed_is_said(tmp_path: Path) -> None:
    known = baseline(of(y=2.0), tmp_path)
    made = of("pass")
    cases = {case.id: case for case in made.cases}
    (only,), notes = accept(known, made.results, cases, made.environments, today=TODAY)
    assert only == made.results[0]
    assert notes == [
        "baseline: 1 entry no longer needed, nothing deviates there (--write-baseline drops them)"
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"threads": 8}, "threads 2, this is 8"),
        ({"cpu": {"isa": "NEON"}}, "instruction sets FMA3 AVX2, this is NEON"),
        ({"devices": [{"name": "a GPU"}]}, "devices none, this is a GPU"),
        ({"name": "other"}, None),
        ({}, None),
    ],
)
def test_another_machine_is_a_caveat(
    tmp_path: Path, changed: dict[str, Any], words: str | None
) -> None:
    made = of(y=2.0)
    known = baseline(made, tmp_path)
    here = [Environment.model_validate({**ENVIRONMENT, **changed})]
    _, notes = accept(known, made.results, {c.id: c for c in made.cases}, here, today=TODAY)
    assert [words is not None and words in note for note in notes] == [True] * (words is not None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "1:1: accepted is one document, a mapping"),
        ("[]", "1:1: accepted is one document, a mapping"),
        ("version: 2", "1:1: version: found 2; "),
        ("version: 1\nentrys: []", "2:1: entrys: there is no such field"),
        ("version: 1\nentrys: []", "did you mean entries?"),
        ("version: 1\nentries: [{id: a}]", "missing: backend"),
        ("version: 1\nentries: [&a [*a]]", "2:11: found an alias"),
        ("version: 1\nentries: !!python/name:os.system x", "2:10: found the tag"),
    ],
)
def test_a_mistake_is_answered_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(text)
    with pytest.raises(ReportError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:")
    assert words in str(error.value)


@pytest.mark.parametrize("expires", ["31.1.2027", "2027", "soon", "2027-02-30"])
def test_a_date_that_is_none_is_refused(tmp_path: Path, expires: str) -> None:
    path = tmp_path / "b.yaml"
    write(of(y=2.0), path, None, TODAY)
    path.write_text(path.read_text().replace("expires: null", f"expires: {expires}"))
    with pytest.raises(ReportError, match="accepted is a date such as 2027-01-31"):
        load(path)


def test_a_baseline_that_cannot_be_read_or_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write the baseline"):
        write(of(), tmp_path / "file" / "b.yaml", None, TODAY)
