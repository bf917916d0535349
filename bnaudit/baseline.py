"""Report × baseline → what is accepted of its deviations: known ones, as long as they do not get worse.

A baseline has one entry for each gated backend and case that deviates, found by the case's key and the
input's digest. It accepts that entry's status or a better one, with T below FACTOR times the one it
knows. It accepts no crash and no timeout but where the entry has that status, and nothing after its expiry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bnaudit.document import load_as
from bnaudit.report import (
    CaseRecord,
    Environment,
    FailOn,
    Quantity,
    Report,
    ReportError,
    ResultRecord,
)
from bnaudit.verdict import CONSTANT_ABS_ERROR, DEVIATIONS, DIED, FAILED, RAN

FACTOR = 4.0
"""Growth of T from which on a deviation above its bound is worse than the one that was accepted."""

HEADER = """\
# Deviations that are known and accepted: bnaudit run --baseline FILE fails only where one is new or worse.
# reason: yours, and kept when the file is written again. expires: a date such as 2027-01-31, or null.
"""

Deviation = Literal["warn", "fail", "timeout", "crash"]


def _date(value: object) -> object:
    if value is None or isinstance(value, date):
        return value
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        raise ValueError("accepted is a date such as 2027-01-31, or null") from None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Known(_Part):
    """One quantity as it was accepted.

    bound_ratio: T, null where it has none. constant_error: how far constant channels are from the bias, in σ;
    null where none is, or nobody knows.
    """

    status: Deviation
    bound_ratio: float | None = None
    constant_error: float | None = None


class Entry(_Part):
    """The deviation of one backend on one case. id: the case's, for people."""

    id: str
    backend: str
    key: str
    input_sha256: str | None = None
    status: Deviation
    quantities: dict[str, Known] = {}
    reason: str = Field(min_length=1)
    expires: Annotated[date | None, BeforeValidator(_date)] = None


class Machine(_Part):
    """What deviations depend on beside the backend."""

    isa: str | None = None
    threads: int
    devices: list[str] = []


class Baseline(_Part):
    """Accepted deviations, and the environments in which they were seen, by name."""

    version: Literal[1]
    environments: dict[str, Machine] = {}
    entries: list[Entry] = []


def load(path: Path) -> Baseline:
    """Reads a baseline. Raises ReportError with file:line:column and what is accepted there."""
    return load_as(Baseline, path, ReportError)


def accept(
    baseline: Baseline,
    results: Sequence[ResultRecord],
    cases: Mapping[str, CaseRecord],
    environments: Iterable[Environment],
    *,
    today: date,
    fail_on: FailOn = "fail",
) -> tuple[list[ResultRecord], list[str]]:
    """The results, the accepted ones with the reason; and what there is to say about the baseline.

    A result that an entry knows and does not accept says why in `waiver`. fail_on: with "warn", warnings
    are deviations too.
    """
    entries = {(entry.backend, entry.key): entry for entry in baseline.entries}
    judged = []
    needless = 0
    for result in results:
        case = cases[result.case]
        entry = entries.get((result.backend, case.key)) if result.gated else None
        if entry is not None and result.status in _deviations(fail_on):
            refusal = _refusal(entry, result, case, today)
            update = {"accepted": entry.reason} if refusal is None else {"waiver": refusal}
            judged.append(result.model_copy(update=update))
        else:
            needless += entry is not None and result.status in RAN
            judged.append(result)
    notes = list(_caveats(baseline.environments, environments))
    if needless:
        entries_ = "1 entry" if needless == 1 else f"{needless} entries"
        notes.append(
            f"baseline: {entries_} no longer needed, nothing deviates there (--write-baseline drops them)"
        )
    return judged, notes


def _deviations(fail_on: FailOn) -> tuple[str, ...]:
    return DEVIATIONS if fail_on == "warn" else FAILED


def _refusal(entry: Entry, result: ResultRecord, case: CaseRecord, today: date) -> str | None:
    """Why the entry does not accept the result; None where it does."""
    if entry.expires is not None and today > entry.expires:
        return f"the waiver expired on {entry.expires}: {entry.reason}"
    if entry.input_sha256 != case.input_sha256:
        return "the baseline knows this case with another input"
    if result.status in DIED and result.status != entry.status:
        return f"the baseline knows a {entry.status}, this is a {result.status}"
    if RAN.index(result.status) > RAN.index(entry.status):
        return f"worse than the baseline's {entry.status}"
    if result.status in ("warn", "fail") and not result.quantities and entry.quantities:
        return "the baseline knows deviations, and nothing was returned that could be judged"
    for name, quantity in result.quantities.items():
        if quantity.status == result.status:
            worse = _worse(name, quantity, entry.quantities.get(name))
            if worse is not None:
                return worse
    return None


