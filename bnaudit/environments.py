"""Where subjects live: this interpreter, another one, or one that is built from requirements.

A specification is a Python interpreter, the folder of a virtual environment, `cmd:COMMAND` (anything that
starts a Python with the worker's arguments behind it: a container, numactl), or requirements separated by
blanks, led by a Python or not: `python3.8 mxnet==1.9.1 numpy==1.23.5` (see `bnaudit.building`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bnaudit import building
from bnaudit.building import BuildError, Request, Watch
from bnaudit.inputs import Inputs
from bnaudit.scenario import Case
from bnaudit.subject import Reply, Subject, SubjectError
from bnaudit.worker.backends import BACKENDS, Backend

CURRENT = "current"
"""The name of the interpreter that the auditor itself runs in."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PYTHON = re.compile(r"(.*/)?python(\d+(\.\d+)?)?")


class EnvironmentSpecError(Exception):
    """A specification of an environment that cannot be; the message says why in a sentence."""


@dataclass(frozen=True)
class Environment:
    """A named environment. command: starts a Python; the worker's script and arguments follow it."""

    name: str
    command: tuple[str, ...]


def parse(given: str) -> tuple[str, str]:
    """NAME and SPEC of NAME=SPEC. Raises EnvironmentSpecError."""
    name, equals, spec = given.partition("=")
    if not equals or not spec.strip() or not NAME.fullmatch(name):
        raise EnvironmentSpecError(
            f"{given!r} is no environment; one is NAME=SPEC, such as old=.venv-old or "
            "old='python3.10 torch==2.4.0'"
        )
    if name == CURRENT:
        raise EnvironmentSpecError(
            f"the name {CURRENT!r} belongs to the interpreter that bnaudit runs in"
        )
    return name, spec.strip()


