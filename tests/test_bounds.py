"""What the bounds forgive and what they do not: each test fails if its bound is loosened."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from correct import outputs, prepare

from bnaudit import bounds
from bnaudit.bounds import FORMATS
from bnaudit.measure import Measurement
from bnaudit.reference import Declarations, Reference
from bnaudit.verdict import Verdict, judge

HARD = "input: {distribution: normal, mean: 1.0e+6}\nshape: [8, 2, 64, 64]\nbackward: true\n"
"""Ill-conditioned: the first-order bound of float32 sums exceeds a whole standard deviation here."""

EASY = "input: {distribution: normal}\nshape: [4, 2, 8, 8]\n"


def judged(folder: Path, text: str, **moved: float) -> tuple[Verdict, dict[str, Measurement]]:
    """The verdict on the right outputs, those named moved by a distance."""
    case, inputs = prepare(folder, text)
    given = outputs(case, inputs)
    for name, distance in moved.items():
        given[name] = given[name].astype(np.float64) + distance
    reference = Reference(case, inputs)
    measured = reference.measure(given, Declarations())
    return judge(case.thresholds, measured, reference.facts), measured


@pytest.mark.parametrize("dtype", FORMATS)
def test_formats_are_those_of_numpy(dtype: str) -> None:
    form = FORMATS[dtype]
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        info = ml_dtypes.finfo(ml_dtypes.bfloat16)
    else:
        info = np.finfo(dtype)
    assert form.unit_roundoff == float(info.eps) / 2
    assert form.smallest == float(info.smallest_subnormal)
    assert form.largest == float(info.max)


def test_nothing_beyond_a_few_percent_of_a_standard_deviation_is_forgiven(tmp_path: Path) -> None:
    assert judged(tmp_path, HARD)[0].status == "pass"
    case, inputs = prepare(tmp_path, HARD)
    reference = Reference(case, inputs)
    assert reference.facts.ill_conditioned
    rounded_mean = 8 * 2.0**-24 * 1e6  # the tight bound: here larger than the cap
    verdict, measured = judged(tmp_path, HARD, y=1.2 * rounded_mean)
    assert verdict.quantities["y"].status == "fail"
    assert measured["y"].bound_ratio == pytest.approx(1.2, abs=0.1)
    hundred = HARD.replace("1.0e+6", "1.0e+4")
    assert judged(tmp_path, hundred, y=0.045)[0].quantities["y"].status == "fail"


@pytest.mark.parametrize(("name", "distance"), [("batch_mean", 0.1), ("batch_var", 0.2)])
def test_the_statistics_of_hard_input_are_capped_as_well(
    tmp_path: Path, name: str, distance: float
) -> None:
    text = HARD.replace("1.0e+6", "1.0e+5")
    verdict, _ = judged(tmp_path, text, **{name: distance})
    assert verdict.quantities[name].status == "fail"


@pytest.mark.parametrize("mean", ["0", "1.0e+4", "1.0e+5"])
def test_a_gradient_of_zero_is_never_right_enough(tmp_path: Path, mean: str) -> None:
    case, inputs = prepare(tmp_path, HARD.replace("1.0e+6", mean))
    given = outputs(case, inputs)
    reference = Reference(case, inputs)
    given["grad_input"] = np.zeros_like(given["grad_input"])
    verdict = judge(case.thresholds, reference.measure(given, Declarations()), reference.facts)
    assert verdict.quantities["grad_input"].status == "fail"


def test_what_the_best_algorithms_do_not_lose_is_a_warning(tmp_path: Path) -> None:
    # Of 2^17 elements a sum may lose more than one of 2^8; the tight bound knows no n.
    text = EASY.replace("[4, 2, 8, 8]", "[32, 2, 64, 64]")
    verdict, measured = judged(tmp_path, text, y=20 * 2.0**-24)
    y = measured["y"]
    assert y.tight_ratio is not None
    assert y.bound_ratio is not None
    assert y.tight_ratio > 1 > y.bound_ratio
    assert (verdict.quantities["y"].status, verdict.quantities["y"].label) == ("warn", "stable")


def test_the_floor_is_the_rounding_of_the_mean(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, HARD)
    x = inputs.x[0].astype(np.longdouble)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    right = abs(mean.astype(np.float32) - mean) / np.sqrt(std**2 + 1e-5)
    floor = bounds.floor(Reference(case, inputs).norm, "float32")
    np.testing.assert_allclose(floor, right.astype(np.float64), rtol=1e-4)


def test_few_good_bits_are_broken_and_many_are_degraded(tmp_path: Path) -> None:
    far, near = judged(tmp_path, EASY, y=0.02)[0], judged(tmp_path, EASY, y=1e-4)[0]
    assert far.quantities["y"].label == "broken"
    assert near.quantities["y"].label == "degraded"
    assert near.quantities["y"].status == "fail"


def test_a_sum_has_four_levels_and_one_for_every_doubling() -> None:
    assert [bounds.summation_levels(n) for n in (0, 1, 2, 1024)] == [4, 4, 5, 14]


def test_running_statistics_add_up_their_batches_bounds() -> None:
    zero = np.zeros(1)
    batches = [(np.ones(1), np.full(1, 1e-3))] * 2
    u, eta = 2.0**-24, 2.0**-149
    one = 0.5 * 1e-3 + 4 * u * 1 + eta
    two = 0.5 * one + 0.5 * 1e-3 + 4 * u * 1.5 + eta
    found = bounds.running_allowance(zero, batches, [0.5, 0.5], 1.0, "float32").allowed
    assert found[0] == pytest.approx(2 * two, rel=1e-12)


def test_a_momentum_of_zero_allows_no_change() -> None:
    batches = [(np.full(1, 1e9), np.full(1, 1.0))]
    found = bounds.running_allowance(np.zeros(1), batches, [0.0], 1.0, "float32").allowed
    assert found[0] == 0


@pytest.mark.parametrize("std", ["1e-25", "1.0e+25"])
def test_squares_out_of_range_are_the_named_cause(tmp_path: Path, std: str) -> None:
    text = EASY.replace("normal}", f"normal, std: {std}}}") + "eps: 0\n"
    assert judged(tmp_path, text)[0].quantities["y"].status == "pass"
    verdict, _ = judged(tmp_path, text, y=1.0)
    assert verdict.cause == "BN004 overflow or underflow"


def test_causes_need_a_pattern(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, EASY.replace("normal}", "normal, mean: 5}"))
    reference = Reference(case, inputs)
    right = outputs(case, inputs)

    def cause(**changed: npt.ArrayLike) -> str | None:
        given = {**right, **{name: np.asarray(values) for name, values in changed.items()}}
        measured = reference.measure(given, Declarations())
        return judge(case.thresholds, measured, reference.facts).cause

    nan = {name: np.full_like(right[name], math.nan) for name in ("y", "batch_mean", "batch_var")}
    assert cause(**nan) == "BN005 non-finite output"
    assert cause(batch_mean=-right["batch_mean"]) is None
    assert cause(batch_mean=right["batch_mean"] * np.float32(1.001)) == (
        "BN003 low-precision accumulation"
    )
    assert cause(y=right["y"] + np.float32(1)) is None


def test_running_statistics_stand_for_batch_statistics_that_are_not_handed_out(
    tmp_path: Path,
) -> None:
    case, inputs = prepare(tmp_path, EASY.replace("normal}", "normal, mean: 50}"))
    reference = Reference(case, inputs)
    names = ("y", "running_mean", "running_var")
    right = {name: outputs(case, inputs)[name] for name in names}

    def cause(**changed: npt.ArrayLike) -> str | None:
        given = {**right, **{name: np.asarray(values) for name, values in changed.items()}}
        measured = reference.measure(given, Declarations())
        return judge(case.thresholds, measured, reference.facts).cause

    y = right["y"] * np.float32(1.5)
    assert cause(y=y, running_mean=right["running_mean"] * np.float32(1.001)) == (
        "BN003 low-precision accumulation"
    )
    assert cause(y=y, running_var=right["running_var"] * np.float32(1.5)) == (
        "BN002 cancellation in the variance"
    )
    assert cause(y=y, running_mean=-right["running_mean"]) is None
    assert cause(y=y) is None
    assert cause(running_var=right["running_var"] * np.float32(1.5)) is None  # whose fault is it?
