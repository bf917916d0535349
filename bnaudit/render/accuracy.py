"""A report as a table of accuracy in Markdown: implementations by kinds of input, the worst of each.

A column is an entry of COLUMNS; those of which the report has no case are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bnaudit.render.words import markdown_text, number
from bnaudit.report import CaseRecord, Environment, Quantity, Report, ResultRecord
from bnaudit.verdict import LABELS


class Column(NamedTuple):
    """One kind of input. scenarios: those it is taken from, by name."""

    heading: str
    scenarios: tuple[str, ...]
    quantities: tuple[str, ...] = ("y",)
    holds: Callable[[CaseRecord], bool] = lambda case: True


def _mean(*means: float) -> Callable[[CaseRecord], bool]:
    return lambda case: case.input.get("mean") in means


def _dtype(dtype: str) -> Callable[[CaseRecord], bool]:
    return lambda case: case.dtype == dtype


COLUMNS = (
    Column(
        "constant channel",
        ("constant-channel", "constant-channel-inexact", "long-constant", "caffe-3963"),
        holds=_dtype("float32"),
    ),
    Column("mean 1e2", ("large-offset",), holds=_mean(1e2)),
    Column("mean 1e4", ("large-offset",), holds=_mean(1e4)),
    Column("mean 1e6", ("large-offset",), holds=_mean(1e6)),
    Column("long reduction", ("long-reduction",)),
    Column("float16", ("half-precision",), holds=_dtype("float16")),
    Column("bfloat16", ("half-precision",), holds=_dtype("bfloat16")),
    Column("float64", ("float64",)),
    Column("overflow", ("magnitude-overflow",)),
    Column("small n", ("small-n",)),
    Column("inference", ("inference", "inference-at-mean")),
    Column("backward", ("backward",), ("grad_input", "grad_weight", "grad_bias")),
    Column("running statistics", ("running-statistics",), ("running_mean", "running_var")),
)

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

LEGEND = """\
Each cell is the worst of its cases. **exact**: as good as the best algorithms; **stable**: within what a
backward-stable algorithm may lose; **degraded**: more than that; **broken**: not finite, or hardly a digit is
right. The figure is the deviation of y in standard deviations of the output (σ), or that of gradients and
running statistics in units of what a stable algorithm may lose (×). An empty cell: no case of it was run. –:
the implementation says that it does not do this."""


class Cell(NamedTuple):
    """The worst of a column's cases on one implementation. note: what stands in its footnote."""

    text: str
    note: str | None
    worst: tuple[ResultRecord, str] | None


def accuracy(report: Report) -> str:
    """The page: gated backends, or all where none is. Those that did not run are named below the table."""
    cases = {case.id: case for case in report.cases}
    columns = [c for c in COLUMNS if any(_belongs(case, c) for case in report.cases)]
    rows: dict[str, list[ResultRecord]] = {}
    gates = any(result.gated for result in report.results)
    for result in report.results:
        if result.gated or not gates:
            rows.setdefault(result.backend, []).append(result)
    absent = {name: own[0].reason for name, own in rows.items() if own[0].status == "unavailable"}
    order = sorted(
        (name for name in rows if name not in absent), key=lambda name: name.rpartition(":")[2]
    )
    versions = {e.name: e for e in report.environments}
    shown = _short(order)
    notes: dict[str, int] = {}
    table, details = [], []
    for name in order:
        cells = []
        for column in columns:
            own = [r for r in rows[name] if _belongs(cases[r.case], column)]
            cell = _cell(own, column)
            mark = ""
            if cell.note is not None:
                mark = str(notes.setdefault(cell.note, len(notes) + 1)).translate(SUPERSCRIPTS)
            cells.append(f"{cell.text}{mark and ' '}{mark}")
            if cell.worst is not None:
                details.append([_code(shown[name]), column.heading, *_detail(*cell.worst)])
        title = _title(shown[name], name, rows[name][0], versions)
        table.append([title, *cells])
    parts = [
        "# Accuracy of BatchNorm implementations",
        _head(report),
        *_table(["implementation", *(c.heading for c in columns)], table),
        "",
        LEGEND,
        "",
        *(f"{i}. {markdown_text(text)}" for text, i in notes.items()),
        "",
        *(
            f"{_code(name)} did not run: {markdown_text(reason or '')}"
            for name, reason in absent.items()
        ),
        "",
        "<details><summary>The case behind each cell that is degraded or broken</summary>",
        "",
        *_table(
            ["implementation", "column", "case", "quantity", "is", "should be", "×bound", "kernel"],
            details,
        ),
        "",
        "</details>",
        "",
        "## Environments",
        "",
        *_environments(report.environments),
    ]
    return "\n".join(parts) + "\n"


