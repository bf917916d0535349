"""Report → what a person reads on a terminal: rows, findings, controls, the verdict.

Pure functions of the report's records; nothing is printed here. The table's columns are fixed before its
first row (`Layout`), so that a scenario's rows can be shown as soon as it is complete.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from bnaudit import __version__
from bnaudit.findings import Finding, clusters, worst_quantity, worst_result
from bnaudit.render.consistency import consistency
from bnaudit.render.evidence import Neighbours, bound, evidence, off_by
from bnaudit.render.words import Hanging, brief, count, label, listed, number
from bnaudit.report import CaseRecord, Environment, Report, ResultRecord
from bnaudit.verdict import FAILED, RAN

if TYPE_CHECKING:
    from bnaudit.doctor import Entry

STYLES = {
    "pass": "green",
    "warn": "yellow",
    "fail": "red",
    "timeout": "magenta",
    "crash": "magenta",
}

VERDICT_STYLES = {"pass": "bold green", "warn": "bold yellow"}

WIDE = 120
"""Columns of the terminal from which kernel, floor and condition number have room."""

OFF_BY, BOUND, FLOOR, CONDITION, KERNEL = 9, 6, 7, 9, 14
"""Widths of the columns that do not depend on names."""

NARROW = 12
"""What is left of a scenario's name at least, where there is room for that."""

DETAIL_LINES = 6
"""Lines of a traceback that a finding shows; all of them with -v."""

KEY = "σ: standard deviations of y.  ×bound: 1 = worst a stable algorithm may do."

SPECIMENS_KEY = "Specimens are in (parentheses): they deviate by design, and gate nothing."


