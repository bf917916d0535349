"""Measurements × thresholds → a verdict: status, label, the reason in words, and the cause where one shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

from bnaudit.measure import Measurement, Worst
from bnaudit.reference import Facts

RUN_STATUSES = ("pass", "warn", "fail")
"""From best to worst, for results that were measured."""

DIED = ("timeout", "crash")
"""Statuses of results whose backend took too long, or died or raised where it should not."""

FAILED = ("fail", *DIED)

DEVIATIONS = ("warn", *FAILED)
"""Statuses of results that can be findings."""

RAN = (*RUN_STATUSES, *DIED)
"""Statuses of results whose backend was called, from best to worst; the others say why it was not."""

NOT_REPEATABLE = "not repeatable: "
"""Begins what the reason says of a second call that gave other bits."""

LABELS = ("exact", "stable", "degraded", "broken")
"""From best to worst."""

CONSTANT_ABS_ERROR = 1e-3
"""Harm threshold of a constant channel: a thousandth of a standard deviation."""

Thresholds: TypeAlias = Mapping[str, float | None]
"""Limits of one quantity; None switches one off."""

DEFAULT_THRESHOLDS: Thresholds = {
    "bound_ratio": 1.0,
    "constant_abs_error": CONSTANT_ABS_ERROR,
    "tight_ratio": None,
    "max_abs_error": None,
    "max_ulp_error": None,
}

CAUSES = {
    "BN001": "constant channel",
    "BN002": "cancellation in the variance",
    "BN003": "low-precision accumulation",
    "BN004": "overflow or underflow",
    "BN005": "non-finite output",
    "BN006": "running-statistics semantics",
    "BN007": "memory-format or tail fault",
    "BN008": "not reproducible",
}


@dataclass(frozen=True)
class Judged:
    """One quantity: what was measured, and the verdict on it."""

    status: str
    label: str | None
    reason: str | None
    max_abs_error: float | None
    max_sigma_error: float | None
    max_ulp_error: float | None
    bound_ratio: float | None
    tight_ratio: float | None
    floor: float | None
    nonfinite: int
    worst: Worst | None
    constant_misses: int | None = None
    constant_error: float | None = None
    poor: int | None = None
    judged: bool | None = None
    unjudged: int | None = None
    rounded: bool | None = None
    histogram: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on all quantities of one result; cause is such as "BN003 low-precision accumulation"."""

    status: str
    label: str | None
    reason: str | None
    cause: str | None
    quantities: dict[str, Judged]


def judge(
    thresholds: Mapping[str, Thresholds],
    measurements: Mapping[str, Measurement],
    facts: Facts,
    not_repeatable: str | None = None,
) -> Verdict:
    """Judges every measured quantity; the result is as bad as its worst quantity.

    thresholds: the scenario's own, by quantity. not_repeatable: where a second call gave other bits, in
    words; such a result is a warn at least.
    """
    judged = {
        name: _judge_quantity(measurement, thresholds.get(name, {}), facts, name)
        for name, measurement in measurements.items()
    }
    worst = max(judged.values(), key=lambda q: RUN_STATUSES.index(q.status), default=None)
    if worst is None:
        return Verdict(
            "fail", None, "contract: nothing was returned that could be judged", None, {}
        )
    name = next(name for name, quantity in judged.items() if quantity is worst)
    label = judged["y"].label if "y" in judged else worst.label
    if worst.label is not None and (
        label is None or LABELS.index(worst.label) > LABELS.index("stable")
    ):
        label = max(label or worst.label, worst.label, key=LABELS.index)
    reason = None if worst.reason is None else f"{name}: {worst.reason}"
    cause = _cause(measurements, judged, facts) if worst.status == "fail" else None
    status = worst.status
    if not_repeatable is not None:
        status = max(status, "warn", key=RUN_STATUSES.index)
        reason = "; ".join(filter(None, (reason, f"{NOT_REPEATABLE}{not_repeatable}")))
        cause = cause or f"BN008 {CAUSES['BN008']}"
    return Verdict(status, label, reason, cause, judged)


