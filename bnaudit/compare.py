"""Report × Report → Changes: what a new version does worse, better or otherwise than the old one.

Cases are paired by key, the digest of their parameters, and only where the inputs have the same digest;
backends by name. Two results are as different as the worst of their quantities. What a report keeps of a
quantity is its largest errors and its worst element: where all of these are equal, the bits are taken to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from bnaudit import __version__
from bnaudit.findings import comparable
from bnaudit.rejudge import is_complete, rejudged
from bnaudit.report import (
    CaseRecord,
    Environment,
    ForeignText,
    Number,
    Quantity,
    Report,
    ResultRecord,
    Status,
)
from bnaudit.verdict import NOT_REPEATABLE, RAN

SCHEMA_VERSION = 1

FACTOR = 4.0
"""Growth of T from which on a deviation that matters is a regression, unless said otherwise."""

SOUND = ("pass", "warn")

RUNNING = ("running_mean", "running_var")

STATISTICS = ("batch_mean", "batch_var", "invstd", *RUNNING)

Kind = Literal[
    "newly failing",
    "regressed",
    "semantics changed",
    "newly unavailable",
    "newly unsupported",
    "newly running",
    "newly passing",
    "improved",
    "changed within bounds",
]
"""From the worst to the least.

semantics changed: the batch statistics are as good as before, and a running one follows another rule.
newly running: unsupported or unavailable in OLD. changed within bounds: other numbers, and neither a
status nor T tells them apart.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

FailOn = Literal["regression", "change", "never"]


class ComparisonError(Exception):
    """The comparison that was asked for makes no sense; the message says why in one sentence."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Caveat(_Record):
    """Something beside the backends that differs between the reports."""

    what: ForeignText
    old: ForeignText | None
    new: ForeignText | None


class QuantityChange(_Record):
    """A quantity of which the reports have other numbers, with the status that today's rules give it."""

    name: str
    kind: Kind
    regression: bool
    old: Quantity
    new: Quantity


class Change(_Record):
    """A case on a backend whose result is not the same in both reports.

    case, backend and environment are NEW's names. regression: whether it fails the comparison where gated.
    quantities: those that changed, worst first; none where one of the results has no numbers.
    same: quantities whose numbers are equal. statistics_identical: no statistic changed, so that what
    follows from them did.
    """

    scenario: str
    case: str
    old_case: str
    backend: ForeignText
    old_backend: ForeignText
    environment: str
    old_environment: str
    gated: bool
    kind: Kind
    regression: bool
    old_status: Status
    new_status: Status
    reason: ForeignText | None
    cause: str | None
    old_kernel: ForeignText | None
    new_kernel: ForeignText | None
    quantities: list[QuantityChange]
    same: list[str]
    statistics_identical: bool


class CheckChange(_Record):
    """A check of consistency, or a scenario's control, that held in one report and not in the other.

    case: NEW's name, or the control's scenario. check: that of consistency, or "must fail", "must pass".
    reason: what was seen in the report in which it does not hold. regression: whether that is NEW.
    """

    case: str
    backend: ForeignText
    check: str
    regression: bool
    reason: ForeignText | None


class CaseError(_Record):
    """A case whose results cannot be compared, because the inputs were not the same."""

    case: str
    old_sha256: str
    new_sha256: str


class Side(_Record):
    """One of the two reports. only_*: what the other one does not have."""

    started: str
    command: ForeignText
    bnaudit_version: str
    verdict: str
    only_cases: list[str]
    only_backends: list[ForeignText]


