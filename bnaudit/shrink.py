"""Case and fault → the smallest case found in which the same quantity still fails.

Greedy: parameters to their defaults, then every length of the shape to the smallest that will do (doubling,
then bisection), all with the case's own distribution. Where that is not one number, its values are then taken
as an array, of which delta debugging (Zeller and Hildebrandt, 2002) removes images, places and channels, and
which is rounded to few digits. Every step is judged on the backend, by the audit's own reference and bounds.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bnaudit.distributions import (
    Array,
    Channels,
    Constant,
    Distribution,
    File,
    Nonfinite,
    Switch,
)
from bnaudit.environments import AnySubject
from bnaudit.inputs import make
from bnaudit.literals import INLINE
from bnaudit.reference import Reference
from bnaudit.repro import Fault, fault_of
from bnaudit.scenario import Affine, Case, Parameters, Running
from bnaudit.verdict import judge
from bnaudit.worker.rounding import widen

BUDGET = 40.0
"""Seconds after which nothing smaller is looked for."""

MARGIN = 2.0
"""Times what is allowed that the error is to be (or was, where it was less): on another processor, too."""

DIGITS = (1, 2, 3, 4)
"""Significant decimal digits to which values are rounded, the fewest first."""

Attempt: TypeAlias = Callable[[Case], Fault | None]
"""Runs a case; the fault, where it is the one that is looked for."""


def attempt(
    case: Case, backend: str, subject: AnySubject, scratch: Path, wanted: Fault
) -> Fault | None:
    """The same fault in another case: the same status and, of a deviation, the same quantity, by a margin."""
    if case.unsupported() is not None or next(case.faults(), None) is not None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="shrink-", dir=scratch))
    try:
        inputs = make(case, folder)
        reply = subject.run(backend, case, inputs)
        if reply.outcome != "done":
            return Fault(reply.outcome) if reply.outcome == wanted.status else None
        reference = Reference(case, inputs)
        measured = reference.measure(reply.outputs, reply.declarations)
        verdict = judge(case.thresholds, measured, reference.facts, reply.not_repeatable)
        if verdict.status != wanted.status:
            return None
        weight = None if case.affine is None else reference.weight
        found = fault_of(
            verdict.status, verdict.quantities, case.thresholds, weight, wanted.quantity
        )
        if found is None or not found.excess >= min(MARGIN, (1 - 1e-6) * wanted.excess):
            return None
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shrink(
    case: Case,
    attempt: Attempt,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    budget: float = BUDGET,
) -> tuple[Case, Fault] | None:
    """A case that is as small as could be found, and its fault; None where the case itself has none.

    Values that are no plain distribution's are in a .npy file in `folder`.
    """
    search = _Search(attempt, folder, say, time.monotonic() + budget)
    if not search.take(case):
        return None
    while True:
        before = search.case.key
        search.simplify_parameters()
        search.shorten()
        if search.case.key == before or search.is_over():
            break
    plain, plain_fault = search.case, search.fault
    if not isinstance(plain.input, Constant) and plain.steps == 1 and plain.n:
        search.reduce_values()
        if math.prod(search.case.shape) > max(INLINE, math.prod(plain.shape) // 2):
            search.case, search.fault = plain, plain_fault  # no gain for which a file is worth it
        search.simplify_parameters()
    assert search.fault is not None  # noqa: S101 - the case itself failed
    return search.case, search.fault


def changed(case: Case, **changes: Any) -> Case:
    """The case with other fields, validated."""
    fields = {name: getattr(case, name) for name in Case.model_fields}
    return Case.model_validate({**fields, **changes})


class _Search:
    """The smallest case so far, and its fault."""

    def __init__(
        self, attempt: Attempt, folder: Path, say: Callable[[str], None], deadline: float
    ) -> None:
        self.case: Case
        self.fault: Fault | None = None
        self._attempt = attempt
        self._folder = folder
        self._say = say
        self._deadline = deadline
        self._files = itertools.count()
        self._tried: set[str] = set()
        self._said = ""

    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def take(self, case: Case) -> bool:
        """Makes this the case if the fault is in it."""
        if case.key in self._tried or (self._tried and self.is_over()):
            return False
        self._tried.add(case.key)
        fault = self._attempt(case)
        if fault is None:
            return False
        self.case, self.fault = case, fault
        text = f"{'x'.join(map(str, case.shape))} {case.memory_format} {case.input.distribution}"
        if text != self._said:
            self._say(f"still there in {text}")
        self._said = text
        return True

    def take_changed(self, **changes: Any) -> bool:
        return any(getattr(self.case, k) != v for k, v in changes.items()) and self.take(
            changed(self.case, **changes)
        )

    # --- parameters --------------------------------------------------------------------------------

    def simplify_parameters(self) -> None:
        """Every parameter to its default, where the fault does not need it."""
        while self.case.steps > 1:
            if not (self.take_changed(steps=1) or self.take_changed(steps=self.case.steps // 2)):
                break
        for part in _simpler(self.case.input):
            if self.take_changed(input=part):
                break
        self.take_changed(affine=None)
        for name in ("backward", "grad_output", "running", "eps", "momentum", "param_dtype",
                     "seed", "memory_format"):  # fmt: skip
            default = Parameters.model_fields[name].get_default(call_default_factory=True)
            self.take_changed(**{name: default})
        if self.case.backward:
            self.take_changed(grad_output=Constant(distribution="constant", value=1.0))
        if self.case.affine is not None and not self.take_changed(affine=Affine()):
            for name in ("weight", "bias"):
                self.take_changed(
                    affine=self.case.affine.model_copy(update={name: getattr(Affine(), name)})
                )
        if self.case.running != Running():
            for name in ("mean", "var"):
                self.take_changed(
                    running=self.case.running.model_copy(update={name: getattr(Running(), name)})
                )

    # --- the shape, with the same distribution -----------------------------------------------------

    def shorten(self) -> None:
        """Every length to the smallest that will do; the fewest dimensions."""
        for axis in (1, 0, *range(2, len(self.case.shape))):
            if axis < len(self.case.shape):
                self._shorten_axis(axis)
        while len(self.case.shape) > 2 and self.case.shape[-1] == 1:
            if not self.take_changed(shape=self.case.shape[:-1]):
                break
        if len(self.case.shape) > 2:
            self.take_changed(shape=(self.case.n, self.case.channels))

    def _shorten_axis(self, axis: int) -> None:
        whole = self.case.shape[axis]

        def fails_with(length: int) -> bool:
            shape = list(self.case.shape)
            shape[axis] = length
            return self.take(changed(self.case, shape=tuple(shape)))

        # From below: small cases are quick.
        length, passed = 1, 0
        while length < whole and not fails_with(length):
            passed, length = length, 2 * length
            if self.is_over():
                return
        fails = min(length, whole)
        while fails - passed > 1 and not self.is_over():
            middle = (fails + passed) // 2
            if fails_with(middle):
                fails = middle
            else:
                passed = middle

    # --- values ------------------------------------------------------------------------------------

    def reduce_values(self) -> None:
        """The values as an array: fewer of them, and rounder ones."""
        case, fault = self.case, self.fault
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            inputs = make(case, folder)
            x = np.array(widen(inputs.x[0], case.dtype))
            stored = inputs.grad_output
            dy = None if stored is None else np.array(widen(stored[0], case.dtype))
        finally:
            shutil.rmtree(folder)
        if dy is not None and isinstance(case.grad_output, Constant):
            dy = None
        if not self._take_arrays(case, x, dy):
            return
        channel = 0
        if fault is not None and fault.index is not None:
            channel = fault.index[1] if len(fault.index) > 1 else fault.index[0]
        if x.shape[1] > 1:
            for own in ([channel], [channel, (channel + 1) % x.shape[1]]):
                kept = _without_rest(x, dy, 1, own)
                if self._take_arrays(_of_channels(self.case, own), *kept):
                    x, dy = kept
                    break
        for axis in (0, *range(2, x.ndim)):
            x, dy = self._reduce_axis(x, dy, axis)
        if x.ndim > 2:
            flat = [
                a if a is None else np.moveaxis(a, 1, -1).reshape(-1, a.shape[1]) for a in (x, dy)
            ]
            if flat[0] is not None and self._take_arrays(self.case, flat[0], flat[1]):
                x, dy = flat[0], flat[1]
        for values in _rounded(x):
            if self._take_arrays(self.case, values, dy):
                x = values
                break
        for value in np.unique(x)[:4]:
            plain = Constant(distribution="constant", value=float(value))
            if math.isfinite(value) and self.take_changed(input=plain):
                return

    def _take_arrays(self, case: Case, x: Array, dy: Array | None) -> bool:
        files = {"input": self._file(x)}
        if dy is not None:
            files["grad_output"] = self._file(dy)
        taken = self.take(changed(case, shape=x.shape, **files))
        if not taken:
            for file in files.values():
                file.source.unlink()
        return taken

    def _file(self, values: Array) -> File:
        name = f"{next(self._files)}.npy"
        np.save(self._folder / name, values)
        return File.model_validate(
            {"distribution": "file", "path": name}, context={"folder": self._folder}
        )

    def _reduce_axis(self, x: Array, dy: Array | None, axis: int) -> tuple[Array, Array | None]:
        """Delta debugging of the places along an axis: parts alone, then all but a part."""
        parts = 2
        while (length := x.shape[axis]) > 1 and not self.is_over():
            parts = min(parts, length)
            chunks = np.array_split(np.arange(length), parts)
            others = (np.concatenate(chunks[:k] + chunks[k + 1 :]) for k in range(parts))
            for kept in [*chunks, *(others if parts > 2 else ())]:
                candidate = _without_rest(x, dy, axis, kept)
                if self._take_arrays(self.case, *candidate):
                    x, dy = candidate
                    parts = 2 if len(kept) < length // 2 else max(parts - 1, 2)
                    break
            else:
                if parts == length:
                    break
                parts *= 2
        return x, dy


def _simpler(source: Distribution) -> Iterable[Distribution]:
    """What a distribution of distributions is made of."""
    if isinstance(source, Channels):
        yield from source.items
    elif isinstance(source, Nonfinite):
        yield source.base
    elif isinstance(source, Switch):
        yield source.before
        yield source.after


def _without_rest(
    x: Array, dy: Array | None, axis: int, kept: Sequence[int] | Array
) -> tuple[Array, Array | None]:
    return x.take(kept, axis), None if dy is None else dy.take(kept, axis)


def _of_channels(case: Case, kept: Sequence[int]) -> Case:
    """The case with the per-channel tensors of these channels, as constants."""

    def of(source: Distribution, values: Array) -> Distribution:
        if isinstance(source, Constant):
            return source
        items = tuple(Constant(distribution="constant", value=float(values[c])) for c in kept)
        return items[0] if len(items) == 1 else Channels(distribution="channels", items=items)

    with tempfile.TemporaryDirectory() as folder:
        inputs = make(case, Path(folder))
        dtype = case.parameter_dtype
        running = Running(
            mean=of(case.running.mean, widen(inputs.running_mean, dtype)),
            var=of(case.running.var, widen(inputs.running_var, dtype)),
        )
        affine = case.affine
        if affine is not None and inputs.weight is not None and inputs.bias is not None:
            affine = Affine(
                weight=of(affine.weight, widen(inputs.weight, dtype)),
                bias=of(affine.bias, widen(inputs.bias, dtype)),
            )
    return changed(case, running=running, affine=affine)


def _rounded(x: Array) -> Iterator[Array]:
    """The values to few significant digits, the fewest first."""
    for digits in DIGITS:
        with np.errstate(all="ignore"):
            yield np.vectorize(lambda v, d=digits: float(f"{v:.{d - 1}e}"), otypes=[np.float64])(x)
