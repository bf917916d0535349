"""The JSON report, version 1: what was run, what came of it, and the verdict, complete at any moment.

`Writer` keeps the file valid while the audit runs, `load` reads one back, `json_schema` describes it.
JSON has no NaN and no infinity: such numbers are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import glob
import gzip
import json
import math
import os
import shlex
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

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

from bnaudit import __version__
from bnaudit.verdict import CAUSES, FAILED, RAN

if TYPE_CHECKING:
    from bnaudit.audit import CaseFacts, ControlOutcome, Result
    from bnaudit.consistency import Consistency, Disagreement
    from bnaudit.verdict import Judged

SCHEMA_VERSION = 1

FORMAT_FAULT = f"BN007 {CAUSES['BN007']}"

DEVIATIONS = RAN[1:]
"""Statuses of results that can be findings."""

CHEAP = 1 << 22
"""Bytes of a report up to which a save follows every result. A save of as many takes some milliseconds."""

GZIP = b"\x1f\x8b"
"""What a file that gzip compressed begins with."""

SECTIONS = ("environments", "cases", "results", "controls", "disagreements", "consistency")
"""Fields of a report that are lists of records."""

DISTRIBUTIONS = ("input", "affine", "running", "grad_output")
"""Fields of a case that are distributions, or hold some."""

PACE = 20
"""Pause between saves of a larger one, in durations of a save: they take a twentieth of the time."""

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


def _plain_number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


def _encodable(value: object) -> object:
    # Paths and a backend's stderr may hold bytes that are not UTF-8, which Python keeps as surrogates.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Number = Annotated[
    float,
    BeforeValidator(_parse_number),
    PlainSerializer(_plain_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}),
]
ForeignText = Annotated[str, BeforeValidator(_encodable)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)

    def to_json(self) -> bytes:
        """The record as JSON on one line."""
        return self.model_dump_json(by_alias=True).encode()


class Cpu(_Record):
    """The processor: its model name, and the widest instruction sets that matter to a BatchNorm."""

    model: ForeignText | None = None
    isa: str | None = None


class Device(_Record):
    """One accelerator and its software."""

    name: ForeignText
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None


class Environment(_Record):
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


class CaseRecord(_Record):
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


class WorstElement(_Record):
    """The element with the largest bound_ratio; *_hex are Python's `float.hex()`."""

    index: list[int]
    value: Number
    value_hex: str
    reference: Number
    reference_hex: str


class Quantity(_Record):
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


class ResultRecord(_Record):
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


class ControlRecord(_Record):
    """Whether a backend did in a scenario what it is known to do there."""

    scenario: str
    backend: str
    expected: Literal["fail", "pass"]
    observed: str
    ok: bool


class DisagreementRecord(_Record):
    """The two gated backends that differ most on a case.

    ratio: in units of twice the tight bound, which two good implementations do not exceed.
    """

    case: str
    quantity: str
    backends: tuple[ForeignText, ForeignText]
    max_abs_difference: Number
    ratio: Number


class ConsistencyRecord(_Record):
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


class SourcePlace(_Record):
    """Where a plug-in stands; file: relative to the working directory where it is below it."""

    file: ForeignText
    line: int


class Summary(_Record):
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


def number_findings(
    results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord], fail_on: FailOn = "fail"
) -> list[int | None]:
    """The finding of each result, from 1; None for those that passed, or warn without a cause.

    fail_on: with "warn", every gated warning is one.
    Results of one scenario, backend, memory format, status and cause are one finding, accepted ones
    another. Gated findings come first, then accepted ones, each kind in the order in which the results came.
    """
    clusters: dict[tuple[object, ...], list[int]] = {}
    for position, result in enumerate(results):
        strict = fail_on == "warn" and result.gated and result.status == "warn"
        if result.status in FAILED or result.cause is not None or strict:
            case = cases[result.case]
            cluster = (
                2 if not result.gated else 0 if result.accepted is None else 1,
                result.accepted,
                case.scenario,
                result.backend,
                result.environment,
                case.memory_format,
                result.status,
                result.cause,
            )
            clusters.setdefault(cluster, []).append(position)
    numbers: list[int | None] = [None] * len(results)
    gated_first = sorted(clusters, key=lambda cluster: int(str(cluster[0])))
    for number, members in enumerate(gated_first, 1):
        for position in clusters[members]:
            numbers[position] = number
    return numbers


def numbered(
    results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord], fail_on: FailOn
) -> list[ResultRecord]:
    """The results with what only all of them together tell: faults of the memory format, and findings."""
    named = name_format_faults(results, cases)
    numbers = number_findings(named, cases, fail_on)
    return [
        result.model_copy(update={"finding": number})
        for result, number in zip(named, numbers, strict=True)
    ]


