"""Measurements, bounds and verdicts on outputs whose error is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from correct import Array, outputs, prepare

from bnaudit import certified, measure
from bnaudit.bounds import FORMATS
from bnaudit.measure import BINS, Measurement
from bnaudit.reference import Declarations, Reference
from bnaudit.verdict import Verdict, judge
from bnaudit.worker.rounding import round_to, widen

FIELDS = """
input: {{distribution: normal, mean: {mean}, std: 2}}
shape: [4, 3, 5, 6]
dtype: {dtype}
backward: true
eps: 1e-3
momentum: 0.25
affine: {{weight: {{distribution: uniform, low: -2, high: 2}}, bias: {{distribution: normal}}}}
running: {{mean: {{distribution: normal}}, var: {{distribution: uniform, low: 0.5, high: 2}}}}
"""


def judged(
    folder: Path, text: str, declared: Declarations | None = None, **changed: Array
) -> tuple[Verdict, dict[str, Measurement]]:
    """The verdict on the right outputs, some of them changed."""
    case, inputs = prepare(folder, text)
    answers = Reference(case, inputs)
    given = {**outputs(case, inputs), **changed}
    measured = answers.measure(given, declared or Declarations())
    return judge(case.thresholds, measured, answers.facts), measured


def right(folder: Path, text: str) -> dict[str, Array]:
    return outputs(*prepare(folder, text))


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("mean", [0, 30, 1000])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_correctly_rounded_results_are_exact(
    tmp_path: Path, dtype: str, mean: float, mode: str
) -> None:
    verdict, measured = judged(tmp_path, FIELDS.format(mean=mean, dtype=dtype) + f"mode: {mode}\n")
    assert verdict.status == "pass"
    assert verdict.label == "exact"
    expected = {"y", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias"}
    assert measured.keys() >= expected
    wide = dtype in ("float32", "float64")
    for name, m in measured.items():
        assert m.bound_ratio is not None
        assert m.bound_ratio <= (0.3 if wide or name not in ("y", "grad_input") else 0.5), name
        assert m.max_ulp_error is not None
        if name in ("y", "grad_input") and dtype != "float64":  # beyond long double's own precision
            assert m.max_ulp_error <= 0.51


def test_one_wrong_element_is_found_and_named(tmp_path: Path) -> None:
    text = FIELDS.format(mean=0, dtype="float32")
    y = right(tmp_path, text)["y"].copy()
    y[2, 1, 3, 4] += 0.5
    verdict, measured = judged(tmp_path, text, y=y)
    worst = measured["y"].worst
    assert worst is not None
    assert worst.index == (2, 1, 3, 4)
    assert worst.value == y[2, 1, 3, 4]
    assert worst.value - worst.reference == pytest.approx(0.5, rel=1e-6)
    assert measured["y"].max_abs_error == pytest.approx(0.5, rel=1e-6)
    assert (verdict.status, verdict.label) == ("fail", "broken")


@pytest.mark.parametrize("name", ["y", "grad_input"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_one_value_that_is_not_finite_is_found(
    tmp_path: Path, dtype: str, value: float, name: str
) -> None:
    text = FIELDS.format(mean=0, dtype=dtype)
    wrong = right(tmp_path, text)[name].copy()
    wrong[1, 2, 0, 5] = round_to(np.array([value]), dtype)[0]
    verdict, measured = judged(tmp_path, text, **{name: wrong})
    m = measured[name]
    assert m.nonfinite == 1
    assert m.bound_ratio == math.inf
    assert m.worst is not None
    assert m.worst.index == (1, 2, 0, 5)
    assert (verdict.status, verdict.label) == ("fail", "broken")
    assert "1 element is not finite" in (verdict.reason or "")


@pytest.mark.parametrize("name", ["batch_mean", "running_var", "grad_weight"])
def test_nan_in_a_statistic_is_found(tmp_path: Path, name: str) -> None:
    text = FIELDS.format(mean=0, dtype="float32")
    wrong = right(tmp_path, text)[name].copy()
    wrong[1] = math.nan
    verdict, measured = judged(tmp_path, text, **{name: wrong})
    assert measured[name].nonfinite == 1
    assert verdict.status == "fail"
    assert verdict.quantities[name].status == "fail"


def test_the_worst_element_of_a_long_half_precision_tensor_is_located(tmp_path: Path) -> None:
    images = 3 * certified.SLAB // 4096
    text = f"input: {{distribution: normal}}\nshape: [{images}, 2, 64, 32]\ndtype: float16\n"
    y = right(tmp_path, text)["y"].copy()
    y[images - 2, 1, 63, 31] = 60000
    _, measured = judged(tmp_path, text, y=y)
    worst = measured["y"].worst
    assert worst is not None
    assert worst.index == (images - 2, 1, 63, 31)


def test_an_infinity_is_right_where_half_precision_overflows(tmp_path: Path) -> None:
    text = """
