"""A saved result × thresholds → the verdict that today's rules give it, without running anything.

A report keeps all that a verdict depends on. Of one that was written before it did, statuses follow from T, T0
and the counts where these decide, and are its own otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

from bnaudit.deviation import Measurement, Worst
from bnaudit.measure import Facts
from bnaudit.report import CaseRecord, Quantity, ResultRecord, Status, quantity_record
from bnaudit.verdict import NOT_REPEATABLE, RUN_STATUSES, Thresholds, judge


def is_complete(result: ResultRecord, case: CaseRecord) -> bool:
    """Whether the report kept all that the verdict depends on."""
    return case.extreme is not None and all(
        quantity.judged is not None for quantity in result.quantities.values()
    )


def rejudged(
    result: ResultRecord, case: CaseRecord, thresholds: Mapping[str, Thresholds] | None = None
) -> ResultRecord:
    """The result as it is judged today. thresholds: by quantity; those of its case where none are given.

    What died, was not run or broke the contract has no quantities, and stays what it is.
    """
    if not result.quantities:
        return result
    if not is_complete(result, case):
        return _by_numbers(result)
    verdict = judge(
        case.thresholds if thresholds is None else thresholds,
        {name: _measurement(quantity) for name, quantity in result.quantities.items()},
        Facts(
            case.mode,
            math.nan if case.condition_number is None else case.condition_number,
            bool(case.ill_conditioned),
            bool(case.extreme),
        ),
        _not_repeatable(result),
    )
    quantities = {name: quantity_record(judged) for name, judged in verdict.quantities.items()}
    return result.model_copy(
        update={
            "status": verdict.status,
            "label": verdict.label,
            "reason": verdict.reason,
            "cause": verdict.cause,
            "quantities": quantities,
        }
    )


def _measurement(quantity: Quantity) -> Measurement:
    """What the quantity's record was made of."""
    known = {f.name: getattr(quantity, f.name) for f in fields(Measurement)}
    worst = quantity.worst
    if worst is not None:
        known["worst"] = Worst(tuple(worst.index), worst.value, worst.reference)
    return Measurement(**known)


def _not_repeatable(result: ResultRecord) -> str | None:
    return (result.reason or "").partition(NOT_REPEATABLE)[2] or None


def _by_numbers(result: ResultRecord) -> ResultRecord:
    quantities = {
        name: quantity.model_copy(update={"status": _status(quantity)})
        for name, quantity in result.quantities.items()
    }
    statuses = [quantity.status for quantity in quantities.values()]
    if _not_repeatable(result) is not None:
        statuses.append("warn")
    status = max(statuses, key=RUN_STATUSES.index)
    return result.model_copy(update={"quantities": quantities, "status": status})


def _status(quantity: Quantity) -> Status:
    """By the numbers where they decide it; else as it was judged."""
    if quantity.label is None:
        return quantity.status
    if quantity.nonfinite or _exceeds(quantity.bound_ratio):
        return "fail"
    if _exceeds(quantity.tight_ratio):
        return max("warn", quantity.status, key=RUN_STATUSES.index)
    return quantity.status


def _exceeds(ratio: float | None) -> bool:
    return ratio is not None and not ratio <= 1
