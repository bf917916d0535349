"""The table of accuracy: the worst of each cell, its cause, and nothing that did not run shown as fine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from standins import facts, judged, report, result, scenarios, typical, wrong

from bnaudit.audit import Event
from bnaudit.measure import Worst
from bnaudit.render.accuracy import COLUMNS, accuracy
from bnaudit.report import load as load_report
from bnaudit.scenario import load

CONSTANT, OFFSET = scenarios()


def tables(text: str) -> list[list[list[str]]]:
    """The page's tables as a Markdown parser reads them, cell by cell."""
    found: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("table_open", "table_close"):
            inside = token.type == "table_open"
            found.extend([] for _ in range(inside))
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and inside:
            found[-1][-1].append(token.content)
    return found


def row(backend: str, *events: Event) -> dict[str, str]:
    """The cells of one implementation by their column."""
    heading, *rows = tables(accuracy(report(*events)))[0]
    (cells,) = [r for r in rows if r[0].startswith(f"`{backend}`")]
    return dict(zip(heading, cells, strict=True))


def test_the_worst_case_of_a_column_is_shown_with_its_cause() -> None:
    cells = row("torch@cpu")
    assert cells["constant channel"] == "**degraded** 0.467 σ ¹".replace("0.467", "0.47")
    assert cells["mean 1e6"] == "exact 1e-7 σ"
    assert cells["implementation"] == "`torch@cpu` 2.13.0+cpu"
    page = accuracy(report())
    assert "\n1. BN003 low-precision accumulation\n" in page
    details = tables(page)[1]
    assert [details[1][i] for i in (1, 3, 4, 5, 6)] == [
        "constant channel",
        "y[0,17,0,0]",
        "-0.467",
        "0",
        "91",
    ]


def test_columns_without_a_case_are_left_out_and_every_row_has_all_the_others() -> None:
    heading, *rows = tables(accuracy(report()))[0]
    assert heading == ["implementation", "constant channel", "mean 1e6"]
    assert all(len(cells) == len(heading) for cells in rows)


def test_every_column_is_fed_by_the_shipped_scenarios() -> None:
    shipped = {scenario.name: scenario for scenario in load([])}
    for column in COLUMNS:
        for name in column.scenarios:
            assert any(column.holds(_record(case)) for case in shipped[name].cases), column.heading


def _record(case: Any) -> Any:
    return case.model_copy(update={"input": case.input.model_dump()})


def test_what_did_not_run_is_never_shown_as_fine() -> None:
    case = CONSTANT.cases[0]
    cells = row("torch@cpu", facts(case), result(case, status="crash", reason="SIGSEGV"))
    assert cells["constant channel"] == "**crash** ¹"
    cells = row("torch@cpu", facts(case), result(case, status="unsupported", reason="no [half]"))
    assert cells["constant channel"] == "– ¹"
    page = accuracy(
        report(facts(case), result(case, status="unsupported", reason="no [half] | *x*"))
    )
    assert r"1. no \[half\] \| \*x\*" in page
    cells = row(
        "torch@cpu",
        facts(case),
        result(case, status="fail", quantities={}, reason="contract: no y"),
    )
    assert cells["constant channel"] == "**fail** ¹"
    page = accuracy(
        report(
            facts(case), result(case), result(case, "torch@cuda", "unavailable", reason="no GPU")
        )
    )
    assert "`torch@cuda` did not run: no GPU" in page
    assert len(tables(page)[0]) == 2


def test_gradients_that_nobody_returns_do_not_fail_because_y_does() -> None:
    (case,) = scenarios("name: backward\ninput: {distribution: normal}\nshape: [4, 3]\n")[0].cases
    y = {"y": wrong(1.0)}
    cells = row("torch@cpu", facts(case), result(case, status="fail", quantities=y))
    assert cells["backward"] == "not returned"


def test_values_that_are_not_finite_outweigh_every_number() -> None:
    first, second = CONSTANT.cases[:2]
    nan = judged(
        "fail",
        label="broken",
        nonfinite=7,
        max_sigma_error=None,
        worst=Worst((0, 0, 0, 0), float("nan"), 0.0),
    )
    events: list[Event] = [
        facts(first),
        result(first, status="fail", quantities={"y": wrong(1e30, label="broken")}),
        facts(second),
        result(second, status="fail", quantities={"y": nan}),
    ]
    assert row("torch@cpu", *events)["constant channel"] == "**broken** 7 not finite"


def test_specimens_are_shown_only_where_nothing_is_gated() -> None:
    names = [cells[0] for cells in tables(accuracy(report()))[0]]
    assert names == ["implementation", "`torch@cpu` 2.13.0+cpu"]
    case = OFFSET.cases[1]
    specimen = report(facts(case), result(case, "welford@cpu"))
    assert tables(accuracy(specimen))[0][1][0] == "`welford@cpu`"


def test_hostile_names_stay_in_their_cells() -> None:
    case = CONSTANT.cases[0]
    name = "torch`|\n# x`@cpu"
    page = accuracy(report(facts(case), result(case, name, kernel="a|b\n<script>")))
    heading, cells = tables(page)[0]
    assert len(cells) == len(heading)
    assert "<script>" not in page


def test_the_page_names_what_ran_where() -> None:
    page = accuracy(report(*typical()))
    assert "bnaudit run" in page
    (environment,) = tables(page)[2][1:]
    assert environment[:2] == ["`current`", "3.11.7"]
    assert "torch 2.13.0+cpu" in environment[2]


def test_environments_are_named_only_where_it_takes_them() -> None:
    case = CONSTANT.cases[0]
    both = ["old:jax@cpu", "new:jax@cpu", "other:flax@cpu", "/a/my.py:f@cpu"]
    page = accuracy(report(facts(case), *(result(case, name, gated=True) for name in both)))
    names = [cells[0].partition(" ")[0] for cells in tables(page)[0][1:]]
    assert names == ["`/a/my.py:f@cpu`", "`flax@cpu`", "`old:jax@cpu`", "`new:jax@cpu`"]


def test_the_published_audit_has_every_column() -> None:
    makefile = Path(__file__).parent.parent.joinpath("Makefile").read_text()
    (names,) = re.findall(r"^SCENARIOS := ((?:.*\\\n)*.*)$", makefile, re.M)
    wanted = {name for column in COLUMNS for name in column.scenarios}
    assert set(names.replace("\\", "").split()) == wanted


def test_the_published_table_is_what_the_published_report_gives() -> None:
    reports = Path(__file__).parent.parent / "reports"
    found = load_report(reports / "frameworks.json.gz")
    assert accuracy(found) == (reports / "frameworks.md").read_text()
    assert all(control.ok for control in found.controls)
