"""Environments: what a specification means, what is built once, and which subject a backend runs on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from correct import prepare

from bnaudit import building, environments, subject
from bnaudit.building import BuildError, completed, known
from bnaudit.environments import EnvironmentSpecError, Subjects, parse, resolve, split
from bnaudit.progress import watch
from bnaudit.subject import Subject, scratch_folder
from bnaudit.worker.backends import BACKENDS

FAKE_PYTHON = """#!/bin/sh
echo "$@" >> {log}
if [ "$1" = -c ]; then
    echo "$0 3.99.0"
elif [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$2" = pip ]; then
    case "$*" in
        *broken*) echo "no matching distribution"; exit 1;;
        *slow*) echo "downloading"; sleep 60;;
    esac
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


def installs(log: Path) -> list[str]:
    """What the stand-in was asked for, but for its version."""
    return [line for line in log.read_text().splitlines() if not line.startswith("-c ")]


@contextlib.contextmanager
def quiet(headline: str) -> Iterator[Callable[[str], None]]:
    yield lambda line: None


@contextlib.contextmanager
def idle(headline: str) -> Iterator[Callable[[str], None]]:
    assert not headline, "nothing is to be built"
    yield lambda line: None


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
    assert resolve("a", sys.executable, idle).command == (sys.executable,)
    assert resolve("a", "python3.99", idle).command == (str(tmp_path / "bin" / "python3.99"),)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert resolve("a", str(tmp_path / "venv"), idle).command == (str(python),)
    command = "cmd:docker run -i 'my image' python"
    assert resolve("a", command, idle).command == ("docker", "run", "-i", "my image", "python")
    assert not log.exists()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("python3.98", "there is no interpreter python3.98"),
        ("nowhere/bin/activate", "there is no file or folder nowhere/bin/activate"),
        ("~nobody-of-this-name/venv", "there is no file or folder ~nobody-of-this-name/venv"),
        (".", "has no bin/python"),
    ],
)
def test_what_is_not_there_is_said_to_be_so(log: Path, spec: str, complaint: str) -> None:
    with pytest.raises(EnvironmentSpecError, match=complaint):
        resolve("a", spec, idle)


# --- built from requirements -----------------------------------------------------------------------


def test_requirements_are_built_once_with_numpy_for_the_worker(log: Path, tmp_path: Path) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def noting(headline: str) -> Iterator[Callable[[str], None]]:
        said.append(headline)
        yield said.append

    first = resolve("old", "python3.99 mxnet==1.9.1", noting)
    assert said == ["building old: mxnet==1.9.1 numpy<1.24"]
    folder = Path(first.command[0]).parent.parent
    assert installs(log) == [f"-m venv {folder}", "-m pip install mxnet==1.9.1 numpy<1.24"]
    assert resolve("other", "python3.99 mxnet==1.9.1", idle).command == first.command
    (entry,) = building.built()
    assert entry.folder == folder
    assert entry.requirements == ["mxnet==1.9.1", "numpy<1.24"]
    assert entry.size > 0
    resolve("old", "python3.99 mxnet==1.9.1 numpy==1.23.5", noting)
    assert installs(log)[-1] == "-m pip install mxnet==1.9.1 numpy==1.23.5"
    assert len(building.prune()) == 2
    assert list(building.cache_folder().iterdir()) == []


def test_what_a_package_needs_for_its_own_build_is_there_first(log: Path) -> None:
    resolve("old", "python3.99 chainer==7.8.1", quiet)
    assert installs(log)[1:] == [
        "-m pip install setuptools<74 wheel",
        "-m pip install --no-build-isolation chainer==7.8.1 numpy<2",
    ]


