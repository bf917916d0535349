"""The report is valid JSON, complete at any moment, and says what was measured."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from standins import (
    ENVIRONMENT,
    OFFSET,
    add,
    facts,
    judged,
    report,
    result,
    scenarios,
    typical,
    wrong,
)

from bnaudit import writer as writer_module
from bnaudit.consistency import Consistency, Disagreement
from bnaudit.findings import number_findings
from bnaudit.measure import Worst
from bnaudit.report import ReportError, ResultRecord, json_schema, load
from bnaudit.writer import Writer

SCHEMA = Draft202012Validator(json_schema())
CASE = scenarios()[0].cases[0]


def read(path: Path) -> dict[str, Any]:
    """The file as strict JSON: no NaN, no Infinity. Validated against the schema."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(path.read_bytes(), parse_constant=refuse)
    SCHEMA.validate(document)
    return document


def named(fields: str) -> list[str]:
    return fields.split()


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    writer = Writer(tmp_path / "report.json", ["bnaudit", "run", "a b"])
    writer.add_environment(ENVIRONMENT)
    return writer


# --- what it says ----------------------------------------------------------------------------------


def test_a_report_has_the_documented_fields(writer: Writer, tmp_path: Path) -> None:
    add(writer, *typical())
    writer.finish("fail", 1)
    document = read(tmp_path / "report.json")
    assert list(document) == named(
        "schema_version bnaudit_version started duration_seconds command environments cases results "
        "controls disagreements consistency unmade missing fail_on places notes summary verdict exit_code"
    )
    assert document["command"] == "bnaudit run 'a b'"
    assert list(document["cases"][0]) == named(
        "id scenario file line shape dtype mode backward memory_format eps momentum steps input seed "
        "key input_sha256 n condition_number ill_conditioned extreme affine running grad_output param_dtype "
        "thresholds"
    )
    assert list(document["results"][0]) == named(
        "case backend environment status label reason cause finding gated kernel seconds detail "
        "declarations accepted waiver quantities"
    )
    assert list(document["results"][0]["quantities"]["y"]) == named(
        "status label max_abs_error max_sigma_error max_ulp_error bound_ratio tight_ratio floor "
        "nonfinite worst reason constant_misses constant_error poor judged unjudged rounded histogram"
    )
    assert list(document["controls"][0]) == named("scenario backend expected observed ok")
    assert document["summary"] == {
        **{"cases": 6, "results": 26, "ran": 20, "pass": 14, "warn": 1, "fail": 5},
        **{"crash": 0, "timeout": 0, "unsupported": 0, "unavailable": 6},
    }


def test_disagreements_and_checks_of_consistency_have_the_documented_fields(
    writer: Writer, tmp_path: Path
) -> None:
    add(writer, facts(CASE), result(CASE))
    writer.add_disagreement(Disagreement(CASE, "y", ("torch@cpu", "b.py:f@cpu"), 0.5, math.inf))
    writer.add_consistency(Consistency(CASE, "torch@cpu", "threads", False, "y[0] was 1, then 2"))
    document = read(tmp_path / "report.json")
    assert document["disagreements"] == [
        {
            "case": CASE.id,
            "quantity": "y",
            "backends": ["torch@cpu", "b.py:f@cpu"],
            "max_abs_difference": 0.5,
            "ratio": "inf",
        }
    ]
    assert document["consistency"] == [
        {
            "case": CASE.id,
            "backend": "torch@cpu",
            "check": "threads",
            "ok": False,
            "reason": "y[0] was 1, then 2",
            "died": False,
            "detail": None,
        }
    ]
    assert writer.finish("fail", 1) == load(tmp_path / "report.json")


def test_a_case_is_saved_with_its_parameters_resolved(writer: Writer, tmp_path: Path) -> None:
    writer.add_case(facts(CASE))
    (case,) = read(tmp_path / "report.json")["cases"]
    assert case["input"] == {"distribution": "constant", "value": 100}
    assert case["shape"] == [32, 64, 56, 56]
    assert case["key"] == CASE.key
    assert (case["eps"], case["momentum"], case["seed"]) == (1e-5, 0, 0)


@pytest.mark.parametrize(
    ("number", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (0.25, 0.25)]
)
def test_numbers_that_json_lacks_are_text(
    writer: Writer, tmp_path: Path, number: float, text: object
) -> None:
    quantity = judged("fail", bound_ratio=number, worst=Worst((1,), number, 1.0))
    writer.add_case(facts(CASE, condition_number=number))
    writer.add_result(result(CASE, status="fail", quantities={"y": quantity}))
    document = read(tmp_path / "report.json")
    y = document["results"][0]["quantities"]["y"]
    assert y["bound_ratio"] == y["worst"]["value"] == text
    assert y["worst"]["value_hex"] == number.hex()
    assert document["cases"][0]["condition_number"] == text
    loaded = load(tmp_path / "report.json").results[0].quantities["y"].bound_ratio
    assert loaded == number or (math.isnan(number) and loaded is not None and math.isnan(loaded))


