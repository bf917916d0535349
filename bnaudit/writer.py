"""Events of an audit → its report, saved as they come, so that the file is complete at any moment."""

from __future__ import annotations

import glob
import json
import os
import shlex
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bnaudit import __version__
from bnaudit.audit import CaseFacts, ControlOutcome, Result
from bnaudit.consistency import Consistency, Disagreement
from bnaudit.findings import numbered
from bnaudit.report import (
    SCHEMA_VERSION,
    CaseRecord,
    ConsistencyRecord,
    ControlRecord,
    DisagreementRecord,
    Environment,
    FailOn,
    Record,
    Report,
    ReportError,
    ResultRecord,
    SourcePlace,
    counted,
    encodable,
    plain_number,
    quantity_record,
)

CHEAP = 1 << 22
"""Bytes of a report up to which a save follows every result. A save of as many takes some milliseconds."""

PACE = 20
"""Pause between saves of a larger one, in durations of a save: they take a twentieth of the time."""

SECTIONS = ("environments", "cases", "results", "controls", "disagreements", "consistency")
"""Fields of a report that are lists of records."""

DISTRIBUTIONS = ("input", "affine", "running", "grad_output")
"""Fields of a case that are distributions, or hold some."""


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
        *,
        kept: int = 0,
    ) -> None:
        """Writes a report without results. path: None for a report that is only kept in memory.

        kept: results of the report in that file, which is continued: until it is finished, this one does not
        take its place before it has as many.
        """
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
        self._kept = kept
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

    def _add(self, section: str, record: Record) -> None:
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
        if path is None or (self._verdict == "interrupted" and len(self.results) < self._kept):
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
            "command": encodable(self._command),
        }

    def _seconds(self) -> float:
        return round(time.monotonic() - self._clock, 3)

    def _tail(self) -> dict[str, Any]:
        return {
            "unmade": list(self.unmade),
            "missing": {encodable(name): encodable(why) for name, why in self.missing.items()},
            "fail_on": self.fail_on,
            "places": {
                encodable(name): place.model_dump(mode="json")
                for name, place in self.places.items()
            },
            "notes": [encodable(note) for note in self.notes],
            "summary": counted(len(self.cases), self._counts),
            "verdict": self._verdict,
            "exit_code": self._exit_code,
        }


def _append(records: bytearray, record: Record) -> None:
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
    return plain_number(value) if isinstance(value, float) else value


def _result_record(result: Result) -> ResultRecord:
    quantities = {name: quantity_record(judged) for name, judged in result.quantities.items()}
    return ResultRecord.model_validate(
        {**vars(result), "case": result.case.id, "quantities": quantities}
    )