def parse_all(given: Sequence[str]) -> list[tuple[str, str]]:
    """NAME and SPEC of each NAME=SPEC, no name twice. Raises EnvironmentSpecError."""
    parsed = [parse(text) for text in given]
    names = [name for name, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise EnvironmentSpecError(f"the environment {name!r} is given twice")
    return parsed


def resolve(name: str, spec: str, watch: Watch) -> Environment:
    """The environment of a specification, built where it has to be, under the eyes of `watch`.

    Raises EnvironmentSpecError, and BuildError where an installer fails.
    """
    found = read(name, spec)
    if isinstance(found, Environment):
        return found
    # -E: what is on the auditor's PYTHONPATH must not stand in for what was built.
    return Environment(name, (str(building.ensure(name, found, watch)), "-E"))


def read(name: str, spec: str) -> Environment | Request:
    """The environment of a specification, or the request for one that is built from requirements.

    Raises EnvironmentSpecError.
    """
    if spec == CURRENT:
        return Environment(name, (sys.executable,))
    if spec.startswith("cmd:"):
        return Environment(name, _command(name, spec))
    path = Path(os.path.expanduser(spec))  # noqa: PTH111 - which leaves ~ of an unknown user alone
    python = path / "bin" / "python"
    if python.exists():
        return Environment(name, (str(python.absolute()),))
    if path.is_dir() and ("/" in spec or not building.name_of(spec)):
        raise EnvironmentSpecError(
            f"{name}: {spec} is no virtual environment: it has no bin/python"
        )
    first, *rest = spec.split()
    if "/" in first and not (PYTHON.fullmatch(first) or first.endswith(".whl") or path.exists()):
        raise EnvironmentSpecError(f"{name}: there is no file or folder {first}")
    if not rest and not spec.endswith(".whl") and ("/" in spec or PYTHON.fullmatch(first)):
        return Environment(name, (_interpreter(name, spec),))
    if not PYTHON.fullmatch(first):
        first, rest = sys.executable, [first, *rest]
    for requirement in rest:
        if requirement.endswith(".whl") and not Path(requirement).expanduser().is_file():
            raise EnvironmentSpecError(f"{name}: there is no file {requirement}")
    try:
        return Request.of(first, rest)
    except BuildError as error:
        raise EnvironmentSpecError(f"{name}: {error}") from error


def frameworks(name: str, spec: str, table: Mapping[str, Backend]) -> list[str]:
    """The real frameworks of the packages that a specification installs; none where it installs nothing.

    Raises EnvironmentSpecError.
    """
    if isinstance(read(name, spec), Environment):
        return []
    libraries = {library for token in spec.split() for library in building.known(token).libraries}
    return [backend for backend, b in table.items() if b.kind == "real" and b.library in libraries]


@dataclass(frozen=True)
class Described:
    """An environment as a list shows it.

    spec: what it was given as, or is to be built from. python: path and version of the interpreter;
    packages: versions of those that matter; reasons: why each real framework cannot run there, or None;
    all three are None where it is not built yet.
    problem: why it cannot be used at all.
    """

    name: str
    spec: str
    python: str | None = None
    packages: Mapping[str, str] | None = None
    reasons: Mapping[str, str | None] | None = None
    problem: str | None = None


def describe(name: str, spec: str, place: Environment, scratch: Path) -> Described:
    """What is in an environment."""
    names = [backend for backend, known in BACKENDS.items() if known.kind == "real"]
    with Subject(name=name, command=place.command, scratch=scratch) as subject:
        try:
            found = subject.environment()
        except SubjectError as error:
            return Described(name, spec, problem=str(error))
        packages = {key: value for key, value in found["packages"].items() if value}
        python = f"{found['executable']} ({found['python']})"
        return Described(name, spec, python, packages, subject.describe(names))


def _command(name: str, spec: str) -> tuple[str, ...]:
    try:
        command = tuple(shlex.split(spec.removeprefix("cmd:")))
    except ValueError as error:
        raise EnvironmentSpecError(f"{name}: {spec} is no command: {error}") from error
    if not command:
        raise EnvironmentSpecError(f"{name}: cmd: is followed by a command that starts a Python")
    return command


def _interpreter(name: str, given: str) -> str:
    found = shutil.which(str(Path(given).expanduser()))
    if found is None:
        raise EnvironmentSpecError(f"{name}: there is no interpreter {given}")
    return str(Path(found).absolute())


def split(backend: str, environments: Sequence[str]) -> tuple[str, str]:
    """The environment's name and the rest of ENV:BACKEND; CURRENT where no environment is named."""
    name, colon, rest = backend.partition(":")
    return (name, rest) if colon and name in environments else (CURRENT, backend)


class Missing:
    """In place of the subject of an environment that could not be built: nothing of it is available."""

    def __init__(self, reason: str) -> None:
        """reason: why, in a sentence."""
        self._reason = reason

    def environment(self) -> dict[str, Any]:
        """Raises SubjectError."""
        raise SubjectError(self._reason)

    def describe(self, backends: Sequence[str]) -> dict[str, str | None]:
        """The reason, for every backend."""
        return dict.fromkeys(backends, self._reason)


class Subjects:
    """Subjects of several environments as one: backends outside the current one are named ENV:BACKEND."""

    def __init__(
        self, subjects: Mapping[str, Subject], missing: Mapping[str, Missing] | None = None
    ) -> None:
        """subjects: by the environment's name, CURRENT among them; missing: those that there are not."""
        self._running = subjects
        self._subjects: dict[str, Subject | Missing] = {**subjects, **(missing or {})}

    @property
    def threads(self) -> int:
        """Threads of every backend."""
        return self._running[CURRENT].threads

    def environment_of(self, backend: str) -> str:
        """The name of the environment in which a backend runs."""
        return split(backend, list(self._subjects))[0]

    def environments(self) -> list[dict[str, Any]]:
        """What backends run on, of each environment in which a worker starts; the current one first."""
        found = []
        for name, subject in self._subjects.items():
            try:
                found.append(subject.environment())
            except SubjectError:
                if name == CURRENT:
                    raise
        return found

    def describe(self, backends: Sequence[str]) -> dict[str, str | None]:
        """Why each backend cannot run, or None."""
        found: dict[str, str | None] = {}
        for name, subject in self._subjects.items():
            own = {
                rest: backend
                for backend in backends
                for environment, rest in [split(backend, list(self._subjects))]
                if environment == name
            }
            if own:
                reasons = subject.describe(list(own))
                found.update((own[rest], reason) for rest, reason in reasons.items())
        return {backend: found[backend] for backend in backends}

    def run(self, backend: str, case: Case, inputs: Inputs) -> Reply:
        """Runs one case on one backend where that lives."""
        name, rest = split(backend, list(self._subjects))
        return self._running[name].run(rest, case, inputs)


AnySubject: TypeAlias = Subject | Subjects
"""What calls backends: one environment, or several."""