def _worse(name: str, quantity: Quantity, known: Known | None) -> str | None:
    if known is None or RAN.index(quantity.status) > RAN.index(known.status):
        status = "pass" if known is None else known.status
        return f"{name} is worse than the baseline's {status}"
    if _has_grown(quantity.bound_ratio, known.bound_ratio, above=1):
        before = "nothing" if known.bound_ratio is None else f"{known.bound_ratio:.3g}"
        return f"{name} has {quantity.bound_ratio:.3g} times its bound, the baseline knows {before}"
    # T says little of constants, which have a rule of their own.
    new, old = quantity.constant_error, known.constant_error
    if old is not None and _has_grown(new, old, above=CONSTANT_ABS_ERROR):
        return f"{name} of a constant channel is off by {new:.3g} σ, the baseline knows {old:.3g}"
    return None


def _has_grown(new: float | None, old: float | None, *, above: float) -> bool:
    """Whether a number that matters, being above something, is FACTOR times the old one."""
    if new is None or new <= above:
        return False
    limit = math.nan if old is None else FACTOR * old
    # Also where both are nan or both are infinite, of which there is no multiple.
    return not (new < limit or repr(new) == repr(old))


def write(
    report: Report, path: Path, earlier: Baseline | None, today: date, fail_on: FailOn = "fail"
) -> int:
    """Writes a baseline of all gated deviations of a report, and returns how many these are.

    earlier: the one that was there; its reasons and dates stay, and its entries of what did not run.
    fail_on: with "warn", warnings are deviations too. Raises ReportError.
    """
    made = _made(report, earlier, today, fail_on)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.tmp")
        partial.write_text(HEADER + _yaml(made.model_dump()), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ReportError(f"cannot write the baseline {path}: {error.strerror}") from error
    return len(made.entries)


def _made(report: Report, earlier: Baseline | None, today: date, fail_on: FailOn) -> Baseline:
    cases = {case.id: case for case in report.cases}
    known = {} if earlier is None else {(e.backend, e.key): e for e in earlier.entries}
    deviations = _deviations(fail_on)
    entries: dict[tuple[str, str], Entry] = {}
    ran = set()
    for result in report.results:
        case = cases[result.case]
        place = (result.backend, case.key)
        if result.status in RAN:
            ran.add(place)
        if result.gated and result.status in deviations:
            before = known.get(place)
            entries[place] = Entry.model_validate(
                {
                    "id": case.id,
                    "backend": result.backend,
                    "key": case.key,
                    "input_sha256": case.input_sha256,
                    "status": result.status,
                    "quantities": {
                        name: {
                            "status": quantity.status,
                            "bound_ratio": quantity.bound_ratio,
                            "constant_error": quantity.constant_error,
                        }
                        for name, quantity in result.quantities.items()
                        if quantity.status in deviations
                    },
                    "reason": before.reason if before else f"known since {today}",
                    "expires": before.expires if before else None,
                }
            )
    kept = [entry for place, entry in known.items() if place not in ran]
    machines = {} if earlier is None or not kept else dict(earlier.environments)
    machines.update({e.name: _machine(e) for e in report.environments})
    return Baseline(version=1, environments=machines, entries=[*entries.values(), *kept])


def _machine(environment: Environment) -> Machine:
    return Machine(
        isa=environment.cpu.isa,
        threads=environment.threads,
        devices=[device.name for device in environment.devices],
    )


def _caveats(known: Mapping[str, Machine], environments: Iterable[Environment]) -> Iterator[str]:
    for environment in environments:
        before, now = known.get(environment.name), _machine(environment)
        if before is None:
            continue
        for what, old, new in (
            ("instruction sets", before.isa, now.isa),
            ("threads", before.threads, now.threads),
            ("devices", ", ".join(before.devices), ", ".join(now.devices)),
        ):
            if old != new:
                yield (
                    f"caveat: the baseline was made with {what} {old or 'none'}, "
                    f"this is {new or 'none'}: deviations depend on it"
                )


class _Text(str):
    """Text that is written in quotes, so that no reader takes it for a number or a date."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Text,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"'),
)


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if key.isidentifier() else _Text(key): _quoted(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return _Text(value) if isinstance(value, str) else value


def _yaml(document: dict[str, Any]) -> str:
    return yaml.dump(
        _quoted(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6
    )
