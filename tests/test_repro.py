"""Scripts: they build the audit's own inputs, get the adapters' own results, and exit as they should."""

from __future__ import annotations

import ast
import contextlib
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frameworks import command

from bnaudit import audit, calls, repro
from bnaudit.inputs import Inputs, make
from bnaudit.report import CaseRecord, Quantity, restored
from bnaudit.repro import Fault, ReproError, Script
from bnaudit.scenario import Case, load, shipped
from bnaudit.subject import Subject, scratch_folder
from bnaudit.verdict import Judged
from bnaudit.worker.backends import BACKENDS
from bnaudit.worker.backends._exact import exact
from bnaudit.worker.layout import bits
from bnaudit.worker.rounding import round_to, widen, widen64
from bnaudit.writer import Writer

CONSTANT = """
name: constant
input: {distribution: constant, value: 3.3}
shape: [4, 2, 32, 32]
memory_format: channels_last
"""

DISTRIBUTIONS = [
    "{distribution: constant, value: 3.3}",
    "{distribution: normal, mean: 1000, std: 0.1}",
    "{distribution: normal}",
    "{distribution: uniform, low: -0.3, high: 7}",
    "{distribution: ramp, low: -3, high: 0.7}",
    "{distribution: alternating, mean: 0.1, amplitude: 1e-3}",
    "{distribution: outlier, value: 1e4, position: first}",
    "{distribution: outlier, value: 1e4, position: last, std: 2}",
    "{distribution: outlier, value: 1e4, position: random, mean: 5}",
    "{distribution: wide, low_exponent: -9, high_exponent: 8}",
    "{distribution: sparse, density: 0.2, mean: 3}",
    "{distribution: subnormal}",
    "{distribution: planted, mean: 3, spread: 0.5}",
    "{distribution: nonfinite, base: {distribution: normal}, values: [nan, inf, -inf], count: 5}",
    "{distribution: channels, items: [{distribution: normal}, {distribution: ramp}]}",
]

ASYMMETRIC = """
name: asymmetric
input: {distribution: normal, mean: 3, std: 2}
shape: SHAPE
dtype: DTYPE
memory_format: FORMAT
mode: MODE
backward: BACKWARD
affine: {weight: {distribution: normal, mean: 1, std: 0.5}, bias: {distribution: normal}}
running: {mean: {distribution: normal}, var: {distribution: uniform, low: 0.5, high: 2}}
momentum: 0.25
eps: 1.0e-3
"""


def case_of(text: str, folder: Path) -> Case:
    path = folder / "case.yaml"
    path.write_text(text)
    return load([str(path)])[0].cases[0]


def asymmetric(folder: Path, **fields: str) -> Case:
    text = ASYMMETRIC
    defaults = {"shape": "[4, 3, 2, 5]", "dtype": "float32", "format": "contiguous"}
    for name, value in {**defaults, "mode": "training", "backward": "true", **fields}.items():
        text = text.replace(name.upper(), value)
    return case_of(text, folder)


def executed(script: Script, folder: Path) -> dict[str, Any]:
    """The arrays that the script has before it calls anything."""
    tree = ast.parse(script.text)
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and "batch_norm" in ast.unparse(node):
            break
        is_about_torch = "torch" in ast.unparse(node) and not isinstance(node, ast.Expr)
        if not is_about_torch and "torch.set_num_threads" not in ast.unparse(node):
            kept.append(node)
    for name, array in script.files.items():
        np.save(f"{folder / 'script.py'}.{name}.npy", array)
    scope: dict[str, Any] = {"__file__": str(folder / "script.py")}
    with np.errstate(all="ignore"):
        exec(compile(ast.Module(kept, []), "script", "exec"), scope)
    return scope


def script_of(case: Case, inputs: Inputs, backend: str = "torch@cpu", **fault: Any) -> Script:
    given = {"quantity": "y", "index": (0,) * len(case.shape), "allowed": 1.0, **fault}
    return repro.script(case, inputs, Fault("fail", **given), backend, threads=2, found="")


def run(script: Script, folder: Path, python: str = sys.executable, **env: str) -> Any:
    path = folder / "script.py"
    path.write_text(script.text)
    for name, array in script.files.items():
        np.save(f"{path}.{name}.npy", array)
    return subprocess.run(
        [python, str(path)], capture_output=True, text=True, env={**os.environ, **env}
    )