def test_a_build_does_not_see_the_auditors_path(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/auditors")
    monkeypatch.setenv("PIP_CONSTRAINT", "mine.txt")
    seen = building._environment()
    assert "PYTHONPATH" not in seen
    assert (seen["PIP_CONSTRAINT"], seen["UV_CONSTRAINT"]) == ("mine.txt", "mine.txt")
    assert resolve("old", "python3.99 a", quiet).command[1:] == ("-E",)


def test_an_installer_that_fails_is_quoted_and_leaves_nothing_behind(log: Path) -> None:
    with pytest.raises(BuildError, match=r"^old cannot be built: ") as caught:
        resolve("old", "python3.99 broken==1", quiet)
    assert caught.value.output == "no matching distribution"
    assert not list(building.cache_folder().glob("*/"))


def test_an_interpreter_that_does_not_run_is_said_to_be_so(log: Path) -> None:
    (log.parent / "bin" / "python3.97").write_text(
        "#!/bin/sh\necho no such version >&2; exit 127\n"
    )
    (log.parent / "bin" / "python3.97").chmod(0o755)
    with pytest.raises(EnvironmentSpecError, match=r"a: python3.97 does not run: no such version"):
        resolve("a", "python3.97 torch", idle)


def test_what_was_interrupted_is_built_again(log: Path) -> None:
    folder = Path(resolve("old", "python3.99 a", quiet).command[0]).parent.parent
    request = folder / building.REQUEST
    assert json.loads(request.read_text())["requirements"] == ["a", "numpy"]
    request.unlink()
    before = len(installs(log))
    resolve("old", "python3.99 a", quiet)
    assert len(installs(log)) == before + 2


def test_an_interrupted_build_leaves_neither_files_nor_processes(log: Path) -> None:
    children: list[int] = []

    @contextlib.contextmanager
    def interrupting(headline: str) -> Iterator[Callable[[str], None]]:
        def interrupt(line: str) -> None:
            assert line == "downloading"
            done = subprocess.run(
                ["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=True
            )
            children.extend(map(int, done.stdout.split()))
            raise KeyboardInterrupt

        yield interrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("old", "python3.99 slow", interrupting)
    assert children
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert not list(building.cache_folder().glob("*/"))


def test_a_second_build_of_the_same_waits_for_the_first_and_uses_it(log: Path) -> None:
    request = building.Request.of("python3.99", ["a"])
    lock = request.folder.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    told = threading.Event()

    @contextlib.contextmanager
    def listening(headline: str) -> Iterator[Callable[[str], None]]:
        yield lambda line: told.set() if "waiting" in line else None

    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert building.prune() == []
        done: list[Path] = []
        thread = threading.Thread(
            target=lambda: done.append(building.ensure("b", request, listening))
        )
        thread.start()
        assert told.wait(10)
        assert not done
        request.interpreter.parent.mkdir(parents=True)
        request.interpreter.touch()
        (request.folder / building.REQUEST).write_text("{}")
        lock.unlink()
    thread.join(10)
    assert done == [request.interpreter]
    assert installs(log) == []


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["onnxruntime==1.20.1"], ["onnx", "numpy"]),
        (["onnxruntime-gpu==1.20.1"], ["onnx", "numpy"]),
        (["onnxruntime-extensions"], ["numpy"]),
        (["onnxruntime[x]>=1.20", "onnx==1.16", "numpy==1.26"], []),
        (["OnnxRuntime~=1.20", "ONNX"], ["numpy"]),
        (["tensorflow==1.15.5"], ["numpy<1.19", "protobuf<3.21"]),
        (["tensorflow==2.21"], ["numpy"]),
        (["torch==2.2.1"], ["numpy<2"]),
        (["torch==2.20.1"], ["numpy"]),
        (["torch<3", "--index-url", "https://x/cpu"], ["numpy"]),
        (["numpy-financial"], ["numpy"]),
        (["dist/onnxruntime-1.33-cp311-cp311-linux_x86_64.whl"], ["onnx", "numpy"]),
    ],
)
def test_what_an_adapter_needs_besides_is_added_unless_given(
    given: list[str], wanted: list[str]
) -> None:
    assert completed(given) == [*given, *wanted]


def test_every_library_of_the_table_exists_and_every_framework_has_a_package() -> None:
    libraries = {backend.library for backend in BACKENDS.values() if backend.kind == "real"}
    named = {library for package in building.PACKAGES for library in package.libraries}
    assert named <= libraries
    assert known("flax==0.12.8").libraries == ("flax",)


def test_a_specification_tells_which_frameworks_it_is_about() -> None:
    def of(spec: str) -> list[str]:
        return environments.frameworks("a", spec, BACKENDS)

    assert of("onnxruntime==1.20.1 numpy<2") == ["onnxruntime@cpu"]
    assert of("flax==0.12.8") == ["flax@cpu", "flax-stable@cpu", "flax-nnx@cpu"]
    assert of(sys.executable) == of("cmd:docker run torch python") == of("current") == []


# --- progress --------------------------------------------------------------------------------------


def test_a_build_is_told_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with watch(quiet=False)("building old: a") as show:
        show("Collecting a")
    with watch(quiet=True)("building old: a") as show:
        show("Collecting a")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "bnaudit: building old: a\n  done in 0 s\n")


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