def name_format_faults(
    results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord]
) -> list[ResultRecord]:
    """The results, with BN007 as the cause where it is the memory format.

    That is where nothing else explains why y fails the bounds, and the same values in the contiguous format
    pass or only warn.
    """
    twins = {case.id: _without_format(case) for case in cases.values()}
    sound = {
        (twins[result.case], result.backend, result.environment)
        for result in results
        if result.status in ("pass", "warn") and cases[result.case].memory_format == "contiguous"
    }
    named = []
    for result in results:
        if _may_be_of_the_format(result, cases[result.case]):
            is_one = (twins[result.case], result.backend, result.environment) in sound
            result = result.model_copy(update={"cause": FORMAT_FAULT if is_one else None})
        named.append(result)
    return named


def _without_format(case: CaseRecord) -> str:
    return case.model_dump_json(exclude={"id", "key", "memory_format"})


def _may_be_of_the_format(result: ResultRecord, case: CaseRecord) -> bool:
    return (
        case.memory_format != "contiguous"
        and result.cause in (None, FORMAT_FAULT)
        and result.label in ("degraded", "broken")
        and "y" in result.quantities
        and result.quantities["y"].status == "fail"
    )


class Writer:
    """A report that grows with the audit.

    What was added is in the file when the method that adds it returns; once the report is larger than
    CHEAP, PACE durations of a save later, or when `save` returns. The file is replaced as a whole, so it
    is a valid report at any moment, also after SIGKILL; until `finish` its verdict is "interrupted". Every
    method raises ReportError where the file cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        command: Sequence[str],
    ) -> None:
        """Writes a report without results. path: None for a report that is only kept in memory."""
        self.environments: list[Environment] = []
        self.cases: dict[str, CaseRecord] = {}
        self.results: list[ResultRecord] = []
        self.controls: list[ControlRecord] = []
        self.disagreements: list[DisagreementRecord] = []
        self.consistency: list[ConsistencyRecord] = []
        self.unmade: list[str] = []
        self.missing: dict[str, str] = {}
        self.fail_on: FailOn = "fail"
        self.places: dict[str, SourcePlace] = {}
        self.notes: list[str] = []
        self._path = None if path is None else Path(os.path.realpath(path))
        self._command = shlex.join(command)
        # Every record is serialized once: a save only writes these.
        self._json = {name: bytearray() for name in SECTIONS}
        self._started = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
        self._clock = time.monotonic()
        self._duration: float | None = None
        self._counts: Counter[str] = Counter()
        self._verdict = "interrupted"
        self._exit_code = 130
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._not_before = 0.0
        self._error: OSError | None = None
        if self._path is not None:
            _prepare(self._path)
        self.save()

    def add_environment(self, found: Mapping[str, Any]) -> Environment:
        """Adds an environment in which backends run."""
        record = Environment.model_validate(found)
        with self._lock:
            self.environments.append(record)
            self._add("environments", record)
        return record

    def add_case(self, facts: CaseFacts) -> CaseRecord:
        """Adds a case; its results follow."""
        record = _case_record(facts)
        with self._lock:
            self.cases[record.id] = record
            self._add("cases", record)
        return record

    def add_result(self, result: Result) -> ResultRecord:
        """Adds the result of one case on one backend."""
        record = _result_record(result)
        with self._lock:
            self.results.append(record)
            self._counts[record.status] += 1
            self._add("results", record)
        return record

    def add_control(self, outcome: ControlOutcome) -> ControlRecord:
        """Adds what came of a control."""
        record = ControlRecord.model_validate(outcome, from_attributes=True)
        with self._lock:
            self.controls.append(record)
            self._add("controls", record)
        return record

    def add_disagreement(self, found: Disagreement) -> DisagreementRecord:
        """Adds how far the gated backends are apart on a case."""
        record = DisagreementRecord.model_validate({**vars(found), "case": found.case.id})
        with self._lock:
            self.disagreements.append(record)
            self._add("disagreements", record)
        return record

    def add_consistency(self, found: Consistency) -> ConsistencyRecord:
        """Adds what came of a check of consistency."""
        record = ConsistencyRecord.model_validate({**vars(found), "case": found.case.id})
        with self._lock:
            self.consistency.append(record)
            self._add("consistency", record)
        return record

    def save(self) -> None:
        """Writes all that was added so far."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._write()
            self._check()

    def finish(
        self, verdict: str, exit_code: int, results: Sequence[ResultRecord] | None = None
    ) -> Report:
        """Numbers the findings, writes the final report and returns it.

        results: those that were added, where something about them has changed since.
        """
        with self._lock:
            self.results = numbered(
                self.results if results is None else results, self.cases, self.fail_on
            )
            self._json["results"].clear()
            for record in self.results:
                _append(self._json["results"], record)
            self._verdict, self._exit_code = verdict, exit_code
            self._duration = self._seconds()
            self.save()
            return Report.model_validate(
                {
                    **self._head(),
                    "environments": self.environments,
                    "cases": list(self.cases.values()),
                    "results": self.results,
                    "controls": self.controls,
                    "disagreements": self.disagreements,
                    "consistency": self.consistency,
                    **self._tail(),
                }
            )

    def text(self) -> bytes:
        """The report as it stands, one record per line."""
        with self._lock:
            return b"".join(self._pieces())

    def _add(self, section: str, record: _Record) -> None:
        self._check()
        _append(self._json[section], record)
        if self._timer is None:
            wait = self._not_before - time.monotonic()
            if wait <= 0:
                self.save()
            else:
                self._timer = threading.Timer(wait, self._save_late)
                self._timer.daemon = True
                self._timer.start()

    def _save_late(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():  # otherwise saved meanwhile
                self._timer = None
                self._write()

    def _check(self) -> None:
        if self._error is not None:
            raise ReportError(
                f"cannot write the report {self._path}: {self._error.strerror}"
            ) from self._error

    def _write(self) -> None:
        path = self._path
        if path is None:
            return
        start = time.monotonic()
        try:
            if path.exists() and not path.is_file():  # /dev/null, a pipe: not to be replaced
                if self._duration is not None:
                    path.write_bytes(self.text())
            else:
                partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                try:
                    with partial.open("wb") as file:
                        file.writelines(self._pieces())
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            self._error = error
        end = time.monotonic()
        is_cheap = sum(map(len, self._json.values())) <= CHEAP
        self._not_before = end if is_cheap else end + PACE * (end - start)

    def _pieces(self) -> Iterator[bytes | bytearray]:
        yield json.dumps(self._head(), ensure_ascii=False)[:-1].encode()
        for name, records in self._json.items():
            yield f',\n"{name}":['.encode()
            yield records
            yield b"\n]" if records else b"]"
        yield b",\n" + json.dumps(self._tail())[1:].encode() + b"\n"

    def _head(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "bnaudit_version": __version__,
            "started": self._started,
            "duration_seconds": self._seconds() if self._duration is None else self._duration,
            "command": _encodable(self._command),
        }

    def _seconds(self) -> float:
        return round(time.monotonic() - self._clock, 3)

    def _tail(self) -> dict[str, Any]:
        return {
            "unmade": list(self.unmade),
            "missing": {_encodable(name): _encodable(why) for name, why in self.missing.items()},
            "fail_on": self.fail_on,
            "places": {
                _encodable(name): place.model_dump(mode="json")
                for name, place in self.places.items()
            },
            "notes": [_encodable(note) for note in self.notes],
            "summary": counted(len(self.cases), self._counts),
            "verdict": self._verdict,
            "exit_code": self._exit_code,
        }


def counted(cases: int, statuses: Mapping[str, int]) -> dict[str, int]:
    """The fields of a summary. statuses: how many results have each."""
    counts = {status: statuses.get(status, 0) for status in get_args(Status)}
    return {
        "cases": cases,
        "results": sum(counts.values()),
        "ran": sum(counts[status] for status in RAN),
        **counts,
    }


def _append(records: bytearray, record: _Record) -> None:
    records += (b",\n" if records else b"\n") + record.to_json()


def _prepare(path: Path) -> None:
    """Makes the folder of the report, and removes what a killed run left half written there."""
    if path.is_dir():
        raise ReportError(f"cannot write the report {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for partial in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(
            f"cannot write the report {path}: {error.strerror} ({error.filename})"
        ) from error


def _case_record(facts: CaseFacts) -> CaseRecord:
    fields = facts.case.model_dump()
    distributions = {name: _plain(fields[name]) for name in DISTRIBUTIONS}
    return CaseRecord.model_validate(
        {
            **fields,
            **distributions,
            **({} if facts.facts is None else vars(facts.facts)),
            "input_sha256": facts.input_sha256,
            "key": facts.case.key,
            "n": facts.n,
        }
    )


def _plain(value: Any) -> Any:
    """A distribution's fields as JSON has them: numbers that it does not know as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain_number(value) if isinstance(value, float) else value


def _result_record(result: Result) -> ResultRecord:
    quantities = {name: quantity_record(judged) for name, judged in result.quantities.items()}
    return ResultRecord.model_validate(
        {**vars(result), "case": result.case.id, "quantities": quantities}
    )


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
