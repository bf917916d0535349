"""Cases × backends → results: the only loop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from bnaudit.certified import check_environment
from bnaudit.consistency import Bench, Call, Consistency, Disagreement, examine
from bnaudit.distributions import FileError
from bnaudit.environments import AnySubject
from bnaudit.inputs import Inputs, make
from bnaudit.measure import Measurement
from bnaudit.reference import Facts, Reference
from bnaudit.scenario import Case, Scenario
from bnaudit.verdict import DIED, RAN, Judged, judge
from bnaudit.worker.rounding import storage

TENSORS_HELD = 8
"""Tensors of the statistics dtype that a case may take: those in files, and what a plain backend holds."""


@dataclass(frozen=True)
class Selected:
    """A backend to run. gated: its deviations decide the exit code. required: it must be available."""

    name: str
    gated: bool
    required: bool = False


@dataclass(frozen=True)
class CaseFacts:
    """What is known of a case before any backend ran; None where its inputs could not be made."""

    case: Case
    n: int
    input_sha256: str | None
    facts: Facts | None


@dataclass(frozen=True)
class Result:
    """One case on one backend."""

    case: Case
    backend: str
    environment: str
    status: str
    gated: bool
    label: str | None = None
    reason: str | None = None
    cause: str | None = None
    finding: int | None = None
    kernel: str | None = None
    seconds: float | None = None
    detail: str | None = None
    declarations: Mapping[str, Any] | None = None
    accepted: str | None = None
    quantities: dict[str, Judged] = field(default_factory=dict)


@dataclass(frozen=True)
class ControlOutcome:
    """Whether a backend did in a scenario what it is known to do there."""

    scenario: str
    backend: str
    expected: str
    observed: str
    ok: bool


class Observed(NamedTuple):
    """What a control's outcome follows from; quantities: the status of each."""

    case: str
    steps: int
    status: str
    quantities: Mapping[str, str]


class Concluded(Protocol):
    """What the verdict needs to know of a result."""

    @property
    def status(self) -> str:
        """Its status."""

    @property
    def gated(self) -> bool:
        """Whether it decides on the exit code."""

    @property
    def accepted(self) -> str | None:
        """Why it does not, if a baseline accepts it."""


class Checked(Protocol):
    """What the verdict needs to know of a check of consistency."""

    @property
    def ok(self) -> bool | None:
        """Whether it holds; None where it was not made."""

    @property
    def died(self) -> bool:
        """Whether the backend died in it."""

    @property
    def check(self) -> str:
        """Its name."""


Event = CaseFacts | Result | ControlOutcome | Disagreement | Consistency

Earlier: TypeAlias = Callable[[Case, Sequence[Selected]], Sequence[Event] | None]
"""What came of a case on the chosen backends before; None where that is not known."""


def run(
    scenarios: Sequence[Scenario],
    selection: Sequence[Selected],
    subject: AnySubject,
    scratch: Path,
    *,
    matches: Callable[[str, str], bool] = lambda case, backend: True,
    stop_early: bool = False,
    checks: frozenset[str] = frozenset(),
    other: AnySubject | None = None,
    earlier: Earlier = lambda case, backends: None,
) -> Iterator[Event]:
    """Runs every case on the selected backends and on its scenario's controls.

    Yields each case's facts, then its results, the disagreement of its gated backends and what came of
    the `checks` of consistency; after a scenario's last case, its controls' outcomes.
    A control runs on the whole of its scenario, ungated, unless it is selected anyway; `matches(case id,
    backend)` filters the rest. stop_early: end after the first gated failure. other: a subject with another
    number of threads; `threads` among the checks needs it. earlier: what came of a case in an earlier run
    that was interrupted, or None where it has to be run.
    Raises EnvironmentFaultError where no exact reference can be computed.
    """
    check_environment()
    loop = _Loop(subject, scratch, checks, other)
    for scenario in scenarios:
        controls = dict.fromkeys((*scenario.controls.must_fail, *scenario.controls.must_pass))
        names = dict.fromkeys((*(backend.name for backend in selection), *controls))
        unavailable = subject.describe(list(names))
        wanted = [
            case
            for case in scenario.cases
            if any(matches(case.id, backend.name) for backend in selection)
        ]
        results: list[Result] = []
        for case in wanted:
            chosen = [b for b in selection if matches(case.id, b.name)]
            matched = {backend.name for backend in chosen}
            chosen += [Selected(name, gated=False) for name in controls if name not in matched]
            events = earlier(case, chosen)
            for event in loop.run(case, chosen, unavailable) if events is None else events:
                yield event
                if isinstance(event, Result):
                    results.append(event)
                if stop_early and _is_failure(event):
                    return
        # A control answers for its whole scenario; a filtered one proves nothing either way.
        if len(wanted) == len(scenario.cases):
            yield from _control_outcomes(scenario, results)