class Comparison(_Record):
    """What changed from one bnaudit report to another.

    notes: sentences on what the comparison cannot tell. compared: pairs of results of which at least one
    ran; unchanged: those of them that are no change. changes: the worst first. checks: those that hold in
    one report only.
    """

    model_config = ConfigDict(frozen=True, title="bnaudit comparison, version 1")

    schema_version: Literal[1]
    bnaudit_version: str
    factor: Number
    fail_on: FailOn
    old: Side
    new: Side
    caveats: list[Caveat]
    notes: list[ForeignText]
    errors: list[CaseError]
    compared: int
    unchanged: int
    counts: dict[Kind, int]
    changes: list[Change]
    checks: list[CheckChange]
    verdict: Literal["same", "changed", "regression", "incomplete", "nothing-in-common"]
    exit_code: Literal[0, 1, 3, 5]


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a comparison."""
    schema = Comparison.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def compare(
    old: Report,
    new: Report,
    *,
    factor: float = FACTOR,
    renamed: Mapping[str, str] | None = None,
    fail_on: FailOn = "regression",
) -> Comparison:
    """What changed from old to new, the worst first.

    A regression is a worse status, a result that was sound and is missing, or T at least `factor` times
    the old one where the new T0 (T where there is no T0) is above 1; a deviation of y that is not above
    its floor is none. Only gated backends decide on the exit code: 1 where one regressed (fail_on
    "change": where anything of one changed; "never": not at all) or where a check or a control no longer
    holds, 3 where inputs of a case differ, 5 where
    no gated result has a counterpart.
    renamed: names of NEW's backends by those of OLD's, where they differ. Raises ComparisonError.
    """
    pairing = _Pairing(old, new, _resolve(old, new, renamed or {}))
    changes = []
    for before, after in pairing.rejudged():
        change = _change(before, after, pairing.scenarios[after.case], factor)
        if change is not None:
            changes.append(change)
    changes.sort(key=_severity)
    checks = [*_check_changes(old, new, pairing), *_control_changes(old, new)]
    checks.sort(key=lambda check: not check.regression)
    counts = Counter(change.kind for change in changes)
    gated = bool(checks) or any(change.gated for change in changes)
    gates = any(r.gated for r in (*old.results, *new.results))
    verdict = _verdict(pairing, changes, checks, gates=gates)
    fails = (verdict == "regression" and fail_on != "never") or (gated and fail_on == "change")
    code = 1 if fails else {"incomplete": 3, "nothing-in-common": 5}.get(verdict, 0)
    return Comparison.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "bnaudit_version": __version__,
            "factor": factor,
            "fail_on": fail_on,
            "old": pairing.side(old, pairing.only_old, pairing.backends_only_old),
            "new": pairing.side(new, pairing.only_new, pairing.backends_only_new),
            "caveats": list(_caveats(old, new, pairing)),
            "notes": list(_notes(old, new, pairing)),
            "errors": pairing.errors,
            "compared": len(pairing.results),
            "unchanged": len(pairing.results) - len(changes),
            "counts": {kind: counts[kind] for kind in KINDS},
            "changes": changes,
            "checks": checks,
            "verdict": verdict,
            "exit_code": code,
        }
    )


def _verdict(
    pairing: _Pairing, changes: Sequence[Change], checks: Sequence[CheckChange], *, gates: bool
) -> str:
    """gates: whether a backend of either report is gated; then specimens alone are nothing in common."""
    if any(change.regression and change.gated for change in changes):
        return "regression"
    if any(check.regression for check in checks):
        return "regression"
    if pairing.errors:
        return "incomplete"
    if not any(
        old.status in RAN and new.status in RAN and (old.gated or new.gated or not gates)
        for old, new in pairing.results
    ):
        return "nothing-in-common"
    return "changed" if changes or checks else "same"


# --- pairs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """A backend in an environment."""

    backend: str
    environment: str


@dataclass
class _Pairing:
    """Which results of the reports belong together, and what has no counterpart."""

    old: Report
    new: Report
    renamed: Mapping[str, str]
    results: list[tuple[ResultRecord, ResultRecord]] = field(default_factory=list)
    errors: list[CaseError] = field(default_factory=list)
    unpaired: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Pairs cases, then backends, then the results of both."""
        self.scenarios = {case.id: case.scenario for case in self.new.cases}
        self.partly_rejudged = {"OLD": 0, "NEW": 0}
        self.cases = _pair_cases(self.old.cases, self.new.cases)
        self.only_old = _missing(self.old.cases, [before for before, _ in self.cases])
        self.only_new = _missing(self.new.cases, [after for _, after in self.cases])
        olds, news = _slots(self.old), _slots(self.new)
        self.slots = list(_pair_slots(olds, news, self.renamed))
        self.backends_only_old = _alone(olds, {before for before, _ in self.slots})
        self.backends_only_new = _alone(news, {after for _, after in self.slots})
        self._pair_results()

    def rejudged(self) -> Iterator[tuple[ResultRecord, ResultRecord]]:
        """The pairs of results, both by today's rules and NEW's thresholds."""
        olds = {case.id: case for case in self.old.cases}
        news = {case.id: case for case in self.new.cases}
        for before, after in self.results:
            old, new = olds[before.case], news[after.case]
            self.partly_rejudged["OLD"] += not is_complete(before, old)
            self.partly_rejudged["NEW"] += not is_complete(after, new)
            yield rejudged(before, old, new.thresholds), rejudged(after, new)

    def _pair_results(self) -> None:
        befores = {(r.case, _Slot(r.backend, r.environment)): r for r in self.old.results}
        afters = {(r.case, _Slot(r.backend, r.environment)): r for r in self.new.results}
        for old_case, new_case in self.cases:
            if _digests_differ(old_case, new_case):
                self.errors.append(
                    CaseError(
                        case=new_case.id,
                        old_sha256=old_case.input_sha256 or "",
                        new_sha256=new_case.input_sha256 or "",
                    )
                )
                continue
            for old_slot, new_slot in self.slots:
                before = befores.get((old_case.id, old_slot))
                after = afters.get((new_case.id, new_slot))
                if before is None or after is None:
                    self.unpaired["OLD"] += before is not None
                    self.unpaired["NEW"] += after is not None
                elif before.status in RAN or after.status in RAN:
                    self.results.append((before, after))

    @staticmethod
    def side(report: Report, cases: list[str], backends: list[str]) -> Side:
        """What the comparison says of one report."""
        return Side(
            started=report.started,
            command=report.command,
            bnaudit_version=report.bnaudit_version,
            verdict=report.verdict,
            only_cases=cases,
            only_backends=backends,
        )