input: {distribution: outlier, value: 100, position: first}
shape: [1, 1, 1, 4096]
dtype: float16
affine: {weight: 60000, bias: 0}
"""
    y = right(tmp_path, text)["y"]
    assert np.isinf(y[0, 0, 0, 0])
    verdict, measured = judged(tmp_path, text)
    assert measured["y"].nonfinite == 0
    assert verdict.status == "pass"
    for wrong in (-math.inf, math.nan, 65504.0):
        changed = y.copy()
        changed[0, 0, 0, 0] = wrong
        assert judged(tmp_path, text, y=changed)[0].status == "fail"


def test_the_kernels_agree_with_the_formulas(tmp_path: Path) -> None:
    """T and T0 of y, written out once more in NumPy."""
    text = FIELDS.format(mean=5, dtype="float32")
    case, inputs = prepare(tmp_path, text)
    exact = outputs(case, inputs)
    rng = np.random.default_rng(0)
    y = (exact["y"] + rng.standard_normal(case.shape) * 1e-5).astype(np.float32)
    m = Reference(case, inputs).measure({"y": y}, Declarations())["y"]
    x = inputs.x[0].astype(np.longdouble)
    shape = (1, 3, 1, 1)
    weight = inputs.weight.astype(np.longdouble).reshape(shape)  # type: ignore[union-attr]
    bias = inputs.bias.astype(np.longdouble).reshape(shape)  # type: ignore[union-attr]
    mu = x.mean((0, 2, 3), keepdims=True)
    var = ((x - mu) ** 2).mean((0, 2, 3), keepdims=True)
    r = 1 / np.sqrt(var + np.longdouble(case.eps))
    xh = (x - mu) * r
    right_y = xh * weight + bias
    u, eta, g = 2.0**-24, 2.0**-149, 4 + math.log2(case.n)
    k = r * (abs(x) + abs(x).mean((0, 2, 3), keepdims=True))
    w = abs(weight)
    shared = u * abs(right_y) + eta / 2 + w * r * eta
    wide = 2 * (shared + u * g * (w * (k * (1 + abs(xh)) + abs(xh)) + abs(bias)))
    tight = 2 * (shared + 4 * u * (w * ((abs(mu) + 2 * np.sqrt(var)) * r + abs(xh)) + abs(bias)))
    capped = np.minimum(wide, np.maximum(tight, 0.03 * w + 2 * u * abs(right_y)))
    error = abs(y - right_y)
    assert m.bound_ratio == pytest.approx(float((error / capped).max()), rel=1e-6)
    assert m.tight_ratio == pytest.approx(float((error / tight).max()), rel=1e-6)
    assert m.max_abs_error == pytest.approx(float(error.max()), rel=1e-6)


CONSTANT = "input: {{distribution: constant, value: {value}}}\nshape: [1, 1, 3, 3]\n"


def test_the_founding_case_fails_by_the_constant_rule_alone(tmp_path: Path) -> None:
    y = np.full((1, 1, 3, 3), -0.00482519669, np.float32)
    verdict, measured = judged(tmp_path, CONSTANT.format(value=100), y=y)
    m = measured["y"]
    assert m.bound_ratio is not None
    assert m.bound_ratio < 0.2  # a backward-stable algorithm may lose this much
    assert m.constant_misses == 9
    assert m.constant_error == pytest.approx(0.00482519669)
    assert (verdict.status, verdict.label) == ("fail", "degraded")
    assert verdict.cause == "BN001 constant channel"


def test_the_constant_that_is_off_is_shown_even_if_another_element_has_the_larger_ratio(
    tmp_path: Path,
) -> None:
    text = """
