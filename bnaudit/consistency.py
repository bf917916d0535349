"""What a result must not depend on, and whether it does; and how far backends are from each other.

Each check runs a backend a second time, with one thing changed:

    repeat        nothing: the same bits
    threads       the number of threads: the same bits
    channels      the values in the odd channels, all set to 0: the same bits in the even channels
    batch-order   the images, in reverse: within the bounds, since a summation tree may follow their order
    inference     the mode: the batch again in inference, with the running statistics that training left

and "backends" compares two that are both sound: more than twice the tight bound apart, one is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bnaudit.environments import AnySubject
from bnaudit.inputs import Array, Inputs
from bnaudit.measure import Measurement
from bnaudit.reference import Reference
from bnaudit.scenario import Case
from bnaudit.subject import Reply
from bnaudit.verdict import DIED
from bnaudit.worker.execution import IN_FULL, difference
from bnaudit.worker.rounding import round_to

Check: TypeAlias = "Callable[[Bench, str, Call], str | None]"
"""Says what a result depends on that it must not; None where it does not."""

CHECKS = ("repeat", "threads", "channels", "batch-order", "inference", "backends")


@dataclass(frozen=True)
class Consistency:
    """What came of one check of one backend on one case; the reason where it does not hold.

    ok: None where the check could not be made. died: the call that the check needs crashed or took too
    long; detail: its traceback or last words.
    """

    case: Case
    backend: str
    check: str
    ok: bool | None
    reason: str | None = None
    died: bool = False
    detail: str | None = None


@dataclass(frozen=True)
class Disagreement:
    """The two gated backends that differ most on a case.

    ratio: the largest difference of an element in units of twice its tight bound, which two of the best
    algorithms do not exceed.
    """

    case: Case
    quantity: str
    backends: tuple[str, str]
    max_abs_difference: float
    ratio: float


@dataclass(frozen=True)
class Call:
    """A call that was made, and its measurements."""

    reply: Reply
    measurements: Mapping[str, Measurement]


@dataclass(frozen=True)
class Bench:
    """A case with all that is needed to call backends on it again.

    other: a subject with another number of threads. folder: that of the inputs.
    """

    case: Case
    inputs: Inputs
    reference: Reference
    subject: AnySubject
    other: AnySubject | None
    folder: Path


def examine(
    bench: Bench, calls: Mapping[str, Call], checks: frozenset[str]
) -> Iterator[Disagreement | Consistency]:
    """What there is to say of the gated backends' first calls on a case.

    Always where two of them differ most; and of each backend the checks that are asked for and apply.
    """
    case = bench.case
    found = _disagreement(bench, calls)
    if found is not None:
        yield found
        if "backends" in checks:
            yield _judged(found, calls)
    for backend, first in calls.items():
        for check, make in _CHECKS.items():
            if check in checks and _applies(check, case):
                yield _made(bench, backend, check, make, first)


def _made(bench: Bench, backend: str, check: str, make: Check, first: Call) -> Consistency:
    outcome = partial(Consistency, bench.case, backend, check)
    try:
        reason = make(bench, backend, first)
    except _NotMade as obstacle:
        return outcome(None, str(obstacle))
    except OSError as error:  # no room for what is changed: this check's loss alone
        return outcome(None, f"the changed inputs could not be written: {error.strerror or error}")
    except _Ended as end:
        reply = end.reply
        reason = f"{end} the call ended: {reply.outcome}: {reply.reason}"
        if reply.outcome == "unsupported":
            return outcome(None, reason)
        return outcome(False, reason, reply.outcome in DIED, reply.detail)
    return outcome(reason is None, reason)


class _NotMade(Exception):  # noqa: N818 - an outcome
    """A check that cannot be made; the message says why."""


class _Ended(Exception):  # noqa: N818 - an outcome
    """A second call without outputs; the message is its circumstance."""

    def __init__(self, circumstance: str, reply: Reply) -> None:
        super().__init__(circumstance)
        self.reply = reply


def _applies(check: str, case: Case) -> bool:
    if check == "channels":
        return case.channels > 1 and case.n > 0
    if check == "inference":
        return case.mode == "training" and case.n > 0
    return check != "batch-order" or case.shape[0] > 1


def _done(circumstance: str, reply: Reply) -> Reply:
    """The reply, if it has outputs; raises _Ended."""
    if reply.outcome != "done":
        raise _Ended(circumstance, reply)
    return reply


def _repeat(bench: Bench, backend: str, first: Call) -> str | None:
    circumstance = "in a second call"
    if first.reply.not_repeatable is not None:
        return f"{circumstance} {first.reply.not_repeatable}"
    second = bench.subject.run(backend, bench.case, bench.inputs)
    return _changed(bench, first.reply, _done(circumstance, second), circumstance)


def _threads(bench: Bench, backend: str, first: Call) -> str | None:
    assert bench.other is not None  # noqa: S101 - there is one where the check is asked for
    circumstance = f"with --threads {bench.other.threads}"
    second = bench.other.run(backend, bench.case, bench.inputs)
    return _changed(bench, first.reply, _done(circumstance, second), circumstance)


def _channels(bench: Bench, backend: str, first: Call) -> str | None:
    circumstance = "with the odd channels set to 0"
    x = bench.inputs.x.copy()
    x[:, :, 1::2] = 0
    second = bench.subject.run(backend, bench.case, _altered(bench, "channels", {"x": x}))
    even = slice(0, None, 2)
    return _changed(bench, first.reply, _done(circumstance, second), circumstance, even)


def _batch_order(bench: Bench, backend: str, first: Call) -> str | None:
    circumstance = "with the batch in reverse"
    tensors = {"x": bench.inputs.x, "grad_output": bench.inputs.grad_output}
    reversed_ = {name: t[:, ::-1] for name, t in tensors.items() if t is not None}
    inputs = _altered(bench, "batch-order", reversed_)
    second = _done(circumstance, bench.subject.run(backend, bench.case, inputs))
    outputs = {
        name: array[::-1] if name in IN_FULL else array for name, array in second.outputs.items()
    }
    measured = bench.reference.measure(outputs, second.declarations)
    for name, measurement in measured.items():
        before = first.measurements.get(name)
        if not measurement.sound and (before is None or before.sound):
            ratio = measurement.bound_ratio
            return (
                f"{circumstance} {name} deviates {ratio:.3g} times its bound, in order less than it"
            )
    return None


def _inference(bench: Bench, backend: str, first: Call) -> str | None:
    circumstance = "in inference with the running statistics that training left"
    left, dtype = first.reply.outputs, bench.case.parameter_dtype
    for name in ("running_mean", "running_var"):
        if name not in left:
            raise _NotMade(f"{name} is not returned")
        if not first.measurements[name].sound:
            return f"{name}, with which inference would go on, is wrong after training already"
    tensors = {name: round_to(left[name], dtype) for name in ("running_mean", "running_var")}
    tensors["x"] = bench.inputs.x[-1:]
    inputs = _altered(bench, f"inference after {backend}", tensors)
    inputs.files.pop("grad_output", None)
    inputs = replace(inputs, grad_output=None)
    case = bench.case.model_copy(update={"mode": "inference", "steps": 1, "backward": False})
    second = _done(circumstance, bench.subject.run(backend, case, inputs))
    y = Reference(case, inputs).measure(second.outputs, second.declarations)["y"]
    if y.sound or y.worst is None:
        return None
    index = ",".join(map(str, y.worst.index))
    return f"{circumstance} y[{index}] = {y.worst.value:.6g}, should be {y.worst.reference:.6g}"


_CHECKS: dict[str, Check] = {
    "repeat": _repeat,
    "threads": _threads,
    "channels": _channels,
    "batch-order": _batch_order,
    "inference": _inference,
}


def _altered(bench: Bench, digest: str, tensors: Mapping[str, Array]) -> Inputs:
    """The case's inputs with other values in some tensors, which are saved in the bench's folder.

    digest: what tells these values from others on the same case.
    """
    files = dict(bench.inputs.files)
    for name, tensor in tensors.items():
        files[name] = str(bench.folder / f"altered-{name}.npy")
        np.save(files[name], np.ascontiguousarray(tensor))
    digest = f"{bench.inputs.sha256} {digest}"
    return replace(bench.inputs, **tensors, sha256=digest, files=files)


def _changed(
    bench: Bench, first: Reply, second: Reply, circumstance: str, channels: slice = slice(None)
) -> str | None:
    """What changed between two calls in the given channels, in words; None where all bits are the same."""

    def part(reply: Reply) -> dict[str, Array]:
        return {
            name: array[:, channels] if name in IN_FULL else array[channels]
            for name, array in reply.outputs.items()
        }

    found = difference(part(first), part(second), bench.case.dtype)
    return None if found is None else f"{circumstance} {found}"


def _disagreement(bench: Bench, calls: Mapping[str, Call]) -> Disagreement | None:
    """Where two backends differ most, in units of twice the tight bound; None for fewer than two."""
    has_statistics = bench.case.mode == "training" and bench.case.n > 0
    found = []
    for a, b in combinations(calls, 2):
        first, second = calls[a].reply.outputs, calls[b].reply.outputs
        for name in ("y", "batch_mean") if has_statistics else ("y",):
            if name in first and name in second:
                error, ratio = bench.reference.difference(name, first[name], second[name])
                found.append(Disagreement(bench.case, name, (a, b), error, ratio))
    return max(found, key=lambda disagreement: disagreement.ratio, default=None)


def _judged(found: Disagreement, calls: Mapping[str, Call]) -> Consistency:
    """Whether two backends are no further apart than two good ones can be; if not, of the worse one."""

    def tight_ratio(backend: str) -> float:
        ratio = calls[backend].measurements[found.quantity].tight_ratio
        return 0.0 if ratio is None else ratio

    better, worse = sorted(found.backends, key=tight_ratio)
    if found.ratio <= 1:
        return Consistency(found.case, worse, "backends", True)
    reason = (
        f"{found.quantity} differs from {better}'s by {found.max_abs_difference:.3g}, {found.ratio:.3g} "
        "times what two good implementations can differ by"
    )
    return Consistency(found.case, worse, "backends", False, reason)