def _pair_cases(
    olds: Sequence[CaseRecord], news: Sequence[CaseRecord]
) -> list[tuple[CaseRecord, CaseRecord]]:
    """Cases of equal keys, in NEW's order; of several with one key, those of the same id first."""
    left: dict[str, dict[str, CaseRecord]] = {}
    for case in olds:
        left.setdefault(case.key, {})[case.id] = case
    pairs: dict[str, CaseRecord] = {}
    for case in news:
        same = left.get(case.key, {}).pop(case.id, None)
        if same is not None:
            pairs[case.id] = same
    for case in news:
        rest = left.get(case.key)
        if case.id not in pairs and rest:
            pairs[case.id] = rest.pop(next(iter(rest)))
    return [(pairs[case.id], case) for case in news if case.id in pairs]


def _missing(cases: Sequence[CaseRecord], paired: Sequence[CaseRecord]) -> list[str]:
    ids = {case.id for case in paired}
    return [case.id for case in cases if case.id not in ids]


def _digests_differ(old: CaseRecord, new: CaseRecord) -> bool:
    """Whether the inputs are known to differ; those that were not made are in no result."""
    known = old.input_sha256 is not None and new.input_sha256 is not None
    return known and old.input_sha256 != new.input_sha256


def _slots(report: Report) -> list[_Slot]:
    return list(dict.fromkeys(_Slot(r.backend, r.environment) for r in report.results))


def _pair_slots(
    olds: Sequence[_Slot], news: Sequence[_Slot], renamed: Mapping[str, str]
) -> Iterator[tuple[_Slot, _Slot]]:
    """Backends of one name; environments of one name too, where a backend ran in several."""
    taken = set(renamed.values())
    for old in olds:
        default = None if old.backend in taken else old.backend
        name = renamed.get(old.backend, default)
        candidates = [slot for slot in news if slot.backend == name]
        several = len(candidates) > 1 or sum(slot.backend == old.backend for slot in olds) > 1
        for new in candidates:
            if not several or new.environment == old.environment:
                yield old, new