input: {distribution: channels, items: [{distribution: constant, value: 100}, {distribution: normal}]}
shape: [2, 2, 3]
"""
    y = right(tmp_path, text)["y"].copy()
    y[1, 0, 2] = 0.002
    y[0, 1, 1] += np.float32(4e-7)
    verdict, measured = judged(tmp_path, text, y=y)
    assert verdict.quantities["y"].status == "fail"
    worst = measured["y"].worst
    assert worst is not None
    assert worst.index == (1, 0, 2)
    assert worst.value == pytest.approx(0.002)
    assert worst.reference == 0


def test_a_harmless_miss_of_a_constant_only_warns(tmp_path: Path) -> None:
    y = np.full((1, 1, 3, 3), 5e-5, np.float32)
    verdict, _ = judged(tmp_path, CONSTANT.format(value=3.3), y=y)
    assert verdict.status == "warn"
    assert verdict.label == "stable"


def test_in_inference_an_element_at_the_running_mean_is_a_constant(tmp_path: Path) -> None:
    text = CONSTANT.format(value=10000) + "mode: inference\nrunning: {mean: 10000, var: 0}\n"
    assert judged(tmp_path, text)[0].label == "exact"
    y = np.full((1, 1, 3, 3), 0.0269, np.float32)
    verdict, _ = judged(tmp_path, text, y=y)
    assert verdict.status == "fail"
    assert verdict.cause == "BN001 constant channel"


def test_zero_variance_without_eps_is_not_judged(tmp_path: Path) -> None:
    y = np.full((1, 1, 3, 3), math.nan, np.float32)
    verdict, _ = judged(tmp_path, CONSTANT.format(value=1) + "eps: 0\n", y=y)
    assert verdict.quantities["y"].status == "pass"
    assert "not judged" in (verdict.quantities["y"].reason or "")


@pytest.mark.parametrize("images", [2, 3, 4, 8])
def test_a_biased_running_variance_is_found_unless_declared(tmp_path: Path, images: int) -> None:
    text = f"input: {{distribution: normal}}\nshape: [{images}, 4]\nrunning: {{mean: 0, var: 0}}\nmomentum: 1\n"
    biased = outputs(*prepare(tmp_path, text), correction=0)["running_var"]
    verdict, _ = judged(tmp_path, text, running_var=biased)
    assert verdict.status == "fail"
    assert verdict.cause == "BN006 running-statistics semantics"
    verdict, _ = judged(tmp_path, text, Declarations(running_var_correction=0), running_var=biased)
    assert verdict.status == "pass"


def test_an_inverted_momentum_is_found(tmp_path: Path) -> None:
    text = FIELDS.format(mean=3, dtype="float32")
    inverted = right(tmp_path, text.replace("0.25", "0.75"))
    verdict, _ = judged(
        tmp_path,
        text,
        running_mean=inverted["running_mean"],
        running_var=inverted["running_var"],
    )
    assert verdict.status == "fail"
    assert verdict.cause == "BN006 running-statistics semantics"


@pytest.mark.parametrize("momentum", ["0.1", "null"])
def test_running_statistics_over_many_steps(tmp_path: Path, momentum: str) -> None:
    text = f"input: {{distribution: normal, mean: 7}}\nshape: [2, 3, 4]\nsteps: 100\nmomentum: {momentum}\n"
    verdict, measured = judged(tmp_path, text)
    assert verdict.status == "pass"
    wrong = right(tmp_path, text)["running_mean"] * np.float32(1 + 1e-4)
    assert judged(tmp_path, text, running_mean=wrong)[0].status == "fail"
    assert measured["running_var"].bound_ratio is not None


def test_inference_must_leave_the_running_statistics_alone(tmp_path: Path) -> None:
    text = FIELDS.format(mean=0, dtype="float32") + "mode: inference\n"
    moved = np.nextafter(right(tmp_path, text)["running_mean"], np.float32(9))
    verdict, _ = judged(tmp_path, text, running_mean=moved)
    assert verdict.quantities["running_mean"].status == "fail"


def test_one_value_per_channel_may_keep_the_running_variance(tmp_path: Path) -> None:
    text = "input: {distribution: normal}\nshape: [1, 3]\nrunning: {mean: 0, var: 2}\n"
    kept, moved = np.full(3, 2, np.float32), np.full(3, 1.8, np.float32)
    assert judged(tmp_path, text, running_var=kept)[0].status == "pass"
    assert judged(tmp_path, text, running_var=moved)[0].status == "pass"
    nan = np.full(3, math.nan, np.float32)
    assert judged(tmp_path, text, running_var=nan)[0].status == "fail"


def test_an_empty_batch_changes_nothing(tmp_path: Path) -> None:
    text = "input: {distribution: normal}\nshape: [0, 3, 4]\nbackward: true\n"
    case, inputs = prepare(tmp_path, text)
    zero = np.zeros(3, np.float32)
    empty = np.zeros((0, 3, 4), np.float32)
    given = {
        "y": empty,
        "grad_input": empty,
        "grad_weight": zero,
        "grad_bias": zero,
        "running_mean": zero,
        "running_var": np.ones(3, np.float32),
        "batch_mean": np.full(3, math.nan, np.float32),
    }
    answers = Reference(case, inputs)
    verdict = judge(case.thresholds, answers.measure(given, Declarations()), answers.facts)
    assert verdict.status == "pass"
    assert "batch_mean" not in verdict.quantities
    given["running_var"] = np.full(3, math.nan, np.float32)
    assert (
        judge(case.thresholds, answers.measure(given, Declarations()), answers.facts).status
        == "fail"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_channel_that_is_not_finite_must_be_so_and_spares_the_others(
    tmp_path: Path, dtype: str
) -> None:
    text = f"""
