"""All that a report knows of one result, for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bnaudit.render.console import STYLES
from bnaudit.render.evidence import Neighbours, bound, evidence, off_by, place
from bnaudit.render.words import Hanging, count, label, listed, number
from bnaudit.report import CaseRecord, Report, ResultRecord

WIDTH = 18
"""Of the names before the values."""


def detail(
    report: Report, result: ResultRecord, others: Sequence[ResultRecord] = ()
) -> Iterator[RenderableType]:
    """The result with its case, quantities, worst elements, environment and neighbours.

    others: results that are the same finding.
    """
    case = next(case for case in report.cases if case.id == result.case)
    style = STYLES.get(result.status, "dim")
    head = Text() if result.finding is None else Text(f"[{result.finding}] ", "bold")
    word = result.status.upper() if result.gated else f"({result.status})"
    head.append(word, f"bold {style}")
    head.append(f" {result.backend} {case.scenario} {label(case)}")
    yield Hanging("", head)
    for line in evidence(result):
        yield Hanging("    ", line)
    yield ""
    for name, value in _facts(report, result, case):
        yield Hanging(f"{name:{WIDTH}}", value)
    if result.quantities:
        yield ""
        yield _quantities(result)
        yield ""
        yield from _worst_elements(result)
    if result.detail:
        yield ""
        for line in result.detail.rstrip().splitlines():
            yield Hanging("    ", Text(line.expandtabs(4), "dim"))
    if others:
        yield ""
        yield f"also in {count(len(others), 'other case')} of this finding:"
        for other in others:
            yield Hanging("    ", f"{other.case}: {other.reason or other.status}")


def _facts(report: Report, result: ResultRecord, case: CaseRecord) -> Iterator[tuple[str, str]]:
    """Everything with one value, by name; what is not known is left out."""
    environment = next((e for e in report.environments if e.name == result.environment), None)
    source = place(report, result.backend, case)
    facts: dict[str, Any] = {
        "status": result.status if result.gated else f"{result.status} (gates nothing)",
        "label": result.label,
        "cause": result.cause,
        "reason": result.reason,
        "accepted": result.accepted,
        "not accepted": result.waiver,
        "nearby": "; ".join(Neighbours(report).comparisons(result, most=None)) or None,
        "kernel": result.kernel,
        "seconds": None if result.seconds is None else number(result.seconds, 3),
        "declarations": result.declarations,
        "case": case.id,
        "scenario": f"{case.file}:{case.line}",
        "plug-in": f"{source.file}:{source.line}" if result.backend in report.places else None,
        "input": case.input,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "memory format": case.memory_format,
        "mode": case.mode + (" with gradients" if case.backward else ""),
        "eps": case.eps,
        "momentum": "null: cumulative average" if case.momentum is None else case.momentum,
        "steps": case.steps,
        "seed": case.seed,
        "affine": case.affine,
        "running": case.running,
        "grad_output": case.grad_output if case.backward else None,
        "param_dtype": case.param_dtype,
        "thresholds": case.thresholds or None,
        "n": f"{case.n} values a channel",
        "condition number": None
        if case.condition_number is None
        else number(case.condition_number, 4),
        "input sha256": case.input_sha256,
        "key": case.key,
    }
    if environment is not None:
        facts |= {
            "environment": f"{environment.name}: {environment.summary()}",
            "platform": environment.platform,
            "processor": environment.cpu.model,
            "instruction sets": environment.cpu.isa,
            "threads": environment.threads,
            "BLAS": environment.blas,
            "devices": listed([device.name for device in environment.devices])
            if environment.devices
            else None,
            "flags": environment.flags or None,
        }
    for name, value in facts.items():
        if value is not None:
            yield name, json.dumps(value) if isinstance(value, dict) else str(value)


def _quantities(result: ResultRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in ("quantity", "status", "off by", "max abs", "max ulp", "×bound", "×tight", "floor"):
        left = name in ("quantity", "status")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for name, quantity in result.quantities.items():
        table.add_row(
            name,
            Text(quantity.status, STYLES.get(quantity.status, "")),
            off_by(name, quantity),
            number(quantity.max_abs_error, 3),
            number(quantity.max_ulp_error, 3),
            bound(quantity),
            number(quantity.tight_ratio, 2),
            number(quantity.floor, 2),
        )
    return table


def _worst_elements(result: ResultRecord) -> Iterator[RenderableType]:
    for name, quantity in result.quantities.items():
        if quantity.reason:
            yield Hanging(f"{name}: ", quantity.reason)
        if quantity.nonfinite:
            yield Hanging(
                f"{name}: ", f"{quantity.nonfinite} elements wrongly finite or not finite"
            )
        worst = quantity.worst
        if worst is not None:
            index = ",".join(map(str, worst.index))
            yield Hanging(f"{name}[{index}] = ", f"{worst.value!r} = {worst.value_hex}")
            yield Hanging("    should be ", f"{worst.reference!r} = {worst.reference_hex}")