def test_an_input_with_numbers_that_json_lacks_is_saved(writer: Writer, tmp_path: Path) -> None:
    text = OFFSET.replace(
        "{distribution: normal, mean: [10, 1e6]}",
        "{distribution: nonfinite, base: {distribution: normal}, values: [.nan, -.inf], count: 2}",
    )
    writer.add_case(facts(scenarios(text)[0].cases[0]))
    (case,) = read(tmp_path / "report.json")["cases"]
    assert case["input"]["values"] == ["nan", "-inf"]


def test_what_does_not_apply_is_null(writer: Writer, tmp_path: Path) -> None:
    absent: dict[str, Any] = dict.fromkeys(
        named("max_abs_error max_ulp_error bound_ratio tight_ratio floor worst label")
    )
    writer.add_case(facts(CASE, condition_number=math.nan, input_sha256=None))
    writer.add_result(result(CASE, quantities={"y": judged("pass", **absent)}))
    writer.add_result(result(CASE, "torch@cuda", "unavailable", kernel=None, seconds=None))
    document = read(tmp_path / "report.json")
    assert document["cases"][0]["condition_number"] is None
    assert document["results"][0]["quantities"]["y"].items() >= absent.items()
    assert document["results"][1]["kernel"] is document["results"][1]["label"] is None
    assert document["results"][1]["quantities"] == {}


def test_text_that_is_not_utf8_is_saved(writer: Writer, tmp_path: Path) -> None:
    writer.add_case(facts(CASE))
    writer.add_result(result(CASE, status="crash", detail="path \udcff and\nanother line"))
    detail = read(tmp_path / "report.json")["results"][0]["detail"]
    assert detail == "path \\udcff and\nanother line"


def test_every_record_is_on_a_line_of_its_own(writer: Writer, tmp_path: Path) -> None:
    add(writer, *typical())
    writer.finish("fail", 1)
    lines = (tmp_path / "report.json").read_text().splitlines()
    results = [line for line in lines if line.startswith('{"case":')]
    assert len(results) == 26
    assert all(json.loads(line.rstrip(",")) for line in results)


def test_a_loaded_report_equals_the_saved_one(writer: Writer, tmp_path: Path) -> None:
    add(writer, *typical())
    assert writer.finish("fail", 1) == load(tmp_path / "report.json")


# --- findings --------------------------------------------------------------------------------------


def test_failures_of_one_cause_and_memory_format_are_one_finding_gated_first() -> None:
    constant, _ = scenarios()
    contiguous = [case for case in constant.cases if case.memory_format == "contiguous"]
    last = next(case for case in constant.cases if case.memory_format == "channels_last")
    made = report(
        *(facts(case) for case in (*contiguous, last)),
        result(contiguous[0], "caffe-2016@cpu", "fail"),
        result(contiguous[0], status="fail", cause="BN003"),
        result(contiguous[0], "welford@cpu"),
        result(contiguous[1], status="fail", cause="BN003"),
        result(contiguous[1], status="crash"),
        result(last, status="fail", cause="BN003"),
        result(last, status="fail", cause="BN001"),
        result(last, status="warn"),
    )
    assert [r.finding for r in made.results] == [5, 1, None, 1, 2, 3, 4, None]


def test_a_finding_is_numbered_only_when_the_report_is_finished(writer: Writer) -> None:
    add(writer, *typical())
    assert {r.finding for r in writer.results} == {None}
    cases = writer.cases
    assert [n for n in number_findings(writer.results, cases) if n is not None] == [2, 3, 2, 1, 3]


# --- complete at any moment ------------------------------------------------------------------------


def test_an_unfinished_report_says_interrupted(writer: Writer, tmp_path: Path) -> None:
    document = read(tmp_path / "report.json")
    assert (document["verdict"], document["exit_code"]) == ("interrupted", 130)
    assert document["summary"]["results"] == 0


