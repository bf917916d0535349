"""Shrinking: what is left is small, plain where it can be, and has the fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bnaudit.cli import cli
from bnaudit.distributions import Channels, Constant, File, Normal
from bnaudit.inputs import make
from bnaudit.repro import Fault
from bnaudit.scenario import Case, load
from bnaudit.shrink import attempt, shrink
from bnaudit.subject import Subject
from bnaudit.worker.rounding import widen

FAULT = Fault("fail", "y", (0, 0, 0, 0), 1.0, 0.0, 0.1)


def case_of(text: str, folder: Path) -> Case:
    path = folder / "case.yaml"
    path.write_text(text)
    return load([str(path)])[0].cases[0]


def planted(fails: Callable[[Case, Any], Any]) -> Callable[[Case], Fault | None]:
    """An attempt: `fails(case, x)` is the index of the faulty element, or None."""

    def attempt(case: Case) -> Fault | None:
        if case.unsupported() is not None or next(case.faults(), None) is not None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            x = np.array(widen(make(case, Path(folder)).x[-1], case.dtype))
        index = fails(case, x)
        return None if index is None else Fault("fail", "y", tuple(index), 1.0, 0.0, 0.1)

    return attempt


TEXT = """
name: s
input: {distribution: constant, value: 3.3}
shape: [6, 5, 20, 20]
eps: 0.01
momentum: 0.3
steps: 4
backward: true
memory_format: channels_last
seed: 5
affine: {weight: {distribution: normal}, bias: 3}
"""


def test_a_case_without_the_fault_is_not_shrunk(tmp_path: Path) -> None:
    assert shrink(case_of(TEXT, tmp_path), lambda case: None, tmp_path) is None


def test_what_the_fault_does_not_need_gets_its_default(tmp_path: Path) -> None:
    found = shrink(case_of(TEXT, tmp_path), lambda case: FAULT, tmp_path)
    assert found is not None
    small = found[0]
    assert (small.shape, small.steps, small.backward) == ((1, 1), 1, False)
    assert (small.eps, small.momentum, small.seed) == (1e-5, 0.1, 0)
    assert (small.affine, small.memory_format) == (None, "contiguous")


@pytest.mark.parametrize("needed", [1, 7, 37, 400])
def test_lengths_are_the_smallest_in_which_the_fault_is(needed: int, tmp_path: Path) -> None:
    def fails(case: Case, x: Any) -> Any:
        return (0,) * x.ndim if case.n >= needed and case.memory_format == "channels_last" else None

    found = shrink(case_of(TEXT, tmp_path), planted(fails), tmp_path)
    assert found is not None
    small = found[0]
    assert isinstance(small.input, Constant)
    assert small.memory_format == "channels_last"
    assert needed <= small.n <= max(needed + 2, 1.1 * needed)
    for axis in range(4):
        less = list(small.shape)
        less[axis] -= 1
        if min(less) >= 1 and axis != 1:
            assert small.n // small.shape[axis] * less[axis] < max(needed, 2)


def test_one_element_of_many_is_found_and_rounded(tmp_path: Path) -> None:
    """Of a normal input that no smaller normal input can stand for."""
    case = case_of(
        "name: s\ninput: {distribution: normal, std: 100}\nshape: [8, 3, 8, 8]\nseed: 3\n"
        "affine: {weight: {distribution: normal}, bias: 0}\n",
        tmp_path,
    )
    with tempfile.TemporaryDirectory() as folder:
        highest = float(make(case, Path(folder)).x.max())
    limit = float(f"{highest:.0e}") if float(f"{highest:.0e}") < highest else highest - 50

    def fails(case: Case, x: Any) -> Any:
        place = np.unravel_index(int(x.argmax()), x.shape)
        has_affine = case.affine is not None
        return [int(i) for i in place] if x.max() >= limit and has_affine else None

    found = shrink(case, planted(fails), tmp_path)
    assert found is not None
    small = found[0]
    assert small.shape == (1, 1)
    assert isinstance(small.input, Constant)
    assert float(f"{small.input.value:.3e}") == small.input.value


def test_two_elements_far_apart_are_found(tmp_path: Path) -> None:
    case = case_of("name: s\ninput: {distribution: normal}\nshape: [7, 2, 30]\n", tmp_path)
    with tempfile.TemporaryDirectory() as folder:
        x = make(case, Path(folder)).x[0]
    pair = {float(x[5, 1, 3]), float(x[2, 1, 28])}

    def fails(case: Case, x: Any) -> Any:
        return (0, x.shape[1] - 1, 0) if pair <= set(x.reshape(-1).tolist()) else None

    found = shrink(case, planted(fails), tmp_path)
    assert found is not None
    small = found[0]
    assert isinstance(small.input, File)
    assert np.prod(small.shape) <= 4


def test_a_part_of_a_mixed_input_is_taken_alone(tmp_path: Path) -> None:
    case = case_of(
        "name: s\nshape: [4, 4, 8]\ninput: {distribution: channels, items: "
        "[{distribution: normal}, {distribution: constant, value: 3.3}]}\n",
        tmp_path,
    )
    assert isinstance(case.input, Channels)
    found = shrink(
        case,
        planted(lambda case, x: (0, 0, 0) if (x == x.dtype.type(3.3)).any() else None),
        tmp_path,
    )
    assert found is not None
    assert found[0].input == Constant(distribution="constant", value=3.3)
    assert found[0].n == 1


def test_a_plain_distribution_stays_where_its_values_are_many(tmp_path: Path) -> None:
    """All of a thousand values are needed: no file says that better than the generator."""
    case = case_of("name: s\ninput: {distribution: normal}\nshape: [4, 1, 20, 20]\n", tmp_path)
    attempt = planted(lambda case, x: (0, 0) if x.size >= 1000 else None)
    found = shrink(case, attempt, tmp_path, budget=2.0)
    assert found is not None
    assert isinstance(found[0].input, Normal)
    assert found[0].n == pytest.approx(1000, abs=30)


# --- the command -----------------------------------------------------------------------------------

PLUGIN = """
import numpy as np