def _judge_quantity(m: Measurement, overrides: Thresholds, facts: Facts, name: str) -> Judged:
    thresholds = {**DEFAULT_THRESHOLDS, **overrides}
    failures, warnings = [], []
    unjudged = "not judged: variance + eps is not positive and finite, so nothing is defined"
    if not m.judged:
        return _judged(m, "pass", None, unjudged)
    if m.nonfinite:
        finite = m.worst is not None and math.isfinite(m.worst.value)
        count = f"{m.nonfinite} element{'s are' if m.nonfinite > 1 else ' is'}"
        failures.append(
            f"{count} finite where the right value is not" if finite else f"{count} not finite"
        )
    for key, text in (
        ("bound_ratio", "deviates {value:.3g} times as much as a stable algorithm may"),
        ("max_abs_error", "max_abs_error {value:.3g} exceeds the scenario's {limit:g}"),
        ("max_ulp_error", "max_ulp_error {value:.3g} exceeds the scenario's {limit:g}"),
        ("tight_ratio", "tight_ratio {value:.3g} exceeds the scenario's {limit:g}"),
    ):
        value, limit = getattr(m, key), thresholds[key]
        if value is not None and limit is not None and not value <= limit and not m.nonfinite:
            failures.append(text.format(value=value, limit=limit))
    harmful = False
    if m.constant_misses:
        error = math.inf if m.constant_error is None else m.constant_error
        limit = thresholds["constant_abs_error"]
        harmful = not error <= CONSTANT_ABS_ERROR
        text = f"must equal the bias and is off by {error:.3g} σ"
        if limit is not None and not error <= limit:
            failures.append(text)
        else:
            warnings.append(text)
    if m.tight_ratio is not None and not m.tight_ratio <= 1:
        warnings.append(f"{m.tight_ratio:.3g} times what the best algorithms lose")
    label = _label(m, harmful)
    status = "fail" if failures else "warn" if warnings else "pass"
    reasons = failures or warnings
    if reasons and name == "y" and facts.ill_conditioned:
        reasons.append("the input is ill-conditioned")
    if failures and label in ("exact", "stable"):
        reasons.append(f"only the scenario's own threshold fails it: by the bounds it is {label}")
    if m.unjudged:
        reasons = [*reasons, f"in {m.unjudged} channel{'s' * (m.unjudged > 1)} {unjudged}"]
    return _judged(m, status, label, "; ".join(reasons) or None)


def _judged(m: Measurement, status: str, label: str | None, reason: str | None) -> Judged:
    shared = {f.name for f in fields(Judged)} & {f.name for f in fields(Measurement)}
    return Judged(status, label, reason, **{name: getattr(m, name) for name in shared})


def _label(m: Measurement, harmful: bool) -> str:
    if m.nonfinite or m.poor:
        return "broken"
    if (m.bound_ratio is not None and not m.bound_ratio <= 1) or harmful:
        return "degraded"
    if m.constant_misses or m.tight_ratio is None or not m.tight_ratio <= 1:
        return "stable"
    return "exact"


def _cause(
    measurements: Mapping[str, Measurement], judged: Mapping[str, Judged], facts: Facts
) -> str | None:
    """The fault that the pattern of failing quantities points at; None where it points at none."""
    failed = {name for name, quantity in judged.items() if quantity.status == "fail"}
    y = measurements.get("y")
    # Where y is wrong, running statistics stand for batch statistics that are not handed out.
    mean = "batch_mean" if "batch_mean" in judged else "running_mean"
    variances = {"batch_var", "invstd"} & judged.keys() or {"running_var"}
    sound = mean in judged.keys() - failed and not variances & failed
    code = None
    if failed <= {"running_mean", "running_var"}:
        has_batch = {"batch_mean", "batch_var"} & judged.keys()
        code = "BN006" if has_batch else None
    elif failed & {"y", *variances} and mean not in failed and facts.extreme:
        code = "BN004"
    elif mean in failed:
        code = "BN003" if measurements[mean].rounded else None
    elif failed & variances:
        code = "BN002" if facts.condition_number > 10 else None
    elif "y" in failed and y is not None:
        if y.nonfinite:
            code = "BN005"
        elif y.constant_misses and (sound or facts.mode == "inference"):
            code = "BN001"
    if code is None and y is not None and y.nonfinite:
        code = "BN005"
    return None if code is None else f"{code} {CAUSES[code]}"