# --- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_script_makes_the_inputs_bit_for_bit(
    distribution: str, dtype: str, tmp_path: Path
) -> None:
    case = case_of(
        f"name: s\ninput: {distribution}\nshape: [4, 2, 8, 4]\ndtype: {dtype}\nseed: 7\n"
        "affine: {weight: {distribution: normal}, bias: 0.1}\n",
        tmp_path,
    )
    inputs = make(case, tmp_path)
    script = script_of(case, inputs)
    made = executed(script, tmp_path)
    plain = distribution.split()[1].rstrip(",}") not in ("subnormal",) or dtype != "bfloat16"
    assert not script.files or not plain
    for name in ("x", "weight", "bias", "running_mean", "running_var"):
        wanted = getattr(inputs, name)[0] if name == "x" else getattr(inputs, name)
        own = dtype if name == "x" else case.parameter_dtype
        wanted = np.ascontiguousarray(widen(wanted, own) if own == "bfloat16" else wanted)
        assert made[name].dtype == wanted.dtype
        assert np.array_equal(bits(made[name]), bits(wanted)), name


def test_a_small_array_is_written_out_and_a_file_comes_along_where_nothing_else_will_do(
    tmp_path: Path,
) -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 2, 2)).astype(np.float32)
    np.save(tmp_path / "small.npy", values)
    np.save(tmp_path / "large.npy", np.tile(values, (9, 1, 1, 1)) * np.float32(1.1))
    for name, files in (("small", set()), ("large", {"x"})):
        case = case_of(f"name: s\ninput: {{distribution: file, path: {name}.npy}}\n", tmp_path)
        folder = tmp_path / f"{name}-inputs"
        folder.mkdir()
        inputs = make(case, folder)
        script = script_of(case, inputs)
        assert set(script.files) == files
        assert np.array_equal(executed(script, tmp_path)["x"], inputs.x[0])


# --- calls -----------------------------------------------------------------------------------------


class Workers:
    """A subject for each interpreter, because starting torch takes seconds."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.scratch = stack.enter_context(scratch_folder())
        self._stack = stack
        self._subjects: dict[str, Subject] = {}

    def outputs(self, case: Case, inputs: Inputs, backend: str, python: str) -> Mapping[str, Any]:
        if python not in self._subjects:
            subject = Subject(command=(python,), scratch=self.scratch)
            self._subjects[python] = self._stack.enter_context(subject)
        reply = self._subjects[python].run(backend, case, inputs)
        assert reply.outcome in ("done", "unsupported"), reply
        return reply.outputs


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with contextlib.ExitStack() as stack:
        yield Workers(stack)


def assert_the_script_computes_the_same(
    workers: Workers, case: Case, backend: str, folder: Path, python: str = sys.executable
) -> None:
    """Every quantity that the script has has the bits that the worker returned."""
    (folder / "inputs").mkdir(exist_ok=True)
    inputs = make(case, folder / "inputs")
    outputs = workers.outputs(case, inputs, backend, python)
    if not outputs:
        return  # which the framework does not do
    values = calls.call(backend, case, 2).values
    base, checks = "", []
    # All in one process, for its start takes seconds; running statistics before they are moved again.
    for name in sorted(outputs.keys() & values.keys(), key=lambda name: "running" not in name):
        array = outputs[name]
        if name in ("y", "grad_input"):
            array = widen(array, case.dtype)
        index = tuple(length - 1 for length in array.shape)
        expected = float(array[index])
        text = script_of(case, inputs, backend, quantity=name, index=index, expected=expected).text
        before, _, rest = text.partition("value = float(")
        base = base or before
        checks.append(
            f"print('{name}', float({rest.partition(')' + chr(10) + 'expected')[0]}), {expected!r})"
        )
    program = base + "\n".join(checks)
    if python == sys.executable:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "script", "exec"), {})
        output = printed.getvalue()
    else:
        done = run(Script(program, {}, None), folder, python)
        assert done.returncode == 0, done.stderr[-2000:]
        output = done.stdout
    lines = output.splitlines()[-len(checks) :]
    assert len(lines) == len(checks) > 0
    for line in lines:
        name, found, expected_text = line.split()
        value = float(found)
        if name in ("y", "grad_input"):  # the worker rounds what comes back wider
            value = float(widen64(round_to(np.array([value]), case.dtype), case.dtype)[0])
        assert value == float(expected_text), line


VARIANTS: list[dict[str, str]] = [
    {},
    {"format": "channels_last"},
    {"format": "strided"},
    {"mode": "inference", "backward": "false"},
    {"dtype": "bfloat16", "shape": "[4, 3]"},
    {"dtype": "float64", "shape": "[4, 3, 2, 2, 2]", "format": "channels_last"},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_torch_is_called_as_the_adapter_calls_it(
    fields: dict[str, str], tmp_path: Path, workers: Workers
) -> None:
    pytest.importorskip("torch")
    assert_the_script_computes_the_same(
        workers, asymmetric(tmp_path, **fields), "torch@cpu", tmp_path
    )


def test_torch_is_called_with_a_tensor_of_onednn_s(tmp_path: Path, workers: Workers) -> None:
    pytest.importorskip("torch")
    assert_the_script_computes_the_same(workers, asymmetric(tmp_path), "torch-mkldnn@cpu", tmp_path)


@pytest.mark.parametrize("backend", ["two-pass@cpu", "chainer-2016@cpu", "gemm@cpu"])
def test_a_specimen_is_called_as_the_worker_calls_it(
    backend: str, tmp_path: Path, workers: Workers
) -> None:
    assert_the_script_computes_the_same(
        workers, asymmetric(tmp_path, format="channels_last"), backend, tmp_path
    )


def test_a_specimen_gets_16_bits_widened_and_its_y_is_rounded(
    tmp_path: Path, workers: Workers
) -> None:
    case = asymmetric(tmp_path, dtype="float16")
    assert_the_script_computes_the_same(workers, case, "one-pass@cpu", tmp_path)


def test_a_specimen_that_counts_steps_is_told_them(tmp_path: Path, workers: Workers) -> None:
    case = asymmetric(tmp_path, backward="false")
    case = case.model_copy(update={"steps": 3})
    assert_the_script_computes_the_same(workers, case, "nvcaffe-0.15@cpu", tmp_path)


@pytest.mark.parametrize("momentum", ["0.25", "null"])
def test_several_steps_are_a_loop(momentum: str, tmp_path: Path, workers: Workers) -> None:
    pytest.importorskip("torch")
    text = ASYMMETRIC.replace("momentum: 0.25", f"momentum: {momentum}\nsteps: 3")
    for name, value in (("SHAPE", "[9, 3, 4]"), ("DTYPE", "float32"), ("FORMAT", "contiguous")):
        text = text.replace(name, value)
    case = case_of(text.replace("MODE", "training").replace("BACKWARD", "false"), tmp_path)
    assert_the_script_computes_the_same(workers, case, "torch@cpu", tmp_path)


PLUGIN = """
import numpy as np