input: {{distribution: nonfinite, base: {{distribution: normal}}, values: [nan], count: 1}}
shape: [2, 3, 4, 5]
dtype: {dtype}
"""
    verdict, _ = judged(tmp_path, text)
    assert verdict.status == "pass", verdict
    y = right(tmp_path, text)["y"].copy()
    spoiled = int(np.flatnonzero(np.isnan(widen(y, dtype)).any(axis=(0, 2, 3)))[0])
    y[0, spoiled, 0, 0] = 0
    assert judged(tmp_path, text, y=y)[0].status == "fail"
    y = right(tmp_path, text)["y"].copy()
    y[1, (spoiled + 1) % 3, 1, 1] = round_to(np.array([math.nan]), dtype)[0]
    assert judged(tmp_path, text, y=y)[0].status == "fail"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_in_inference_only_the_touched_elements_are_not_finite(tmp_path: Path, value: str) -> None:
    text = f"""
input: {{distribution: nonfinite, base: {{distribution: normal}}, values: [{value}], count: 2}}
shape: [2, 3, 4, 5]
mode: inference
backward: true
"""
    verdict, measured = judged(tmp_path, text)
    assert verdict.quantities["y"].status == "pass"
    assert verdict.quantities["grad_input"].status == "pass"
    y = right(tmp_path, text)["y"].copy()
    touched = np.argwhere(~np.isfinite(y))
    assert len(touched) == 2
    y[tuple(touched[0])] = 0
    assert judged(tmp_path, text, y=y)[1]["y"].nonfinite == 1
    assert measured["y"].nonfinite == 0


def test_variance_that_overflows_float32_is_named(tmp_path: Path) -> None:
    text = "input: {distribution: normal, std: 1.0e+20}\nshape: [4, 2, 8, 8]\n"
    verdict, _ = judged(tmp_path, text)
    assert verdict.quantities["y"].status == "pass"
    verdict, _ = judged(tmp_path, text, y=np.zeros((4, 2, 8, 8), np.float32))
    assert verdict.status == "fail"
    assert verdict.cause == "BN004 overflow or underflow"


def test_float64_extremes_are_judged(tmp_path: Path) -> None:
    for std in ("1e+300", "1e-300"):
        text = f"input: {{distribution: normal, std: {std}}}\nshape: [4, 2, 8, 8]\ndtype: float64\n"
        verdict, _ = judged(tmp_path, text)
        assert verdict.quantities["y"].label == "exact", std


def test_cancellation_in_the_variance_is_named(tmp_path: Path) -> None:
    text = "input: {distribution: normal, mean: 1000}\nshape: [16, 2, 8, 8]\n"
    case, inputs = prepare(tmp_path, text)
    x = inputs.x[0]
    mean = x.mean((0, 2, 3), dtype=np.float32)
    var = np.abs((x * x).mean((0, 2, 3), dtype=np.float32) - mean * mean)
    invstd = 1 / np.sqrt(var + np.float32(1e-5))
    y = (x - mean.reshape(1, 2, 1, 1)) * invstd.reshape(1, 2, 1, 1)
    answers = Reference(case, inputs)
    given = {"y": y, "batch_mean": mean, "batch_var": var, "invstd": invstd}
    verdict = judge(case.thresholds, answers.measure(given, Declarations()), answers.facts)
    assert verdict.status == "fail"
    assert verdict.cause == "BN002 cancellation in the variance"


def test_thresholds_of_a_scenario_add_and_remove_conditions(tmp_path: Path) -> None:
    text = FIELDS.format(mean=0, dtype="float32")
    y = right(tmp_path, text)["y"].copy()
    y[0, 0, 0, 0] += 1e-6
    strict = text + "thresholds: {y: {max_abs_error: 1e-7}}\n"
    verdict, _ = judged(tmp_path, strict, y=y)
    assert verdict.status == "fail"
    assert verdict.quantities["y"].label in ("exact", "stable")
    assert "threshold" in (verdict.reason or "")
    y[0, 0, 0, 0] += 1e-2
    lenient = text + "thresholds: {y: {bound_ratio: null}}\n"
    assert judged(tmp_path, text, y=y)[0].status == "fail"
    assert judged(tmp_path, lenient, y=y)[0].quantities["y"].status != "fail"


@pytest.mark.parametrize("name", ["grad_input", "grad_weight", "grad_bias"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_wrong_gradient_is_found(tmp_path: Path, dtype: str, name: str) -> None:
    text = FIELDS.format(mean=0, dtype=dtype)
    exact = right(tmp_path, text)[name]
    wide = widen(exact, dtype) if name == "grad_input" else exact
    wrong = (wide * 1.05).astype(wide.dtype)
    changed = {name: round_to(wrong, dtype) if name == "grad_input" else wrong}
    verdict, _ = judged(tmp_path, text, None, **changed)
    assert verdict.quantities[name].status == "fail"


def test_a_negative_running_variance_is_no_accident(tmp_path: Path) -> None:
    text = "input: {distribution: normal}\nshape: [2, 3, 4]\nmode: inference\nrunning: {mean: 0, var: %s}\n"
    assert judged(tmp_path, text % "-1.0e-6")[0].status == "pass"
    verdict, _ = judged(tmp_path, text % "-1")
    assert "not judged" in (verdict.quantities["y"].reason or "")


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_in_half_precision_are_judged_by_their_own_rounding(
    tmp_path: Path, dtype: str, steps: int
) -> None:
    text = f"""
