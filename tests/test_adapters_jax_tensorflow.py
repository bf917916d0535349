"""The adapters of JAX, Flax, TensorFlow and Keras, each in its own environment.

They are `jax` (jax, flax, keras), `tensorflow` (TensorFlow 2 with its Keras), `tensorflow-1` and `torch`
(torch, keras); see `frameworks` for where these are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from correct import outputs as right_outputs
from correct import prepare
from frameworks import DTYPES, HALF, Environments, command

from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.backends import _flax, _jax, _keras, _tensorflow, _tensorflow_1
from bnaudit.worker.rounding import widen

ENVIRONMENTS = {
    "jax@cpu": "jax",
    "flax@cpu": "jax",
    "flax-stable@cpu": "jax",
    "flax-nnx@cpu": "jax",
    "tensorflow@cpu": "tensorflow",
    "tensorflow-nchw@cpu": "tensorflow",
    "tensorflow-moments@cpu": "tensorflow",
    "tensorflow-xla@cpu": "tensorflow",
    "keras-jax@cpu": "jax",
    "keras-tensorflow@cpu": "tensorflow",
    "keras-torch@cpu": "torch",
    "tensorflow-1@cpu": "tensorflow-1",
}
MOVE_NOTHING = ("jax@cpu", "tensorflow-moments@cpu", "tensorflow-xla@cpu")
"""Backends without running statistics of their own."""

KERAS = ("keras-jax@cpu", "keras-tensorflow@cpu", "keras-torch@cpu")
BIASED = ("flax@cpu", "flax-stable@cpu", "flax-nnx@cpu", *KERAS)

FUSED = ("tensorflow@cpu", "tensorflow-nchw@cpu", "tensorflow-1@cpu")
"""Backends that refuse float64, and parameters in 16 bits."""

FLOAT32_ANYWAY = ("keras-jax@cpu", "keras-torch@cpu")
"""Backends that compute in float32 what they say is float64."""

EVERY = pytest.mark.parametrize("backend", ENVIRONMENTS)


def run(
    subjects: Environments, backend: str, folder: Path, text: str
) -> tuple[Reply, dict[str, Any], Any]:
    """The reply to a case, what is right, and the case."""
    name = ENVIRONMENTS[backend]
    case, inputs = prepare(folder, text)
    reply = subjects[name].run(backend, case, inputs)
    correction = 0 if backend in BIASED else 1
    return reply, right_outputs(case, inputs, correction=correction), case


ASYMMETRIC = """
input: {distribution: normal, mean: 1.5, std: 2}
shape: [%s]
dtype: %s
memory_format: %s
param_dtype: %s
momentum: 0.25
affine: {weight: {distribution: normal, mean: 1}, bias: {distribution: normal}}
running: {mean: {distribution: normal}, var: {distribution: uniform, low: 0.5, high: 2}}
backward: true
"""


def check(reply: Reply, right: dict[str, Any], dtype: str, *, near: float = 64) -> None:
    """Every returned quantity is right to `near` roundings of the dtype."""
    for name, got in reply.outputs.items():
        expected = right[name]
        if name in ("y", "grad_input"):
            got, expected = widen(got, dtype), widen(expected, dtype)
        scale = max(1.0, float(np.abs(expected).max()))
        limit = near * HALF[dtype] * scale
        np.testing.assert_allclose(got, expected, rtol=0, atol=limit, err_msg=name)


@EVERY
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "memory_format", "param_dtype"),
    [
        ("16, 3", "contiguous", "statistics"),
        ("6, 3, 7", "strided", "statistics"),
        ("4, 3, 5, 6", "contiguous", "statistics"),
        ("4, 3, 5, 6", "channels_last", "same"),
        ("2, 3, 4, 3, 5", "channels_last", "statistics"),
    ],
)
def test_an_asymmetric_case_is_right(
    subjects: Environments,
    tmp_path: Path,
    backend: str,
    mode: str,
    dtype: str,
    shape: str,
    memory_format: str,
    param_dtype: str,
) -> None:
    text = ASYMMETRIC % (shape, dtype, memory_format, param_dtype) + f"mode: {mode}\n"
    reply, right, _ = run(subjects, backend, tmp_path, text)
    if backend in FUSED and (dtype == "float64" or (param_dtype == "same" and "16" in dtype)):
        assert reply.outcome == "unsupported"
        assert "FusedBatchNorm" in (reply.reason or "")
        return
    assert (reply.outcome, reply.reason) == ("done", None)
    assert reply.kernel
    names = {"y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"}
    if mode == "training" and backend in MOVE_NOTHING:
        names -= {"running_mean", "running_var"}
    assert names <= reply.outputs.keys()
    if dtype == "float64" and backend in FLOAT32_ANYWAY:
        with pytest.raises(AssertionError):
            check(reply, right, dtype)
        near = 64 * HALF["float32"] / HALF["float64"]
        check(reply, right, dtype, near=near)
    else:
        check(reply, right, dtype)


@EVERY
@pytest.mark.parametrize(
    "fields",
    ["affine: null\nbackward: true\n", "steps: 3\nmomentum: null\n", "eps: 1e-3\nmomentum: 1\n"],
    ids=["no-affine", "cumulative", "other-eps"],
)
def test_options_mean_the_same_in_every_framework(
    subjects: Environments, tmp_path: Path, backend: str, fields: str
) -> None:
    text = f"input: {{distribution: normal, mean: 1.5}}\nshape: [4, 3, 5, 6]\n{fields}"
    reply, right, case = run(subjects, backend, tmp_path, text)
    assert (reply.outcome, reply.reason) == ("done", None)
    assert ("grad_input" in reply.outputs) == case.backward
    assert "grad_weight" not in reply.outputs
    assert ("running_var" in reply.outputs) == (backend not in MOVE_NOTHING)
    check(reply, right, case.dtype)


@EVERY
def test_of_one_value_only_the_bias_is_left(
    subjects: Environments, tmp_path: Path, backend: str
) -> None:
    text = "input: {distribution: normal}\nshape: [1, 3]\naffine: {weight: 3, bias: 0.75}\n"
    reply, _, _ = run(subjects, backend, tmp_path, text)
    np.testing.assert_array_equal(reply.outputs["y"], np.full((1, 3), 0.75, np.float32))


@EVERY
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_an_empty_batch_has_an_empty_result(
    subjects: Environments, tmp_path: Path, backend: str, mode: str
) -> None:
    text = f"input: {{distribution: normal}}\nshape: [0, 3, 2, 2]\nbackward: true\nmode: {mode}\n"
    name = ENVIRONMENTS[backend]
    reply = subjects[name].run(backend, *prepare(tmp_path, text))
    assert (reply.outcome, reply.reason) == ("done", None)
    assert reply.outputs["y"].shape == reply.outputs["grad_input"].shape == (0, 3, 2, 2)


OFFSET = "input: {distribution: normal, mean: 1e4}\nshape: [16, 8, 32, 32]\n"


@pytest.mark.parametrize("backend", ["flax@cpu", "flax-nnx@cpu", "jax@cpu"])
def test_the_fast_variance_of_a_large_offset_is_clipped_to_nothing(
    subjects: Environments, tmp_path: Path, backend: str
) -> None:
    reply, right, case = run(subjects, backend, tmp_path, OFFSET)
    # Without a variance, y is divided by the root of eps: 316 times too large, 1.4e3 at most.
    assert np.abs(reply.outputs["y"] - right["y"]).max() > 1000
    assert np.abs(reply.outputs["y"]).max() < 6 / np.sqrt(case.eps)


@pytest.mark.parametrize("backend", ["flax-stable@cpu", "keras-jax@cpu"])
def test_two_passes_bear_a_large_offset(
    subjects: Environments, tmp_path: Path, backend: str
) -> None:
    reply, right, _ = run(subjects, backend, tmp_path, OFFSET)
    assert np.abs(reply.outputs["y"] - right["y"]).max() < 0.01


def test_keras_on_torch_takes_the_root_of_a_negative_variance(
    subjects: Environments, tmp_path: Path
) -> None:
    reply, _, _ = run(subjects, "keras-torch@cpu", tmp_path, OFFSET)
    assert np.isnan(reply.outputs["y"]).any()


CONSTANT = "input: {distribution: constant, value: 3.3}\nshape: [32, 64, 56, 56]\n"


@pytest.mark.parametrize(
    ("backend", "least", "most"),
    [
        ("tensorflow@cpu", 0.06, 0.5),  # 0.467 with two threads, 0.260 with one
        ("tensorflow-nchw@cpu", 0.06, 0.5),  # 0.260
        ("tensorflow-1@cpu", 0.06, 0.5),  # 0.260
        ("flax@cpu", 0, 1e-3),
        ("flax-stable@cpu", 0, 1e-3),
        ("keras-torch@cpu", 0, 1e-3),
    ],
)
def test_long_running_sums_of_a_constant_show_in_y(
    subjects: Environments, tmp_path: Path, backend: str, least: float, most: float
) -> None:
    reply, _, _ = run(subjects, backend, tmp_path, CONSTANT)
    assert least <= np.abs(reply.outputs["y"]).max() <= most


def test_tensorflow_1_raises_a_small_eps_in_silence(subjects: Environments, tmp_path: Path) -> None:
    small = "input: {distribution: normal, std: 0.001}\nshape: [4, 3, 5, 6]\n"
    reply, _, _ = run(subjects, "tensorflow-1@cpu", tmp_path, small + "eps: 1e-7\n")
    right = right_outputs(*prepare(tmp_path, small + "eps: 1.001e-5\n"))
    np.testing.assert_allclose(reply.outputs["y"], right["y"], rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_reaches_tensorflow(tmp_path: Path) -> None:
    means = []
    for threads in (1, 2):
        with (
            scratch_folder() as scratch,
            Subject(command=command("tensorflow"), threads=threads, scratch=scratch) as subject,
        ):
            reply = subject.run("tensorflow@cpu", *prepare(tmp_path, CONSTANT))
            means.append(reply.outputs["running_mean"][0])
    assert means[0] != means[1]


MODULES: list[tuple[ModuleType, str, str, str]] = [
    (_jax, "jax@cpu", "jax", "pip install jax"),
    (_flax, "flax@cpu", "flax", "pip install flax"),
    (_tensorflow, "tensorflow@cpu", "tensorflow", "pip install tensorflow-cpu"),
    (_tensorflow_1, "tensorflow-1@cpu", "tensorflow", "pip install 'tensorflow<2'"),
    (_keras, "keras-jax@cpu", "jax", "pip install jax"),
    (_keras, "keras-tensorflow@cpu", "tensorflow", "pip install tensorflow-cpu"),
    (_keras, "keras-torch@cpu", "torch", "pip install 'bnaudit[torch]'"),
]


@pytest.mark.parametrize(("module", "backend", "package", "install"), MODULES)
def test_what_is_missing_is_said_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, module: Any, backend: str, package: str, install: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, package, None)
    reason = module.unavailable(backend)
    assert reason.startswith(f"{package} is not installed in this environment ({install}")


@pytest.mark.parametrize(("module", "backend", "package", "install"), MODULES[:4])
def test_a_package_that_fails_to_import_says_why(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: Any,
    backend: str,
    package: str,
    install: str,
) -> None:
    (tmp_path / f"{package}.py").write_text("raise AttributeError('no such thing')\n")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = module.unavailable(backend)
    assert reason == f"{package} cannot be imported: AttributeError: no such thing"
