"""Report → one HTML page that needs no network: the verdict and the findings, a map, plots and every result.

What the page says without scripts is written here; `assets/report.js` draws the rest from the records that
are embedded as JSON. The plots are Observable Plot's: log-log dots with rules, ticks and tips in a few
lines, as SVG, which prints, follows the theme's colours and can be tested. Plot and the D3 that it stands
on are 0.5 MB; canvas libraries of a tenth of that would need a scatter plot of our own.

Nothing of a report becomes markup: text is escaped here, is text nodes there, and the page's content
security policy runs no scripts but the page's own, by their digests, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from io import StringIO
from string import Template
from typing import Any, get_args

from rich.console import Console, RenderableType

from bnaudit.findings import worst_quantity
from bnaudit.render import console
from bnaudit.render.evidence import off_by
from bnaudit.render.words import label, number
from bnaudit.report import (
    CaseRecord,
    DisagreementRecord,
    Environment,
    Quantity,
    Report,
    ResultRecord,
    Status,
    plain_number,
)

SCRIPTS = ("d3.min.js", "plot.umd.min.js", "report.js")
"""The page's scripts, in the order in which they run."""

STATUSES: Sequence[str] = get_args(Status)

UNFOLDED = 6
"""Findings of gated backends that are read at once; the others unfold."""

LINES = 5
"""Lines of a finding that are read at once; what unfolds is a traceback."""

LISTED = 200
"""Disagreements and broken checks that the page lists at most; the JSON report has all."""

HEADING = re.compile(r"\[(\d+)\] (\S+) (.*)")
"""A finding's first line: number, status, where."""

INVISIBLE = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}"
)
"""Control characters, which HTML does not allow."""

CASE_FIELDS = (
    *("id", "scenario", "shape", "dtype", "n", "condition_number", "mode", "backward"),
    *(
        "memory_format",
        "eps",
        "momentum",
        "steps",
        "seed",
        "input",
        "affine",
        "running",
        "grad_output",
    ),
    *("param_dtype", "thresholds", "file", "line", "key", "input_sha256"),
)
"""Fields of a case that the page shows as the report has them."""

RESULT_FIELDS = (
    *("backend", "environment", "status", "label", "reason", "cause", "finding", "gated", "kernel"),
    *("seconds", "detail"),
)

QUANTITY_FIELDS = (
    *("status", "max_abs_error", "max_sigma_error", "max_ulp_error", "bound_ratio", "tight_ratio"),
    *("floor", "nonfinite", "reason", "histogram"),
)


def html(report: Report) -> str:
    """The whole page. It is read with and without scripts; filters, map and plots need them."""
    scripts = [_asset(name) for name in SCRIPTS]
    sections = {
        "title": _text(f"bnaudit: {report.verdict}"),
        "policy": _policy(scripts),
        "style": _asset("report.css"),
        "verdict": _text(report.verdict),
        "word": _text(console.verdict(report).plain),
        "counts": _text(console.counts(report)),
        "facts": _definitions(_facts(report)),
        "tally": _tally(report.results),
        "findings": _findings(report),
        "controls": _controls(report),
        "consistency": _consistency(report),
        "caveats": _caveats(report),
        "environments": "".join(map(_environment, report.environments)),
        "licenses": _text(_asset("licenses.txt")),
        "data": _json(_data(report)),
        "scripts": "".join(f"<script>{script}</script>\n" for script in scripts),
    }
    return Template(_asset("report.html")).substitute(sections)


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )


# --- the data --------------------------------------------------------------------------------------


def _data(report: Report) -> dict[str, Any]:
    """What the script shows, as tables: a name for each column, once, and rows."""
    quantities = list(dict.fromkeys(name for r in report.results for name in r.quantities))
    positions = {case.id: position for position, case in enumerate(report.cases)}
    return {
        "quantities": quantities,
        "cases": _table(["label", *CASE_FIELDS], map(_case_row, report.cases)),
        "results": _table(
            ["case", *RESULT_FIELDS, "quantity", "off_by", "quantities"],
            (_result_row(result, positions, quantities) for result in report.results),
        ),
        "fields": ["name", *QUANTITY_FIELDS, "index", "value", "reference"],
    }


