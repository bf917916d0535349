"""The command line: what it prints where, how it exits, and what an interruption leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from standins import CONSTANT, ENVIRONMENT, OFFSET, facts, result, scenarios, typical

from bnaudit import __version__, audit, building, subject
from bnaudit.audit import Selected
from bnaudit.baseline import Baseline
from bnaudit.cli import cli, main
from bnaudit.cli.common import Failure
from bnaudit.cli.conduct import _available
from bnaudit.cli.run import CHECKS
from bnaudit.consistency import Consistency
from bnaudit.document import load_as
from bnaudit.rejudge import Overrides
from bnaudit.report import ReportError, json_schema, load
from bnaudit.worker.backends import BACKENDS

COMMANDS = (
    "run",
    "list",
    "show",
    "check",
    "compare",
    "upgrade",
    "probe",
    "repro",
    "selftest",
    "schema",
    "doctor",
)


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Invoke:
    """Runs the command line in this process, in a folder of its own with a scenario file."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "s.yaml").write_text(f"{CONSTANT}---{OFFSET}")

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as exit_info:
            main(list(arguments))
        out, err = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), out, err)

    return run


class Subject:
    """Knows torch@cuda to be unavailable, and starts nothing."""

    name = "current"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def environments(self) -> list[dict[str, Any]]:
        return [self.environment()]

    def describe(self, backends: Sequence[str]) -> dict[str, str | None]:
        return {name: "no GPU" if name.endswith("cuda") else None for name in backends}

    def environment(self) -> dict[str, Any]:
        return ENVIRONMENT


class Mock:
    """Stands for the audit: yields `events`, raises those that are exceptions; keeps what it was given."""

    def __init__(self) -> None:
        self.events: list[Any] = typical()
        self.given: dict[str, Any] = {}

    def run(self, loaded: Any, selection: Any, owner: Any, scratch: Path, **options: Any) -> Any:
        self.given = {"loaded": loaded, "selection": selection, "subject": owner, **options}
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    mock = Mock()
    monkeypatch.setattr(audit, "run", mock.run)
    monkeypatch.setattr(subject, "Subject", Subject)
    return mock


def events(*statuses: str, backend: str = "torch@cpu") -> list[Any]:
    case = scenarios()[1].cases[0]
    return [facts(case), *(result(case, backend, status) for status in statuses)]


# --- run, with an audit that is made up ------------------------------------------------------------


def test_a_run_prints_rows_findings_and_the_verdict_and_saves_a_report(
    invoke: Invoke, mock: Mock
) -> None:
    outcome = invoke("run", "s.yaml", "--json", "reports/r.json", "-q")
    assert outcome.code == 1
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0].endswith("torch 2.13.0+cpu, 2 threads, 6 cases")
    assert lines[1] == "Gating: torch@cpu"
    assert lines[4].split() == [
        "scenario",
        "backend",
        "worst",
        "case",
        "off",
        "by",
        "×bound",
        "status",
    ]
    assert "0.467 σ     91  FAIL 1/4" in lines[5]
    assert "[1] FAIL torch@cpu constant-channel value=3.3 channels_last 32x64x56x56" in lines
    assert lines[-3:] == [
        "FAIL (exit 1)",
        "σ: standard deviations of y.  ×bound: 1 = worst a stable algorithm may do.",
        "report reports/r.json",
    ]
    saved = load(Path("reports/r.json"))
    assert (saved.verdict, saved.exit_code, len(saved.results)) == ("fail", 1, 26)
    assert {r.finding for r in saved.results if r.status == "fail"} == {1, 2, 3}


def test_the_rows_of_a_scenario_are_printed_when_it_is_complete_and_saved(
    invoke: Invoke, mock: Mock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[bool, int]] = []
    original = typical()

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        printed = ""
        for event in original:
            printed += capsys.readouterr().out
            saved = json.loads(Path("r.json").read_bytes())
            seen.append(("FAIL 1/4" in printed, len(saved["results"])))
            yield event

    monkeypatch.setattr(audit, "run", watched)
    invoke("run", "s.yaml", "--json", "r.json", "-q")
    complete = next(
        i for i, event in enumerate(original) if isinstance(event, audit.ControlOutcome)
    )
    assert [printed for printed, _ in seen] == [i > complete for i in range(len(original))]
    assert [saved for _, saved in seen] == [
        sum(isinstance(event, audit.Result) for event in original[:i]) for i in range(len(original))
    ]


