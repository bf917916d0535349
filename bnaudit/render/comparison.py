"""Comparison → what a person reads of it: on a terminal, and as Markdown for a pull request.

Pure functions of the comparison and of NEW's cases. Regressions are listed one by one; of what is no
regression, the first few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import RenderableType
from rich.text import Text

from bnaudit.compare import KINDS, Change, Comparison, Kind, QuantityChange, Side
from bnaudit.render.evidence import MANY_ULPS
from bnaudit.render.words import Hanging, count, label, markdown_table, markdown_text, number
from bnaudit.report import CaseRecord, Quantity
from bnaudit.verdict import FAILED

FEW = 10
"""Rows of each kind, and names of cases and backends, where all of them would hide the rest."""

WIDTHS = (12, 24, 18)
"""Of the terminal's columns for quantity, off by and ×bound."""

COLUMNS = ("scenario", "backend", "case", "quantity", "off by", "×bound", "status", "remark")
"""Of a table in Markdown."""

NO_LONGER = "checks that no longer hold"

STYLES = {
    "newly failing": "bold red",
    "regressed": "red",
    "semantics changed": "magenta",
    "newly unavailable": "yellow",
    "newly unsupported": "yellow",
    "newly running": "cyan",
    "newly passing": "green",
    "improved": "green",
    "changed within bounds": "dim",
}

VERDICTS = {
    "regression": "NEW is worse",
    "incomplete": "some cases have other inputs and were not compared",
    "nothing-in-common": "no gated result has a counterpart in the other report (--map OLD=NEW pairs others)",
    "changed": "no regression",
    "same": "no change",
}


def comparison(found: Comparison, cases: Mapping[str, CaseRecord]) -> Iterator[RenderableType]:
    """All lines that a terminal shows. cases: NEW's, by id."""
    yield Hanging("OLD: ", _side(found.old))
    yield Hanging("NEW: ", _side(found.new))
    for line in _remarks(found):
        yield Hanging("  ", Text(line, "yellow"))
    for kind, changes in _by_kind(found):
        shown = _shown(changes)
        yield ""
        yield Text.assemble((kind, STYLES[kind]), f" {len(changes)}")
        place = None
        for alike in _alike(shown):
            first = alike[0]
            if (first.scenario, _backend(first)) != place:
                place = first.scenario, _backend(first)
                yield Hanging(" ", Text(", ".join(place), "bold"))
            for change in alike:
                yield Hanging("  ", label(cases[change.case]))
            yield Hanging("    ", Text(_line(_cells(first)), "" if first.gated else "dim"))
            if details := "; ".join(_details(first)):
                yield Hanging("    ", Text(details, "dim"))
        if len(shown) < len(changes):
            yield f" and {len(changes) - len(shown)} more (--json has them)"
    for heading, lines in _checks(found):
        yield ""
        yield Text(f"{heading} {len(lines)}", "red" if heading == NO_LONGER else "green")
        yield from (Hanging("  ", line) for line in lines)
    yield ""
    yield Hanging("", _counts(found))
    style = "bold red" if found.exit_code else "bold green"
    code = f"exit {found.exit_code}"
    if (found.verdict, found.exit_code) in (("regression", 0), ("changed", 1)):
        code += f": --fail-on {found.fail_on}"
    verdict = Text(f"{found.verdict.upper()} ({code})", style)
    yield Hanging("", verdict.append(f": {_verdict(found)}", style="not bold"))


def markdown(found: Comparison, cases: Mapping[str, CaseRecord]) -> str:
    """The same as GitHub's Markdown."""
    lines = [
        f"## bnaudit compare: {found.verdict}",
        "",
        f"{_verdict(found)[0].upper()}{_verdict(found)[1:]}. {_counts(found)}.",
        "",
        f"- OLD: {markdown_text(_side(found.old))}",
        f"- NEW: {markdown_text(_side(found.new))}",
        *(f"- {markdown_text(line)}" for line in _remarks(found)),
    ]
    for kind, changes in _by_kind(found):
        shown = _shown(changes)
        lines += ["", f"### {kind[0].upper()}{kind[1:]}: {len(changes)}", ""]
        rows = []
        for change in shown:
            case = label(cases[change.case])
            remark = "; ".join(_details(change))
            cells = change.scenario, _backend(change), case, *_cells(change), remark
            rows.append([markdown_text(cell) for cell in cells])
        lines += markdown_table(COLUMNS, rows)
        if len(shown) < len(changes):
            lines += ["", f"and {len(changes) - len(shown)} more"]
    for heading, texts in _checks(found):
        lines += ["", f"### {heading[0].upper()}{heading[1:]}: {len(texts)}", ""]
        lines += [f"- {markdown_text(text)}" for text in texts]
    return "\n".join(lines) + "\n"


# --- rows ------------------------------------------------------------------------------------------


def _shown(changes: Sequence[Change]) -> list[Change]:
    """Every gated regression, and the first few of the others."""
    told = [change for change in changes if change.gated and change.regression]
    others = [change for change in changes if not (change.gated and change.regression)]
    return told + others[:FEW]


def _by_kind(found: Comparison) -> Iterator[tuple[Kind, list[Change]]]:
    for kind in KINDS:
        changes = [change for change in found.changes if change.kind == kind]
        if changes:
            yield kind, changes