@dataclass(frozen=True)
class Layout:
    """Widths of the table's columns, in terminal cells."""

    scenario: int
    backend: int
    worst: int
    status: int
    width: int

    @property
    def wide(self) -> bool:
        """Whether kernel, floor and condition number have room."""
        return self.width >= WIDE

    @classmethod
    def fit(
        cls, width: int, scenarios: Iterable[str], backends: Iterable[str], most_cases: int
    ) -> Layout:
        """The layout for a terminal of this width, these names, and this many cases in a scenario."""
        status = len("(fail /) ") + 2 * max(len(str(most_cases)), 2)
        fixed = 1 + 2 + 2 + 1 + OFF_BY + 1 + BOUND + 1 + status
        if width >= WIDE:
            fixed += 1 + FLOOR + 1 + CONDITION + 2 + KERNEL
        room = max(width - fixed, 24)
        scenario = max(cell_len(name) for name in ("scenario", *scenarios))
        backend = max(cell_len(name) for name in ("backend", *backends))
        # Names yield to the worst case until that has two fifths, the scenario's before the backend's.
        names = room - max(room * 2 // 5, room - scenario - backend)
        scenario = min(scenario, max(names - backend, min(NARROW, names // 2)))
        backend = min(backend, names - scenario)
        return cls(scenario, backend, room - scenario - backend, status, width)


def opening(
    environment: Environment,
    cases: int,
    gated: Sequence[str],
    missing: Mapping[str, str],
    with_specimens: bool,
) -> Iterator[RenderableType]:
    """What is about to run, and on what.

    gated: the gated backends that are available. missing: those asked for that are not, with the reason.
    """
    torch = environment.packages.get("torch")
    parts = [
        f"bnaudit {__version__}",
        f"Python {environment.python}",
        *([f"torch {torch}"] if torch else []),
        count(environment.threads, "thread"),
        count(cases, "case"),
    ]
    yield Hanging("", ", ".join(parts))
    yield Hanging("Gating: ", ", ".join(gated) or "nothing")
    for name, reason in missing.items():
        yield Hanging("  ", Text(f"{name} is unavailable: {reason}", "bold red"))
    if with_specimens:
        yield Hanging("", SPECIMENS_KEY)
    yield ""


def heading(layout: Layout) -> Text:
    """The table's first line."""
    return _line(
        layout,
        scenario=Text("scenario"),
        backend=Text("backend"),
        worst=Text("worst case"),
        off_by=Text("off by"),
        bound=Text("×bound"),
        status=Text(" status"),
        floor=Text("floor"),
        condition=Text("condition"),
        kernel=Text("kernel"),
        style="bold",
    )


def rows(
    layout: Layout,
    results: Sequence[ResultRecord],
    cases: Mapping[str, CaseRecord],
    *,
    verbose: bool = False,
) -> list[Text]:
    """The lines of one scenario: a line per backend that is not green, then one for the green ones.

    Nothing where all are green. verbose: a line per backend, whatever its status.
    """
    groups: dict[tuple[str, str], list[ResultRecord]] = {}
    for result in results:
        groups.setdefault((result.backend, result.environment), []).append(result)
    ran: list[list[ResultRecord]] = []
    absent: list[list[ResultRecord]] = []
    for group in groups.values():
        (ran if any(r.status in RAN for r in group) else absent).append(group)
    ran.sort(key=lambda group: not group[0].gated)
    green = [group for group in ran if worst_result(group).status == "pass"]
    shown = ran if verbose else [group for group in ran if group not in green]
    lines = [_row(layout, group, cases) for group in shown]
    if verbose:
        lines += [_absent_row(layout, group) for group in absent]
    elif shown and green:
        lines.append(_green_row(layout, green))
    if lines:
        name = cases[results[0].case].scenario
        # A long name goes on beside the next rows, where there are enough of them.
        parts = textwrap.wrap(name, layout.scenario)
        if len(parts) > len(lines):
            parts = [_shorten(name, layout.scenario)]
        for position, part in enumerate(parts):
            lines[position] = Text.assemble(" ", part, lines[position][1 + len(part) :])
    return lines


def hidden_scenarios(report: Report) -> Text | None:
    """How many scenarios have no line in the table, because all is well there or because nothing ran."""
    worst: dict[str, int] = {}
    scenarios = {case.id: case.scenario for case in report.cases}
    for result in report.results:
        severity = RAN.index(result.status) if result.status in RAN else -1
        name = scenarios[result.case]
        worst[name] = max(worst.get(name, -1), severity)
    passing = sum(severity == 0 for severity in worst.values())
    silent = sum(severity < 0 for severity in worst.values())
    parts = []
    if passing:
        parts.append(f"{count(passing, 'scenario')} {'passes' if passing == 1 else 'pass'}")
    if silent:
        parts.append(f"{count(silent, 'scenario')} ran on no backend")
    if not parts:
        return None
    return Text(f" {' and '.join(parts)} (-v lists {'it' if passing + silent == 1 else 'them'})")


def findings(
    report: Report, *, verbose: bool = False, path: str | None = None
) -> list[RenderableType]:
    """The numbered findings: gated ones in full, accepted ones in a line, of each specimen only the first.

    verbose: all in full. path: where the report is, for the command that shows more.
    """
    neighbours = Neighbours(report)
    blocks: list[RenderableType] = []
    accepted: list[RenderableType] = []
    specimens: dict[str, list[Finding]] = {}
    for finding in clusters(report):
        if verbose or (finding.worst.gated and finding.worst.accepted is None):
            blocks.append(_finding(finding, neighbours, verbose, path))
        elif finding.worst.gated:
            accepted.append(_accepted(finding))
        else:
            specimens.setdefault(finding.worst.backend, []).append(finding)
    if accepted:
        blocks.append(Group(*accepted))
    if specimens:
        ordered = sorted(specimens.values(), key=lambda found: _telling(found).number)
        blocks.append(Group(*[_specimen(found, neighbours.cases) for found in ordered]))
    return blocks


def controls(report: Report) -> Iterator[RenderableType]:
    """How many controls behaved, and each that did not."""
    if not report.controls:
        yield "no control ran"
        return
    behaved = sum(control.ok for control in report.controls)
    yield f"controls {behaved}/{len(report.controls)} as expected"
    for control in report.controls:
        if not control.ok:
            duty = f"{control.backend} must {control.expected} in {control.scenario}"
            yield Hanging("  ", Text(f"{duty}: {control.observed}", "bold red"))


def counts(report: Report) -> str:
    """The line "398 of 424 ran: …", with the reason for what was unavailable."""
    summary = report.summary
    numbers = {
        "pass": summary.passed,
        "warn": summary.warn,
        "fail": summary.fail,
        "crash": summary.crash,
        "timeout": summary.timeout,
    }
    parts = [f"{number} {status}" for status, number in numbers.items() if number]
    specimens = sum(r.status == "fail" and not r.gated for r in report.results)
    if specimens:
        whose = "all" if specimens == summary.fail else f"{specimens} of them"
        failed = f"{summary.fail} fail"
        parts = [f"{p} ({whose} specimens)" if p == failed else p for p in parts]
    accepted = sum(r.accepted is not None for r in report.results)
    if accepted:
        parts.append(f"{accepted} of these accepted by the baseline")
    text = f"{summary.ran} of {summary.results} ran"
    if parts:
        text += f": {', '.join(parts)}"
    if summary.unsupported:
        text += f"; {summary.unsupported} unsupported"
    if summary.unavailable:
        text += f"; {summary.unavailable} unavailable ({_absences(report.results)})"
    return text


def verdict(report: Report) -> Text:
    """The last word: "FAIL (exit 1)"."""
    failed = any(r.gated and r.status == "fail" and r.accepted is None for r in report.results)
    inconsistent = any(record.ok is False for record in report.consistency)
    code = f"exit {report.exit_code}"
    reason = ""
    if report.verdict == "fail" and report.exit_code == 0:
        code += ": --fail-on never"
    elif report.verdict == "fail" and not failed and inconsistent:
        reason = ": a check of consistency does not hold"
    elif report.verdict == "fail" and not failed:
        code += ": --fail-on warn"
    elif report.verdict == "incomplete":
        reason = ": " + _incomplete(report)
    elif report.verdict == "untrusted":
        reason = ": a control did not behave, so nothing here can be trusted"
    elif report.verdict == "nothing-gated":
        reason = ": only specimens ran" if report.summary.ran else ": nothing ran"
    elif report.verdict == "interrupted":
        reason = ": this is what was measured until then"
    text = Text(
        f"{report.verdict.upper()} ({code})", VERDICT_STYLES.get(report.verdict, "bold red")
    )
    return text.append(reason, style="not bold")


def closing(
    report: Report, *, verbose: bool = False, path: str | None = None
) -> Iterator[RenderableType]:
    """All that follows the table, each part a renderable. path: where the report was saved."""
    hidden = hidden_scenarios(report)
    if hidden is not None and not verbose:
        yield hidden
    for finding in findings(report, verbose=verbose, path=path):
        yield ""
        yield finding
    yield ""
    yield from controls(report)
    yield from consistency(report, verbose=verbose)
    yield from gaps(report)
    for note in report.notes:
        yield Hanging("", Text(note, "yellow"))
    yield Hanging("", counts(report))
    if verbose or not report.summary.ran:
        reasons = Counter(r.reason for r in report.results if r.status == "unsupported")
        for reason, number in reasons.most_common():
            yield Hanging("  ", f"{number} unsupported: {reason or 'no reason given'}")
    yield Hanging("", verdict(report))
    yield Hanging("", Text(KEY, style="dim"))


def whole(
    report: Report, width: int, *, verbose: bool = False, path: str | None = None
) -> Iterator[RenderableType]:
    """All that a run prints, of a report that is complete. width: the terminal's."""
    cases = {case.id: case for case in report.cases}
    by_scenario: dict[str, list[ResultRecord]] = {case.scenario: [] for case in report.cases}
    for result in report.results:
        by_scenario[cases[result.case].scenario].append(result)
    sizes = Counter(case.scenario for case in report.cases)
    gated = {r.backend: None for r in report.results if r.gated and r.status != "unavailable"}
    specimens = any(not r.gated for r in report.results)
    for environment in report.environments[:1]:
        yield from opening(environment, len(cases), list(gated), report.missing, specimens)
    for other in report.environments[1:]:
        yield Hanging("", Text(f"{other.name}: {other.summary()}", "dim"))
    backends = {result.backend for result in report.results}
    layout = Layout.fit(width, by_scenario, backends, max(sizes.values(), default=0))
    lines = [
        line for own in by_scenario.values() for line in rows(layout, own, cases, verbose=verbose)
    ]
    if lines:
        yield heading(layout)
        yield from lines
    yield from closing(report, verbose=verbose, path=path)


def backend_list(
    entries: Iterable[tuple[str, str, bool, str | None, str]],
) -> RenderableType:
    """Backends: name, kind, whether it runs by default, why it is unavailable, what is its own."""
    entries = list(entries)
    width = max(len(name) for name, *_ in entries)
    blocks: list[RenderableType] = []
    for name, kind, default, reason, summary in entries:
        state = Text("available", "green") if reason is None else Text("unavailable", "yellow")
        usual = "default" if default else ""
        blocks.append(Text.assemble(f"{name:{width}}  {kind:8}  {usual:7}  ", state))
        lines = [summary] if reason is None else [summary, f"unavailable: {reason}"]
        blocks.append(Hanging("    ", *lines))
    return Group(*blocks)


def scenario_list(entries: Iterable[tuple[str, int, str]]) -> RenderableType:
    """Scenarios: name, number of cases, the first sentence of the description."""
    entries = list(entries)
    width = max((len(name) for name, *_ in entries), default=0)
    digits = max((len(str(cases)) for _, cases, _ in entries), default=0)
    lines = []
    for name, cases, description in entries:
        sentence = re.split(r"(?<=[.!?])\s", " ".join(description.split()), maxsplit=1)[0]
        lines.append(Hanging(f"{name:{width}}  {cases:{digits}}  ", sentence))
    return Group(*lines)


def examination(entries: Iterable[Entry]) -> RenderableType:
    """What bnaudit doctor found."""
    entries = list(entries)
    width = max(len(entry.topic) for entry in entries)
    lines = []
    for entry in entries:
        text = Text(entry.finding, "bold red" if entry.is_fault else "")
        if entry.remedy is not None:
            text.append(f": {entry.remedy}", "yellow")
        lines.append(Hanging(f"{entry.topic:{width}}  ", text))
    return Group(*lines)


# --- rows ------------------------------------------------------------------------------------------


def _row(layout: Layout, group: Sequence[ResultRecord], cases: Mapping[str, CaseRecord]) -> Text:
    new = [r for r in group if r.accepted is None and r.status in FAILED]
    worst = worst_result(new or group)
    case = cases[worst.case]
    ran = sum(r.status in RAN for r in group)
    same = sum(r.status == worst.status for r in group)
    word = worst.status.upper() if worst.gated and new else worst.status
    name, quantity = worst_quantity(worst)
    prefix = "" if name in ("y", "") else f"{name} "
    style = STYLES[worst.status]
    if worst.gated and worst.status != "pass" and worst.accepted is None:
        style += " bold"
    return _line(
        layout,
        backend=Text(_shorten(worst.backend, layout.backend)),
        worst=Text(prefix + brief(case, layout.worst - len(prefix))),
        off_by=Text(off_by(name, quantity)),
        bound=Text(bound(quantity)),
        status=_status(layout, f"{word} {same}/{ran}", worst.gated, style),
        floor=Text(number(None if quantity is None else quantity.floor, 2)),
        condition=Text(number(case.condition_number, 2)),
        kernel=Text(worst.kernel or "-"),
        style="" if worst.gated else "dim",
    )


def _green_row(layout: Layout, groups: Sequence[Sequence[ResultRecord]]) -> Text:
    sigmas, ratios = [], []
    for result in (r for group in groups for r in group if r.status == "pass"):
        for name, quantity in result.quantities.items():
            if name == "y" and quantity.max_sigma_error is not None:
                sigmas.append(quantity.max_sigma_error)
            if quantity.bound_ratio is not None:
                ratios.append(quantity.bound_ratio)
    names = ", ".join(group[0].backend for group in groups)
    return _line(
        layout,
        span=Text(names),
        off_by=Text(f"{number(max(sigmas), 2)} σ" if sigmas else "-"),
        bound=Text(number(max(ratios, default=None), 2)),
        status=_status(layout, "pass", any(g[0].gated for g in groups), STYLES["pass"]),
        style="",
    )


def _absent_row(layout: Layout, group: Sequence[ResultRecord]) -> Text:
    first = group[0]
    return _line(
        layout,
        backend=Text(_shorten(first.backend, layout.backend)),
        rest=Text(f"{first.status}: {first.reason or 'no reason given'}"),
        style="dim",
    )


def _status(layout: Layout, text: str, gates: bool, style: str) -> Text:
    text = f" {text}" if gates else f"({text})"
    if len(text) > layout.status:  # a long word with many cases: the word alone
        word = text.strip(" ()").partition(" ")[0]
        text = f" {word}" if gates else f"({word})"
    return Text(text, style)


def _line(
    layout: Layout,
    *,
    scenario: Text | None = None,
    backend: Text | None = None,
    worst: Text | None = None,
    span: Text | None = None,
    rest: Text | None = None,
    off_by: Text | None = None,
    bound: Text | None = None,
    status: Text | None = None,
    floor: Text | None = None,
    condition: Text | None = None,
    kernel: Text | None = None,
    style: str,
) -> Text:
    """One line of the table. span: takes the columns backend and worst; rest: all after backend."""
    both = layout.backend + 2 + layout.worst
    after = layout.worst + 1 + OFF_BY + 1 + BOUND + 2 + layout.status
    cells: list[str | Text] = [" ", _cell(scenario, layout.scenario), "  "]
    if span is not None:
        cells.append(_cell(span, both))
    else:
        cells += [_cell(backend, layout.backend), "  "]
        cells.append(_cell(worst, layout.worst) if rest is None else _cell(rest, after))
    if rest is None:
        cells += [" ", _cell(off_by, OFF_BY, right=True), " ", _cell(bound, BOUND, right=True)]
        if layout.wide:
            cells += [" ", _cell(floor, FLOOR, right=True)]
            cells += [" ", _cell(condition, CONDITION, right=True)]
        cells += [" ", _cell(status, layout.status)]
        if layout.wide:
            cells += ["  ", _cell(kernel, KERNEL)]
    line = Text.assemble(*cells, style=style, no_wrap=True)
    line.truncate(layout.width)
    line.rstrip()
    return line


def _cell(text: Text | None, width: int, *, right: bool = False) -> Text:
    cell = Text() if text is None else text.copy()
    cell.truncate(width, overflow="ellipsis")
    cell.align("right" if right else "left", width)
    return cell


def _shorten(name: str, width: int) -> str:
    """A name that keeps its telling end: a backend's variant, a plug-in's function, half of a scenario's."""
    if len(name) <= width:
        return name
    if ":" in name:
        kept = width - 1
    elif "@" in name:
        ends = (len(name) - name.rfind(sign) for sign in "-@")
        kept = next((end for end in ends if end <= width - 3), width - 1)
    else:
        kept = (width - 1) // 2
    return f"{name[: width - 1 - kept]}…{name[len(name) - kept :]}"


# --- findings --------------------------------------------------------------------------------------


def _finding(
    finding: Finding, neighbours: Neighbours, verbose: bool, path: str | None
) -> RenderableType:
    worst, case = finding.worst, finding.case
    red = worst.gated and worst.accepted is None
    word = worst.status.upper() if red else _lower(worst)
    style = f"bold {STYLES[worst.status]}" if red else "dim"
    body = [
        Text.assemble((word, style), f" {worst.backend} {case.scenario} {label(case)}".rstrip()),
        *map(Text, evidence(worst)),
    ]
    if worst.accepted is not None:
        body.append(Text(f"accepted: {worst.accepted}"))
    if worst.waiver is not None:
        body.append(Text(f"not accepted: {worst.waiver}"))
    last = []
    if worst.cause is not None:
        last.append(f"cause {worst.cause}")
    last += neighbours.comparisons(worst)
    if len(finding.results) > 1:
        last.append(f"the worst of {len(finding.results)} cases")
    if verbose and worst.kernel is not None:
        last.append(f"kernel {worst.kernel}")
    if path is not None:
        last.append(f"bnaudit show {shlex.quote(path)} {finding.number}")
    if last:
        body.append(Text(" · ".join(last)))
    if worst.detail:
        lines = worst.detail.rstrip().splitlines()
        shown = lines if verbose else lines[-DETAIL_LINES:]
        body += [Text(line.expandtabs(4), style="dim") for line in shown]
    return Hanging(Text(f"[{finding.number}] ", "bold"), *body)


def _lower(result: ResultRecord) -> str:
    """The status of what does not make the report red: in parentheses that of a specimen."""
    return result.status if result.gated else f"({result.status})"


def _accepted(finding: Finding) -> RenderableType:
    worst, case = finding.worst, finding.case
    text = (
        f"{worst.status} {worst.backend} {case.scenario} {label(case)}: accepted: {worst.accepted}"
    )
    if len(finding.results) > 1:
        text += f" (the worst of {len(finding.results)} cases)"
    return Hanging(Text(f"[{finding.number}] ", style="dim"), Text(text, style="dim"))


def _specimen(found: Sequence[Finding], cases: Mapping[str, CaseRecord]) -> RenderableType:
    finding = _telling(found)
    first = finding.results[0]
    case = cases[first.case]
    text = f"({first.status}) {first.backend} {case.scenario} {label(case)}"
    fault = next(evidence(first), None)
    if fault is not None:
        text += f": {fault.partition(';')[0]}"
    if len(found) > 1:
        text += f" (and {count(len(found) - 1, 'more finding')}, -v)"
    return Hanging(Text(f"[{finding.number}] ", style="dim"), Text(text, style="dim"))


def _telling(found: Sequence[Finding]) -> Finding:
    """The first in which y is off, which says more than a statistic."""
    return next((f for f in found if worst_quantity(f.results[0])[0] == "y"), found[0])


# --- numbers and names -----------------------------------------------------------------------------


def _absences(results: Sequence[ResultRecord]) -> str:
    backends: dict[str, list[str]] = {}
    for result in results:
        if result.status == "unavailable":
            names = backends.setdefault(result.reason or "no reason given", [])
            if result.backend not in names:
                names.append(result.backend)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in backends.items())


def _incomplete(report: Report) -> str:
    gated = [r for r in report.results if r.gated and r.accepted is None]
    words = {"crash": "died", "timeout": "took too long"}
    died = Counter((r.backend, words[r.status]) for r in gated if r.status in words)
    died.update((record.backend, "died") for record in report.consistency if record.died)
    if died:
        return ", ".join(f"{name} {what} in {count(n, 'case')}" for (name, what), n in died.items())
    if report.missing:
        return f"asked for and unavailable: {', '.join(report.missing)}"
    return f"asked for and checked in no case: {', '.join(report.unmade)}"


def gaps(report: Report) -> Iterator[RenderableType]:
    """What a gated backend was asked for and did not give: all cases, or some of a case's quantities."""
    cases = {case.id: case for case in report.cases}
    gated: dict[str, list[ResultRecord]] = {}
    for result in report.results:
        if result.gated and result.status != "unavailable":
            gated.setdefault(result.backend, []).append(result)
    for backend, results in gated.items():
        measured = [r for r in results if r.quantities]
        if report.summary.ran and all(r.status == "unsupported" for r in results):
            reasons = dict.fromkeys(r.reason or "no reason given" for r in results)
            yield Hanging("", Text(f"{backend} ran in no case: {'; '.join(reasons)}", "yellow"))
        absent = Counter(
            name
            for result in measured
            for name in _owed(cases[result.case])
            if name not in result.quantities
        )
        if absent:
            parts = [
                f"{name} in {n} of {count(len(measured), 'case')}" for name, n in absent.items()
            ]
            yield Hanging("", f"not judged, because {backend} did not return them: {listed(parts)}")


def _owed(case: CaseRecord) -> Iterator[str]:
    """Quantities beside y that a BatchNorm computes in such a case."""
    if case.mode == "training" and case.n > 0 and case.momentum != 0:
        yield "running_mean"
        yield "running_var"
    if case.backward:
        yield "grad_input"