def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    mean = x.mean((0, *range(2, x.ndim)))
    running_mean += momentum * (mean - running_mean)
    return (x - mean.reshape(1, -1, 1, 1)).astype(x.dtype)
"""


def test_a_plugin_is_imported_from_its_file(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "my_bn.py"
    path.write_text(PLUGIN)
    case = asymmetric(tmp_path, format="strided", backward="false")
    assert_the_script_computes_the_same(workers, case, f"{path}:batch_norm", tmp_path)


FRAMEWORKS = {
    "jax@cpu": "jax",
    "flax@cpu": "jax",
    "flax-stable@cpu": "jax",
    "flax-nnx@cpu": "jax",
    "keras-jax@cpu": "jax",
    "keras-tensorflow@cpu": "tensorflow",
    "keras-torch@cpu": "torch",
    "tensorflow@cpu": "tensorflow",
    "tensorflow-nchw@cpu": "tensorflow",
    "tensorflow-moments@cpu": "tensorflow",
    "tensorflow-xla@cpu": "tensorflow",
    "tensorflow-1@cpu": "tensorflow-1",
    "onnxruntime@cpu": "onnxruntime",
    "mlx@cpu": "mlx",
    "tinygrad@cpu": "tinygrad",
    "paddle@cpu": "paddle",
    "mxnet@cpu": "mxnet",
    "chainer@cpu": "chainer",
    "haiku@cpu": "jax",
    "mindspore@cpu": "mindspore",
    "nnabla@cpu": "nnabla",
    "megengine@cpu": "megengine",
}


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"format": "channels_last", "backward": "false", "dtype": "float16"},
        {"mode": "inference", "backward": "false", "shape": "[4, 3, 6]"},
    ],
)
def test_frameworks_are_called_as_their_adapters_call_them(
    backend: str, fields: dict[str, str], tmp_path: Path, workers: Workers
) -> None:
    python = command(FRAMEWORKS[backend])[0]
    assert_the_script_computes_the_same(
        workers, asymmetric(tmp_path, **fields), backend, tmp_path, python
    )


@pytest.mark.parametrize("file", [path.name for path in sorted(shipped().glob("*.yaml"))])
def test_every_shipped_case_can_be_rebuilt_from_its_record(file: str) -> None:
    for scenario in load([str(shipped() / file)]):
        for case in scenario.cases:
            writer = Writer(None, ["bnaudit"])
            record = writer.add_case(audit.CaseFacts(case, case.n, None, None))
            again = CaseRecord.model_validate_json(record.to_json())
            assert repro.rebuilt(again) == case


# --- faults ----------------------------------------------------------------------------------------


def judged(**fields: Any) -> Judged:
    empty = dict.fromkeys(
        ("label", "max_abs_error", "max_ulp_error", "bound_ratio", "tight_ratio", "floor", "reason")
    )
    element = {
        "index": [0, 1],
        "value": 0.5,
        "reference": 0.0,
        "value_hex": "",
        "reference_hex": "",
    }
    record = {**empty, "status": "fail", "nonfinite": 0, "worst": element, **fields}
    return restored(Quantity.model_validate(record), Judged)


def test_what_is_allowed_follows_from_the_ratio() -> None:
    fault = repro.fault_of("fail", {"y": judged(bound_ratio=5.0, max_abs_error=0.5)}, {}, None)
    assert fault is not None
    assert (fault.quantity, fault.index, fault.value) == ("y", (0, 1), 0.5)
    assert fault.allowed == pytest.approx(0.1)
    assert fault.excess == pytest.approx(5)


def test_a_constant_channel_is_allowed_a_thousandth_of_the_weight() -> None:
    y = judged(bound_ratio=0.5, constant_misses=3, constant_error=0.25)
    fault = repro.fault_of("fail", {"y": y}, {}, np.array([7.0, -2.0]))
    assert fault is not None
    assert fault.allowed == pytest.approx(0.002)


def test_another_element_than_the_one_that_fails_is_not_taken_for_it() -> None:
    y = judged(bound_ratio=0.5, constant_misses=3, constant_error=0.25)
    fault = repro.fault_of("fail", {"y": y}, {}, None)
    assert fault is not None
    assert fault.index is None


def test_a_threshold_of_the_scenario_counts() -> None:
    y = judged(bound_ratio=0.1, max_abs_error=0.5)
    assert repro.fault_of("fail", {"y": judged(status="pass")}, {}, None) is None
    fault = repro.fault_of("fail", {"y": y}, {"y": {"max_abs_error": 0.2}}, None)
    assert fault is not None
    assert fault.allowed == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("value", "expected", "allowed", "code"),
    [
        (0.5, 0.0, 0.1, 1),
        (0.05, 0.0, 0.1, 0),
        (math.nan, 0.0, 0.1, 1),
        (math.inf, 0.0, None, 1),
        (0.5, 0.0, None, 0),
        (0.5, math.nan, None, 1),
        (math.nan, math.nan, None, 0),
    ],
)
def test_the_exit_code_says_whether_the_fault_is_there(
    value: float, expected: float, allowed: float | None, code: int, tmp_path: Path
) -> None:
    """The framework is a plug-in that returns what the test says."""
    path = tmp_path / "says.py"
    path.write_text(
        f"inf, nan = float('inf'), float('nan')\ndef f(x, *a, **k):\n    return x * 0 + {value!r}\n"
    )
    case = case_of(CONSTANT, tmp_path)
    inputs = make(case, tmp_path)
    script = script_of(case, inputs, f"{path}:f", expected=expected, allowed=allowed)
    done = run(script, tmp_path)
    assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("quantity", "index"),
    [
        ("y", (3, 2, 1)),
        ("batch_mean", (1,)),
        ("batch_var", (1,)),
        ("invstd", (1,)),
        ("running_mean", (1,)),
        ("running_var", (1,)),
        ("grad_input", (3, 2, 1)),
        ("grad_weight", (1,)),
        ("grad_bias", (1,)),
    ],
)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_fractions_prove_what_the_audit_expects(
    quantity: str, index: tuple[int, ...], mode: str, tmp_path: Path
) -> None:
    """The exact backend, whose results are correctly rounded, and the proof agree to the last bit."""
    if mode == "inference" and quantity not in ("y", "grad_input", "grad_weight", "grad_bias"):
        return
    case = asymmetric(tmp_path, shape="[4, 3, 5]", mode=mode, dtype="float64")
    inputs = make(case, tmp_path)
    outputs = exact(
        inputs.x[0],
        inputs.weight,
        inputs.bias,
        inputs.running_mean,
        inputs.running_var,
        training=mode == "training",
        momentum=0.25,
        eps=case.eps,
        grad_output=None if inputs.grad_output is None else inputs.grad_output[0],
    )
    script = script_of(case, inputs, "exact@cpu", quantity=quantity, index=index, expected=1.0)
    assert script.proof is not None
    done = subprocess.run([sys.executable, "-c", script.proof], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(outputs[quantity][index])


def test_what_cannot_be_shown_is_one_sentence(tmp_path: Path) -> None:
    case = case_of(CONSTANT, tmp_path)
    inputs = make(case, tmp_path)
    for backend, fault, words in (
        ("torch-sync@cpu", {}, "no stand-alone script for torch-sync@cpu"),
        ("torch@cpu", {"index": None}, "--shrink"),
        ("onnxruntime@cpu", {"quantity": "invstd"}, "hands out no invstd"),
        (f"{tmp_path}/none.py:f", {}, "cannot be read"),
    ):
        with pytest.raises(ReproError, match=re.escape(words)):
            script_of(case, inputs, backend, **fault)


def test_every_template_is_of_a_backend_that_there_is() -> None:
    assert set(calls.TEMPLATES) <= set(BACKENDS)