def _alone(slots: Sequence[_Slot], paired: Set[_Slot]) -> list[str]:
    """Backends without a counterpart; with the environment where another one of theirs has one."""
    known = {slot.backend for slot in paired}
    return [
        f"{slot.backend} in {slot.environment}" if slot.backend in known else slot.backend
        for slot in slots
        if slot not in paired
    ]


def _resolve(old: Report, new: Report, renamed: Mapping[str, str]) -> dict[str, str]:
    """The full names of backends that were given with or without their device."""
    return {
        _named(given, "OLD", old): _named(target, "NEW", new) for given, target in renamed.items()
    }


def _named(given: str, side: str, report: Report) -> str:
    """The backend of this name; without a device, that on the cpu if there is one."""
    names = list(dict.fromkeys(result.backend for result in report.results))
    for name in (given, f"{given}@cpu", f"{given}@cuda"):
        if name in names:
            return name
    raise ComparisonError(f"{side} has no backend {given!r}; it has {', '.join(names) or 'none'}")


# --- changes ---------------------------------------------------------------------------------------


def _change(old: ResultRecord, new: ResultRecord, scenario: str, factor: float) -> Change | None:
    """The change from one result to the other; None where there is none."""
    shared = [name for name in old.quantities if name in new.quantities]
    quantities = [
        _quantity_change(name, old.quantities[name], new.quantities[name], factor)
        for name in shared
        if _numbers(old.quantities[name]) != _numbers(new.quantities[name])
    ]
    quantities.sort(key=_quantity_severity)
    names = [quantity.name for quantity in quantities]
    same = [name for name in shared if name not in names]
    kind, regression = _kind(old, new, quantities, same)
    if kind is None:
        return None
    return Change(
        scenario=scenario,
        case=new.case,
        old_case=old.case,
        backend=new.backend,
        old_backend=old.backend,
        environment=new.environment,
        old_environment=old.environment,
        gated=old.gated or new.gated,
        kind=kind,
        regression=regression,
        old_status=old.status,
        new_status=new.status,
        reason=new.reason,
        cause=new.cause,
        old_kernel=old.kernel,
        new_kernel=new.kernel,
        quantities=quantities,
        same=same,
        statistics_identical=any(name in STATISTICS for name in same)
        and not any(name in STATISTICS for name in names),
    )


def _kind(
    old: ResultRecord,
    new: ResultRecord,
    quantities: Sequence[QuantityChange],
    same: Sequence[str],
) -> tuple[Kind | None, bool]:
    """What kind of change two results are, and whether it is a regression."""
    if new.status not in RAN:
        kind: Kind = "newly unavailable" if new.status == "unavailable" else "newly unsupported"
        return kind, old.status in SOUND
    if old.status not in RAN:
        return "newly running", False
    if not (old.quantities and new.quantities):
        return _kind_of_statuses(old.status, new.status)
    regression = any(quantity.regression for quantity in quantities)
    if _repeatable(old) and not _repeatable(new) and not regression:
        return "regressed", True
    if _semantics_changed(old, new, quantities, same):
        return "semantics changed", regression
    if not quantities:
        return ("improved" if _repeatable(new) and not _repeatable(old) else None), False
    worst = quantities[0].kind
    if worst == "newly failing" and old.status not in SOUND:
        worst = "regressed"  # in one quantity more
    elif worst == "newly passing" and new.status not in SOUND:
        worst = "improved"
    return worst, regression


def _kind_of_statuses(old: str, new: str) -> tuple[Kind | None, bool]:
    """The same of results without numbers: they died, or broke the contract."""
    if old == new:
        return None, False
    if RAN.index(new) > RAN.index(old):
        return ("newly failing" if old in SOUND else "regressed"), True
    return ("newly passing" if new in SOUND else "improved"), False


