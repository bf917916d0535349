"""Checks of consistency and disagreements, as a person reads them on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from bnaudit.render.words import Hanging, count, label, number
from bnaudit.report import CaseRecord, ConsistencyRecord, DisagreementRecord, Report


def consistency(report: Report, *, verbose: bool = False) -> Iterator[RenderableType]:
    """How far gated backends are apart, and which checks do not hold; each scenario's worst, all if verbose."""
    cases = {case.id: case for case in report.cases}
    yield from _disagreements(report.disagreements, cases, verbose)
    yield from _checks(report.consistency, cases, verbose)


def _disagreements(
    records: list[DisagreementRecord], cases: dict[str, CaseRecord], verbose: bool
) -> Iterator[RenderableType]:
    if not records:
        return
    apart = [record for record in records if not record.ratio <= 1]
    yield Hanging(
        "",
        f"disagreement: in {len(apart)} of {len(records)} cases two gated backends differ by more than "
        "two good ones can",
    )
    worst: dict[str, DisagreementRecord] = {}
    for record in sorted(apart, key=lambda record: -record.ratio):
        worst.setdefault(record.case if verbose else cases[record.case].scenario, record)
    for record in worst.values():
        first, second = record.backends
        case = cases[record.case]
        yield Hanging(
            "  ",
            f"{case.scenario} {label(case)}: {record.quantity} of {first} and {second} by "
            f"{number(record.max_abs_difference, 3)}, {number(record.ratio, 2)} times as much",
        )


def _checks(
    records: list[ConsistencyRecord], cases: dict[str, CaseRecord], verbose: bool
) -> Iterator[RenderableType]:
    if not records:
        return
    made = [record for record in records if record.ok is not None]
    failed = [record for record in made if not record.ok]
    # "backends" is the disagreement, and has been told.
    told = [record for record in failed if record.check != "backends"]
    yield f"consistency {len(made) - len(failed)}/{len(made)} checks hold"
    for line in _grouped(told, cases, verbose):
        yield Hanging("  ", line)
    unmade = Counter(
        (record.backend, record.check, record.reason) for record in records if record.ok is None
    )
    for (backend, check, reason), times in unmade.items():
        yield Hanging("  ", f"{check} {backend}: not made in {count(times, 'case')}: {reason}")


def _grouped(
    records: list[ConsistencyRecord], cases: dict[str, CaseRecord], verbose: bool
) -> Iterator[Text]:
    """One of each scenario, backend and check; all of them, with tracebacks, if verbose."""
    groups: dict[tuple[str, ...], list[ConsistencyRecord]] = {}
    for record in records:
        key = (record.backend, record.check, cases[record.case].scenario)
        groups.setdefault((*key, record.case) if verbose else key, []).append(record)
    for (backend, check, scenario, *_), group in groups.items():
        rest = len(group) - 1
        more = f" (and in {count(rest, 'more case')})" if rest else ""
        place = f"{scenario} {label(cases[group[0].case])}"
        text = Text.assemble(
            (f"{check} {backend}", "red"), f" {place}: {group[0].reason or 'no reason given'}{more}"
        )
        if verbose and group[0].detail:
            text.append(f"\n{group[0].detail.rstrip()}", style="dim")
        yield text
