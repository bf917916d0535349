"""What is fuzzed: a function of bytes each, which may only fail in the way that its module documents.

A target returns whether it accepted what it got. Whatever else it raises is a fault of bnaudit.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest import mock

import numpy as np
import yaml
from rich.console import Console

from bnaudit import baseline, compare, config, rejudge, repro
from bnaudit.distributions import FileError
from bnaudit.inputs import Inputs, make
from bnaudit.reference import Reference
from bnaudit.render import accuracy, comparison, console, html, junit, markdown, sarif
from bnaudit.report import GZIP, Environment, ReportError, ResultRecord, load, restored
from bnaudit.scenario import Case, ScenarioError, shipped
from bnaudit.scenario import load as load_scenarios
from bnaudit.subject import OUTCOMES, Subject, SubjectError
from bnaudit.verdict import Judged
from bnaudit.worker import protocol

Target = Callable[[bytes, Path], bool]

SMALL = 1 << 12
"""Elements of a case up to which its inputs are made."""


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder for a target, which it runs in."""
    made, before = Path(mkdtemp(prefix="fuzz-", dir="/dev/shm")), Path.cwd()
    os.chdir(made)
    try:
        yield made
    finally:
        os.chdir(before)
        shutil.rmtree(made)


def _refused(error: Exception, name: str) -> bool:
    """Not accepted, in a sentence that names the file."""
    assert name in str(error), error
    return False


def scenario(content: bytes, scratch: Path) -> bool:
    """The loader of scenarios, and the inputs of the small cases that it accepts."""
    path = scratch / "s.yaml"
    path.write_bytes(content)
    try:
        found = load_scenarios([str(path)])
    except ScenarioError as error:
        return _refused(error, path.name)
    for case in [case for scenario in found for case in scenario.cases][:3]:
        if case.steps * math.prod(case.shape) <= SMALL:
            inputs = scratch / "inputs"
            inputs.mkdir()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # numbers overflow where they are told to
                    make(case, inputs)
            except (OSError, FileError):
                pass
            finally:
                shutil.rmtree(inputs)
    return True


def report(content: bytes, scratch: Path) -> bool:
    """The reader of reports, and all that is made of a report."""
    path = scratch / "r.json"
    path.write_bytes(content)
    try:
        found = load(path)
    except ReportError as error:
        return _refused(error, path.name)
    cases = {case.id: case for case in found.cases}
    compared = compare.compare(found, found)
    assert compared.exit_code in (0, 5), compared
    assert not compared.changes, compared.changes
    by_scenario: dict[str, list[ResultRecord]] = {}
    for result in found.results:
        rejudge.rejudged(result, cases[result.case])
        by_scenario.setdefault(cases[result.case].scenario, []).append(result)
    screen = Console(file=io.StringIO(), width=80, markup=False)
    names = [result.backend for result in found.results]
    layout = console.Layout.fit(80, by_scenario, names, len(found.cases))
    for verbose in (False, True):
        for results in by_scenario.values():
            for line in console.rows(layout, results, cases, verbose=verbose):
                screen.print(line)
        for part in console.closing(found, verbose=verbose):
            screen.print(part)
    for part in comparison.comparison(compared, cases):
        screen.print(part)
    comparison.markdown(compared, cases)
    accuracy.accuracy(found)
    html.html(found)
    junit.junit(found)
    sarif.sarif(found)
    markdown.markdown(found)
    markdown.workflow_commands(found)
    results, controls = rejudge.judged_again(found, rejudge.Overrides())
    again = rejudge.concluded(found, results, controls, fail_on="warn")
    again.model_dump_json(by_alias=True)
    for number in {result.finding for result in found.results if result.finding is not None}:
        with suppress(repro.ReproError):
            record, result = repro.find(found, number)
            case = repro.rebuilt(record)
            weight = np.ones(case.channels)
            quantities = {n: restored(q, Judged) for n, q in result.quantities.items()}
            repro.fault_of(result.status, quantities, record.thresholds, weight)
    compared.model_dump_json()
    return True


def settings(content: bytes, scratch: Path) -> bool:
    """The readers of baselines and of a project's settings, as YAML and as TOML."""
    accepted = False
    for name, read in (
        ("s.yaml", baseline.load),
        ("s.yaml", lambda path: config.load(str(path))),
        ("s.toml", lambda path: config.load(str(path))),
    ):
        path = scratch / name
        path.write_bytes(content)
        try:
            read(path)
            accepted = True
        except (ReportError, ScenarioError, config.ConfigError) as error:
            _refused(error, name)
    return accepted


# --- a worker's replies ----------------------------------------------------------------------------

SHAPE = (2, 3, 4, 5)

SMALL_CASE = b"""
name: small
input: {distribution: normal}
shape: [2, 3, 4, 5]
backward: true
"""

BACKEND = "one-pass@cpu"


class Process:
    """Stands for a worker that has written all it will ever write, and has ended."""

    pid = 2**30
    returncode = 0

    def __init__(self, written: bytes) -> None:
        self.stdin = Path(os.devnull).open("wb", buffering=0)  # noqa: SIM115 - as Popen has it
        ends = os.pipe(), os.pipe()
        for (_, end), text in zip(ends, (written[: 1 << 15], b"last words\n"), strict=True):
            os.write(end, text)
            os.close(end)
        self.stdout, self.stderr = (os.fdopen(end, "rb", buffering=0) for end, _ in ends)


