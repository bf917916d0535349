"""The worker's side of the protocol between an auditor and a subject. This docstring is its contract.

`PYTHON .../bnaudit/worker PARENT_PID`, started in an empty folder, answers requests until its standard
input ends or, on Linux, the process PARENT_PID dies. It needs Python 3.7 and NumPy, and nothing else of the
auditor's.

Requests come on standard input and replies leave on standard output, each one line of JSON in ASCII. The
worker keeps both pipes to itself: for everything that runs in it, standard input is empty and standard
output is standard error. A reply repeats its request's `id`. When the worker is ready to serve it sends
`{"id": 0, "outcome": "done"}`.

Backends are named as in `backends.BACKENDS`, or are plug-ins, `FILE.py:NAME` and `package.module:NAME`; their
contract stands in `plugin`. `folder` is where a plug-in's file or module is looked for.

    {"id": 1, "op": "describe", "backends": [NAME, …], "folder": PATH}
    {"id": 1, "outcome": "done", "unavailable": {NAME: REASON or null, …}}

    {"id": 2, "op": "environment", "library": "numpy"}
    {"id": 2, "outcome": "done", "environment": {…}}             see `environment`

    {"id": 3, "op": "run", "backend": NAME, "folder": PATH, "outputs": PATH,
     "case": {"dtype", "param_dtype", "mode", "memory_format", "eps", "momentum", "steps"},
     "inputs": {"sha256": DIGEST, "files": {"x": PATH, …}}}
    {"id": 3, "outcome": "done", "kernel": TEXT or null, "seconds": S, "outputs": ["y", …],
     "not_repeatable": TEXT or null, "declarations": {"running_var_correction": 1, "running_update": "ema"}}

Inputs are C-order .npy files: x and grad_output (steps, N, C, *), weight, bias, running_mean and running_var
(C,); a case without affine parameters or gradients has no such file. bfloat16 travels as its bits in uint16.
Files with the same names and digest hold the same values. An output is the C-order file NAME.npy in the
folder `outputs`: y and grad_input in the case's dtype, per-channel quantities in float32 or float64. A file
that is there already is replaced; nothing else is kept in it.

A plug-in, and a built-in backend on a GPU, is called twice on a case's last step, with the same tensors:
`not_repeatable` is null if it gave the same bits twice, or else says where not. Outputs and seconds are those
of the first call. Memory that is allocated during a plug-in's calls holds NaN; small blocks only do so if the
worker was started with GLIBC_TUNABLES as in `poison.TUNABLES`.

Every request is answered, and a request without a result by

    {"id": 3, "outcome": OUTCOME, "reason": TEXT, "traceback": TEXT or null}

with the outcome "unavailable" (this backend cannot run here), "unsupported" (it does not take this case),
"contract" (it returned or changed what it must not) or "raised" (anything else that was raised).
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np

from . import environment, plugin
from .backends import BACKENDS
from .execution import Implementation, NoResult, Tensors, describe, printable, run, traced

if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from .rounding import Array

    Message = dict[str, Any]

UPDATES = ("ema", "caffe")


def serve(parent: int) -> None:
    """Answers requests until standard input ends. parent: process to die with, where the system can."""
    _die_with(parent)
    # The core of a worker that is meant to crash would fill its folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    requests, replies = _take_pipes()
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1)
    # Nobody reads them here: what matters about a backend is what it returns.
    warnings.simplefilter("ignore")
    worker = Worker()
    _send(replies, {"id": 0, "outcome": "done"})
    for line in requests:
        _send(replies, worker.reply(line))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: BinaryIO, message: Message) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


class Worker:
    """Answers one request at a time, and remembers what it loaded."""

    def __init__(self) -> None:
        """Loads nothing yet."""
        self._loaded: dict[str, Implementation] = {}
        self._tensors: tuple[str, Tensors] | None = None

    def reply(self, line: bytes) -> Message:
        """The reply to a line; one that is no request is answered without an id."""
        try:
            request = json.loads(line.decode("ascii"))
            identity = request["id"]
        except Exception as error:
            reason = "the request cannot be read: " + describe(error)
            return {"id": None, "outcome": "raised", "reason": reason, "traceback": None}
        return dict(self.answer(request), id=identity)

    def answer(self, request: Message) -> Message:
        """The reply to a request, without its id."""
        try:
            if request["op"] == "describe":
                names = request["backends"]
                reasons = {name: self._unavailable(name, request["folder"]) for name in names}
                return {"outcome": "done", "unavailable": reasons}
            if request["op"] == "environment":
                return {"outcome": "done", "environment": environment.describe(request["library"])}
            return self._run(request)
        except NoResult as end:
            self._tensors = None  # they may have been written to
            return {"outcome": end.outcome, "reason": end.reason, "traceback": end.trace}
        except plugin.Unavailable as error:
            return {"outcome": "unavailable", "reason": printable(str(error)), "traceback": None}
        except Exception as error:  # whatever it is, the auditor must learn of it
            self._tensors = None
            reason = "the worker failed: " + describe(error)
            return {"outcome": "raised", "reason": reason, "traceback": traced(error)}

    def _unavailable(self, name: str, folder: str) -> str | None:
        try:
            self._load(name, folder)
        except plugin.Unavailable as error:
            return printable(str(error))
        except NoResult:
            return None  # it is there, and running it will tell what is wrong with it
        return None

    def _load(self, name: str, folder: str) -> Implementation:
        if name not in self._loaded:
            process = os.getpid()
            try:
                self._loaded[name] = _implementation(name, folder)
            except (plugin.Unavailable, NoResult):
                raise
            except BaseException as error:  # a module that calls sys.exit is broken, too
                raise NoResult("raised", describe(error), traced(error)) from error
            finally:
                if os.getpid() != process:
                    os._exit(0)  # the module forked, and this is the copy
        return self._loaded[name]

    def _run(self, request: Message) -> Message:
        implementation = self._load(request["backend"], request["folder"])
        declarations = _declarations(implementation)
        case, inputs = request["case"], request["inputs"]
        key = json.dumps([case, inputs, implementation.form], sort_keys=True)
        if self._tensors is None or self._tensors[0] != key:
            self._tensors = None  # frees the last case's before the next one's are made
            self._tensors = (key, Tensors(case, inputs["files"], implementation.form))
        tensors = self._tensors[1]
        execution = run(implementation, case, tensors)
        if not tensors.kept:
            self._tensors = None
        for name, array in execution.outputs.items():
            _save(os.path.join(request["outputs"], name + ".npy"), array)
        return {
            "outcome": "done",
            "outputs": list(execution.outputs),
            "kernel": execution.kernel,
            "seconds": execution.seconds,
            "not_repeatable": execution.not_repeatable,
            "declarations": declarations,
        }


def _save(path: str, array: Array) -> None:
    try:
        # np.save by itself writes another memory format several times more slowly.
        np.save(path, np.ascontiguousarray(array), allow_pickle=False)
    except OSError as error:
        if os.path.exists(path):
            os.remove(path)  # the next output may need the room
        # NumPy counts elements where the disk is full, and does not say so.
        reason = "%s could not be written: %s" % (os.path.basename(path), error.strerror or error)
        raise NoResult("raised", reason) from error


def _implementation(name: str, folder: str) -> Implementation:
    if plugin.is_plugin(name):
        return plugin.load(name, folder)
    backend = BACKENDS[name]
    module = importlib.import_module("." + backend.module, __package__ + ".backends")
    reason = module.unavailable(name)
    if reason is not None:
        raise plugin.Unavailable(reason)
    function = getattr(module, backend.function)
    form = "widened" if getattr(function, "widened", False) else "stored"
    return Implementation(function, form, repeated=name.endswith("@cuda"))


def _declarations(implementation: Implementation) -> Message:
    correction = getattr(implementation.function, "running_var_correction", 1)
    update = getattr(implementation.function, "running_update", "ema")
    if correction not in (0, 1):
        raise NoResult("contract", "running_var_correction is %r, not 0 or 1" % (correction,))
    if update not in UPDATES:
        raise NoResult("contract", "running_update is %r, not ema or caffe" % (update,))
    return {"running_var_correction": int(correction), "running_update": update}
