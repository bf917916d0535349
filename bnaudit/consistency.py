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
from itertools import combinations
from pathlib import Path

import numpy as np

from bnaudit.deviation import Measurement
from bnaudit.inputs import Array, Inputs
from bnaudit.measure import Reference
from bnaudit.scenario import Case
from bnaudit.subject import Reply, Subject
from bnaudit.worker.execution import IN_FULL, difference
from bnaudit.worker.rounding import round_to

CHECKS = ("repeat", "threads", "channels", "batch-order", "inference", "backends")


@dataclass(frozen=True)
class Consistency:
    """What came of one check of one backend on one case; the reason where it does not hold."""

    case: Case
    backend: str
    check: str
    ok: bool
    reason: str | None = None


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
    subject: Subject
    other: Subject | None
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
            yield _judged(found)
    for backend, first in calls.items():
        for check, make in _CHECKS.items():
            if check in checks and _applies(check, case):
                reason = make(bench, backend, first)
                yield Consistency(case, backend, check, reason is None, reason)


def _applies(check: str, case: Case) -> bool:
    if check == "channels":
        return case.channels > 1 and case.n > 0
    if check == "inference":
        return case.mode == "training" and case.n > 0
    return check != "batch-order" or case.shape[0] > 1


def _repeat(bench: Bench, backend: str, first: Call) -> str | None:
    second = bench.subject.run(backend, bench.case, bench.inputs)
    return _changed(bench, first.reply, second, "in a second call")


def _threads(bench: Bench, backend: str, first: Call) -> str | None:
    assert bench.other is not None  # noqa: S101 - there is one where the check is asked for
    second = bench.other.run(backend, bench.case, bench.inputs)
    return _changed(bench, first.reply, second, f"with --threads {bench.other.threads}")


def _channels(bench: Bench, backend: str, first: Call) -> str | None:
    def silence(tensor: Array) -> Array:
        changed: Array = tensor.copy()
        changed[:, :, 1::2] = 0
        return changed

    inputs = _altered(bench, "channels", {"x": silence(bench.inputs.x)})
    second = bench.subject.run(backend, bench.case, inputs)
    return _changed(bench, first.reply, second, "with the odd channels set to 0", slice(0, None, 2))


def _batch_order(bench: Bench, backend: str, first: Call) -> str | None:
    tensors = {"x": bench.inputs.x, "grad_output": bench.inputs.grad_output}
    reversed_ = {name: t[:, ::-1] for name, t in tensors.items() if t is not None}
    second = bench.subject.run(backend, bench.case, _altered(bench, "batch-order", reversed_))
    if second.outcome != "done":
        return _ended(second, "with the batch in reverse")
    outputs = {
        name: array[::-1] if name in IN_FULL else array for name, array in second.outputs.items()
    }
    measured = bench.reference.measure(outputs, second.declarations)
    for name, measurement in measured.items():
        if not _sound(measurement) and _sound(first.measurements.get(name)):
            ratio = measurement.bound_ratio
            return f"{name} with the batch in reverse: {ratio:.3g} times its bound, in order within"
    return None


def _inference(bench: Bench, backend: str, first: Call) -> str | None:
    case, left = bench.case, first.reply.outputs
    if not {"running_mean", "running_var"} <= left.keys():
        return None
    last = bench.inputs.x[-1:]
    running = {
        name: round_to(left[name], case.parameter_dtype) for name in ("running_mean", "running_var")
    }
    changes = {"mode": "inference", "steps": 1, "backward": False}
    inputs = replace(_altered(bench, "inference", {"x": last, **running}), grad_output=None)
    inputs.files.pop("grad_output", None)
    inputs = replace(inputs, sha256=f"{inputs.sha256} of {backend}")
    case = case.model_copy(update=changes)
    second = bench.subject.run(backend, case, inputs)
    if second.outcome != "done":
        return _ended(second, "in inference")
    reference = Reference(case, inputs)
    y = reference.measure(second.outputs, second.declarations)["y"]
    if _sound(y):
        return None
    worst = y.worst
    place = (
        ""
        if worst is None
        else f": y[{','.join(map(str, worst.index))}] = {worst.value:.6g}, should be {worst.reference:.6g}"
    )
    return f"in inference with the running statistics that training left{place}"


_CHECKS: dict[str, Callable[[Bench, str, Call], str | None]] = {
    "repeat": _repeat,
    "threads": _threads,
    "channels": _channels,
    "batch-order": _batch_order,
    "inference": _inference,
}


def _altered(bench: Bench, check: str, tensors: Mapping[str, Array]) -> Inputs:
    """The case's inputs with a check's values in some tensors, which are saved in the bench's folder."""
    files = dict(bench.inputs.files)
    for name, tensor in tensors.items():
        files[name] = str(bench.folder / f"{check}-{name}.npy")
        np.save(files[name], np.ascontiguousarray(tensor))
    digest = f"{bench.inputs.sha256} {check}"
    return replace(bench.inputs, **tensors, sha256=digest, files=files)


def _sound(measurement: Measurement | None) -> bool:
    if measurement is None or measurement.bound_ratio is None:
        return True
    return measurement.bound_ratio <= 1 and measurement.nonfinite == 0


def _ended(reply: Reply, circumstance: str) -> str:
    return f"{circumstance} the call ended: {reply.outcome}: {reply.reason}"


def _changed(
    bench: Bench, first: Reply, second: Reply, circumstance: str, channels: slice = slice(None)
) -> str | None:
    """What changed between two calls in the given channels, in words; None where all bits are the same."""
    if second.outcome != "done":
        return _ended(second, circumstance)

    def part(reply: Reply) -> dict[str, Array]:
        return {
            name: array[:, channels] if name in IN_FULL else array[channels]
            for name, array in reply.outputs.items()
        }

    found = difference(part(first), part(second), bench.case.dtype)
    return None if found is None else f"{circumstance} {found}"


def _disagreement(bench: Bench, calls: Mapping[str, Call]) -> Disagreement | None:
    """Where two backends differ most, in units of twice the tight bound; None for fewer than two."""
    found = []
    for a, b in combinations(calls, 2):
        first, second = calls[a].reply.outputs, calls[b].reply.outputs
        for name in ("y", "batch_mean"):
            if name in first and name in second:
                error, ratio = bench.reference.difference(name, first[name], second[name])
                found.append(Disagreement(bench.case, name, (a, b), error, ratio))
    return max(found, key=lambda disagreement: disagreement.ratio, default=None)


def _judged(found: Disagreement) -> Consistency:
    """Whether two backends are no further apart than two good ones can be."""
    first, second = found.backends
    reason = (
        f"{found.quantity} differs from {second}'s by {found.max_abs_difference:.3g}, {found.ratio:.3g} "
        "times what two good implementations can differ by"
    )
    ok = found.ratio <= 1
    return Consistency(found.case, first, "backends", ok, None if ok else reason)
