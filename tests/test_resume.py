"""An interrupted run is continued: nothing is run twice, and the end is that of a run in one piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bnaudit.audit import Selected
from bnaudit.cli import main
from bnaudit.report import load
from bnaudit.resume import Earlier
from bnaudit.scenario import Case

SCENARIOS = """
name: first
input: {distribution: normal, mean: [0, 1e5]}
shape: [4, 3, 5]
controls: {must_fail: [one-pass@cpu], must_pass: [exact@cpu]}
---
name: second
input: {distribution: constant, value: [3.3, 100]}
shape: [4, 3, 5]
---
name: third
input: {distribution: normal}
shape: [4, 3]
memory_format: [contiguous, channels_last]
"""

PLUGIN = """
import os, pathlib
import numpy as np
LOG = pathlib.Path(__file__).with_name("calls")
def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    with LOG.open("a") as log:
        log.write(f"{x.ravel()[0]!r}\\n")
    axes = (0, *range(2, x.ndim))
    wide = x.astype(np.float64)
    y = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + eps)
    return y.astype(x.dtype)
""".replace("\\\\", "\\")
"""Writes down that it was called: twice a case, as every plug-in is."""


class Outcome(NamedTuple):
    """How a command ended, and all that it said."""

    exit_code: object
    output: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "s.yaml").write_text(SCENARIOS)
    (tmp_path / "plugin.py").write_text(PLUGIN)

    def invoke(*options: str) -> Outcome:
        backend = f"{tmp_path / 'plugin.py'}:batch_norm"
        given = ["run", str(tmp_path / "s.yaml"), "-b", backend, "-q"]
        with pytest.raises(SystemExit) as end:
            main([*given, "--json", str(tmp_path / "r.json"), *options])
        said = capsys.readouterr()
        return Outcome(end.value.code, said.out + said.err)

    return invoke


def calls(folder: Path) -> int:
    log = folder / "calls"
    count = len(log.read_text().splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def interrupt(path: Path, cases: int) -> None:
    """Makes of a finished report one that was cut short in the last of its first `cases` cases."""
    document = json.loads(path.read_text())
    document["cases"] = document["cases"][:cases]
    ids = [case["id"] for case in document["cases"]]
    document["results"] = [r for r in document["results"] if r["case"] in ids][:-1]
    document["controls"] = []
    document["verdict"], document["exit_code"] = "interrupted", 130
    path.write_text(json.dumps(document))


def comparable(path: Path) -> dict[str, Any]:
    found = load(path).model_dump(mode="json", exclude={"started", "duration_seconds", "command"})
    for result in found["results"]:
        del result["seconds"]
    return found


@pytest.mark.parametrize(("cases", "rerun"), [(1, 5), (3, 3), (5, 1), (6, 0)])
def test_only_what_is_not_complete_is_run_again(
    run: Run, tmp_path: Path, cases: int, rerun: int
) -> None:
    target = tmp_path / "r.json"
    first = run()
    assert first.exit_code == 0, first.output
    assert calls(tmp_path) == 2 * 5
    whole = comparable(target)
    interrupt(target, cases)
    again = run("--resume")
    assert (again.exit_code, comparable(target)) == (0, whole)
    assert calls(tmp_path) == 2 * rerun
    assert "controls 2/2 as expected" in again.output


def test_without_the_option_everything_is_run_again(run: Run, tmp_path: Path) -> None:
    run()
    calls(tmp_path)
    run()
    assert calls(tmp_path) == 10


def test_a_report_that_is_not_there_yet_is_begun(run: Run, tmp_path: Path) -> None:
    assert run("--resume").exit_code == 0
    assert calls(tmp_path) == 10


def test_a_backend_that_is_new_is_run_on_every_case(run: Run, tmp_path: Path) -> None:
    run()
    calls(tmp_path)
    run("--resume", "-b", "welford")
    assert calls(tmp_path) == 10
    assert {"welford@cpu", "exact@cpu"} <= {r.backend for r in load(tmp_path / "r.json").results}


def change_environment(document: dict[str, Any]) -> None:
    document["environments"][0]["packages"]["numpy"] = "1.0"


def change_scenario(document: dict[str, Any]) -> None:
    document["cases"][1]["key"] = "0" * 64


def change_version(document: dict[str, Any]) -> None:
    document["bnaudit_version"] = "0.0.1"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change_environment, "in current packages.numpy was 1.0, and is"),
        (change_scenario, "the scenarios are not the same: first/mean=100000.0"),
        (change_version, "it was written by bnaudit 0.0.1"),
    ],
)
def test_what_differs_is_said_and_nothing_is_lost(
    run: Run, tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    target = tmp_path / "r.json"
    run()
    document = json.loads(target.read_text())
    change(document)
    text = json.dumps(document)
    target.write_text(text)
    outcome = run("--resume")
    assert outcome.exit_code == 2
    assert f"bnaudit: cannot resume {target}: " in outcome.output
    assert complaint in outcome.output
    assert target.read_text() == text


def test_checks_of_consistency_are_taken_over_or_made(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    run("--check", "repeat")
    calls(tmp_path)
    whole = comparable(target)
    run("--resume", "--check", "repeat")
    assert calls(tmp_path) == 0
    assert comparable(target) == whole
    run("--resume")
    assert calls(tmp_path) == 10


def test_it_takes_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--resume"])
    assert end.value.code == 2
    assert "--resume takes --json FILE" in capsys.readouterr().err


def test_interrupted_once_more_before_it_got_anywhere_nothing_is_lost(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "r.json"
    run()
    interrupt(target, 5)
    before = target.read_text()
    take_over = Earlier.__call__

    def stop(earlier: Earlier, case: Case, backends: Sequence[Selected]) -> Any:
        if case.scenario == "second":
            raise KeyboardInterrupt
        return take_over(earlier, case, backends)

    with monkeypatch.context() as patch:
        patch.setattr(Earlier, "__call__", stop)
        assert run("--resume").exit_code == 130
    assert target.read_text() == before
    calls(tmp_path)
    assert run("--resume").exit_code == 0
    assert calls(tmp_path) == 2