input: {{distribution: normal, mean: 30}}
shape: [8, 2, 64]
dtype: {dtype}
backward: true
param_dtype: same
momentum: 0.5
steps: {steps}
running: {{mean: -800, var: 300}}
"""
    case, inputs = prepare(tmp_path, text)
    exact = outputs(case, inputs)
    stored = {
        name: widen(round_to(value.astype(np.float64), dtype), dtype)
        for name, value in exact.items()
        if name.startswith(("running", "grad_weight", "grad_bias"))
    }
    verdict, _ = judged(tmp_path, text, None, **stored)
    assert verdict.status == "pass", verdict.reason


@pytest.mark.parametrize("momentum", ["0.1", "null"])
def test_caffe_averages_scaled_sums(tmp_path: Path, momentum: str) -> None:
    text = f"input: {{distribution: normal}}\nshape: [2, 3, 4]\nsteps: 3\nmomentum: {momentum}\n"
    case, inputs = prepare(tmp_path, text)
    means = inputs.x.astype(np.float64).mean((1, 3))
    f = 1.0 if momentum == "null" else 1 - 0.1
    mean = (f * f * means[0] + f * means[1] + means[2]) / (f * f + f + 1)
    given = {"running_mean": mean}
    declared = Declarations(running_update="caffe")
    m = Reference(case, inputs).measure(given, declared)["running_mean"]
    assert m.bound_ratio is not None
    assert m.bound_ratio < 1e-3


def test_an_infinite_bias_spoils_y_alone(tmp_path: Path) -> None:
    text = """