GREETING = b'{"id": 0, "outcome": "done"}\n'
AVAILABLE = (
    GREETING
    + json.dumps({"id": 1, "outcome": "done", "unavailable": {BACKEND: None}}).encode()
    + b"\n"
)
DONE = (
    GREETING
    + json.dumps(
        {
            "id": 1,
            "outcome": "done",
            "outputs": ["y", "batch_mean"],
            "kernel": "a kernel",
            "seconds": 0.25,
            "not_repeatable": None,
            "declarations": {"running_var_correction": 0, "running_update": "ema"},
        }
    ).encode()
    + b"\n"
)


def array(shape: tuple[int, ...]) -> bytes:
    """A .npy file of ones in float32."""
    file = io.BytesIO()
    np.save(file, np.ones(shape, np.float32))
    return file.getvalue()


@contextmanager
def _answers(scratch: Path, *written: bytes, y: bytes | None = None) -> Iterator[Subject]:
    """A subject whose workers, one after the other, write this and leave y.npy and batch_mean.npy."""
    streams = iter(written)

    def start(*arguments: Any, **options: Any) -> Process:
        for folder in scratch.glob("outputs-*"):
            (folder / "y.npy").write_bytes(array(SHAPE) if y is None else y)
            (folder / "batch_mean.npy").write_bytes(array(SHAPE[1:2]))
        return Process(next(streams))

    with mock.patch("subprocess.Popen", start), Subject(scratch=scratch) as subject:
        yield subject
    assert list(scratch.glob("worker-*")) == list(scratch.glob("outputs-*")) == []


@cache
def _small() -> tuple[Case, Inputs, dict[str, bytes]]:
    """A case, its inputs, and the files that they are in."""
    with TemporaryDirectory() as made:
        path = Path(made) / "small.yaml"
        path.write_bytes(SMALL_CASE)
        ((case,),) = (found.cases for found in load_scenarios([str(path)]))
        inputs = make(case, Path(made))
        return case, inputs, {file: Path(file).read_bytes() for file in inputs.files.values()}


def _run(scratch: Path, *written: bytes, y: bytes | None = None) -> bool:
    """A run's Reply must be one that can be reported."""
    case, inputs, _ = _small()
    with _answers(scratch, *written, y=y) as subject:
        reply = subject.run(BACKEND, case, inputs)
    measured = {}
    if reply.outcome == "done":
        measured = Reference(case, inputs).measure(reply.outputs, reply.declarations)
    else:
        assert reply.outcome in OUTCOMES.values() or reply.outcome == "timeout"
        assert reply.reason
    ResultRecord.model_validate(
        {
            **dict.fromkeys(ResultRecord.model_fields),
            **{name: getattr(reply, name) for name in ("reason", "detail", "kernel", "seconds")},
            **{"case": case.id, "backend": BACKEND, "environment": "current", "gated": True},
            **{"status": "pass", "quantities": {}},
        }
    ).to_json()
    return bool(measured)


def replies(content: bytes, scratch: Path) -> bool:
    """A worker that answers this, whatever it is asked."""
    with _answers(scratch, content) as subject:
        reason = subject.describe([BACKEND])[BACKEND]
        assert reason is None or isinstance(reason, str)
    with _answers(scratch, content) as subject, suppress(SubjectError):
        Environment.model_validate(subject.environment()).to_json()
    return _run(scratch, AVAILABLE, content)


def outputs(content: bytes, scratch: Path) -> bool:
    """A worker that leaves this as its output."""
    return _run(scratch, AVAILABLE, DONE, y=content)


def requests(content: bytes, scratch: Path) -> bool:
    """The worker's side: every line is answered by a line."""
    for file, values in _small()[2].items():
        (scratch / Path(file).name).write_bytes(values)
    served = protocol.Worker()
    accepted = False
    for line in content.splitlines()[:3]:
        try:
            request = json.loads(line)
            request["outputs"] = str(scratch)  # nothing is to be written elsewhere
            line = json.dumps(request).encode()
        except (ValueError, TypeError, RecursionError):
            pass
        answer = served.reply(line)
        json.dumps(answer).encode("ascii")
        accepted |= answer["outcome"] == "done"
    return accepted


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (scenario, report, settings, replies, outputs, requests)
}


CORPUS = Path(__file__).parent / "corpus"
"""A folder for each target: one file or a few that it accepts, and files that once showed a fault."""


def originals(name: str) -> list[bytes]:
    """The target's corpus, and other forms of it in which single values can be damaged."""
    texts = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    if name == "report":
        texts += [gzip.decompress(text) for text in texts if text.startswith(GZIP)]
    if name == "scenario":
        own = [path.read_bytes() for path in sorted(shipped().glob("*.yaml"))]
        sound = [(CORPUS / name / "everything.yaml").read_bytes(), *own]
        trees = [tree for text in sound for tree in yaml.safe_load_all(text)]
        texts += [*own, *(json.dumps(tree).encode() for tree in trees)]  # JSON is YAML, too
    return texts
