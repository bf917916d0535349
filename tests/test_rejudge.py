"""A saved report judged again: the same verdicts, or those of other thresholds; and what older reports lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from click.testing import CliRunner

from bnaudit.cli import cli
from bnaudit.rejudge import is_complete, rejudged
from bnaudit.report import Report, load

SCENARIOS = """
name: hard
input: {distribution: normal, mean: [0, 1e5], std: 1}
shape: [4, 3, 5, 7]
backward: true
thresholds: THRESHOLDS
---
name: constant
input: {distribution: constant, value: [3.3, 100]}
shape: [8, 2, 56, 56]
thresholds: THRESHOLDS
---
name: huge
input: {distribution: normal, mean: 0, std: 1e25}
shape: [4, 3, 5]
thresholds: THRESHOLDS
---
name: running
input: {distribution: normal}
shape: [2, 3]
steps: 2
thresholds: THRESHOLDS
---
name: undefined
input: {distribution: channels, items: [{distribution: constant, value: 1}, {distribution: normal}]}
shape: [4, 4]
eps: 0
thresholds: THRESHOLDS
"""

PLUGIN = """
import numpy as np
calls = 0
def averages_nothing(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *(1,) * (x.ndim - 2))
    mean, var = x.mean(axes), x.var(axes)
    y = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return {"y": y.astype(x.dtype), "batch_mean": mean, "batch_var": var, "running_var": var}
def drifts(x, *others, eps, **options):
    global calls
    calls += 1
    axes = (0, *range(2, x.ndim))
    wide = x.astype(np.float64)
    y = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + eps)
    return {"y": (y * (1 + calls * 1e-7)).astype(x.dtype)}
"""
"""One does not average its running variance; the other's y is another at every call."""


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Reports of the same audit with different thresholds."""
    folder = tmp_path_factory.mktemp("reports")
    plugin = folder / "plugin.py"
    plugin.write_text(PLUGIN)
    reports = {}
    for name, thresholds in {
        "none": "{}",
        "strict": "{y: {max_abs_error: 1e-9}, batch_mean: {tight_ratio: 0.01}, batch_var: {max_ulp_error: 0}}",
        "lenient": "{y: {bound_ratio: null, constant_abs_error: null}, batch_mean: {bound_ratio: null}}",
    }.items():
        scenario, target = folder / "scenarios.yaml", folder / f"{name}.json"
        scenario.write_text(SCENARIOS.replace("THRESHOLDS", thresholds))
        specimens = ["one-pass", "two-pass-sequential", "caffe-2016", "exact"]
        backends = [*specimens, f"{plugin}:averages_nothing", f"{plugin}:drifts"]
        options = [part for backend in backends for part in ("-b", backend)]
        outcome = CliRunner().invoke(
            cli, ["run", str(scenario), *options, "-q", "--json", str(target)]
        )
        assert outcome.exception is None, outcome.output
        reports[name] = load(target)
    return reports


def judged_again(report: Report, thresholds: Mapping[str, Any]) -> list[dict[str, Any]]:
    cases = {case.id: case for case in report.cases}
    assert all(is_complete(result, cases[result.case]) for result in report.results)
    return [
        comparable(rejudged(result, cases[result.case], thresholds)) for result in report.results
    ]


def comparable(result: Any) -> dict[str, Any]:
    """All but how long it took and how findings were numbered."""
    found: dict[str, Any] = result.model_dump(mode="json", exclude={"seconds", "finding"})
    return found


def test_a_report_judged_again_is_what_it_was(audited: dict[str, Report]) -> None:
    report = audited["none"]
    statuses = {result.status for result in report.results}
    causes = {(result.cause or "")[:5] for result in report.results}
    assert {"pass", "warn", "fail"} <= statuses
    assert {"BN002", "BN004", "BN006", "BN008"} <= causes
    cases = {case.id: case for case in report.cases}
    for result in report.results:
        assert comparable(rejudged(result, cases[result.case])) == comparable(result)


@pytest.mark.parametrize(("old", "new"), [("none", "strict"), ("strict", "lenient")])
def test_other_thresholds_give_what_a_run_with_them_gives(
    audited: dict[str, Report], old: str, new: str
) -> None:
    thresholds = audited[new].cases[0].thresholds
    assert judged_again(audited[old], thresholds) == [comparable(r) for r in audited[new].results]
    assert judged_again(audited[old], {}) == [comparable(r) for r in audited["none"].results]


def test_other_thresholds_do_change_something(audited: dict[str, Report]) -> None:
    found = {name: [result.status for result in report.results] for name, report in audited.items()}
    assert found["strict"] != found["none"] != found["lenient"]


def test_what_an_older_report_lacks_is_known_to_be_missing(audited: dict[str, Report]) -> None:
    report = audited["none"]
    result = next(r for r in report.results if r.quantities)
    case = next(c for c in report.cases if c.id == result.case)
    older = {
        name: quantity.model_copy(update={"judged": None})
        for name, quantity in result.quantities.items()
    }
    assert is_complete(result, case)
    assert not is_complete(result.model_copy(update={"quantities": older}), case)
    assert not is_complete(result, case.model_copy(update={"extreme": None}))
