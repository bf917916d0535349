"""The interface for other people's test suites: right outputs pass, planted faults raise the finding."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from correct import outputs as right_outputs

import bnaudit
from bnaudit import api
from bnaudit.scenario import ScenarioError
from bnaudit.worker.rounding import widen

ALL = """
name: every
input: {distribution: normal, mean: 2}
shape: [4, 3, 5, 6]
dtype: [float32, float16, bfloat16, float64]
memory_format: [contiguous, channels_last, strided]
backward: true
affine: {weight: {distribution: normal}, bias: {distribution: normal}}
"""
STEPS = "name: steps\ninput: {distribution: normal}\nshape: [4, 3]\nsteps: 3\nmomentum: 0.25\n"


def cases(folder: Path, text: str) -> list[bnaudit.Case]:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return bnaudit.cases(path)


def right(case: bnaudit.Case) -> dict[str, Any]:
    return right_outputs(case, api._prepared(case).inputs)


def test_right_outputs_pass_in_every_dtype_and_memory_format(tmp_path: Path) -> None:
    every = cases(tmp_path, ALL)
    assert len(every) == 12
    for case in every:
        result = bnaudit.judge(case, right(case))
        assert (result.status, result.reason) == ("pass", None), case.id
        result.check(fail_on="warn")
        assert {"y", "grad_input", "running_var", "invstd"} <= result.quantities.keys()


def test_inputs_are_what_the_audit_uses_in_the_dtype_and_memory_format(tmp_path: Path) -> None:
    for case in cases(tmp_path, ALL):
        inputs = case.inputs()
        assert inputs.x.shape == case.shape
        assert inputs.x.dtype.name == case.dtype
        stored = api._prepared(case).inputs.x[-1]
        assert np.array_equal(inputs.x.astype(np.float64), widen(stored, case.dtype))
        contiguous = inputs.x.flags.c_contiguous
        assert contiguous == (case.memory_format == "contiguous")
        assert np.moveaxis(inputs.x, 1, -1).flags.c_contiguous == (
            case.memory_format == "channels_last"
        )
        assert inputs.grad_output is not None
        assert inputs.steps[-1].x is inputs.x
        inputs.x[...] = 0
        assert case.inputs().x.any()


def test_steps_are_handed_out_one_by_one(tmp_path: Path) -> None:
    (case,) = cases(tmp_path, STEPS)
    inputs = case.inputs()
    assert len(inputs.steps) == 3
    mean, var = inputs.running_mean, inputs.running_var
    for x, _ in inputs.steps:
        mean = mean + 0.25 * (x.mean(0) - mean)
        var = var + 0.25 * (x.var(0, ddof=1) - var)
    y = right(case)["y"]
    bnaudit.judge(case, {"y": y, "running_mean": mean, "running_var": var}).check()
    early = bnaudit.judge(case, {"y": y, "running_mean": inputs.running_mean})
    with pytest.raises(bnaudit.DeviationError, match="running_mean"):
        early.check()


def test_a_wrong_y_raises_the_finding(tmp_path: Path) -> None:
    case = cases(tmp_path, ALL)[0]
    wrong = right(case)["y"].copy()
    wrong[1, 2, 3, 4] += 1
    result = bnaudit.judge(case, wrong)
    with pytest.raises(AssertionError) as raised:
        result.check()
    text = str(raised.value)
    assert text.startswith(f"fail {case.id}\n")
    assert f"y[1,2,3,4] = {float(wrong[1, 2, 3, 4])!r}, should be " in text


def test_a_warning_raises_only_where_it_is_asked_to(tmp_path: Path) -> None:
    (case,) = cases(
        tmp_path, "name: c\ninput: {distribution: constant, value: 3}\nshape: [4, 2, 8]\n"
    )
    result = bnaudit.judge(case, np.full(case.shape, 1e-5, np.float32))
    assert result.status == "warn"
    result.check()
    with pytest.raises(bnaudit.DeviationError, match="must equal the bias"):
        result.check(fail_on="warn")


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (np.zeros((1, 2)), "shape"),
        (np.zeros((4, 3, 5, 6)), "y is float64, not float32"),
        ({}, "no y was returned"),
        ({"y": None, "batch_mean": np.zeros(3)}, "no y was returned"),
        ({"output": np.zeros((4, 3, 5, 6), np.float32)}, "y is meant"),
        ({"y": "text"}, "contract"),
    ],
)
def test_what_is_no_output_breaks_the_contract(tmp_path: Path, outputs: Any, reason: str) -> None:
    result = bnaudit.judge(cases(tmp_path, ALL)[0], outputs)
    assert result.status == "fail"
    assert reason in (result.reason or "")
    with pytest.raises(bnaudit.DeviationError, match="contract"):
        result.check()


def test_declarations_decide_on_the_running_variance(tmp_path: Path) -> None:
    (case,) = cases(tmp_path, STEPS)
    biased = right_outputs(case, api._prepared(case).inputs, correction=0)
    assert bnaudit.judge(case, biased).cause == "BN006 running-statistics semantics"
    bnaudit.judge(case, biased, running_var_correction=0).check()


def test_tensors_of_torch_and_bfloat16_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for case in cases(tmp_path, ALL):
        if case.memory_format == "contiguous":
            wide = torch.tensor(widen(right(case)["y"], case.dtype), requires_grad=True)
            bnaudit.judge(case, wide.to(getattr(torch, case.dtype))).check()
            if case.dtype == "bfloat16":
                stored = wide.detach().numpy().astype(ml_dtypes.bfloat16)
                bnaudit.judge(case, {"y": stored}).check()


def test_the_least_recently_used_inputs_are_let_go(tmp_path: Path) -> None:
    every = cases(tmp_path, ALL)
    folder = api._prepared(every[0]).folder
    assert folder.exists()
    for case in every[1 : 1 + api.KEPT]:
        case.inputs()
    assert len(api._PREPARED) == api.KEPT
    assert not folder.exists()


def test_cases_come_from_shipped_scenarios_and_mistakes_are_said(tmp_path: Path) -> None:
    shipped = bnaudit.cases("backward", "small-n")
    assert {case.scenario for case in shipped} == {"backward", "small-n"}
    with pytest.raises(ScenarioError, match="nosuch"):
        bnaudit.cases("nosuch")
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        bnaudit.nosuch  # noqa: B018


def test_the_examples_run_under_pytest(tmp_path: Path) -> None:
    """Their tests are named after their cases, and fail where the batch norm is wrong."""
    assert api.__doc__ is not None
    example = textwrap.dedent(api.__doc__.split("\n\n", 1)[1])
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text()
    (published,) = re.findall(r"```python\n(import bnaudit, pytest\n.*?)```", readme, re.S)
    example += published.replace("test_batch_norm", "test_published")
    (tmp_path / "test_mine.py").write_text(
        "import numpy as np\n"
        "def my_batch_norm(x, weight, bias, eps):\n"
        "    axes = (0, 2, 3)\n"
        "    wide = x.astype(np.float64)\n"
        "    mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)\n"
        "    scale = weight.astype(np.float64).reshape(1, -1, 1, 1) / np.sqrt(var + eps)\n"
        "    y = (wide - mean) * scale + bias.reshape(1, -1, 1, 1)\n"
        "    return (y * (1 if abs(mean).max() < 5 else 1.1)).astype(x.dtype)\n" + example
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "test_published[large-offset/mean=0" in done.stdout
    assert "test_batch_norm[smoke/input=constant(value=3.3)" in done.stdout
    assert "PASSED" in done.stdout
    assert "DeviationError: fail smoke/" in done.stdout