def test_every_result_is_in_the_file_when_it_was_added(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    writer.add_case(facts(CASE))
    for number in range(1, 30):
        writer.add_result(result(CASE, f"backend-{number}@cpu"))
        document = read(path)
        assert len(document["results"]) == document["summary"]["pass"] == number
        assert document["verdict"] == "interrupted"
    assert list(tmp_path.iterdir()) == [path]


def test_dear_saves_are_spaced_and_none_is_forgotten(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CHEAP", 0)
    monkeypatch.setattr(writer_module, "PACE", 100)
    path = tmp_path / "report.json"
    saves = []
    write = writer._write

    def counted() -> None:
        saves.append(1)
        write()

    monkeypatch.setattr(writer, "_write", counted)
    writer.add_case(facts(CASE))
    for number in range(200):
        writer.add_result(result(CASE, f"backend-{number}@cpu"))
    assert len(saves) < 50
    deadline = time.monotonic() + 5
    while len(read(path)["results"]) < 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(read(path)["results"]) == 200


def test_saving_now_does_not_wait_for_the_pause(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CHEAP", 0)
    monkeypatch.setattr(writer_module, "PACE", 1e6)
    writer.add_case(facts(CASE))
    for _ in range(3):
        writer.add_result(result(CASE))
    assert len(read(tmp_path / "report.json")["results"]) < 3
    writer.save()
    assert len(read(tmp_path / "report.json")["results"]) == 3


def test_a_record_is_serialized_once(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized = []
    to_json = ResultRecord.to_json

    def counted(record: ResultRecord) -> bytes:
        serialized.append(record)
        return to_json(record)

    monkeypatch.setattr(ResultRecord, "to_json", counted)
    writer.add_case(facts(CASE))
    for _ in range(20):
        writer.add_result(result(CASE))
    assert len(serialized) == 20


ENDLESS = """
import sys
import time
from pathlib import Path
from standins import ENVIRONMENT, CONSTANT, add, facts, result, scenarios
from bnaudit.writer import Writer

case = scenarios()[0].cases[0]
writer = Writer(Path(sys.argv[1]), ["bnaudit", "run"])
writer.add_environment(ENVIRONMENT)
writer.add_case(facts(case))
number = 0
while True:
    number += 1
    writer.add_result(result(case, f"backend-{number}@cpu"))
    print(number, flush=True)
    time.sleep(0.001)
"""


@pytest.mark.parametrize("attempt", range(10))
def test_a_killed_writer_leaves_every_result_it_had_taken(tmp_path: Path, attempt: int) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        time.sleep(random.Random(attempt).uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split("\n")
    taken = int(lines[-2]) if len(lines) > 1 else 1
    document = read(path)
    assert len(document["results"]) in (taken, taken + 1)
    assert document["summary"]["results"] == len(document["results"])
    assert document["verdict"] == "interrupted"


# --- where it goes ---------------------------------------------------------------------------------


def test_missing_folders_are_made(tmp_path: Path) -> None:
    Writer(tmp_path / "a" / "b" / "report.json", [])
    assert read(tmp_path / "a" / "b" / "report.json")["results"] == []


def test_a_target_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match=r"cannot write the report .*file/report.json: "):
        Writer(tmp_path / "file" / "report.json", [])
    with pytest.raises(ReportError, match="it is a folder"):
        Writer(tmp_path, [])
    with pytest.raises(ReportError, match=r"cannot write the report /proc/report\.json: "):
        Writer(Path("/proc/report.json"), [])


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add_case(facts(CASE))

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ReportError, match="No space left on device"):
        writer.add_result(result(CASE))
    monkeypatch.undo()
    assert len(read(tmp_path / "report.json")["cases"]) == 1


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    Writer(tmp_path / "link.json", []).finish("pass", 0)
    assert (tmp_path / "link.json").is_symlink()
    assert read(tmp_path / "real.json")["verdict"] == "pass"


def test_a_pipe_gets_the_finished_report_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    writer = Writer(pipe, [])
    add(writer, *typical())
    writer.finish("fail", 1)
    reader.join(5)
    assert json.loads(received[0])["exit_code"] == 1
    assert pipe.is_fifo()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".report.json.123.tmp").write_text("{")
    (tmp_path / ".other.json.123.tmp").write_text("{")
    Writer(tmp_path / "report.json", [])
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", ".other.json.123.tmp"}


# --- reading one back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read the report .*No such file"),
        ("{", "is not JSON: "),
        ("\xff", "is not JSON: |not a bnaudit report"),
        ("[]", "is not a bnaudit report: it has no schema_version"),
        ('{"a": 1}', "is not a bnaudit report: it has no schema_version"),
        ('{"schema_version": 2}', "is a report of version 2; this bnaudit reads version 1"),
        ('{"schema_version": 1}', "is not a valid report: bnaudit_version: Field required"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ReportError, match=complaint):
        load(path)


def test_a_wrong_field_is_named_with_its_place(writer: Writer, tmp_path: Path) -> None:
    add(writer, *typical())
    writer.finish("fail", 1)
    path = tmp_path / "report.json"
    document = json.loads(path.read_text())
    document["results"][2]["quantities"]["y"]["bound_ratio"] = "infinite"
    path.write_text(json.dumps(document))
    with pytest.raises(ReportError, match=r"results\.2\.quantities\.y\.bound_ratio: .*accepted"):
        load(path)


def test_a_field_of_a_later_version_does_not_stop_reading(writer: Writer, tmp_path: Path) -> None:
    writer.finish("pass", 0)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert load(path).verdict == "pass"


def test_the_schema_refuses_a_wrong_report(writer: Writer, tmp_path: Path) -> None:
    add(writer, *typical(), result(CASE, status="fail", quantities={"y": wrong(1.0)}))
    writer.finish("fail", 1)
    document = read(tmp_path / "report.json")
    document["results"][0]["status"] = "good"
    assert not SCHEMA.is_valid(document)
    Draft202012Validator.check_schema(json_schema())