@pytest.mark.parametrize(
    ("made", "options", "code", "verdict"),
    [
        (events("pass"), [], 0, "PASS (exit 0)"),
        (events("warn", "pass"), [], 0, "WARN (exit 0)"),
        (events("warn"), ["--fail-on", "warn"], 1, "FAIL (exit 1: --fail-on warn)"),
        (events("fail"), [], 1, "FAIL (exit 1)"),
        (events("fail"), ["--fail-on", "never"], 0, "FAIL (exit 0: --fail-on never)"),
        (events("crash", "fail"), [], 3, "INCOMPLETE (exit 3): torch@cpu died in 1 case"),
        (
            events("timeout"),
            ["--fail-on", "never"],
            3,
            "INCOMPLETE (exit 3): torch@cpu took too long in 1 case",
        ),
        (events("unavailable"), [], 5, "NOTHING-GATED (exit 5): nothing ran"),
        (
            events("unavailable", backend="torch@cuda"),
            ["--require", "torch@cuda"],
            3,
            "INCOMPLETE (exit 3): asked for and unavailable: torch@cuda",
        ),
        (
            events("pass", "fail", backend="gemm@cpu"),
            [],
            5,
            "NOTHING-GATED (exit 5): only specimens ran",
        ),
        (
            [*events("fail"), audit.ControlOutcome("large-offset", "a", "fail", "0 of 1", False)],
            [],
            4,
            "UNTRUSTED (exit 4): a control did not behave, so nothing here can be trusted",
        ),
        ([], [], 5, "NOTHING-GATED (exit 5): nothing ran"),
    ],
)
def test_exit_code_verdict_and_report_agree(
    invoke: Invoke, mock: Mock, made: list[Any], options: list[str], code: int, verdict: str
) -> None:
    mock.events = made
    outcome = invoke("run", "s.yaml", "--json", "r.json", *options)
    assert outcome.code == code
    assert f"\n{verdict}\n" in outcome.out
    saved = load(Path("r.json"))
    assert saved.exit_code == code
    assert saved.verdict.upper() == verdict.partition(" ")[0]


def test_the_options_reach_the_audit(invoke: Invoke, mock: Mock) -> None:
    options = (
        "-b welford@cpu -b torch@cpu --require gemm@cpu -k constant -x --threads 3 --timeout 7.5"
    )
    invoke("run", "s.yaml", *options.split())
    assert mock.given["selection"] == [
        audit.Selected("welford@cpu", gated=True, required=True),
        audit.Selected("torch@cpu", gated=True, required=True),
        audit.Selected("gemm@cpu", gated=False, required=True),
    ]
    assert mock.given["stop_early"] is True
    assert mock.given["checks"] == frozenset()
    assert mock.given["matches"]("CONSTANT-channel/x", "torch@cpu") is True
    assert mock.given["matches"]("large-offset/x", "torch@cpu") is False
    assert [s.name for s in mock.given["loaded"]] == ["constant-channel", "large-offset"]
    threads_and_timeout = {"threads": 3, "timeout": 7.5}
    assert mock.given["subject"].options.items() >= threads_and_timeout.items()


@pytest.mark.parametrize(
    ("options", "checks"),
    [
        (["--consistency"], set(CHECKS)),
        (["--check", "threads", "--check", "repeat"], {"threads", "repeat"}),
    ],
)
def test_checks_of_consistency_can_be_asked_for_together_and_alone(
    invoke: Invoke, mock: Mock, options: list[str], checks: set[str]
) -> None:
    invoke("run", "s.yaml", *options)
    assert mock.given["checks"] == checks
    assert mock.given["other"].options["threads"] == 1


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_a_timeout_is_a_positive_number(invoke: Invoke, mock: Mock, seconds: str) -> None:
    outcome = invoke("run", "s.yaml", "--timeout", seconds)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1