def _table(columns: Sequence[str], rows: Iterable[list[Any]]) -> dict[str, Any]:
    return {"columns": columns, "rows": list(rows)}


def _case_row(case: CaseRecord) -> list[Any]:
    record = case.model_dump(mode="json", include=set(CASE_FIELDS))
    return [label(case), *(record[name] for name in CASE_FIELDS)]


def _result_row(
    result: ResultRecord, positions: Mapping[str, int], quantities: Sequence[str]
) -> list[Any]:
    record = result.model_dump(mode="json", include=set(RESULT_FIELDS))
    name, worst = worst_quantity(result)
    return [
        positions[result.case],
        *(record[field] for field in RESULT_FIELDS),
        name,
        off_by(name, worst),
        [_quantity_row(quantities.index(key), q) for key, q in result.quantities.items()],
    ]


def _quantity_row(name: int, quantity: Quantity) -> list[Any]:
    metrics = [_short(getattr(quantity, field)) for field in QUANTITY_FIELDS]
    worst = quantity.worst
    if worst is None:
        return [name, *metrics, None, None, None]
    return [name, *metrics, worst.index, *map(plain_number, (worst.value, worst.reference))]


def _short(value: Any) -> Any:
    """A measured number with the digits that are read, and some to round them by; anything else as it is."""
    return plain_number(float(f"{value:.6g}")) if isinstance(value, float) else value


def _json(value: Any) -> str:
    """JSON that is safe within a script element: without <, > and &, and in ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


# --- what is read without scripts ------------------------------------------------------------------


def _facts(report: Report) -> dict[str, str]:
    gated = dict.fromkeys(
        r.backend for r in report.results if r.gated and r.status != "unavailable"
    )
    facts = {
        "Gating": ", ".join(gated) or "nothing",
        "Started": f"{report.started}, took {number(report.duration_seconds, 3)}\N{NO-BREAK SPACE}s",
        "Command": report.command,
        "Version": f"bnaudit {report.bnaudit_version}",
    }
    for name, reason in report.missing.items():
        facts[f"Missing: {name}"] = reason
    return facts


def _tally(results: Iterable[ResultRecord]) -> str:
    """Counts of the statuses, of gated backends and of specimens, under a bar of their shares."""
    counts: Counter[tuple[bool, str]] = Counter((r.gated, r.status) for r in results)
    text = ""
    for gated, name in ((True, "gated"), (False, "(specimens)")):
        used = {s: counts[gated, s] for s in STATUSES if counts[gated, s]}
        if used:
            bar = "".join(f'<i class="{s}" style="flex-grow:{n}"></i>' for s, n in used.items())
            words = "".join(
                f'<span>{n} <span class="status {s}">{s}</span></span>' for s, n in used.items()
            )
            text += f"<dt>{name}</dt><dd><div>{bar}</div><p>{words}</p></dd>"
    return text


def _findings(report: Report) -> str:
    """The findings in the terminal's words; those of specimens folded away."""
    gated: list[str] = []
    specimens: list[str] = []
    for block in console.findings(report, verbose=True):
        first, *rest = _plain(block).splitlines()
        found = HEADING.match(first)
        if found is None:
            continue
        finding, word, where = found.groups()
        status = word.strip("()").lower()
        text = "".join(f"<p>{_text(line)}</p>" for line in rest[:LINES])
        if len(rest) > LINES:
            text += f"<details><summary>more</summary><pre>{_text(chr(10).join(rest[LINES:]))}</pre></details>"
        item = (
            f'<li class="finding {status}" id="finding-{finding}"><h3><span class="status {status}">'
            f'{_text(word)}</span> <b class="number">{finding}</b> {_text(where)}</h3>{text}</li>'
        )
        (specimens if word.startswith("(") else gated).append(item)
    first = "".join(gated[:UNFOLDED])
    text = f"<ol>{first}</ol>" if gated else "<p>No gated backend has a finding.</p>"
    for kind, items, words in (
        ("gated", gated[UNFOLDED:], "more of gated backends"),
        ("specimens", specimens, "of specimens, which deviate by design and gate nothing"),
    ):
        if items:
            text += (
                f'<details class="{kind}"><summary>{len(items)} {words}</summary>'
                f"<ol>{''.join(items)}</ol></details>"
            )
    return text


