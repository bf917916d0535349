"""Virtual environments made of requirements, and the cache that keeps them.

An environment is built in its place in the cache, under a lock, and counts as built once it holds the file
REQUEST: a build that was interrupted or failed is never used, and is made anew. (It is not moved there when
complete, because scripts in a virtual environment know its path.)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

REQUEST = "bnaudit-request.json"
"""Written into a built environment when it is complete."""

LAST_LINES = 8
"""Lines of an installer's output that a failure shows."""

REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(\[[^]]*\])?")
"""The beginning of a requirement: name and extras."""

PROBE = (
    "import platform, sys;"
    "print(getattr(sys, '_base_executable', None) or sys.executable, platform.python_version())"
)

UV_NAMES = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_CONSTRAINT": "UV_CONSTRAINT",
}
"""Settings of pip that uv knows by another name."""

Watch: TypeAlias = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Given a headline, a context in which something takes long; what it gives is told each line of it."""


class BuildError(Exception):
    """An environment cannot be built; the message says why, `output` is the installer's last lines."""

    def __init__(self, message: str, output: str = "") -> None:
        """Takes the sentence, and what the installer wrote."""
        super().__init__(message)
        self.output = output


class Package(NamedTuple):
    """What bnaudit knows of a framework's package.

    pattern: of the requirement's name, and of its version as far as that matters. libraries: of backends.
    companions: what its adapter needs besides, or what it fails with in its newest version. build: what has
    to be there before it is installed, because its own build does not ask for it.
    """

    pattern: str
    libraries: tuple[str, ...]
    companions: tuple[str, ...] = ()
    build: tuple[str, ...] = ()


PACKAGES = (
    Package(r"chainer", ("chainer",), ("numpy<2",), ("setuptools<74", "wheel")),
    Package(r"dm-haiku", ("haiku",), ("jax",)),
    Package(r"jaxlib", ("jax",), ("jax",)),
    Package(r"keras", ("keras-jax", "keras-tensorflow", "keras-torch")),
    Package(r"mlx", ("mlx",), ("mlx[cpu]",) if sys.platform == "linux" else ()),
    Package(r"mxnet", ("mxnet",), ("numpy<1.24",)),
    Package(r"onnxruntime(-gpu)?", ("onnxruntime",), ("onnx",)),
    Package(r"opencv-python(-headless)?", ("opencv",), ("onnx", "protobuf<7")),
    Package(r"paddlepaddle", ("paddle",)),
    Package(r"tensorflow(-\w+)?(==|~=)1", ("tensorflow-1",), ("numpy<1.19", "protobuf<3.21")),
    Package(r"tensorflow(-\w+)?", ("tensorflow", "tensorflow-1")),
    Package(r"torch(==|~=)(1|2\.[0-2])", ("torch",), ("numpy<2",)),
)
"""The first that fits counts. Other packages need nothing, and serve the library of their own name."""

WORKER = ("numpy",)
"""What the worker itself needs."""


def name_of(requirement: str) -> str:
    """The normalized name of a requirement or a wheel's file, with its extras; "" for an option."""
    if requirement.endswith(".whl"):
        requirement = Path(requirement).name.partition("-")[0]
    found = REQUIREMENT.match(requirement)
    return _normal(found[1]) + (found[2] or "").lower() if found else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def known(requirement: str) -> Package:
    """What is known of a requirement's package."""
    name = name_of(requirement).partition("[")[0]
    version = "" if requirement.endswith(".whl") else REQUIREMENT.sub("", requirement, count=1)
    for package in PACKAGES:
        if re.fullmatch(rf"{package.pattern}([^\w-].*)?", name + version):
            return package
    return Package(name, (name,))


def completed(requirements: Sequence[str]) -> list[str]:
    """The requirements, and what the adapters of their packages and the worker need besides."""
    found = list(requirements)
    names = {name_of(requirement) for requirement in requirements}
    wanted = [c for requirement in requirements for c in known(requirement).companions]
    for companion in (*wanted, *WORKER):
        if name_of(companion) not in names:
            names.add(name_of(companion))
            found.append(companion)
    return found


@dataclass(frozen=True)
class Built:
    """An environment in the cache. python: what it was made with; age: in seconds; size: in bytes."""

    folder: Path
    python: str
    requirements: list[str]
    age: float

    @property
    def size(self) -> int:
        """What it takes on the disk."""
        return sum(
            path.lstat().st_blocks * 512 for path in self.folder.rglob("*") if not path.is_dir()
        )