def _quantity_change(name: str, old: Quantity, new: Quantity, factor: float) -> QuantityChange:
    kind: Kind
    regression = _is_worse(old, new, factor)
    if regression:
        kind = "newly failing" if new.status == "fail" and old.status in SOUND else "regressed"
    elif _is_worse(new, old, factor):
        kind = "newly passing" if old.status == "fail" and new.status in SOUND else "improved"
    else:
        kind = "changed within bounds"
    return QuantityChange(name=name, kind=kind, regression=regression, old=old, new=new)


def _is_worse(old: Quantity, new: Quantity, factor: float) -> bool:
    """Whether a quantity's new numbers are a regression from its old ones."""
    if not new.nonfinite and new.floor is not None and comparable(new.max_abs_error) <= new.floor:
        return False
    if RAN.index(new.status) > RAN.index(old.status):
        # Otherwise only the scenario's thresholds became stricter.
        return any(after > before for before, after in zip(_errors(old), _errors(new), strict=True))
    matters = new.bound_ratio if new.tight_ratio is None else new.tight_ratio
    before, after = comparable(old.bound_ratio), comparable(new.bound_ratio)
    return after > before and after >= factor * before and comparable(matters) > 1


def _errors(quantity: Quantity) -> tuple[float, ...]:
    return (
        quantity.nonfinite,
        comparable(quantity.bound_ratio),
        comparable(quantity.tight_ratio),
        comparable(quantity.max_abs_error),
        comparable(quantity.max_ulp_error),
    )


def _numbers(quantity: Quantity) -> str:
    """All that decides about it, in which a NaN equals itself."""
    return quantity.model_dump_json(exclude={"status", "label", "reason", "histogram"})


def _repeatable(result: ResultRecord) -> bool:
    return NOT_REPEATABLE not in (result.reason or "")


def _semantics_changed(
    old: ResultRecord,
    new: ResultRecord,
    quantities: Sequence[QuantityChange],
    same: Sequence[str],
) -> bool:
    """Whether a running statistic follows another rule, or declares one, and nothing else is behind it."""
    if old.declarations and new.declarations and old.declarations != new.declarations:
        return any(name in RUNNING for name in (*same, *(q.name for q in quantities)))
    if any(q.name in RUNNING and _right_value_moved(q) for q in quantities):
        return True
    moved = {q.name for q in quantities if (q.old.status in SOUND) != (q.new.status in SOUND)}
    if not moved or not moved <= {*RUNNING}:
        return False
    if any(q.regression for q in quantities if q.name not in RUNNING):
        return False
    known = any((result.cause or "").startswith("BN006") for result in (old, new))
    return known or "y" in same


def _right_value_moved(quantity: QuantityChange) -> bool:
    """Whether one element has another right value: of the same input, only a declaration does that."""
    old, new = quantity.old.worst, quantity.new.worst
    if old is None or new is None:
        return False
    return old.index == new.index and old.reference_hex != new.reference_hex


def _severity(change: Change) -> tuple[bool, int, float]:
    worst = max((comparable(q.new.bound_ratio) for q in change.quantities), default=0.0)
    return not change.gated, KINDS.index(change.kind), -worst


def _quantity_severity(quantity: QuantityChange) -> tuple[int, bool, float]:
    return KINDS.index(quantity.kind), quantity.name != "y", -comparable(quantity.new.bound_ratio)


# --- checks and controls ---------------------------------------------------------------------------


def _check_changes(old: Report, new: Report, pairing: _Pairing) -> Iterator[CheckChange]:
    """Checks of consistency that were made in both reports, of the same input, with another outcome."""
    before = {(c.case, c.backend, c.check): c for c in old.consistency}
    cases = {after.id: before.id for before, after in pairing.cases}
    differing = {error.case for error in pairing.errors}
    backends = {after.backend: before.backend for before, after in pairing.slots}
    for now in new.consistency:
        if now.case not in cases or now.case in differing or now.backend not in backends:
            continue
        then = before.get((cases[now.case], backends[now.backend], now.check))
        if then is None or None in (then.ok, now.ok) or then.ok == now.ok:
            continue
        reason = now.reason if then.ok else then.reason
        yield CheckChange(
            case=now.case,
            backend=now.backend,
            check=now.check,
            regression=bool(then.ok),
            reason=reason,
        )


