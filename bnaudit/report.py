"""The JSON report, version 1: what was run, what came of it, and the verdict.

`writer.Writer` makes one while the audit runs, `load` reads one back, `json_schema` describes it.
JSON has no NaN and no infinity: such numbers are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import from_json

from bnaudit.measure import Measurement, Worst
from bnaudit.reference import Facts
from bnaudit.verdict import DEVIATIONS, RAN, Judged

SCHEMA_VERSION = 1

GZIP = b"\x1f\x8b"
"""What a file that gzip compressed begins with."""

Status = Literal["pass", "warn", "fail", "crash", "timeout", "unsupported", "unavailable"]
RunStatus = Literal["pass", "warn", "fail"]
Verdict = Literal["pass", "warn", "fail", "incomplete", "untrusted", "nothing-gated", "interrupted"]
FailOn = Literal["fail", "warn", "never"]
Label = Literal["exact", "stable", "degraded", "broken"]


class ReportError(Exception):
    """The report cannot be written or read; the message is one sentence that says why."""


def _parse_number(value: object) -> object:
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        raise ValueError('a number, "nan", "inf" or "-inf" is accepted')
    return value


def plain_number(value: float) -> float | str:
    """A number as JSON has it: as text where it is not finite."""
    return value if math.isfinite(value) else repr(value)


def encodable(value: object) -> object:
    """Text that is valid Unicode; anything else as it is."""
    # Paths and a backend's stderr may hold bytes that are not UTF-8, which Python keeps as surrogates.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Number = Annotated[
    float,
    BeforeValidator(_parse_number),
    PlainSerializer(plain_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}),
]
ForeignText = Annotated[str, BeforeValidator(encodable)]


class Record(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    def to_json(self) -> bytes:
        """The record as JSON on one line."""
        return self.model_dump_json(by_alias=True).encode()


class Cpu(Record):
    """The processor: its model name, and the widest instruction sets that matter to a BatchNorm."""

    model: ForeignText | None = None
    isa: str | None = None


class Device(Record):
    """One accelerator and its software."""

    name: ForeignText
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None


class Environment(Record):
    """Where backends ran: an interpreter, its packages, and the machine. More keys may follow."""

    model_config = ConfigDict(extra="allow")

    name: str
    python: str
    platform: str
    cpu: Cpu
    blas: ForeignText | None
    threads: int
    packages: dict[str, str | None]
    devices: list[Device]
    flags: dict[str, Any]

    def summary(self) -> str:
        """Python and the packages that are there, in a line."""
        there = [f"{name} {version}" for name, version in self.packages.items() if version]
        return ", ".join([f"Python {self.python}", *there])


class CaseRecord(Record):
    """A case with its parameters resolved, and what is known of its input.

    input_sha256, condition_number, ill_conditioned and extreme are null where the inputs were not made;
    see `reference.Facts`. What follows is also null in reports that do not have it.
    """

    id: str
    scenario: str
    file: ForeignText
    line: int
    shape: list[int]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    mode: Literal["training", "inference"]
    backward: bool
    memory_format: Literal["contiguous", "channels_last", "strided"]
    eps: Number
    momentum: Number | None
    steps: int
    input: dict[str, Any]
    seed: int
    key: str
    input_sha256: str | None
    n: int
    condition_number: Number | None = None
    ill_conditioned: bool | None = None
    extreme: bool | None = None
    affine: dict[str, Any] | None = None
    running: dict[str, Any] | None = None
    grad_output: dict[str, Any] | None = None
    param_dtype: Literal["statistics", "same"] | None = None
    thresholds: dict[str, dict[str, Number | None]] = {}

    def facts(self) -> Facts:
        """What a verdict takes into account beside the measurements."""
        condition = math.nan if self.condition_number is None else self.condition_number
        return Facts(self.mode, condition, bool(self.ill_conditioned), bool(self.extreme))


class WorstElement(Record):
    """The element with the largest bound_ratio; *_hex are Python's `float.hex()`."""

    index: list[int]
    value: Number
    value_hex: str
    reference: Number
    reference_hex: str


class Quantity(Record):
    """One returned quantity against the reference.

    max_sigma_error: |error| / |weight|, of y only. From constant_misses on: see `measure.Measurement`;
    judged is null in reports that do not have them.
    """

    status: RunStatus
    label: Label | None
    max_abs_error: Number | None
    max_sigma_error: Number | None = None
    max_ulp_error: Number | None
    bound_ratio: Number | None
    tight_ratio: Number | None
    floor: Number | None
    nonfinite: int
    worst: WorstElement | None
    reason: str | None
    constant_misses: int | None = None
    constant_error: Number | None = None
    poor: int | None = None
    judged: bool | None = None
    unjudged: int | None = None
    rounded: bool | None = None
    histogram: list[int] | None = None


class ResultRecord(Record):
    """One case on one backend.

    detail: the traceback, or a dead worker's last words. declarations: what the backend says of its running
    statistics, see `reference.Declarations`; null where it was not called.
    """

    case: str
    backend: ForeignText
    environment: str
    status: Status
    label: Label | None
    reason: ForeignText | None
    cause: str | None
    finding: int | None
    gated: bool
    kernel: ForeignText | None
    seconds: Number | None
    detail: ForeignText | None = None
    declarations: dict[str, Any] | None = None
    accepted: ForeignText | None = None
    waiver: ForeignText | None = None
    quantities: dict[str, Quantity]


