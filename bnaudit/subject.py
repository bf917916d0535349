"""The subject of an audit: worker processes in one interpreter, started, fed, timed and replaced.

A worker may be killed, hang, or write what it likes: each run has its own Reply, and the next run finds a
working process. What a worker does with a request is `bnaudit.worker.protocol`'s to say.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from bnaudit import worker as worker_package
from bnaudit.inputs import Array, Inputs
from bnaudit.reference import Declarations
from bnaudit.scenario import Case
from bnaudit.worker import plugin
from bnaudit.worker.backends import BACKENDS
from bnaudit.worker.execution import IN_FULL, MAPPED, QUANTITIES
from bnaudit.worker.poison import TUNABLES
from bnaudit.worker.protocol import UPDATES
from bnaudit.worker.rounding import storage

FIRST_CALL = 5
"""A backend's first call may take this many times the usual limit: it compiles, or starts a device.

So may the start of a worker and the import of a library or a plug-in, which have LEAST_START in any case.
"""

LEAST_START = 30.0
"""Seconds; from a slow disk, a framework takes some to be imported."""

STDERR_KEPT = 1 << 16
"""Bytes of a worker's standard error that are remembered."""

OWN_FRAME = re.compile(r"bnaudit/worker/\w+\.py|<frozen runpy>")
"""Frames of the worker itself, which tell nothing about a backend."""

INNERMOST_FIRST = "(most recent call first):"
LAST_LINES = 20
LAST_CHARACTERS = 4000
"""How much of it a crash or a timeout shows."""

LONGEST_REPLY = 1 << 20
"""Bytes after which a reply without an end is taken for garbage."""

LONGEST_QUOTE = 200
"""Characters of garbage that are shown."""

DEEPEST_REPLY = 20
"""Lists and mappings within each other after which a reply is garbage; those of a worker have five."""

ROOM = 1 << 31
"""Free bytes below which shared memory is not used for the scratch folder."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)

CASE_FIELDS = ("dtype", "param_dtype", "mode", "memory_format", "eps", "momentum", "steps")
"""What a worker is told of a case; the rest it sees in the tensors."""

OUTCOMES = {
    "done": "done",
    "unsupported": "unsupported",
    "unavailable": "unavailable",
    "contract": "contract",
    "raised": "crash",
}
"""What the auditor calls a worker's outcomes."""


class SubjectError(Exception):
    """The interpreter cannot run a worker at all; the message says why."""


@dataclass(frozen=True)
class Reply:
    """What became of one case on one backend.

    Attributes:
        outcome: "done", "unsupported", "unavailable", "contract", "crash" or "timeout".
        reason: why there are no outputs, in a sentence.
        detail: a traceback, or the last lines of standard error.
        outputs: read-only arrays by quantity: y and grad_input in the storage of the case's dtype, the
            others (C,) in float32 or float64. Large ones are mapped files that are deleted already: their
            memory is free once nothing refers to them.
        kernel: what ran, in the backend's words.
        seconds: inside the backend, all steps together.
        not_repeatable: where a second call of the last step gave other bits, in words; None where it gave
            the same, or was not made.
    """

    outcome: str
    reason: str | None = None
    detail: str | None = None
    outputs: Mapping[str, Array] = field(default_factory=dict)
    kernel: str | None = None
    seconds: float | None = None
    declarations: Declarations = field(default_factory=Declarations)
    not_repeatable: str | None = None