def _belongs(case: CaseRecord, column: Column) -> bool:
    return case.scenario in column.scenarios and column.holds(case)


def _cell(results: Sequence[ResultRecord], column: Column) -> Cell:
    died = [r for r in results if r.status in ("crash", "timeout")]
    if died:
        return Cell(f"**{died[0].status}**", died[0].reason, (died[0], "y"))
    measured = [
        (result, name)
        for result in results
        for name in column.quantities
        if name in result.quantities and _has_numbers(result.quantities[name])
    ]
    if not measured:
        return _without_numbers(results)
    result, name = max(measured, key=lambda found: _severity(found[0].quantities[found[1]]))
    quantity = result.quantities[name]
    bad = quantity.label in ("degraded", "broken")
    label = f"**{quantity.label}**" if bad else quantity.label
    figure = (
        f"{quantity.nonfinite} not finite"
        if quantity.nonfinite
        else f"{number(quantity.max_sigma_error, 2)} σ"
        if name == "y"
        else f"{number(quantity.bound_ratio, 2)} ×"
    )
    return Cell(f"{label} {figure}", result.cause if bad else None, (result, name) if bad else None)


def _without_numbers(results: Sequence[ResultRecord]) -> Cell:
    """A cell of cases that did not run, or broke the contract; or of quantities that are not handed out."""
    broken = [r for r in results if r.status == "fail" and not r.quantities]
    if broken:
        return Cell("**fail**", broken[0].reason, None)
    refused = [r for r in results if r.status == "unsupported"]
    if refused:
        return Cell("–", refused[0].reason, None)
    return Cell("not returned" if results else "", None, None)


def _has_numbers(quantity: Quantity) -> bool:
    """Whether it was judged, and had elements to be judged by."""
    return quantity.label is not None and (
        quantity.nonfinite > 0 or quantity.bound_ratio is not None
    )


def _severity(quantity: Quantity) -> tuple[int, int, float, float]:
    """By label, then by T, which is comparable from case to case; σ are only so on constants."""
    assert quantity.label is not None  # noqa: S101 - those without are left out
    return (
        LABELS.index(quantity.label),
        quantity.nonfinite,
        quantity.bound_ratio or 0.0,
        quantity.max_sigma_error or 0.0,
    )


def _detail(result: ResultRecord, name: str) -> list[str]:
    quantity = result.quantities.get(name)
    if quantity is None or quantity.worst is None:
        return [_code(result.case), name, "", "", "", markdown_text(result.kernel or "")]
    worst = quantity.worst
    place = ",".join(map(str, worst.index))
    return [
        _code(result.case),
        f"{name}[{place}]",
        number(worst.value, 6),
        number(worst.reference, 6),
        number(quantity.bound_ratio, 2),
        markdown_text(result.kernel or ""),
    ]


def _short(names: Sequence[str]) -> dict[str, str]:
    """Backends without their environment, where no other has them as well."""
    backends = [name.rpartition(":")[2] for name in names]
    return {
        name: backend if backends.count(backend) == 1 and ".py:" not in name else name
        for name, backend in zip(names, backends, strict=True)
    }


def _title(shown: str, name: str, first: ResultRecord, environments: dict[str, Environment]) -> str:
    """The backend, with the version of the first package that is named like it."""
    environment = environments.get(first.environment)
    library = name.rpartition(":")[2].partition("@")[0]
    packages = {} if environment is None else environment.packages
    version = next((v for p, v in packages.items() if v and library.partition("-")[0] in p), None)
    return f"{_code(shown)}{' ' + version if version else ''}"


def _head(report: Report) -> str:
    return (
        f"\nMade by bnaudit {report.bnaudit_version} on {report.started[:10]} from "
        f"{report.summary.cases} cases, of which {report.summary.ran} results ran, by\n\n"
        f"    {report.command}\n"
    )


def _environments(environments: Iterable[Environment]) -> list[str]:
    rows = [
        [
            _code(e.name),
            e.python,
            ", ".join(f"{name} {version}" for name, version in e.packages.items() if version),
            markdown_text(
                f"{e.cpu.model or 'an unknown processor'}, {e.cpu.isa or 'no vector units'}"
            ),
            str(e.threads),
        ]
        for e in environments
    ]
    return _table(["environment", "Python", "packages", "processor", "threads"], rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).replace('|', '¦').split())}`"