def _control_changes(old: Report, new: Report) -> Iterator[CheckChange]:
    before = {(c.scenario, c.backend, c.expected): c for c in old.controls}
    for now in new.controls:
        then = before.get((now.scenario, now.backend, now.expected))
        if then is None or then.ok == now.ok:
            continue
        yield CheckChange(
            case=now.scenario,
            backend=now.backend,
            check=f"must {now.expected}",
            regression=then.ok,
            reason=(now if then.ok else then).observed,
        )


# --- caveats ---------------------------------------------------------------------------------------


def _caveats(old: Report, new: Report, pairing: _Pairing) -> Iterator[Caveat]:
    """What else differs, each difference once."""
    olds = {environment.name: environment for environment in old.environments}
    news = {environment.name: environment for environment in new.environments}
    found = [Caveat(what="bnaudit", old=old.bnaudit_version, new=new.bnaudit_version)]
    for names in dict.fromkeys((a.environment, b.environment) for a, b in pairing.slots):
        if names[0] in olds and names[1] in news:
            before, after = _traits(olds[names[0]]), _traits(news[names[1]])
            found += [
                Caveat(what=what, old=before.get(what), new=after.get(what))
                for what in {**before, **after}
            ]
    seen = set()
    for caveat in found:
        text = caveat.model_dump_json()
        if caveat.old != caveat.new and text not in seen:
            seen.add(text)
            yield caveat


def _traits(environment: Environment) -> dict[str, str | None]:
    """What results may depend on."""
    devices = [
        " ".join(
            [
                device.name,
                *(
                    f"{what} {version}"
                    for what in ("driver", "cuda", "cudnn")
                    if (version := getattr(device, what)) is not None
                ),
            ]
        )
        for device in environment.devices
    ]
    return {
        "instruction sets": environment.cpu.isa,
        "processor": environment.cpu.model,
        "threads": str(environment.threads),
        "GPU": ", ".join(devices) or None,
        **{f"flag {name}": str(value) for name, value in environment.flags.items()},
        "BLAS": environment.blas,
        "platform": environment.platform,
        "Python": environment.python,
        **environment.packages,
    }


def _notes(old: Report, new: Report, pairing: _Pairing) -> Iterator[str]:
    for side, report in (("OLD", old), ("NEW", new)):
        if report.verdict in ("interrupted", "untrusted"):
            yield f"{side} is from an {report.verdict} run"
        if report.bnaudit_version != __version__ and pairing.partly_rejudged[side]:
            yield (
                f"{side} was judged by bnaudit {report.bnaudit_version}: statuses are today's where T, T0 and "
                "counts decide them, and its own for constants and for thresholds of a scenario"
            )
        if pairing.unpaired[side]:
            yield f"without a counterpart in the other report: {pairing.unpaired[side]} of {side}'s results"
    stricter = sum(_only_thresholds_differ(a, b) for a, b in pairing.results)
    if stricter and any(pairing.partly_rejudged.values()):
        yield f"in {stricter} results only the scenario's thresholds differ, which is no change of a backend"
    for backend, names in _lost(pairing).items():
        parts = ", ".join(f"{name} ({n} case{'s' * (n > 1)})" for name, n in names.items())
        yield f"{backend} no longer returns {parts}"


def _only_thresholds_differ(old: ResultRecord, new: ResultRecord) -> bool:
    """Whether statuses differ although no number does."""
    return any(
        quantity.status != old.quantities[name].status
        and _numbers(quantity) == _numbers(old.quantities[name])
        for name, quantity in new.quantities.items()
        if name in old.quantities
    )


def _lost(pairing: _Pairing) -> dict[str, Counter[str]]:
    """Quantities that OLD's results have and NEW's do not, by NEW's backend."""
    lost: dict[str, Counter[str]] = {}
    for old, new in pairing.results:
        names = old.quantities.keys() - new.quantities.keys() if new.quantities else ()
        for name in sorted(names):
            lost.setdefault(new.backend, Counter())[name] += 1
    return lost