def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    axes, shape = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    mean = np.add.accumulate(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), axis=1)[:, -1]
    mean = (mean / np.float32(x.size // x.shape[1])).reshape(shape)
    var = np.square(x.astype(np.float64) - mean).mean(axes).reshape(shape)
    y = (x - mean) / np.sqrt(var + eps)
    if weight is not None:
        y = y * weight.reshape(shape) + bias.reshape(shape)
    return y.astype(x.dtype)
"""

RIGHT = PLUGIN.replace("np.moveaxis(x, 1, 0)", "np.moveaxis(x.astype(np.float64), 1, 0)").replace(
    "np.float32(x.size", "float(x.size"
)

SCENARIO = """
name: long
input: {distribution: constant, value: 3.3}
shape: [8, 2, 32, 32]
memory_format: channels_last
"""


def invoke(*arguments: str) -> Result:
    from bnaudit.cli.common import Failure

    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if isinstance(result.exception, Failure):
        assert "\n" not in str(result.exception)
    return result


def report_of(folder: Path, backend: str, text: str = SCENARIO) -> Path:
    (folder / "long.yaml").write_text(text)
    path = folder / "report.json"
    invoke("run", str(folder / "long.yaml"), "-b", backend, "--json", str(path), "-q")
    assert json.loads(path.read_text())["summary"]["fail"] == 1
    return path


def exit_code(script: Path, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, env={**os.environ, **environment}
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode


def test_a_plugin_s_fault_is_shrunk_and_gone_when_it_is_mended(tmp_path: Path) -> None:
    plugin = tmp_path / "serial.py"
    plugin.write_text(PLUGIN)
    backend = f"{plugin}:batch_norm"
    report = report_of(tmp_path, backend)
    target = tmp_path / "small.py"
    done = invoke("repro", str(report), "1", "--shrink", "--issue", "-o", str(target))
    assert done.exit_code == 0, done.exception
    assert len(target.read_text().splitlines()) <= 40
    assert exit_code(target) == 1
    small = load([str(tmp_path / "small.yaml")])[0].cases[0]
    assert small.n < 400
    assert small.memory_format == "contiguous"
    with Subject(scratch=tmp_path) as subject:
        assert attempt(small, backend, subject, tmp_path, FAULT) is not None
    issue = (tmp_path / "small.md").read_text()
    assert target.read_text() in issue
    assert "and should be 0.0" in issue
    assert "fractions" in issue
    assert "\n```\n0.0\n```\n" in issue
    assert f"numpy {np.__version__}" in issue
    plugin.write_text(RIGHT)
    assert exit_code(target) == 0
    gone = invoke("repro", str(report), "1", "--shrink")
    assert "nothing to shrink" in str(gone.exception)


STAND_IN = """
import torch

def right(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    v = x.double()
    mean = v.mean((0, 2, 3), keepdim=True)
    var = (v - mean).square().mean((0, 2, 3), keepdim=True)
    return ((v - mean) / (var + eps).sqrt()).to(x.dtype)

torch.nn.functional.batch_norm = right
"""


def test_torch_in_channels_last_is_shrunk_to_a_script_that_a_right_torch_passes(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torch")
    report = report_of(tmp_path, "torch@cpu")
    target = tmp_path / "small.py"
    done = invoke("repro", str(report), "1", "--shrink", "-o", str(target))
    assert done.exit_code == 0, done.exception
    assert len(target.read_text().splitlines()) <= 40
    assert load([str(tmp_path / "small.yaml")])[0].cases[0].n < 2000
    assert exit_code(target) == 1
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    assert exit_code(target, PYTHONPATH=str(tmp_path)) == 0


def test_without_options_the_script_is_printed(tmp_path: Path) -> None:
    report = report_of(tmp_path, "two-pass-sequential@cpu")
    done = invoke("repro", str(report), "1")
    assert done.exit_code == 0, done.exception
    path = tmp_path / "script.py"
    path.write_text(done.output)
    assert "np.full((8, 2, 32, 32), 3.3, np.float32)" in done.output
    assert exit_code(path) == 1


def test_what_cannot_be_done_is_one_sentence(tmp_path: Path) -> None:
    report = report_of(tmp_path, "two-pass-sequential@cpu")
    assert "its findings are 1 to" in str(invoke("repro", str(report), "99").exception)
    assert "no environment" in str(
        invoke("repro", str(report), "1", "--shrink", "--env", "x").exception
    )
    document = json.loads(report.read_text())
    document["environments"][0]["name"] = document["results"][0]["environment"] = "old"
    document["results"][0]["backend"] = "old:two-pass-sequential@cpu"
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(document))
    assert invoke("repro", str(elsewhere), "1").exit_code == 0
    assert "--env old=SPEC" in str(invoke("repro", str(elsewhere), "1", "--issue").exception)
    document = json.loads(report.read_text())
    document["cases"][0]["input_sha256"] = "0" * 64
    report.write_text(json.dumps(document))
    assert "not those of the report" in str(invoke("repro", str(report), "1").exception)
    document["cases"][0]["param_dtype"] = None
    report.write_text(json.dumps(document))
    assert "earlier bnaudit" in str(invoke("repro", str(report), "1").exception)