def _is_failure(event: Event) -> bool:
    """Whether it decides that the run fails."""
    if isinstance(event, Consistency):
        return event.ok is False
    return isinstance(event, Result) and event.gated and event.status == "fail"


@dataclass
class _Loop:
    """What runs cases one after the other.

    done: calls of earlier cases, by key and backend, so that identical ones are not made again.
    """

    subject: AnySubject
    scratch: Path
    checks: frozenset[str]
    other: AnySubject | None
    done: dict[tuple[str, str], Call] = field(default_factory=dict)

    def run(
        self, case: Case, backends: Sequence[Selected], unavailable: Mapping[str, str | None]
    ) -> Iterator[Event]:
        """Events of one case."""
        obstacle = case.unsupported() or _shortage(case)
        folder = self.scratch / "case"
        inputs: Inputs | None = None
        reference: Reference | None = None
        try:
            if obstacle is None:
                try:
                    # With its parents, because something may sweep temporary folders.
                    folder.mkdir(mode=0o700, parents=True)
                    inputs = make(case, folder)
                    reference = Reference(case, inputs)
                except (OSError, FileError) as error:
                    # No room for the tensors, or a file of values that has gone: this case's loss alone.
                    text = getattr(error, "strerror", None) or error
                    obstacle = f"the inputs could not be made: {text}"
            yield CaseFacts(
                case,
                case.n,
                None if inputs is None else inputs.sha256,
                None if reference is None else reference.facts,
            )
            # Outputs that nothing is compared with would only keep their space.
            available = sum(b.gated and unavailable[b.name] is None for b in backends)
            is_compared = bool(self.checks) or available > 1
            fresh: dict[str, Call] = {}
            for backend in backends:
                reason = unavailable[backend.name]
                if reason is not None:
                    outcome: dict[str, Any] = {"status": "unavailable", "reason": reason}
                elif inputs is None or reference is None:
                    outcome = {"status": "unsupported", "reason": obstacle}
                else:
                    call = self.done.get((case.key, backend.name))
                    if call is None:
                        call = self._call(backend.name, case, inputs, reference)
                        # Outputs are mapped files: keeping them would keep their space.
                        kept = self.done[case.key, backend.name] = replace(
                            call, reply=replace(call.reply, outputs={})
                        )
                        if is_compared and backend.gated and call.reply.outcome == "done":
                            fresh[backend.name] = call
                        call = kept
                    outcome = _outcome(call, case, reference)
                place = self.subject.environment_of(backend.name)
                yield Result(case, backend.name, place, gated=backend.gated, **outcome)
            if inputs is not None and reference is not None:
                bench = Bench(case, inputs, reference, self.subject, self.other, folder)
                yield from examine(bench, fresh, self.checks)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _call(self, backend: str, case: Case, inputs: Inputs, reference: Reference) -> Call:
        reply = self.subject.run(backend, case, inputs)
        measurements: Mapping[str, Measurement] = {}
        if reply.outcome == "done":
            measurements = reference.measure(reply.outputs, reply.declarations)
        return Call(reply, measurements)


def _shortage(case: Case) -> str | None:
    """Why the case may not fit into this machine's memory, or None."""
    itemsize = storage(case.statistics_dtype).itemsize
    needed = (TENSORS_HELD + case.steps) * math.prod(case.shape) * itemsize
    available = available_memory()
    if available is None or needed <= available:
        return None
    gib = 2**30
    return f"may need {needed / gib:.0f} GiB of memory, and {available / gib:.0f} GiB are available"