def test_every_command_has_a_place_for_compiled_code(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    assert invoke("schema").code == 0
    assert "NUMBA_CACHE_DIR" not in os.environ
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert invoke("schema").code == 0
    assert "bnaudit-numba-" in os.environ["NUMBA_CACHE_DIR"]


def test_an_expression_that_matches_nothing_is_said_to(invoke: Invoke, mock: Mock) -> None:
    outcome = invoke("run", "s.yaml", "-k", "nosuch")
    assert "no case and backend match -k 'nosuch'\n" in outcome.out


@pytest.mark.parametrize(("fail_on", "code"), [("fail", 1), ("never", 0)])
def test_a_check_that_does_not_hold_fails(
    invoke: Invoke, mock: Mock, fail_on: str, code: int
) -> None:
    case = scenarios()[0].cases[0]
    broken = Consistency(case, "torch@cpu", "threads", False, "y[0] was 1, then 2")
    mock.events = [facts(case), result(case), broken]
    outcome = invoke("run", "s.yaml", "--consistency", "--fail-on", fail_on)
    assert outcome.code == code
    assert "threads torch@cpu constant-channel" in outcome.out


def test_a_run_that_stopped_early_says_so(invoke: Invoke, mock: Mock) -> None:
    mock.events = events("fail")
    assert "stopped at the first gated failure (-x)\n" in invoke("run", "s.yaml", "-x").out


def test_the_report_on_stdout_leaves_the_table_to_stderr(invoke: Invoke, mock: Mock) -> None:
    outcome = invoke("run", "s.yaml", "--json", "-", "-q")
    Draft202012Validator(json_schema()).validate(json.loads(outcome.out))
    assert "FAIL 1/4" in outcome.err
    assert "FAIL (exit 1)\n" in outcome.err


def test_verbose_lists_every_row(invoke: Invoke, mock: Mock) -> None:
    out = invoke("run", "s.yaml", "-v").out
    assert "large-offset" in out
    assert "torch@cuda      unavailable: no GPU" in out


def test_progress_is_a_line_now_and_then_where_no_bar_can_be_drawn(
    invoke: Invoke, mock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnaudit.progress.INTERVAL", 0.0)
    outcome = invoke("run", "s.yaml")
    first, *_, last = outcome.err.splitlines()
    assert first == "0/6 cases, 0 s: constant-channel/value=100,memory_format=contiguous"
    assert last == "5/6 cases, 0 s: large-offset/mean=1000000.0"
    assert "cases, 0 s" not in outcome.out
    assert invoke("run", "s.yaml", "-q").err == ""


@pytest.mark.parametrize(("columns", "width"), [(None, 80), ("100", 100), ("120", 120)])
def test_columns_decides_the_width(
    invoke: Invoke, mock: Mock, monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    lines = invoke("run", "s.yaml", "-q").out.splitlines()
    assert width - 12 <= max(len(line) for line in lines) <= width
    assert ("kernel" in lines[4]) == (width >= 120)


def test_colour_follows_the_environment(
    invoke: Invoke, mock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b[" not in invoke("run", "s.yaml").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;31m" in invoke("run", "s.yaml").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in invoke("run", "s.yaml").out


def test_an_interrupted_run_saves_what_it_has(invoke: Invoke, mock: Mock) -> None:
    mock.events = [*typical()[:9], KeyboardInterrupt()]
    outcome = invoke("run", "s.yaml", "--json", "r.json")
    assert outcome.code == 130
    assert outcome.err == (
        "bnaudit: interrupted after 7 results, which are in r.json; --resume runs the rest\n"
    )
    saved = load(Path("r.json"))
    assert (saved.verdict, saved.exit_code, len(saved.results)) == ("interrupted", 130, 7)


def test_an_interrupted_run_leaves_its_formats_and_no_half_baseline(
    invoke: Invoke, mock: Mock
) -> None:
    mock.events = [*typical()[:9], KeyboardInterrupt()]
    outcome = invoke("run", "s.yaml", "--junit", "j.xml", "--write-baseline", "b.yaml", "-q")
    assert outcome.code == 130
    assert 'message="interrupted"' in Path("j.xml").read_text()
    assert not Path("b.yaml").exists()


@pytest.mark.parametrize("option", ["--junit", "--sarif", "--markdown", "--html", "--json"])
def test_a_format_on_stdout_leaves_the_tables_to_stderr(
    invoke: Invoke, mock: Mock, option: str
) -> None:
    outcome = invoke("run", "s.yaml", option, "-", "-q")
    assert outcome.code == 1
    assert "FAIL (exit 1)" in outcome.err.splitlines()
    assert "Gating: torch@cpu" not in outcome.out.splitlines()


def test_a_target_that_cannot_be_is_refused_before_anything_runs(
    invoke: Invoke, mock: Mock
) -> None:
    Path("file").write_text("")
    outcome = invoke("run", "s.yaml", "--sarif", "file/x.sarif")
    assert outcome.code == 2
    assert outcome.err.startswith("bnaudit: cannot write file/x.sarif: ")
    assert not mock.given


def test_a_second_interruption_does_not_disturb_the_first(
    invoke: Invoke, mock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from typical()[:9]
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(audit, "run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert invoke("run", "s.yaml").code == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_fault_of_the_tool_is_one_line_and_its_traceback_is_asked_for(
    invoke: Invoke, mock: Mock
) -> None:
    mock.events = [*typical()[:9], ZeroDivisionError("by zero")]
    outcome = invoke("run", "s.yaml", "--json", "r.json", "-q")
    message = "bnaudit: internal error: ZeroDivisionError: by zero (-v shows where)\n"
    assert (outcome.code, outcome.err) == (3, message)
    assert len(load(Path("r.json")).results) == 7
    err = invoke("run", "s.yaml", "-v").err
    assert "Traceback (most recent call last)" in err
    assert err.endswith(message)


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: "),
        (["run", "bad.yaml"], "bad.yaml:2:1: shapes: "),
        (["run", "s.yaml", "-b", "welfrod"], "did you mean 'welford'?"),
        (["run", "s.yaml", "--require", "torch@gpu"], "did you mean 'torch@cpu'?"),
        (["run", "s.yaml", "-k", "a b"], "at position 3 of 'a b'"),
        (["run", "s.yaml", "--threads", "0"], "'--threads': 0 is not in the range x>=1"),
        (["run", "s.yaml", "--timeout", "0"], "'--timeout': 0.0 is not in the range x>0"),
        (["run", "s.yaml", "--fail-on", "sometimes"], "'sometimes' is not one of"),
        (
            ["run", "s.yaml", "--json", "s.yaml/r.json"],
            "cannot write s.yaml/r.json: s.yaml is no folder",
        ),
        (["run", "s.yaml", "--json", "s.yaml"], "--json would overwrite PATH"),
        (["run", "s.yaml", "--threads", "two"], "'two' is not an integer"),
        (["run", "s.yaml", "--timeout", "long"], "'long' is not a number"),
        (["selftest", "s.yaml", "--json", "."], "it is a folder"),
        (["probe", "torch", "--json", "."], "it is a folder"),
        (["upgrade", "current", "current", "s.yaml", "--markdown", "."], "it is a folder"),
        (["upgrade", "current", "current", "--reports", "s.yaml"], "s.yaml is no folder"),
        (["run", "s.yaml", "--json", "."], "it is a folder"),
        (["run", "s.yaml", "-q", "-v"], "-q and -v exclude each other (see bnaudit run --help)"),
        (["run", "--jsno", "r.json"], "No such option '--jsno'"),
        (["rnu"], "No such command 'rnu'"),
        (["list", "frameworks"], "'frameworks' is not one of"),
        (["list", "backends", "s.yaml"], "list backends takes no PATH"),
        (["list", "cases", "nowhere"], "nowhere: "),
        (["schema", "inputs"], "'inputs' is not one of"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(
    invoke: Invoke, arguments: list[str], complaint: str
) -> None:
    Path("bad.yaml").write_text("name: bad\nshapes: [1, 2]\n")
    outcome = invoke(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("bnaudit: ")
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_mistake_leaves_an_earlier_report_alone(invoke: Invoke) -> None:
    Path("r.json").write_text("precious")
    invoke("run", "s.yaml", "-b", "welfrod", "--json", "r.json")
    assert Path("r.json").read_text() == "precious"


# --- the other commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_explains_itself_within_80_columns(arguments: list[str], option: str) -> None:
    outcome = CliRunner().invoke(cli, [*arguments, option], prog_name="bnaudit")
    assert outcome.exit_code == 0
    assert outcome.output.startswith("Usage: bnaudit")
    assert max(len(line) for line in outcome.output.splitlines()) <= 80


def test_the_version_is_printed(invoke: Invoke) -> None:
    assert invoke("--version").out == f"bnaudit {__version__}\n"


def test_listed_backends_say_why_they_are_unavailable(invoke: Invoke, mock: Mock) -> None:
    lines = invoke("list").out.splitlines()
    assert invoke("list", "backends").out.splitlines() == lines
    index = next(i for i, line in enumerate(lines) if line.startswith("torch@cuda "))
    assert lines[index].split() == ["torch@cuda", "real", "default", "unavailable"]
    assert "    unavailable: no GPU" in lines[index:]
    assert [line.split()[0] for line in lines if line[0] != " "] == list(BACKENDS)
    assert max(len(line) for line in lines) <= 80


def test_built_environments_are_listed_and_pruned(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("bnaudit.cli.catalogue._describe_environments", lambda given, config: [])
    folder = building.cache_folder() / "0123"
    none = f"none built yet; they would be in {folder.parent}"
    assert none in invoke("list", "environments").out.splitlines()
    folder.mkdir(parents=True)
    request = {"python": "/usr/bin/python3.8", "requirements": ["mxnet==1.9.1", "numpy"]}
    (folder / building.REQUEST).write_text(json.dumps(request))
    (folder / "large").write_bytes(b"x" * 100_000)
    lines = invoke("list", "environments").out.splitlines()
    assert "  /usr/bin/python3.8 mxnet==1.9.1 numpy" in lines
    assert re.search(r"^    \d+ KiB, new, /", "\n".join(lines), re.MULTILINE)
    removed = invoke("list", "environments", "--prune").out
    assert removed.startswith("removed 1 environment, ")
    assert list(folder.parent.iterdir()) == []
    for option in ("--prune", "-v", "--env=a=b", "--config=c"):
        outcome = invoke("list", "backends", option)
        assert (outcome.code, "belongs to list environments" in outcome.err) == (2, True)


def test_a_backend_runs_in_another_environment_and_the_report_says_where(
    invoke: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(OFFSET)
    backend = "other:two-pass@cpu"
    outcome = invoke(
        "run",
        "small.yaml",
        "--env",
        f"other={sys.executable}",
        "-b",
        backend,
        "--json",
        "r.json",
        "-q",
    )
    assert outcome.code == 0
    assert "other: Python 3" in outcome.out
    saved = load(Path("r.json"))
    assert [environment.name for environment in saved.environments] == ["current", "other"]
    assert {(r.backend, r.environment) for r in saved.results} == {(backend, "other")}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--env", "other"], 2, "is no environment"),
        (["--env", "a=x/y", "--env", "a=z"], 2, "given twice"),
        (["--env", "a=no/such/python"], 2, "there is no"),
        (["--env", "a=/bin/false"], 3, "a has no framework that bnaudit knows"),
    ],
)
def test_an_environment_that_cannot_be_had_is_one_sentence(
    invoke: Invoke, options: list[str], code: int, words: str
) -> None:
    outcome = invoke("run", "s.yaml", *options)
    assert (outcome.code, outcome.err.count("\n")) == (code, 1)
    assert words in outcome.err


def test_an_environment_that_does_not_start_costs_its_own_rows_only(
    invoke: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(OFFSET)
    outcome = invoke(
        "run", "small.yaml", "--env", "a=/bin/false", "-b", "a:exact", "-b", "exact", "-q"
    )
    assert outcome.code == 3
    assert "asked for and unavailable: a:exact@cpu" in outcome.out
    assert "2 of 4 ran: 2 pass; 2 unavailable" in outcome.out


def test_an_environment_that_cannot_be_built_costs_its_own_rows_only(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "small.yaml").write_text(OFFSET)
    given = ("--env", "a=no-such-package==1", "--env", f"b={sys.executable}", "-q")
    outcome = invoke("run", "small.yaml", *given, "-b", "a:exact", "-b", "b:exact")
    assert outcome.code == 3
    assert "no-such-package" in outcome.err
    assert "a cannot be built" in outcome.err
    assert "asked for and unavailable: a:exact@cpu" in outcome.out
    assert "2 of 4 ran: 2 pass; 2 unavailable" in outcome.out


def test_environments_of_the_settings_are_part_of_a_run(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(OFFSET)
    settings = f"environments: {{other: {sys.executable}, unused: no/such/python}}"
    (tmp_path / "mine.yaml").write_text(settings)
    options = ("small.yaml", "--config", "mine.yaml", "-b", "other:exact", "-q")
    outcome = invoke("run", *options)
    assert (outcome.code, "other: Python 3" in outcome.out) == (0, True)
    assert invoke("run", *options, "--env", "other=no/such/python").code == 2
    (tmp_path / "mine.yaml").write_text("environment: {}")
    outcome = invoke("run", *options)
    assert outcome.code == 2
    assert outcome.err.startswith("bnaudit: mine.yaml:1:1: environment: found an unknown field")


def test_of_backends_that_nobody_named_an_empty_environment_leaves_one_as_missing() -> None:
    chosen = [Selected(f"{place}:{name}", gated=True) for place in "ab" for name in ("x", "y")]
    absent = "y is not installed"
    reasons = {"a:x": None, "a:y": absent, "b:x": "x cannot be imported: a bug", "b:y": absent}
    kept = _available(chosen, reasons, ["a", "b"])
    assert [(b.name, b.required) for b in kept] == [("a:x", False), ("b:x", True)]
    with pytest.raises(Failure, match="b has no framework that bnaudit knows; b:x: x cannot"):
        _available(chosen[2:], reasons, ["b"])


def test_environments_are_described_with_reasons(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "bnaudit.yaml").write_text(
        "environments: {later: numpy==0.0, broken: /bin/false, gone: python3.98}"
    )
    outcome = invoke("list", "environments", "-v", "--env", f"other={sys.executable}")
    words = " ".join(outcome.out.split())
    assert outcome.code == 0
    assert re.search(r"^later .*not built yet", outcome.out, re.MULTILINE)
    assert re.search(r"^broken +/bin/false +/bin/false: exited", outcome.out, re.MULTILINE)
    assert "gone: there is no interpreter python3.98" in words
    assert re.search(rf"^other .*numpy {np.__version__}", outcome.out, re.MULTILINE)
    assert "flax@cpu, flax-stable@cpu, flax-nnx@cpu" in words


def test_listed_scenarios_have_the_first_sentence_of_their_description(invoke: Invoke) -> None:
    assert invoke("list", "scenarios", "s.yaml").out == (
        "constant-channel  4  A channel that holds one value.\n"
        "large-offset      2  The mean is far from zero.\n"
    )


def test_listed_cases_are_their_ids(invoke: Invoke) -> None:
    lines = invoke("list", "cases", "s.yaml").out.splitlines()
    assert lines == [case.id for scenario in scenarios() for case in scenario.cases]


def test_shipped_scenarios_are_listed_without_a_path(invoke: Invoke) -> None:
    assert invoke("list", "scenarios").out.startswith("caffe-3963 ")


@pytest.mark.parametrize("what", [[], ["scenario"], ["report"]])
def test_schemas_are_json_schemas(invoke: Invoke, what: list[str]) -> None:
    schema = json.loads(invoke("schema", *what).out)
    Draft202012Validator.check_schema(schema)
    assert ("exit_code" in schema["properties"]) == (what == ["report"])


def test_doctor_names_the_command_that_installs_what_is_missing(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"CuPy": (("no-such-package",), "something", "pip install cuda13")}
    monkeypatch.setattr("bnaudit.doctor.OPTIONAL", needs)
    outcome = invoke("doctor", "--threads", "1")
    assert outcome.code == 0
    topics = {line.split("  ")[0] for line in outcome.out.splitlines()}
    assert topics >= {
        "interpreter",
        "processor",
        "arithmetic",
        "BLAS",
        "threads",
        "packages",
        "CUDA driver",
        "GPU",
    }
    assert "1 for the backends" in outcome.out
    assert "not installed; needed for something: pip install cuda13\n" in outcome.out


def test_doctor_proposes_what_the_driver_can_run(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"CuPy": (("no-such-package",), "something", "pip install cuda13")}
    monkeypatch.setattr("bnaudit.doctor.OPTIONAL", needs)
    monkeypatch.setattr("bnaudit.doctor._driver", lambda: 12040)
    out = invoke("doctor").out
    assert "CUDA driver  for CUDA 12.4\n" in out
    assert "needed for something: pip install cuda12\n" in out


# --- as a process ----------------------------------------------------------------------------------


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bnaudit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(("arguments", "heavy"), [(["--help"], False), (["list", "cases"], True)])
def test_help_imports_nothing_heavy(arguments: list[str], heavy: bool) -> None:
    code = (
        "import sys\nfrom bnaudit.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'numba', 'rich', 'pydantic', 'yaml', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout.splitlines()[-1] != "[]") == heavy


PLUGIN = """
import time

def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    with open({log!r}, "a") as log:
        print("called", file=log)
    time.sleep(0.05)
    return x
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_a_valid_report_no_processes_and_no_files(
    tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    (tmp_path / "my_bn.py").write_text(PLUGIN.format(log=str(log)))
    cases = OFFSET.replace("[10, 1e6]", str(list(range(200)))).replace("[4, 8,", "[1, 2,")
    (tmp_path / "s.yaml").write_text(cases)
    arguments = ("run", "s.yaml", "-b", "my_bn.py:batch_norm", "--json", "r.json")
    with process(*arguments, cwd=tmp_path, start_new_session=True) as run:
        deadline = time.monotonic() + 60
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = psutil.Process(run.pid).children(recursive=True)
        assert workers
        run.send_signal(number)
        _, err = run.communicate(timeout=30)
    calls = len(log.read_text().splitlines())
    saved = load(tmp_path / "r.json")
    assert saved.verdict == "interrupted"
    assert calls - 2 <= 2 * len(saved.results) <= calls  # each case is called twice
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    if number != signal.SIGKILL:
        assert run.returncode == 130
        assert (
            err == f"bnaudit: interrupted after {len(saved.results)} results, which are in r.json; "
            "--resume runs the rest\n"
        )
        for folder in (Path("/dev/shm"), Path("/tmp")):
            assert not list(folder.glob(f"bnaudit-{run.pid}-*"))
        assert {path.name for path in tmp_path.iterdir()} == {"log", "my_bn.py", "s.yaml", "r.json"}


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    for arguments in (("list", "cases"), ("schema", "report")):
        with process(*arguments) as run:
            assert run.stdout is not None
            assert run.stderr is not None
            run.stdout.close()
            assert run.stderr.read() == ""


def test_a_closed_stdout_and_a_poor_locale_are_survived() -> None:
    command = [sys.executable, "-m", "bnaudit", "list", "scenarios"]
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True)
    assert (closed.returncode, closed.stderr) == (0, b"")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    poor = subprocess.run([*command[:-1], "backends"], capture_output=True, env=environment)
    assert (poor.returncode, poor.stderr) == (0, b"")


# --- the README ------------------------------------------------------------------------------------

README = (Path(__file__).parent.parent / "README.md").read_text()


def example(language: str, section: str) -> str:
    found = re.search(rf"^## {section}.*?```{language}\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_every_command_backend_and_exit_code_is_documented() -> None:
    for command in COMMANDS:
        assert f"bnaudit {command}" in README
    for name in BACKENDS:
        assert name in README or f"`{name.partition('@')[0]}`" in README
    assert all(f"| {status} |" in README for status in (0, 1, 2, 3, 4, 5, 130))


def test_the_scenario_of_the_readme_can_be_loaded(invoke: Invoke) -> None:
    Path("my.yaml").write_text(example("yaml", "Writing a scenario"))
    assert len(invoke("list", "cases", "my.yaml").out.splitlines()) == 24


def test_the_thresholds_and_the_baseline_of_the_readme_can_be_loaded(tmp_path: Path) -> None:
    thresholds, entries = tmp_path / "t.yaml", tmp_path / "b.yaml"
    thresholds.write_text(example("yaml", "Reports for people and for CI"))
    entries.write_text("version: 1\nentries:\n" + example("yaml", "Known deviations"))
    assert load_as(Overrides, thresholds, ReportError).scenarios.keys() == {"large-offset"}
    (entry,) = load_as(Baseline, entries, ReportError).entries
    assert str(entry.expires) == "2027-01-31"


def test_the_plugin_of_the_readme_passes_an_easy_case(invoke: Invoke) -> None:
    Path("my_bn.py").write_text(example("python", "Auditing your own kernel"))
    Path("easy.yaml").write_text(
        "name: easy\ndescription: Nothing hard.\ninput: {distribution: normal}\nshape: [2, 3, 4, 4]\n"
        "mode: [training, inference]\n"
    )
    outcome = invoke("run", "easy.yaml", "-b", "my_bn.py:batch_norm")
    assert "PASS (exit 0)" in outcome.out
    assert outcome.code == 0