class ControlRecord(Record):
    """Whether a backend did in a scenario what it is known to do there."""

    scenario: str
    backend: str
    expected: Literal["fail", "pass"]
    observed: str
    ok: bool


class DisagreementRecord(Record):
    """The two gated backends that differ most on a case.

    ratio: in units of twice the tight bound, which two good implementations do not exceed.
    """

    case: str
    quantity: str
    backends: tuple[ForeignText, ForeignText]
    max_abs_difference: Number
    ratio: Number


class ConsistencyRecord(Record):
    """One check of what a result must not depend on.

    ok: null where it could not be made. reason: what was seen where it does not hold. died: the backend
    crashed or took too long in it.
    """

    case: str
    backend: ForeignText
    check: str
    ok: bool | None
    reason: ForeignText | None
    died: bool
    detail: ForeignText | None


class SourcePlace(Record):
    """Where a plug-in stands; file: relative to the working directory where it is below it."""

    file: ForeignText
    line: int


class Summary(Record):
    """Counts over all results. ran: those whose backend was called."""

    cases: int
    results: int
    ran: int
    passed: int = Field(alias="pass")
    warn: int
    fail: int
    crash: int
    timeout: int
    unsupported: int
    unavailable: int


class Report(BaseModel):
    """A bnaudit report. See README.md for what the fields say.

    unmade: checks of consistency that were asked for by name and made in no case. missing: backends that
    were asked for by name and are unavailable, with the reason. fail_on: the deviation that exits with 1.
    places: of plug-ins whose source was found. notes: what a baseline leaves to be said.
    """

    model_config = ConfigDict(frozen=True, title="bnaudit report, version 1")

    schema_version: Literal[1]
    bnaudit_version: str
    started: str
    duration_seconds: Number
    command: ForeignText
    environments: list[Environment]
    cases: list[CaseRecord]
    results: list[ResultRecord]
    controls: list[ControlRecord]
    disagreements: list[DisagreementRecord] = []
    consistency: list[ConsistencyRecord] = []
    unmade: list[str] = []
    missing: dict[ForeignText, ForeignText] = {}
    fail_on: FailOn = "fail"
    places: dict[ForeignText, SourcePlace] = {}
    notes: list[ForeignText] = []
    summary: Summary
    verdict: Verdict
    exit_code: Literal[0, 1, 3, 4, 5, 130]

    def to_json(self) -> str:
        """The report as it is saved."""
        return f"{self.model_dump_json(by_alias=True)}\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a report."""
    schema = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def load(path: Path) -> Report:
    """Reads a saved report, also one that gzip compressed.

    Raises ReportError where it is none, or is of another version.
    """
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        document = from_json(content)  # unlike json.loads, it refuses text that cannot be written
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ReportError(f"cannot read the report {path}: {error.strerror}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version is None:
        raise ReportError(f"{path} is not a bnaudit report: it has no schema_version")
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"{path} is a report of version {version}; this bnaudit reads version {SCHEMA_VERSION}"
        )
    try:
        report = Report.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ReportError(f"{path} is not a valid report: {field}: {first['msg']}") from error
    for fault in _dangling(report):
        raise ReportError(f"{path} is not a valid report: {fault}")
    return report


def _dangling(report: Report) -> Iterator[str]:
    """What records say of others that is not so."""
    known = {case.id for case in report.cases}
    for section in ("results", "disagreements", "consistency"):
        for position, record in enumerate(getattr(report, section)):
            if record.case not in known:
                yield f"{section}.{position}.case: there is no case {record.case!r}"
    for position, result in enumerate(report.results):
        if result.finding is not None and result.status not in DEVIATIONS:
            yield f"results.{position}.finding: what is {result.status} is no finding"


def counted(cases: int, statuses: Mapping[str, int]) -> dict[str, int]:
    """The fields of a summary. statuses: how many results have each."""
    counts = {status: statuses.get(status, 0) for status in get_args(Status)}
    return {
        "cases": cases,
        "results": sum(counts.values()),
        "ran": sum(counts[status] for status in RAN),
        **counts,
    }


def quantity_record(judged: Judged) -> Quantity:
    """What the report keeps of one judged quantity."""
    worst = None
    if judged.worst is not None:
        value, reference = float(judged.worst.value), float(judged.worst.reference)
        worst = WorstElement(
            index=list(judged.worst.index),
            value=value,
            value_hex=value.hex(),
            reference=reference,
            reference_hex=reference.hex(),
        )
    return Quantity.model_validate({**vars(judged), "worst": worst})


Kept = TypeVar("Kept", Measurement, Judged)


def restored(quantity: Quantity, kind: type[Kept]) -> Kept:
    """What a quantity's record was made of."""
    known = {field.name: getattr(quantity, field.name) for field in fields(kind)}
    worst = quantity.worst
    if worst is not None:
        known["worst"] = Worst(tuple(worst.index), worst.value, worst.reference)
    return kind(**known)