class _Failure(Exception):  # noqa: N818 - what happened to a request
    """A request without a reply: "crash" or "timeout", the reason, and standard error's last lines."""

    def __init__(self, outcome: str, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.detail = detail


class _NoStart(_Failure):
    """A worker that never became ready."""


class Subject:
    """The worker processes of one environment: one per library, one per plug-in. A context manager.

    Workers start when they are first needed. Use it from one thread, and from one that lasts: on Linux a
    worker dies with the thread that started it.
    """

    def __init__(
        self,
        *,
        name: str = "current",
        command: Sequence[str] = (sys.executable,),
        threads: int = 2,
        timeout: float = 60.0,
        scratch: Path,
    ) -> None:
        """command: starts a Python, with the worker's arguments behind it.

        threads: for every backend. timeout: seconds for a run, its first FIRST_CALL times as many, as for
        what comes before it.
        """
        self.name = name
        self._command = command
        self.threads = threads
        self._timeout = timeout
        self._start_limit = max(timeout * FIRST_CALL, LEAST_START)
        self._scratch = scratch
        self._folder = str(Path.cwd())
        self._workers: dict[str, _Worker] = {}
        self._unavailable: dict[str, str | None] = {}
        self._called: set[str] = set()

    def __enter__(self) -> Subject:
        """Starts nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kills the workers."""
        self.close()

    def environment_of(self, backend: str) -> str:
        """The name of the environment in which a backend runs: this one's."""
        return self.name

    def close(self) -> None:
        """Kills the workers and whatever they started."""
        for key in list(self._workers):
            self._stop(key)

    def describe(self, backends: Sequence[str]) -> dict[str, str | None]:
        """Why each backend cannot run here, or None; loads those that it has not been asked about."""
        unknown: dict[str, list[str]] = {}
        for backend in dict.fromkeys(backends):
            if backend not in self._unavailable:
                unknown.setdefault(_worker_key(backend), []).append(backend)
        for key, names in unknown.items():
            self._unavailable.update(self._load(key, names))
        return {backend: self._unavailable[backend] for backend in backends}

    def environment(self) -> dict[str, Any]:
        """What backends run on here, as in a report. Raises SubjectError where no worker can run.

        Devices and flags are those of the libraries whose backends were described before, except for
        libraries and plug-ins that break their worker.
        """
        found: dict[str, Any] = {}
        for key in ["numpy", *sorted(self._workers.keys() - {"numpy"})]:
            # A plug-in's tensors, if they are not NumPy's, are torch's.
            library = "torch" if plugin.is_plugin(key) else key
            try:
                with self._worker(key) as worker:
                    part = worker.environment(library, self._start_limit)
            except _Failure as failure:
                if key != "numpy":
                    continue  # running it will tell
                raise SubjectError(f"{shlex.join(self._command)}: {failure.reason}") from failure
            found = found or part
            found["devices"] += [d for d in part["devices"] if d not in found["devices"]]
            found["flags"] = {**found["flags"], **part["flags"]}
        return {"name": self.name, **found}

    def environments(self) -> list[dict[str, Any]]:
        """What backends run on: this environment alone."""
        return [self.environment()]

    def run(self, backend: str, case: Case, inputs: Inputs) -> Reply:
        """Runs one case on one backend; whatever the backend does comes back as a Reply."""
        key = _worker_key(backend)
        reason = self.describe([backend])[backend]
        if reason is not None:
            return Reply("unavailable", reason)
        if key not in self._workers:
            self._load(
                key, [backend]
            )  # the last worker is gone; loading has a time limit of its own
        limit = self._timeout if backend in self._called else self._timeout * FIRST_CALL
        self._called.add(backend)
        try:
            with self._worker(key) as worker:
                request = {
                    "op": "run",
                    "backend": backend,
                    "folder": self._folder,
                    "outputs": str(worker.outputs_folder()),
                    "case": {name: getattr(case, name) for name in CASE_FIELDS},
                    "inputs": {"sha256": inputs.sha256, "files": dict(inputs.files)},
                }
                reply = worker.reply(worker.request(request, limit), case)
        except _Failure as failure:
            return Reply(failure.outcome, failure.reason, failure.detail)
        if reply.outcome == "crash" and backend.endswith("@cuda"):
            self._stop(key)  # after an error of a kernel, a process cannot use the GPU any more
        return reply

    def _load(self, key: str, names: Sequence[str]) -> dict[str, str | None]:
        """Loads backends of one worker. Those that kill it are available: running them shows what they do."""
        if key == "":
            return {name: f"there is no backend {name}" for name in names}
        try:
            with self._worker(key) as worker:
                return worker.unavailable(names, self._folder, self._start_limit)
        except _NoStart as failure:
            return dict.fromkeys(
                names, f"no worker starts in {shlex.join(self._command)}: {failure.reason}"
            )
        except _Failure as failure:
            late = (
                f"not loaded within {self._start_limit:g} s"
                if failure.outcome == "timeout"
                else None
            )
            return dict.fromkeys(names, late)

    @contextlib.contextmanager
    def _worker(self, key: str) -> Iterator[_Worker]:
        """A worker that runs. It does not outlive a failure or an interrupt: its reply may still come."""
        worker = self._workers.get(key)
        try:
            if worker is None or worker.has_exited():
                self._stop(key)
                environment = _environment(self.threads, plugin.is_plugin(key))
                worker = self._workers[key] = _Worker(self._command, environment, self._scratch)
                worker.greet(self._start_limit)
            yield worker
        except BaseException:
            self._stop(key)
            raise

    def _stop(self, key: str) -> None:
        worker = self._workers.pop(key, None)
        if worker is not None:
            worker.kill()


def _worker_key(backend: str) -> str:
    """Backends of one library share a worker, a plug-in has its own; "" for a name that is unknown."""
    if plugin.is_plugin(backend):
        return backend
    return BACKENDS[backend].library if backend in BACKENDS else ""


class _Worker:
    """One process, with the auditor's ends of its pipes."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], scratch: Path
    ) -> None:
        self._count = 0
        self._pending = b""
        self._stderr = b""
        script = Path(worker_package.__file__).parent
        try:
            # Apart from each other, so that a plug-in that clears the folder it runs in does no harm.
            self._folder = _made(scratch, "worker-")
            self._outputs = _made(scratch, "outputs-")
        except OSError as error:
            raise _NoStart("crash", str(error)) from error
        try:
            # No -I: on clusters libraries come by way of PYTHONPATH and the user's site-packages.
            self._process = subprocess.Popen(
                [*command, str(script), str(os.getpid())],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._remove_files()
            raise _NoStart("crash", str(error)) from error
        self._stdin, self._stdout, self._stderr_pipe = (
            _pipe(stream)
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        self._selector = selectors.DefaultSelector()
        for stream in (self._stdin, self._stdout, self._stderr_pipe):
            os.set_blocking(stream.fileno(), False)
        for stream in (self._stdout, self._stderr_pipe):
            self._selector.register(stream, selectors.EVENT_READ)

    def greet(self, limit: float) -> None:
        """Waits until the worker is ready, `limit` seconds at most. Raises _NoStart."""
        try:
            self._receive(limit)
        except _Failure as failure:
            raise _NoStart(failure.outcome, failure.reason, failure.detail) from failure

    def has_exited(self) -> bool:
        """Whether the process has ended; it stays a zombie, so that its process group keeps its number."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self._process.pid, flags) is not None
        except ChildProcessError:
            return True  # no zombie is left where the auditor was started with SIGCHLD ignored

    def outputs_folder(self) -> Path:
        """The folder for this worker's outputs, also where a backend has removed it."""
        self._outputs.mkdir(parents=True, exist_ok=True)
        return self._outputs

    def request(self, message: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """Sends a request and returns its reply, which may take `limit` seconds. Raises _Failure."""
        self._count += 1
        self._stderr = b""
        line = json.dumps({"id": self._count, **message}).encode("ascii") + b"\n"
        deadline = time.monotonic() + limit
        while line:
            try:
                line = line[os.write(self._stdin.fileno(), line) :]
            except BlockingIOError:  # the pipe is full, because the worker does not read
                if time.monotonic() > deadline:
                    raise self._timeout(limit) from None
                self._listen(0.05)
            except OSError as error:
                raise self._death() from error
        return self._receive(limit)

    def unavailable(self, names: Sequence[str], folder: str, limit: float) -> dict[str, str | None]:
        """Loads backends; why each cannot run here, or None. Raises _Failure."""
        request = {"op": "describe", "backends": list(names), "folder": folder}
        answer = self.request(request, limit)
        try:
            return {name: _text(answer["unavailable"][name]) for name in names}
        except (KeyError, TypeError) as error:
            raise self._garbage(f"{type(error).__name__}: {error}") from error

    def environment(self, library: str, limit: float) -> dict[str, Any]:
        """What the worker runs on, and the devices and flags of a library that is loaded. Raises _Failure."""
        answer = self.request({"op": "environment", "library": library}, limit)
        try:
            if answer["outcome"] != "done":
                raise _Failure("crash", str(answer["reason"]), _text(answer["traceback"]))
            return _checked_environment(answer["environment"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._garbage(f"{type(error).__name__}: {error}") from error

    def reply(self, answer: Mapping[str, Any], case: Case) -> Reply:
        """A run's Reply, its outputs read and their files removed. Raises _Failure where it is malformed."""
        try:
            outcome = OUTCOMES[answer["outcome"]]
            if outcome != "done":
                return Reply(outcome, str(answer["reason"]), _text(answer["traceback"]))
            return Reply(
                "done",
                outputs={name: self._read_output(name, case) for name in answer["outputs"]},
                kernel=_text(answer["kernel"]),
                seconds=float(answer["seconds"]),
                declarations=_declarations(answer["declarations"]),
                not_repeatable=_text(answer["not_repeatable"]),
            )
        except Exception as error:  # a bad header raises whatever Python's parser does
            raise self._garbage(f"{type(error).__name__}: {error}") from error

    def _read_output(self, name: str, case: Case) -> Array:
        if name not in QUANTITIES:
            raise ValueError(f"{name!r} is no quantity")
        path = self._outputs / f"{name}.npy"
        if path.is_symlink() or not path.is_file():  # a pipe would never end
            raise ValueError(f"{path.name} is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that are no good
            # Mapped, a shape that the file is too small for takes no memory.
            array: Array = np.lib.format.open_memmap(path, mode="r")
        if array.nbytes < MAPPED:
            array = np.array(array)
        path.unlink()
        if name in IN_FULL:
            right = array.shape == case.shape and array.dtype == storage(case.dtype)
        else:
            right = array.shape == case.shape[1:2] and array.dtype in (np.float32, np.float64)
        if not right:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        array.setflags(write=False)
        return array

    def _receive(self, limit: float) -> dict[str, Any]:
        line = self._receive_line(limit)
        try:
            answer = _spelled_out(json.loads(line))
            if answer["id"] == self._count:
                return dict(answer)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise self._garbage(line[:LONGEST_QUOTE].decode(errors="backslashreplace"))

    def _receive_line(self, limit: float) -> bytes:
        deadline = time.monotonic() + limit
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._timeout(limit)
            if len(self._pending) > LONGEST_REPLY:
                raise self._garbage("a megabyte without an end of line")
            # Children of a dead worker may hold its pipes open: their end alone does not tell.
            gone = not self._listen(min(left, 0.1)) and self.has_exited()
            if gone or self._stdout not in self._selector.get_map():
                raise self._death()
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _listen(self, seconds: float) -> bool:
        """Reads what the worker has written, waiting so long for something; whether there was any."""
        events = self._selector.select(seconds)
        for key, _ in events:
            data = os.read(key.fd, 1 << 16)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._stdout:
                self._pending += data
            else:
                self._stderr = (self._stderr + data)[-STDERR_KEPT:]
        return bool(events)

    def _timeout(self, limit: float) -> _Failure:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)  # the worker then shows where it is
        self._listen_out(0.5)
        return _Failure("timeout", f"no answer within {limit:g} s", self._last_words())

    def _death(self) -> _Failure:
        deadline = time.monotonic() + 1
        while not self.has_exited() and time.monotonic() < deadline:
            self._listen(0.02)
        exited = self.has_exited()
        self._kill_group()
        self._listen_out(0.1)
        code = self._process.returncode
        if not exited or code is None:
            reason = "closed its end of the connection"
        elif code == -signal.SIGKILL:
            reason = "killed by SIGKILL, as a system does that runs out of memory"
        elif code < 0:
            reason = f"killed by {_signal_name(-code)}"
        else:
            reason = f"exited with code {code}"
        return _Failure("crash", reason, self._last_words())

    def _garbage(self, what: str) -> _Failure:
        reason = f"the worker's reply cannot be read: {what[:LONGEST_QUOTE]}"
        return _Failure("crash", reason, self._last_words())

    def _listen_out(self, seconds: float) -> None:
        """Reads what is left in the pipes, until nothing comes for so long."""
        deadline = time.monotonic() + 1
        while self._selector.get_map() and time.monotonic() < deadline and self._listen(seconds):
            pass

    def _last_words(self) -> str | None:
        lines = self._stderr.decode("utf-8", "backslashreplace").splitlines()
        stack = next((i for i, line in enumerate(lines) if line.endswith(INNERMOST_FIRST)), None)
        if stack is not None:
            # faulthandler begins where Python's own tracebacks end; as there, the last line is to tell.
            end = next(
                (i for i in range(stack + 1, len(lines)) if not lines[i].startswith("  File")),
                len(lines),
            )
            frames = [
                line for line in reversed(lines[stack + 1 : end]) if not OWN_FRAME.search(line)
            ]
            lines = [*lines[:stack], *lines[end:], "Stack (most recent call last):", *frames]
        return "\n".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:] or None

    def _kill_group(self) -> None:
        # Only before the process is waited for: afterwards its number may be another's.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)  # a driver that hangs can keep it from ending

    def kill(self) -> None:
        """Ends the process and its children, and removes its files."""
        self._kill_group()
        self._selector.close()
        for stream in (self._stdin, self._stdout, self._stderr_pipe):
            with contextlib.suppress(OSError):
                stream.close()
        self._remove_files()

    def _remove_files(self) -> None:
        for folder in (self._folder, self._outputs):
            shutil.rmtree(folder, ignore_errors=True)


def _spelled_out(value: Any, depth: int = 0) -> Any:
    """JSON in which what UTF-8 cannot carry (lone surrogates) is spelled out. Raises ValueError."""
    if depth > DEEPEST_REPLY:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_spelled_out(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_spelled_out(k): _spelled_out(v, depth + 1) for k, v in value.items()}
    return value


def _text(value: object) -> str | None:
    """A text or None. Raises TypeError."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _declarations(found: Mapping[str, Any]) -> Declarations:
    """Raises TypeError or ValueError where they are not what a worker may declare."""
    declared = Declarations(**found)
    if declared.running_var_correction not in (0, 1) or declared.running_update not in UPDATES:
        raise ValueError(f"{declared}")
    return declared


def _checked_environment(part: Mapping[str, Any]) -> dict[str, Any]:
    """An environment as a report needs it. Raises AttributeError, KeyError, TypeError or ValueError."""
    cpu, devices, packages = part["cpu"], list(part["devices"]), {**part["packages"]}
    needed = [part["python"], part["platform"], *(device["name"] for device in devices)]
    if None in needed or not isinstance(part["threads"], int):
        raise TypeError("an environment without its versions")
    for text in (
        *needed,
        part["blas"],
        *packages.values(),
        *(cpu.get(name) for name in ("model", "isa")),
        *(device.get(name) for device in devices for name in ("driver", "cuda", "cudnn")),
    ):
        _text(text)
    return {**part, "devices": devices, "flags": {**part["flags"]}}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _made(scratch: Path, prefix: str) -> Path:
    """A new folder in the scratch folder, also where that was swept away."""
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=scratch))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101 - all three were asked for
    return stream


def _environment(threads: int, poisoned: bool) -> dict[str, str]:
    """The auditor's environment, with the number of threads of every library that could run some.

    poisoned: for a worker in which the memory of small blocks, too, must hold NaN.
    """
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    if poisoned:
        tunables = (os.environ.get("GLIBC_TUNABLES"), TUNABLES)
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
    # Inductor would otherwise start a pool of processes that compile.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    paths = os.environ.get("PYTHONPATH")
    if paths:
        # The worker runs in a folder of its own: what is relative to the auditor's folder would be lost.
        absolute = (os.path.abspath(path) for path in paths.split(os.pathsep))  # noqa: PTH100
        environment["PYTHONPATH"] = os.pathsep.join(absolute)
    return environment


@contextlib.contextmanager
def scratch_folder(room: int = ROOM) -> Iterator[Path]:
    """A folder for tensors and workers, removed at the end; in shared memory where `room` bytes are free.

    Folders that killed auditors left there are removed first. Raises OSError where none can be made.
    """
    parents = [Path(tempfile.gettempdir())]
    shared = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder only its owner can enter
    if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK):
        parents.append(shared)
    for parent in parents:
        for folder in parent.glob("bnaudit-*-*"):
            _remove_if_stale(folder)
    parent = parents[-1] if shutil.disk_usage(parents[-1]).free >= room else parents[0]
    folder = Path(tempfile.mkdtemp(prefix=f"bnaudit-{os.getpid()}-", dir=parent))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_stale(folder: Path) -> None:
    """Removes a scratch folder of this user's whose auditor is gone.

    Its process number alone does not tell (containers may share the parent folder, and number their own
    processes), and neither does the lock (a folder is a moment without one at first): both must say so.
    """
    pid = folder.name.split("-")[1]
    if not pid.isdecimal() or _is_alive(int(pid)):
        return
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # not this user's, not a folder, or gone already
    try:
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its auditor runs, where process numbers are others
    finally:
        os.close(lock)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