def _controls(report: Report) -> str:
    words, *_ = map(_plain, console.controls(report))
    rows = [
        [
            control.scenario,
            control.backend,
            f"must {control.expected}",
            control.observed,
            control.ok,
        ]
        for control in sorted(report.controls, key=lambda control: control.ok)
    ]
    table = _rows(("scenario", "backend", "expected", "observed"), rows)
    if not rows:
        return f"<p>{_text(words)}</p>"
    misbehaved = "" if all(control.ok for control in report.controls) else " open"
    return f"<details{misbehaved}><summary>{_text(words)}</summary>{table}</details>"


def _consistency(report: Report) -> str:
    """Which checks do not hold, and how far gated backends are apart."""
    labels = {case.id: f"{case.scenario} {label(case)}" for case in report.cases}
    broken = [
        [r.check, r.backend, labels[r.case], r.reason or "no reason given", False]
        for r in report.consistency
        if r.ok is False
    ]
    apart = [
        [" and ".join(r.backends), r.quantity, labels[r.case], _difference(r), False]
        for r in sorted(report.disagreements, key=lambda r: -r.ratio)
        if not r.ratio <= 1
    ]
    text = ""
    if report.consistency:
        made = sum(r.ok is not None for r in report.consistency)
        words = f"{made - len(broken)} of {made} checks hold"
        text += _folded(words, ("check", "backend", "case", "reason"), broken)
    if report.disagreements:
        words = f"gated backends disagree in {len(apart)} of {len(report.disagreements)} cases"
        text += _folded(words, ("backends", "quantity", "case", "differ by"), apart)
    return text or "<p>No checks were made, and there are no two gated backends to compare.</p>"


def _difference(record: DisagreementRecord) -> str:
    times = number(record.ratio, 2)
    return f"{number(record.max_abs_difference, 3)}, {times} times as much as two good ones"


def _folded(words: str, columns: Sequence[str], rows: Sequence[list[Any]]) -> str:
    if not rows:
        return f"<p>{words}</p>"
    rest = f"<p>and {len(rows) - LISTED} more</p>" if len(rows) > LISTED else ""
    table = _rows(columns, rows[:LISTED])
    return f"<details><summary>{words}</summary>{table}{rest}</details>"


def _caveats(report: Report) -> str:
    """What was asked for and not judged, and why."""
    reasons = Counter(r.reason for r in report.results if r.status == "unsupported")
    items = [
        *map(_plain, console.gaps(report)),
        *(f"{n} unsupported: {why or 'no reason given'}" for why, n in reasons.most_common()),
    ]
    text = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<h3>Not judged</h3><ul>{text}</ul>" if text else ""


def _environment(environment: Environment) -> str:
    record = environment.model_dump(mode="json")
    facts = {
        name: _words(value) for name, value in record.items() if name not in ("name", "devices")
    }
    for device in environment.devices:
        facts[device.name] = _words(device.model_dump(mode="json", exclude={"name"}))
    return f"<h3>{_text(environment.name)}</h3>{_definitions(facts)}"


def _words(value: Any) -> str:
    """A value of the report as words: "torch 2.13.0, numpy 2.4.6" for packages."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def _rows(columns: Sequence[str], rows: Iterable[list[Any]]) -> str:
    """A table; the last value of each row says whether all is well."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = ""
    for *cells, ok in rows:
        mark = "pass" if ok else "fail"
        first, *others = (f"{_text(str(cell))}</td>" for cell in cells)
        body += f'<tr><td><span class="mark {mark}">{mark}</span> {first}'
        body += "".join(f"<td>{other}" for other in others) + "</tr>"
    return (
        f'<div class="scroll"><table class="list"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _definitions(facts: Mapping[str, str]) -> str:
    pairs = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _plain(renderable: RenderableType) -> str:
    """What the terminal would show, on as few lines as it has paragraphs."""
    lines = Console(file=StringIO(), width=1_000_000, color_system=None, legacy_windows=False)
    with lines.capture() as capture:
        lines.print(renderable, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return capture.get().rstrip("\n")


def _text(text: str) -> str:
    return escape(text.translate(INVISIBLE))
