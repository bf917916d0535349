"""Cases, results and controls made up for the tests of reports and of what is shown of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bnaudit.audit import CaseFacts, ControlOutcome, Event, Result
from bnaudit.consistency import Consistency, Disagreement
from bnaudit.measure import Worst
from bnaudit.reference import Facts
from bnaudit.report import Report
from bnaudit.scenario import Case, Scenario, load
from bnaudit.verdict import Judged
from bnaudit.writer import Writer

CONSTANT = """
name: constant-channel
description: A channel that holds one value. Its output is the bias.
input: {distribution: constant, value: [100, 3.3]}
shape: [32, 64, 56, 56]
memory_format: [contiguous, channels_last]
momentum: 0
controls: {must_fail: [caffe-2016@cpu], must_pass: [exact@cpu]}
"""

OFFSET = """
name: large-offset
description: The mean is far from zero.
input: {distribution: normal, mean: [10, 1e6]}
shape: [4, 8, 16, 16]
momentum: 0
"""

ENVIRONMENT = {
    "name": "current",
    "python": "3.11.7",
    "executable": "/usr/bin/python3",
    "platform": "Linux",
    "cpu": {"model": "A processor", "isa": "FMA3 AVX2"},
    "blas": "openblas 0.3",
    "threads": 2,
    "packages": {"numpy": "2.4.6", "torch": "2.13.0+cpu"},
    "devices": [],
    "flags": {"tf32": False},
}


@cache
def scenarios(*texts: str) -> tuple[Scenario, ...]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "scenarios.yaml"
        path.write_text("\n---\n".join(texts or (CONSTANT, OFFSET)))
        return tuple(load([str(path)]))


def facts(
    case: Case, condition_number: float = 1.5, input_sha256: str | None = "ab" * 32
) -> CaseFacts:
    known = Facts(case.mode, condition_number, ill_conditioned=False, extreme=False)
    return CaseFacts(case, case.n, input_sha256, None if input_sha256 is None else known)


def judged(status: str = "pass", **changed: Any) -> Judged:
    return Judged(
        **{
            "status": status,
            "label": "exact",
            "reason": None,
            "max_abs_error": 1e-7,
            "max_sigma_error": 1e-7,
            "max_ulp_error": 0.5,
            "bound_ratio": 0.02,
            "tight_ratio": 0.1,
            "floor": 0.0,
            "nonfinite": 0,
            "worst": Worst((0, 17, 0, 0), 1.0000001, 1.0),
            **changed,
        }
    )


def wrong(value: float, **changed: Any) -> Judged:
    """A y that should be 0."""
    return judged(
        "fail",
        **{
            "label": "degraded",
            "reason": f"must equal the bias and is off by {abs(value):.3g} σ",
            "max_abs_error": abs(value),
            "max_sigma_error": abs(value),
            "bound_ratio": 91.2,
            "worst": Worst((0, 17, 0, 0), value, 0.0),
            **changed,
        },
    )


def result(case: Case, backend: str = "torch@cpu", status: str = "pass", **changed: Any) -> Result:
    measured = status in ("pass", "warn", "fail")
    return Result(
        **{
            "case": case,
            "backend": backend,
            "environment": "current",
            "status": status,
            "gated": backend.startswith("torch"),
            "label": "exact" if measured else None,
            "reason": None if status in ("pass", "warn") else "a reason",
            "kernel": "native contiguous",
            "seconds": 0.0123,
            "quantities": {"y": judged(status)} if measured else {},
            **changed,
        }
    )


def typical() -> list[CaseFacts | Result | ControlOutcome]:
    """The founding story: Caffe fails on 100, torch on 3.3 in channels_last, Welford on neither."""
    constant, offset = scenarios()
    events: list[CaseFacts | Result | ControlOutcome] = []
    for case in constant.cases:
        events.append(facts(case, condition_number=float("inf")))
        torch = result(case)
        if "value=3.3" in case.id and case.memory_format == "channels_last":
            torch = result(
                case,
                status="fail",
                label="degraded",
                cause="BN003 low-precision accumulation",
                quantities={
                    "y": wrong(-0.467),
                    "batch_mean": judged("fail", max_sigma_error=None, max_ulp_error=7123.4),
                },
            )
        elif "value=3.3" in case.id:
            torch = result(case, status="warn", quantities={"y": judged("warn", label="stable")})
        caffe = {"y": wrong(-0.00483 if "value=100" in case.id else 0.0321, bound_ratio=0.09)}
        events += [
            torch,
            result(case, "torch@cuda", "unavailable", reason="no GPU"),
            result(case, "welford@cpu"),
            result(case, "caffe-2016@cpu", "fail", quantities=caffe),
            result(case, "exact@cpu"),
        ]
    events += [
        ControlOutcome("constant-channel", "caffe-2016@cpu", "fail", "4 of 4 failed", True),
        ControlOutcome("constant-channel", "exact@cpu", "pass", "4 of 4 passed", True),
    ]
    for case in offset.cases:
        events += [facts(case), result(case), result(case, "welford@cpu")]
        events.append(result(case, "torch@cuda", "unavailable", reason="no GPU"))
    return events


def add(writer: Writer, *events: Event) -> None:
    for event in events:
        if isinstance(event, CaseFacts):
            writer.add_case(event)
        elif isinstance(event, Result):
            writer.add_result(event)
        elif isinstance(event, Disagreement):
            writer.add_disagreement(event)
        elif isinstance(event, Consistency):
            writer.add_consistency(event)
        else:
            writer.add_control(event)


def report(*events: Event, verdict: str = "fail", exit_code: int = 1) -> Report:
    writer = Writer(None, ["bnaudit", "run"])
    writer.add_environment(ENVIRONMENT)
    add(writer, *(events or typical()))
    return writer.finish(verdict, exit_code)
