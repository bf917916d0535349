"""Report → Markdown for a job's summary or a comment, and annotations of GitHub Actions.

Pure functions of the report. The verdict stands first, then what is not green; the rest is collapsed.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence

from bnaudit.findings import Finding, clusters, fails, worst_quantity
from bnaudit.render.console import counts, verdict
from bnaudit.render.evidence import Neighbours, bound, evidence, off_by, place
from bnaudit.render.words import count, label, markdown_table, markdown_text
from bnaudit.report import Report, ResultRecord
from bnaudit.verdict import RAN

ANNOTATIONS = 10
"""What GitHub shows of one step's annotations of a kind."""

REASONS = 20
"""Reasons for what did not run that are listed; the JSON has all."""

LONGEST = 2000
"""Characters of one cell or paragraph: what follows is in the JSON."""


def markdown(report: Report, most_bytes: int | None = None) -> str:
    """The report as GitHub's Markdown; of most_bytes in UTF-8 at most, unless the verdict alone has more."""
    blocks = [*_red(report), *_collapsed(report)]
    text = _verdict(report)
    for position, block in enumerate(blocks):
        longer = f"{text}\n{block}"
        rest = f"\n{count(len(blocks) - position, 'more part')} left out for want of room.\n"
        if most_bytes is not None and len(f"{longer}{rest}".encode()) > most_bytes:
            return text + rest
        text = longer
    return text


def workflow_commands(report: Report) -> list[str]:
    """Commands that make GitHub Actions show findings at their file and line, ANNOTATIONS at most."""
    found: list[str] = []
    for finding in clusters(report):
        if fails(report, finding.worst) and len(found) < ANNOTATIONS:
            file, line = place(report, finding.worst.backend, finding.case)
            title = f"{finding.worst.status} {finding.worst.backend} {finding.case.scenario}"
            message = "\n".join((label(finding.case), *evidence(finding.worst)))
            properties = f"file={_property(file)},line={line},title={_property(title)}"
            found.append(f"::error {properties}::{_data(message)}")
    return found


def _data(text: str) -> str:
    for sign, escape in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(sign, escape)
    return _printable(text)  # other signs that end a line somewhere would end the command


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _verdict(report: Report) -> str:
    lines = [f"## bnaudit: {markdown_text(verdict(report).plain)}", "", f"{_text(counts(report))}."]
    behaved = sum(control.ok for control in report.controls)
    lines += ["", f"Controls: {behaved} of {len(report.controls)} as expected."]
    for control in report.controls:
        if not control.ok:
            duty = f"{control.backend} must {control.expected} in {control.scenario}"
            lines.append(f"- {_text(f'{duty}: {control.observed}')}")
    lines += [f"- {_text(f'{name} is unavailable: {why}')}" for name, why in report.missing.items()]
    lines += [f"- {_text(f'{check} was asked for and made in no case')}" for check in report.unmade]
    lines += [f"- {_text(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _red(report: Report) -> Iterator[str]:
    """A table of what fails, then the evidence of each."""
    neighbours = Neighbours(report)
    red = [finding for finding in clusters(report) if fails(report, finding.worst)]
    if red:
        yield _table(red)
    broken = [r for r in report.consistency if r.ok is False]
    if broken:
        rows = [(r.check, r.backend, r.case, r.reason or "") for r in broken]
        yield _rows(("check that does not hold", "backend", "case", "reason"), rows)
    for finding in red:
        yield _evidence(finding, neighbours)


def _table(found: Sequence[Finding]) -> str:
    rows = []
    for finding in found:
        worst = finding.worst
        name, quantity = worst_quantity(worst)
        off = off_by(name, quantity)
        status = (
            worst.status if worst.accepted is not None or not worst.gated else worst.status.upper()
        )
        rows.append(
            (
                str(finding.number),
                finding.case.scenario,
                worst.backend,
                label(finding.case),
                off if name in ("y", "") else f"{name} {off}",
                bound(quantity),
                status,
                worst.cause or "",
                str(len(finding.results)),
            )
        )
    return _rows(
        ("#", "scenario", "backend", "worst case", "off by", "×bound", "status", "cause", "cases"),
        rows,
    )


def _evidence(finding: Finding, neighbours: Neighbours) -> str:
    worst = finding.worst
    title = f"[{finding.number}] {worst.status} {worst.backend} {finding.case.scenario}"
    lines = [*evidence(worst)]
    lines += [text for text in (worst.waiver,) if text]
    lines += neighbours.comparisons(worst)
    parts = [f"- {_text(line)}" for line in lines]
    if worst.detail:
        parts += ["", _fenced(worst.detail[-LONGEST:])]
    return _details(title, "\n".join(parts))


def _collapsed(report: Report) -> Iterator[str]:
    others = [finding for finding in clusters(report) if not fails(report, finding.worst)]
    accepted = [finding for finding in others if finding.worst.accepted is not None]
    if accepted:
        rows = [
            (
                str(finding.number),
                finding.case.scenario,
                finding.worst.backend,
                label(finding.case),
                finding.worst.status,
                finding.worst.accepted or "",
                str(len(finding.results)),
            )
            for finding in accepted
        ]
        heading = ("#", "scenario", "backend", "worst case", "status", "accepted because", "cases")
        yield _details(
            f"Accepted by the baseline: {count(len(rows), 'finding')}", _rows(heading, rows)
        )
    warnings = [finding for finding in others if finding.worst.gated and not finding.worst.accepted]
    if warnings:
        yield _details(f"Warnings: {count(len(warnings), 'finding')}", _table(warnings))
    specimens = [finding for finding in others if not finding.worst.gated]
    if specimens:
        title = f"Specimens, which gate nothing: {count(len(specimens), 'finding')}"
        yield _details(title, _table(specimens))
    yield _details("All backends", _by_backend(report.results))
    absent = Counter(
        (r.status, r.backend, r.reason or "no reason given")
        for r in report.results
        if r.status not in RAN
    )
    if absent:
        most = absent.most_common(REASONS)
        text = _rows(
            ("status", "backend", "reason", "cases"), [(*key, str(number)) for key, number in most]
        )
        rest = len(absent) - len(most)
        yield _details("What did not run", text + (f"\nand {rest} more reasons" if rest else ""))
    lines = [
        f"- {_text(f'{one.name}: {one.summary()}, {one.cpu.isa}, {one.threads} threads')}"
        for one in report.environments
    ]
    lines.append(f"- {_text(report.command)} (bnaudit {_text(report.bnaudit_version)})")
    yield _details("Environment", "\n".join(lines))


def _by_backend(results: Sequence[ResultRecord]) -> str:
    tally: dict[str, Counter[str]] = {}
    for result in results:
        name = result.backend if result.gated else f"({result.backend})"
        tally.setdefault(name, Counter())[result.status] += 1
    statuses = (*RAN, "unsupported", "unavailable")
    rows = [(name, *(str(n[status] or "") for status in statuses)) for name, n in tally.items()]
    return _rows(("backend", *statuses), rows)


def _details(summary: str, text: str) -> str:
    # The tags' own line is HTML, and the blank lines make Markdown of what follows.
    title = html.escape(" ".join(_printable(summary).split()))
    return f"<details><summary>{title}</summary>\n\n{text.rstrip()}\n\n</details>\n"


def _rows(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = markdown_table(heading, [[_text(cell) for cell in row] for row in rows])
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return markdown_text(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"
