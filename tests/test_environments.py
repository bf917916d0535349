"""Environments: what a specification means, what is built once, and which subject a backend runs on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from correct import prepare

from bnaudit import environments, subject
from bnaudit.environments import EnvironmentSpecError, Subjects, parse, resolve, split
from bnaudit.subject import Subject, scratch_folder

FAKE_PYTHON = """#!/bin/sh
echo "$@" >> {log}
if [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$2" = pip ]; then
    for last; do :; done
    case "$*" in *broken*) echo "no matching distribution"; exit 1;; esac
fi
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A python3.99 that only notes what it is asked for, no uv, and a cache of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "python3.99"
    script.write_text(FAKE_PYTHON.format(log=tmp_path / "log"))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "log"


def silent(text: str) -> None:
    raise AssertionError(f"said {text!r}")


# --- specifications --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "old", "old=", "=spec", "a b=spec", "old:x=spec", "-x=spec"])
def test_what_is_no_environment_is_refused_with_an_example(given: str) -> None:
    with pytest.raises(EnvironmentSpecError, match="one is NAME=SPEC, such as"):
        parse(given)


def test_the_current_interpreters_name_is_taken() -> None:
    with pytest.raises(EnvironmentSpecError, match="belongs to the interpreter"):
        parse("current=x")


def test_a_specification_may_hold_an_equals_sign() -> None:
    assert parse("old=torch==2.4.0 numpy<2") == ("old", "torch==2.4.0 numpy<2")


def test_an_interpreter_a_virtual_environment_and_a_command_are_used_as_they_are(
    tmp_path: Path, log: Path
) -> None:
    assert resolve("a", sys.executable, silent).command == (sys.executable,)
    assert resolve("a", "python3.99", silent).command == (str(tmp_path / "bin" / "python3.99"),)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert resolve("a", str(tmp_path / "venv"), silent).command == (str(python),)
    command = "cmd:docker run -i 'my image' python"
    assert resolve("a", command, silent).command == ("docker", "run", "-i", "my image", "python")
    assert not log.exists()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("python3.98", "there is no interpreter python3.98"),
        ("nowhere/bin/activate", "there is no file or folder nowhere/bin/activate"),
        (".", "has no bin/python"),
    ],
)
def test_what_is_not_there_is_said_to_be_so(log: Path, spec: str, complaint: str) -> None:
    with pytest.raises(EnvironmentSpecError, match=complaint):
        resolve("a", spec, silent)


# --- built from requirements -----------------------------------------------------------------------


def test_requirements_are_built_once_with_numpy_for_the_worker(log: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = resolve("old", "python3.99 mxnet==1.9.1", said.append)
    assert said == ["building old: python3.99 mxnet==1.9.1"]
    folder = Path(first.command[0]).parent.parent
    assert log.read_text().splitlines() == [
        f"-m venv {folder}",
        "-m pip install mxnet==1.9.1 numpy",
    ]
    assert resolve("other", "python3.99 mxnet==1.9.1", silent).command == first.command
    ((place, request),) = environments.built()
    assert place == folder
    assert request["requirements"] == ["mxnet==1.9.1", "numpy"]
    resolve("old", "python3.99 mxnet==1.9.1 numpy==1.23.5", said.append)
    assert log.read_text().splitlines()[-1] == "-m pip install mxnet==1.9.1 numpy==1.23.5"
    assert len(environments.prune()) == 2
    assert list(environments.built()) == []


def test_an_installer_that_fails_is_quoted_and_leaves_nothing_behind(log: Path) -> None:
    with pytest.raises(EnvironmentSpecError, match="no matching distribution") as caught:
        resolve("old", "python3.99 broken==1", lambda text: None)
    assert str(caught.value).startswith("old cannot be built: ")
    assert not list(environments.cache_folder().glob("*"))


def test_what_was_interrupted_is_built_again(log: Path) -> None:
    folder = Path(resolve("old", "python3.99 a", lambda text: None).command[0]).parent.parent
    request = folder / environments.REQUEST
    assert json.loads(request.read_text())["requirements"] == ["a", "numpy"]
    request.unlink()
    said: list[str] = []
    resolve("old", "python3.99 a", said.append)
    assert said


# --- which subject runs what -----------------------------------------------------------------------


class Stub:
    threads = 2

    def __init__(self, name: str) -> None:
        self.name = name

    def describe(self, backends: list[str]) -> dict[str, str | None]:
        return {backend: f"{self.name} has no {backend}" for backend in backends}

    def run(self, backend: str, case: Any, inputs: Any) -> Any:
        return self.name, backend


def test_a_backend_runs_where_its_name_says() -> None:
    subjects: Any = Subjects({name: Stub(name) for name in ("current", "old")})  # type: ignore[misc]
    plugin = "my_bn.py:batch_norm@cpu"
    names = ["old:torch@cpu", "torch@cpu", f"old:{plugin}", plugin]
    assert [subjects.run(name, None, None) for name in names] == [
        ("old", "torch@cpu"),
        ("current", "torch@cpu"),
        ("old", plugin),
        ("current", plugin),
    ]
    assert [subjects.environment_of(name) for name in names] == ["old", "current", "old", "current"]
    reasons = subjects.describe(names)
    assert list(reasons) == names
    assert reasons["old:torch@cpu"] == "old has no torch@cpu"
    assert reasons[plugin] == f"current has no {plugin}"
    assert split("new:torch@cpu", ["old"]) == ("current", "new:torch@cpu")


# --- broken frameworks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "outcome", "words"),
    [
        ("import time; time.sleep(1000)", "unavailable", "not loaded within 5 s"),
        ("import os; os._exit(3)", "crash", "exited with code 3"),
        ("raise SystemExit(4)", "crash", "SystemExit: 4"),
        ("import torch_gone", "unavailable", "No module named 'torch_gone'"),
        ("raise OSError('libtorch.so: cannot open')", "unavailable", "OSError: libtorch.so"),
        ("def f(:", "unavailable", "SyntaxError: "),
    ],
)
def test_a_broken_framework_costs_its_own_results_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, outcome: str, words: str
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    command = ("env", f"PYTHONPATH={tmp_path}", sys.executable)
    case, inputs = prepare(tmp_path, "input: {distribution: normal}\nshape: [4, 3]\n")
    monkeypatch.setattr(subject, "LEAST_START", 5)
    with (
        scratch_folder() as scratch,
        Subject(scratch=scratch) as current,
        Subject(name="x", command=command, scratch=scratch, timeout=1) as broken,
    ):
        subjects = Subjects({"current": current, "x": broken})
        names = ["x:torch@cpu", "x:two-pass@cpu", "two-pass@cpu"]
        reasons = subjects.describe(names)
        assert reasons["x:two-pass@cpu"] is reasons["two-pass@cpu"] is None
        # Told of as the others are, and also where it is the auditor's own.
        assert [found["name"] for found in subjects.environments()] == ["current", "x"]
        assert broken.environment()["packages"]["numpy"]
        first, *others = [subjects.run(name, case, inputs) for name in names]
        again = subjects.run("x:torch@cpu", case, inputs)
    assert first.outcome == again.outcome == outcome
    assert words in (first.reason or "")
    assert [reply.outcome for reply in others] == ["done", "done"]