def _checks(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Checks and controls, by whether they hold in OLD or in NEW."""
    for heading, regression in ((NO_LONGER, True), ("checks that hold now", False)):
        lines = [
            f"{check.backend} {check.check}, {check.case}"
            + (f": {check.reason}" if check.reason else "")
            for check in found.checks
            if check.regression == regression
        ]
        if lines:
            yield heading, lines


def _alike(changes: Sequence[Change]) -> list[list[Change]]:
    """Changes with one line of numbers and one remark, so that only their cases differ; by backend."""
    groups: dict[tuple[str, str], dict[tuple[str, ...], list[Change]]] = {}
    for change in changes:
        group = groups.setdefault((change.scenario, _backend(change)), {})
        group.setdefault((*_cells(change), *_details(change)), []).append(change)
    return [alike for group in groups.values() for alike in group.values()]


def _backend(change: Change) -> str:
    name = change.backend if change.gated else f"({change.backend})"
    before = [] if change.old_backend == change.backend else [change.old_backend]
    if change.old_environment != change.environment:
        name += f" in {change.environment}"
        before = [f"{change.old_backend} in {change.old_environment}"]
    return f"{name}, was {before[0]}" if before else name


def _cells(change: Change) -> tuple[str, str, str, str]:
    """Quantity, off by, ×bound and status."""
    if not change.quantities:
        return "-", "-", "-", _statuses(change.old_status, change.new_status, change.gated)
    worst = change.quantities[0]
    bounds = [number(quantity.bound_ratio, 2) for quantity in (worst.old, worst.new)]
    statuses = _statuses(worst.old.status, worst.new.status, change.gated)
    return worst.name, _off_by(worst), _arrow(*bounds), statuses


def _details(change: Change) -> Iterator[str]:
    """What the row has no room for."""
    if not change.quantities and change.reason is not None:
        yield change.reason
    also = [q.name for q in change.quantities[1:] if q.kind != "changed within bounds"]
    if also:
        yield f"also {', '.join(also)}"
    if change.kind == "semantics changed":
        yield "another rule for the running statistics; those of the batch are as good as before"
    elif change.regression and change.cause is not None:
        yield change.cause
    if change.old_kernel != change.new_kernel:
        yield f"kernel {change.old_kernel or '-'} → {change.new_kernel or '-'}"


def _statuses(old: str, new: str, gated: bool) -> str:
    return _arrow(*(s.upper() if gated and s in FAILED else s for s in (old, new)))


def _off_by(quantity: QuantityChange) -> str:
    """Both deviations in the same unit: y in standard deviations, statistics in ulp, others as they are."""
    both = quantity.old, quantity.new
    if any(q.nonfinite for q in both):
        return _arrow(*(_nonfinite(q) for q in both))
    sigmas = [q.max_sigma_error for q in both]
    ulps = [q.max_ulp_error for q in both]
    if quantity.name == "y" and None not in sigmas:
        return f"{_arrow(*(number(value, 2) for value in sigmas))} σ"
    few = all(value is not None and value <= MANY_ULPS for value in ulps)
    if quantity.name not in ("y", "grad_input") and few:
        return f"{_arrow(*(number(value, 2) for value in ulps))} ulp"
    return _arrow(*(number(q.max_abs_error, 2) for q in both))


def _nonfinite(quantity: Quantity) -> str:
    if quantity.nonfinite and quantity.worst is not None:
        return number(quantity.worst.value, 2)
    return number(quantity.max_abs_error, 2)


def _arrow(old: str, new: str) -> str:
    return f"{old} → {new}" if old != new else old


def _line(cells: Sequence[str]) -> str:
    *columns, status = cells
    padded = (
        cell + " " * (width - cell_len(cell)) for cell, width in zip(columns, WIDTHS, strict=True)
    )
    return "  ".join([*padded, status])


# --- sentences -------------------------------------------------------------------------------------


def _side(side: Side) -> str:
    return f"{side.command} (bnaudit {side.bnaudit_version}, {side.started}, {side.verdict})"


def _remarks(found: Comparison) -> Iterator[str]:
    """Caveats first, then what was not compared."""
    for caveat in found.caveats:
        yield f"{caveat.what}: {caveat.old or 'none'} → {caveat.new or 'none'}"
    yield from found.notes
    for error in found.errors:
        yield (
            f"error: {error.case} has other inputs ({error.old_sha256[:12]} → {error.new_sha256[:12]}) "
            "and was not compared"
        )
    for where, side in (("OLD", found.old), ("NEW", found.new)):
        if side.only_cases:
            yield f"only in {where}: {_names('case', side.only_cases)}"
        if side.only_backends:
            yield f"only in {where}: {_names('backend', side.only_backends)}"


def _names(noun: str, names: Sequence[str]) -> str:
    """As many as there is room for; of more cases, how many there are of each scenario."""
    text = f"{count(len(names), noun)}: "
    if len(names) <= FEW:
        return text + ", ".join(names)
    counts = Counter(name.partition("/")[0] for name in names)
    return text + ", ".join(f"{n} of {scenario}" for scenario, n in counts.items())


def _counts(found: Comparison) -> str:
    parts = [f"{number} {kind}" for kind, number in found.counts.items() if number]
    text = (
        f"{found.compared} results compared: {', '.join([*parts, f'{found.unchanged} unchanged'])}"
    )
    identical = sum(change.statistics_identical for change in found.changes)
    if identical:
        text += f"; in {identical} of the changed ones all statistics are bit-identical"
    return text


def _verdict(found: Comparison) -> str:
    text = VERDICTS[found.verdict]
    regressions = [change for change in found.changes if change.regression]
    gated = sum(change.gated for change in regressions)
    if gated:
        backends = dict.fromkeys(c.backend for c in regressions if c.gated)
        text += f" in {count(gated, 'result')} of {', '.join(backends)}"
    elif found.verdict == "regression":
        text += ": a check no longer holds"
    elif regressions:
        text += f" but of {len(regressions)} specimens' results"
    return text