def available_memory() -> int | None:
    """Bytes that new processes can have without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # not Linux
    kib = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kib[0]) * 1024 if kib else None


def _outcome(call: Call, case: Case, reference: Reference) -> dict[str, Any]:
    """The fields of a Result that follow from a call."""
    reply = call.reply
    known = {"kernel": reply.kernel, "seconds": reply.seconds, "detail": reply.detail}
    if reply.outcome == "contract":
        return {"status": "fail", "reason": f"contract: {reply.reason}", **known}
    if reply.outcome != "done":
        return {"status": reply.outcome, "reason": reply.reason, **known}
    verdict = judge(case.thresholds, call.measurements, reference.facts, reply.not_repeatable)
    return {
        "status": verdict.status,
        "label": verdict.label,
        "reason": verdict.reason,
        "cause": verdict.cause,
        "quantities": verdict.quantities,
        "declarations": vars(reply.declarations),
        **known,
    }


def _control_outcomes(scenario: Scenario, results: Sequence[Result]) -> Iterator[ControlOutcome]:
    for expected, names in (
        ("fail", scenario.controls.must_fail),
        ("pass", scenario.controls.must_pass),
    ):
        for name in names:
            own = [
                Observed(
                    r.case.id,
                    r.case.steps,
                    r.status,
                    {n: q.status for n, q in r.quantities.items()},
                )
                for r in results
                if r.backend == name
            ]
            yield control_outcome(scenario.name, name, expected, own)


def control_outcome(
    scenario: str, backend: str, expected: str, results: Iterable[Observed]
) -> ControlOutcome:
    """Whether a backend did what is expected of it. results: its own in that scenario."""
    own = [result for result in results if result.status != "unsupported"]
    if expected == "fail":
        failed = [result for result in own if _fails_as_expected(result)]
        ok = bool(failed)
        observed = f"{len(failed)} of {len(own)} failed"
    else:
        bad = [result for result in own if result.status not in ("pass", "warn")]
        ok = bool(own) and not bad
        observed = f"{len(own) - len(bad)} of {len(own)} passed"
        if bad:
            observed += f"; {bad[0].case}: {bad[0].status}"
    return ControlOutcome(scenario, backend, expected, observed, ok)


def _fails_as_expected(result: Observed) -> bool:
    """Fails in y, or over several steps in the running statistics; a crash does not count."""
    names = ("y", "running_mean", "running_var") if result.steps > 1 else ("y",)
    return result.status == "fail" and any(result.quantities.get(name) == "fail" for name in names)


def unmade(checks: Sequence[Checked], asked: Collection[str]) -> list[str]:
    """The checks that were asked for and made in no case."""
    made = {check.check for check in checks if check.ok is not None}
    return [name for name in asked if name not in made]


def conclude(
    results: Iterable[Concluded],
    *,
    controls_ok: bool,
    missing: Collection[str] = (),
    checks: Sequence[Checked] = (),
    unmade: Collection[str] = (),
    fail_on: str = "fail",
    interrupted: bool = False,
) -> tuple[str, int]:
    """The verdict and the exit code. Of the exit codes that apply, the largest wins.

    What a baseline accepts is as good as a warning that is allowed. missing: backends that were asked for
    and are unavailable. checks: those of consistency; unmade: those that were asked for and made in no case.
    fail_on: "fail", "warn" (a gated warn fails too) or "never" (a deviation alone does not fail).
    """
    gated = [r for r in results if r.gated]
    statuses = {r.status for r in gated if r.accepted is None}
    ran = any(r.status in RAN for r in gated)
    died = statuses & {*DIED} or any(check.died for check in checks)
    inconsistent = any(check.ok is False for check in checks)
    if interrupted:
        return "interrupted", 130
    if not controls_ok:
        return "untrusted", 4
    if died or missing or unmade:
        return "incomplete", 3
    if inconsistent or "fail" in statuses or (fail_on == "warn" and "warn" in statuses):
        return "fail", 0 if fail_on == "never" else 1
    if not ran:
        return "nothing-gated", 5
    return "warn" if "warn" in statuses or any(r.accepted for r in gated) else "pass", 0