input: {distribution: normal}
shape: [2, 3, 4]
dtype: float16
param_dtype: same
backward: true
affine: {weight: 1, bias: 70000}
"""
    verdict, measured = judged(tmp_path, text)
    assert verdict.status == "pass", verdict.reason
    for name in ("batch_mean", "running_var", "grad_input", "grad_weight"):
        assert measured[name].nonfinite == 0
        assert math.isfinite(measured[name].worst.reference), name  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [7.0, math.nan])
def test_the_constant_rule_spares_what_is_not_judged(tmp_path: Path, value: float) -> None:
    text = CONSTANT.format(value=3) + "eps: 0\n"
    y = np.full((1, 1, 3, 3), value, np.float32)
    assert judged(tmp_path, text, y=y)[0].status == "pass"


def test_grad_bias_keeps_its_allowance_beside_a_spoilt_variance(tmp_path: Path) -> None:
    text = CONSTANT.format(value=3).replace("[1, 1, 3, 3]", "[64, 1, 8, 8]")
    text += "eps: 0\nbackward: true\n"
    case, inputs = prepare(tmp_path, text)
    assert inputs.grad_output is not None
    total = np.add.reduce(inputs.grad_output[0].reshape(-1), dtype=np.float32).reshape(1)
    m = Reference(case, inputs).measure({"grad_bias": total}, Declarations())["grad_bias"]
    assert m.bound_ratio is not None
    assert m.bound_ratio <= 1


@pytest.mark.parametrize("eps", ["0", "1e-12"])
@pytest.mark.parametrize("wrong", [0.0, 1e30, math.inf])
def test_no_invstd_is_right_because_the_input_is_hard(
    tmp_path: Path, wrong: float, eps: str
) -> None:
    text = f"input: {{distribution: normal, mean: 10000, std: 0.001}}\nshape: [64, 1, 8, 8]\neps: {eps}\n"
    verdict, measured = judged(tmp_path, text, invstd=np.full(1, wrong))
    assert (measured["invstd"].bound_ratio or 0) > 0.05
    if wrong != 0:
        assert verdict.quantities["invstd"].status == "fail"


@pytest.mark.parametrize(
    ("std", "weight", "eps"),
    [
        ("1e+100", "1e-215", "1e-5"),
        ("1e+60", "1e-250", "1e-5"),
        ("1e+20", "1e-290", "1e-5"),
        ("1e-115", "1e+200", "0"),
        ("1e-200", "1e+150", "0"),
        ("1e+300", "1e-30", "1e-5"),
        ("1e-310", "1", "0"),
        ("1e+200", "1", "1e-5"),
    ],
)
def test_float64_extremes_of_weight_and_scale_are_judged(
    tmp_path: Path, std: str, weight: str, eps: str
) -> None:
    text = f"""
input: {{distribution: normal, std: {std}}}
shape: [4, 2, 8]
dtype: float64
eps: {eps}
affine: {{weight: {weight}, bias: 0}}
"""
    verdict, measured = judged(tmp_path, text)
    assert verdict.quantities["y"].status == "pass", verdict.reason
    assert measured["y"].bound_ratio is not None
    y = right(tmp_path, text)["y"] * -3e5
    assert judged(tmp_path, text, y=y)[0].quantities["y"].status == "fail"


def test_inference_far_from_the_running_mean_is_judged(tmp_path: Path) -> None:
    for mean, weight in (("1e+115", "1"), ("1", "1e-150")):
        text = f"""
input: {{distribution: normal, std: 1e-200}}
shape: [4, 2, 8]
dtype: float64
mode: inference
running: {{mean: {mean}, var: 1}}
affine: {{weight: {weight}, bias: 0}}
"""
        verdict, _ = judged(tmp_path, text)
        assert verdict.quantities["y"].status == "pass", verdict.reason


def test_gradients_of_huge_dy_do_not_overflow_on_the_way(tmp_path: Path) -> None:
    text = """
