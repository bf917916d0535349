"""Where subjects live: this interpreter, another one, or one that is built from requirements.

A specification is a Python interpreter, the folder of a virtual environment, `cmd:COMMAND` (anything that
starts a Python with the worker's arguments behind it: a container, numactl), or requirements separated by
blanks, led by a Python or not: `python3.8 mxnet==1.9.1 numpy==1.23.5`. What is built stays in a cache, by
the request, and is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bnaudit.inputs import Inputs
from bnaudit.scenario import Case
from bnaudit.subject import Reply, Subject, SubjectError

CURRENT = "current"
"""The name of the interpreter that the auditor itself runs in."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PYTHON = re.compile(r"(.*/)?python(\d+(\.\d+)?)?")

REQUEST = "bnaudit-request.json"
"""Written into a built environment when it is complete."""

LAST_LINES = 8
"""Lines of an installer's output that a failure shows."""


class EnvironmentSpecError(Exception):
    """An environment that cannot be had; the message says why, in a sentence or an installer's last lines."""


@dataclass(frozen=True)
class Environment:
    """A named environment. command: starts a Python; the worker's script and arguments follow it."""

    name: str
    command: tuple[str, ...]


def cache_folder() -> Path:
    """Where built environments are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "bnaudit" / "environments"


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


def resolve(name: str, spec: str, say: Callable[[str], None]) -> Environment:
    """The environment of a specification, built where it has to be; `say` is told what takes long.

    Raises EnvironmentSpecError.
    """
    if spec.startswith("cmd:"):
        return Environment(name, tuple(shlex.split(spec.removeprefix("cmd:"))))
    path = Path(spec).expanduser()
    if path.is_dir():
        python = path / "bin" / "python"
        if not python.exists():
            raise EnvironmentSpecError(
                f"{name}: {spec} is no virtual environment: it has no bin/python"
            )
        return Environment(name, (str(python.absolute()),))
    first, *rest = spec.split()
    if not rest and (path.is_file() or PYTHON.fullmatch(first)):
        return Environment(name, (_interpreter(name, first),))
    if "/" in first and not PYTHON.fullmatch(first):
        raise EnvironmentSpecError(f"{name}: there is no file or folder {first}")
    return Environment(name, (str(_built(name, spec, say)),))


def _interpreter(name: str, given: str) -> str:
    found = shutil.which(str(Path(given).expanduser()))
    if found is None:
        raise EnvironmentSpecError(f"{name}: there is no interpreter {given}")
    return str(Path(found).absolute())


def _built(name: str, spec: str, say: Callable[[str], None]) -> Path:
    """The interpreter of a virtual environment with these requirements, from the cache or made now."""
    first, *rest = spec.split()
    python, requirements = (
        (first, rest) if PYTHON.fullmatch(first) else (sys.executable, [first, *rest])
    )
    base = _interpreter(name, python)
    if not any(re.match(r"numpy\b", requirement) for requirement in requirements):
        requirements = [*requirements, "numpy"]  # which the worker itself needs
    request = {"python": base, "requirements": requirements}
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    folder = cache_folder() / digest
    if not (folder / REQUEST).is_file():
        say(f"building {name}: {spec}")
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv")
        target = str(folder / "bin" / "python")
        if uv is None:
            commands = [[base, "-m", "venv", str(folder)], [target, "-m", "pip", "install"]]
        else:
            commands = [
                [uv, "venv", "--python", base, str(folder)],
                [uv, "pip", "install", "--python", target],
            ]
        commands[1] += requirements
        for command in commands:
            _install(name, command, folder)
        (folder / REQUEST).write_text(json.dumps(request))
    return folder / "bin" / "python"


def _install(name: str, command: Sequence[str], folder: Path) -> None:
    done = (
        subprocess.run(  # the installer's own settings apply: index, find-links, proxy, constraints
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        last = "\n".join(done.stdout.rstrip().splitlines()[-LAST_LINES:])
        raise EnvironmentSpecError(f"{name} cannot be built: {shlex.join(command)} failed:\n{last}")


def built() -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Folders of the environments in the cache, with their requests."""
    for path in sorted(cache_folder().glob(f"*/{REQUEST}")):
        yield path.parent, json.loads(path.read_text())


def prune() -> list[Path]:
    """Removes all built environments, also half-built ones, and returns their folders."""
    folders = sorted(path for path in cache_folder().glob("*") if path.is_dir())
    for folder in folders:
        shutil.rmtree(folder)
    return folders


def split(backend: str, environments: Sequence[str]) -> tuple[str, str]:
    """The environment's name and the rest of ENV:BACKEND; CURRENT where no environment is named."""
    name, colon, rest = backend.partition(":")
    return (name, rest) if colon and name in environments else (CURRENT, backend)


class Subjects:
    """Subjects of several environments as one: backends outside the current one are named ENV:BACKEND."""

    def __init__(self, subjects: Mapping[str, Subject]) -> None:
        """subjects: by the environment's name, CURRENT among them."""
        self._subjects = subjects

    @property
    def threads(self) -> int:
        """Threads of every backend."""
        return self._subjects[CURRENT].threads

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
        return self._subjects[name].run(rest, case, inputs)


AnySubject: TypeAlias = Subject | Subjects
"""What calls backends: one environment, or several."""