def cache_folder() -> Path:
    """Where built environments are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "bnaudit" / "environments"


@dataclass(frozen=True)
class Request:
    """What is to be built.

    python: an interpreter, or a name of one for uv; version: of that, if known. first: what is installed
    before the requirements.
    """

    python: str
    version: str | None
    requirements: list[str]
    first: list[str]

    @classmethod
    def of(cls, python: str, requirements: Sequence[str]) -> Request:
        """The request for an interpreter and requirements as they were given. Raises BuildError."""
        absolute = [
            str(Path(r).expanduser().absolute()) if r.endswith(".whl") else r for r in requirements
        ]
        first = [need for requirement in absolute for need in known(requirement).build]
        return cls(*_base(python), completed(absolute), first)

    @property
    def folder(self) -> Path:
        """Its place in the cache."""
        digest = hashlib.sha256(json.dumps(vars(self)).encode()).hexdigest()[:16]
        return cache_folder() / digest

    @property
    def interpreter(self) -> Path:
        """The Python of the built environment."""
        return self.folder / "bin" / "python"

    def is_built(self) -> bool:
        """Whether it is there, and the interpreter that it was made with still is."""
        return (self.folder / REQUEST).is_file() and self.interpreter.exists()


def _base(given: str) -> tuple[str, str | None]:
    """Path and version of the interpreter that an environment is made with."""
    found = shutil.which(str(Path(given).expanduser()))
    if found is None and shutil.which("uv") is not None:
        return given, None  # uv may find or fetch it
    if found is None:
        raise BuildError(f"there is no interpreter {given}")
    done = subprocess.run([found, "-c", PROBE], capture_output=True, text=True, env=_environment())
    path, _, version = done.stdout.strip().rpartition(" ")
    if done.returncode or not path:
        complaint = (done.stderr.strip().splitlines() or [f"exited with {done.returncode}"])[0]
        raise BuildError(f"{given} does not run: {complaint}")  # such as a shim of pyenv
    return path, version


def ensure(name: str, request: Request, watch: Watch) -> Path:
    """The Python of the environment that is asked for, from the cache or built now. Raises BuildError."""
    if request.is_built():
        return request.interpreter
    headline = f"building {name}: {' '.join(request.requirements)}"
    with watch(headline) as show, _locked(request.folder, show):
        if not request.is_built():  # nobody else has built it meanwhile
            try:
                _build(name, request, show)
            except BaseException:
                shutil.rmtree(request.folder, ignore_errors=True)
                raise
    return request.interpreter


def _build(name: str, request: Request, show: Callable[[str], None]) -> None:
    shutil.rmtree(request.folder, ignore_errors=True)
    folder, python = str(request.folder), str(request.interpreter)
    uv = shutil.which("uv")
    if uv is None:
        make = [request.python, "-m", "venv", folder]
        install = [python, "-m", "pip", "install"]
    else:
        make = [uv, "venv", "--python", request.python, folder]
        install = [uv, "pip", "install", "--python", python]
        if os.environ.get("PIP_NO_INDEX"):
            install.append("--no-index")
    commands = [make, [*install, *request.requirements]]
    if request.first:
        commands[1:] = [
            [*install, *request.first],
            [*install, "--no-build-isolation", *request.requirements],
        ]
    for command in commands:
        _install(name, command, show)
    (request.folder / REQUEST).write_text(json.dumps(vars(request)))


def _install(name: str, command: Sequence[str], show: Callable[[str], None]) -> None:
    """Runs an installer, whose own settings apply: index, find-links, proxy, constraints."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(),
        start_new_session=True,
    )
    assert process.stdout is not None  # noqa: S101 - it was asked for
    with process.stdout:
        try:
            for line in process.stdout:
                if line.strip():
                    last.append(line.rstrip())
                    show(line.strip())
            process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode != 0:
        raise BuildError(f"{name} cannot be built: {shlex.join(command)} failed", "\n".join(last))


def _environment() -> dict[str, str]:
    """The auditor's environment for an installer."""
    found = {  # or what lies on that path would pass for installed
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    for pip, uv in UV_NAMES.items():
        if pip in found:
            separator = "," if uv == "UV_FIND_LINKS" else " "
            found.setdefault(uv, separator.join(found[pip].split()))
    return found


@contextlib.contextmanager
def _locked(folder: Path, show: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other process builds or removes the folder, and keeps others from it."""
    path = folder.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if not _try_lock(lock):
                show("waiting for another bnaudit that builds it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_same(lock, path):  # or whoever had it has removed the file
                yield
                path.unlink(missing_ok=True)
                return
        finally:
            os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def built() -> Iterator[Built]:
    """The environments in the cache."""
    for path in sorted(cache_folder().glob(f"*/{REQUEST}")):
        found: Mapping[str, object] = json.loads(path.read_text())
        requirements = found["requirements"]
        assert isinstance(requirements, list)  # noqa: S101 - `_build` wrote it
        age = max(0.0, time.time() - path.stat().st_mtime)
        yield Built(path.parent, str(found["python"]), requirements, age)


def prune() -> list[Path]:
    """Removes all environments but those being built just now, also half-built ones; returns their folders."""
    removed = []
    for folder in sorted(path for path in cache_folder().glob("*") if path.is_dir()):
        lock = os.open(folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if _try_lock(lock) and _is_same(lock, folder.with_suffix(".lock")):
                shutil.rmtree(folder)
                folder.with_suffix(".lock").unlink()
                removed.append(folder)
        finally:
            os.close(lock)
    return removed