input: {distribution: normal, std: 1e+10}
shape: [4, 2, 8]
dtype: float64
backward: true
grad_output: {distribution: alternating, amplitude: 1.7e+308}
"""
    verdict, measured = judged(tmp_path, text)
    assert verdict.quantities["grad_input"].status == "pass", verdict.reason
    dx = np.full((4, 2, 8), math.nan)
    assert judged(tmp_path, text, grad_input=dx)[0].quantities["grad_input"].status == "fail"
    assert measured["grad_bias"].nonfinite == 0
    wrong = np.full(2, 1e305)
    assert judged(tmp_path, text, grad_bias=wrong)[0].quantities["grad_bias"].status == "fail"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2.0])
def test_in_inference_an_infinite_running_variance_may_not_change_either(
    tmp_path: Path, value: float
) -> None:
    text = """
input: {distribution: normal}
shape: [2, 3]
dtype: float16
param_dtype: same
mode: inference
running: {mean: 0, var: 70000}
"""
    given = np.full(3, value, np.float32)
    zero = np.zeros((2, 3), np.float16)
    verdict, _ = judged(tmp_path, text, running_var=given, y=zero)
    expected = "pass" if value == math.inf else "fail"
    assert verdict.quantities["running_var"].status == expected
    assert verdict.quantities["y"].status == "pass"
    assert "not judged" in (verdict.quantities["y"].reason or "")


def test_a_ratio_that_is_not_a_number_is_never_forgotten() -> None:
    m = 4
    tally = measure._tally(1)
    output = measure._output(FORMATS["float32"])
    ones = np.ones(m)
    buffers = [np.empty(m), np.empty(m)]
    for got, allowed in ((5 * ones, ones * math.nan), (ones, ones)):
        measure._compare(
            0, 0, m, got, ones, 0 * ones, allowed, allowed, ones, *buffers, output, tally
        )
    assert tally.ratio[0] == math.inf
    assert tally.position[0] == 0


def bin_of(ratio: float) -> int:
    """The place of a T in a histogram, by its definition: bins of two octaves from 2^-20 to 2^20."""
    if not ratio < 2.0**20:
        return BINS - 1
    edges = [2.0 ** (2 * k - 20) for k in range(BINS - 1)]
    return sum(ratio >= edge for edge in edges)


@pytest.mark.parametrize("name", ["y", "grad_input"])
def test_the_histogram_counts_every_element_by_its_ratio(tmp_path: Path, name: str) -> None:
    text = FIELDS.format(mean=1, dtype="float32")
    given = right(tmp_path, text)[name]
    none = judged(tmp_path, text)[1][name].histogram
    assert none is not None
    assert len(none) == BINS
    assert sum(none) == given.size
    assert sum(none[bin_of(1.0) :]) == 0
    for factor in (1e-3, 1.0, 30.0, 1e30, math.nan):
        wrong = given.copy()
        wrong[1, 2] += np.float32(factor)
        found = judged(tmp_path, text, **{name: wrong})[1][name]
        assert found.histogram is not None
        assert found.bound_ratio is not None
        assert sum(found.histogram) == given.size
        assert max(np.flatnonzero(found.histogram)) == bin_of(found.bound_ratio)
        assert sum(found.histogram[bin_of(1.0) :]) == wrong[1, 2].size


def test_what_must_not_be_finite_and_is_counts_as_infinitely_wrong(tmp_path: Path) -> None:
    text = (
        "input: {distribution: nonfinite, base: {distribution: normal}, values: [nan], count: 1}\n"
        "shape: [4, 2, 5]\n"
    )
    given = right(tmp_path, text)["y"]
    touched = int(np.flatnonzero(np.isnan(given).any(axis=(0, 2)))[0])
    wrong = given.copy()
    wrong[0, touched, 0] = 1.0
    histogram = judged(tmp_path, text, y=wrong)[1]["y"].histogram
    assert histogram is not None
    assert (sum(histogram), histogram[-1]) == (given.size, 1)
