"""The adapters of ONNX Runtime, Chainer, MXNet, MLX, tinygrad and Paddle, in environments of their own.

See `frameworks` for where these are.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from correct import outputs as right_outputs
from correct import prepare
from frameworks import DTYPES, GRADIENTS, RUNNING, SHAPES, Environments, command, compare, fields

from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.backends import (
    _chainer_real,
    _mlx,
    _mxnet_real,
    _onnxruntime,
    _paddle,
    _tinygrad,
)


class Framework(NamedTuple):
    """What an adapter takes and returns.

    correction: 0 for n, 1 for n - 1. channels_last: what `kernel` says of that memory format. momentum: the
    dtype that the framework rounds it to. perhaps: a dtype that depends on what else is installed.
    """

    dtypes: tuple[str, ...]
    statistics: frozenset[str]
    correction: int
    gradients: bool = True
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    channels_last: str = ""
    momentum: str = "float64"
    perhaps: str = ""


FRAMEWORKS = {
    "onnxruntime": Framework(
        ("float16", "float32", "float64"), frozenset(), 0, gradients=False, momentum="float32"
    ),
    "chainer": Framework(
        ("float16", "float32", "float64"), frozenset({"batch_mean", "batch_var", "invstd"}), 1
    ),
    "mxnet": Framework(
        ("float16", "float32", "float64"),
        frozenset({"batch_mean", "invstd"}),
        0,
        channels_last="axis=-1",
        momentum="float32",
    ),
    "mlx": Framework(DTYPES, frozenset(), 1, ranks=(2, 3, 4)),
    "tinygrad": Framework(DTYPES, frozenset({"batch_mean", "batch_var"}), 1, perhaps="bfloat16"),
    "paddle": Framework(
        ("float32", "float64"), frozenset(), 0, channels_last="NHWC", momentum="float32"
    ),
}
KINDS: dict[str, dict[str, str]] = {
    "training": {},
    "backward": {"backward": "true"},
    "no-affine": {"backward": "true", "affine": "null"},
    "inference": {"mode": "inference", "backward": "true"},
    "steps": {"steps": "3"},
    "cumulative": {"steps": "3", "momentum": "null"},
}


def run(subjects: Environments, framework: str, folder: Path, text: str) -> Reply:
    return subjects[framework].run(f"{framework}@cpu", *prepare(folder, text))


def done(subjects: Environments, framework: str, folder: Path, text: str) -> Reply:
    reply = run(subjects, framework, folder, text)
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    return reply


EVERY = [
    (name, rank, dtype, kind)
    for name, framework in FRAMEWORKS.items()
    for rank, dtype, kind in itertools.product(SHAPES, DTYPES, KINDS)
    if dtype == "float32" or rank == 4
]


@pytest.mark.parametrize(("name", "rank", "dtype", "kind"), EVERY)
def test_every_kind_of_case_gives_the_right_quantities_or_a_refusal(
    subjects: Environments, tmp_path: Path, name: str, rank: int, dtype: str, kind: str
) -> None:
    command(name)
    framework = FRAMEWORKS[name]
    text = fields(shape=f"[{SHAPES[rank]}]", dtype=dtype, **KINDS[kind])
    case, inputs = prepare(tmp_path, text)
    reply = subjects[name].run(f"{name}@cpu", case, inputs)
    if dtype not in framework.dtypes or rank not in framework.ranks:
        assert reply.outcome == "unsupported", reply
        assert reply.reason
        return
    if dtype == framework.perhaps and reply.outcome == "unsupported":
        assert dtype in (reply.reason or "")
        return
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    assert reply.declarations.running_var_correction == framework.correction
    assert name in (reply.kernel or "")
    expected = right_outputs(case, inputs, correction=framework.correction)
    compare(reply, expected, dtype, running=framework.momentum if kind == "cumulative" else None)
    names = {"y"} | RUNNING
    if case.mode == "training":
        names |= framework.statistics
    if case.backward and framework.gradients:
        names |= GRADIENTS if case.affine else {"grad_input"}
    assert reply.outputs.keys() == names


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_other_conventions_would_be_noticed(
    subjects: Environments, tmp_path: Path, name: str
) -> None:
    command(name)
    correction = FRAMEWORKS[name].correction
    reply = done(subjects, name, tmp_path, fields(shape="[4, 3, 5, 6]"))
    for momentum, other in (("0.25", 1 - correction), ("0.75", correction)):
        case, inputs = prepare(tmp_path, fields(shape="[4, 3, 5, 6]", momentum=momentum))
        with pytest.raises(AssertionError, match="running_"):
            compare(reply, right_outputs(case, inputs, correction=other), "float32")


@pytest.mark.parametrize("memory_format", ["channels_last", "strided"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_memory_format_gives_the_right_quantities(
    subjects: Environments, tmp_path: Path, name: str, memory_format: str
) -> None:
    command(name)
    text = fields(shape="[4, 3, 5, 6]", memory_format=memory_format, backward="true")
    case, inputs = prepare(tmp_path, text)
    reply = subjects[name].run(f"{name}@cpu", case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    compare(reply, right_outputs(case, inputs, correction=FRAMEWORKS[name].correction), "float32")
    if memory_format == "channels_last":
        assert FRAMEWORKS[name].channels_last in (reply.kernel or "")


RESNET = "shape: [32, 64, 56, 56]\ninput: {distribution: constant, value: 3.3}\n"


@pytest.mark.parametrize(
    ("name", "memory_format", "low", "high"),
    [
        ("mxnet", "contiguous", 0.25, 0.27),
        ("mxnet", "channels_last", 0.25, 0.27),
        ("mlx", "contiguous", 0.25, 0.27),
        ("paddle", "channels_last", 0.25, 0.27),
        ("chainer", "channels_last", 0.25, 0.27),
        ("chainer", "contiguous", 0, 1e-3),
        ("paddle", "contiguous", 0, 1e-2),
        ("onnxruntime", "contiguous", 0, 1e-2),
    ],
)
def test_a_constant_of_a_resnet_layer_shows_who_adds_one_after_another(
    subjects: Environments,
    tmp_path: Path,
    name: str,
    memory_format: str,
    low: float,
    high: float,
) -> None:
    reply = done(subjects, name, tmp_path, RESNET + f"memory_format: {memory_format}\n")
    assert low <= np.abs(reply.outputs["y"]).max() <= high


def test_mxnet_rebuilds_its_running_variance_from_a_rounded_root(
    subjects: Environments, tmp_path: Path
) -> None:
    constant = "input: {distribution: constant, value: 100}\nshape: [4, 3, 8, 8]\nmomentum: 1\n"
    assert (done(subjects, "mxnet", tmp_path, constant).outputs["running_var"] < 0).all()
    text = (
        "input: {distribution: normal, std: 1e-5}\nshape: [16, 8, 32, 32]\nmomentum: 1\neps: 1e-3\n"
    )
    case, inputs = prepare(tmp_path, text)
    right = right_outputs(case, inputs, correction=0)["running_var"]
    got = done(subjects, "mxnet", tmp_path, text).outputs["running_var"]
    assert np.abs(got / right - 1).max() > 0.5


def test_mxnet_names_the_switch_that_chooses_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXNET_MKLDNN_ENABLED", "0")
    with scratch_folder() as scratch, Subject(command=command("mxnet"), scratch=scratch) as subject:
        reply = subject.run("mxnet@cpu", *prepare(tmp_path, fields(shape="[4, 3]")))
    assert (reply.kernel or "").endswith("axis=1, MXNET_MKLDNN_ENABLED=0")


WIDE = (
    "input: {distribution: normal, std: 1000}\nshape: [16, 3, 8, 8]\ndtype: float16\nmomentum: 1\n"
)


def test_16_bit_parameters_overflow_what_onnxruntime_and_chainer_keep_in_them(
    subjects: Environments, tmp_path: Path
) -> None:
    text = WIDE + "param_dtype: same\n"
    case, inputs = prepare(tmp_path, text)
    right = right_outputs(case, inputs)["y"].astype(float)
    # Casts around ONNX Runtime's node: only what leaves it is in 16 bits. Chainer's statistics are.
    outputs = done(subjects, "onnxruntime", tmp_path, text).outputs
    assert np.isinf(outputs["running_var"]).all()
    np.testing.assert_allclose(outputs["y"].astype(float), right, atol=0.01)
    outputs = done(subjects, "chainer", tmp_path, text).outputs
    assert np.isinf(outputs["batch_var"]).all()
    assert not outputs["y"].any()


@pytest.mark.parametrize("name", ["mxnet", "mlx", "tinygrad"])
def test_a_variance_above_65504_overflows_in_16_bits(
    subjects: Environments, tmp_path: Path, name: str
) -> None:
    outputs = done(subjects, name, tmp_path, WIDE).outputs
    assert np.isinf(outputs["running_var"]).all()
    assert not outputs["y"].any()


def test_mlx_adds_16_bit_numbers_in_16_bits(subjects: Environments, tmp_path: Path) -> None:
    text = "input: {distribution: normal, mean: 10}\nshape: [16, 3, 32, 32]\ndtype: float16\n"
    outputs = done(subjects, "mlx", tmp_path, text).outputs
    assert np.isinf(outputs["running_mean"]).all()
    assert np.isnan(outputs["y"].astype(float)).all()


def test_paddle_passes_a_single_value_through(subjects: Environments, tmp_path: Path) -> None:
    text = fields(shape="[1, 3]", backward="true")
    _, inputs = prepare(tmp_path, text)
    outputs = done(subjects, "paddle", tmp_path, text).outputs
    assert inputs.grad_output is not None
    np.testing.assert_array_equal(outputs["y"], inputs.x[0])
    np.testing.assert_array_equal(outputs["grad_input"], inputs.grad_output[0])
    np.testing.assert_array_equal(outputs["running_var"], inputs.running_var)


def test_an_empty_batch_leaves_mlx_without_running_statistics(
    subjects: Environments, tmp_path: Path
) -> None:
    for text in (fields(shape="[0, 3]"), fields(shape="[0, 3, 4, 4]", backward="true")):
        for _ in range(3):
            outputs = done(subjects, "mlx", tmp_path, text).outputs
            assert np.isnan(outputs["running_mean"]).all()
            for name in GRADIENTS & outputs.keys():
                assert not outputs[name].any()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("onnxruntime", {"dtype": "bfloat16"}, "Could not find an implementation"),
        ("chainer", {"dtype": "bfloat16"}, "no bfloat16"),
        ("chainer", {"shape": "[0, 3, 2]", "backward": "true"}, "ZeroDivisionError"),
        ("mxnet", {"dtype": "float16", "param_dtype": "same"}, "requires uniform type"),
        ("mxnet", {"shape": "[0, 3]"}, "length of 0"),
        ("mlx", {"shape": "[1, 3]"}, "requires more than one value per channel"),
        ("mlx", {"eps": "0"}, "'eps' must be positive"),
        ("mlx", {"shape": "[2, 3, 2, 2, 2]"}, "2, 3 or 4 dimensions"),
        ("tinygrad", {"shape": "[1, 3]"}, "ZeroDivisionError"),
        ("paddle", {"dtype": "float16"}, "is not registered"),
    ],
)
def test_what_a_framework_refuses_is_unsupported_in_its_words(
    subjects: Environments, tmp_path: Path, name: str, changes: dict[str, str], words: str
) -> None:
    reply = run(subjects, name, tmp_path, fields(**{"shape": "[4, 3]", **changes}))
    assert reply.outcome == "unsupported", reply
    assert words in (reply.reason or "")


MODULES: dict[str, Any] = {
    "onnxruntime": _onnxruntime,
    "chainer": _chainer_real,
    "mxnet": _mxnet_real,
    "mlx": _mlx,
    "tinygrad": _tinygrad,
    "paddle": _paddle,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_framework_is_unavailable_and_a_command_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    reason = MODULES[name].unavailable(f"{name}@cpu")
    assert f"{name} is not installed in this environment" in (reason or "")
    assert "pip install" in (reason or "")


@pytest.mark.parametrize("name", MODULES)
def test_a_broken_framework_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{name}.py"
    for source, words in (
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        ("raise AttributeError('np.bool is gone')\n", "np.bool is gone"),
    ):
        file.write_text(source)
        importlib.invalidate_caches()
        reason = MODULES[name].unavailable(f"{name}@cpu")
        assert (reason or "").startswith(f"{name} cannot be imported: ")
        assert words in (reason or "")


def test_tinygrad_needs_the_compiler_that_it_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = types.ModuleType("tinygrad.helpers")
    vars(helpers)["TRAINING"] = 0
    monkeypatch.setitem(sys.modules, "tinygrad", types.ModuleType("tinygrad"))
    monkeypatch.setitem(sys.modules, "tinygrad.helpers", helpers)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "there is no clang" in (_tinygrad.unavailable("tinygrad@cpu") or "")
    monkeypatch.setenv("CC", "clang-0")
    assert "there is no clang-0" in (_tinygrad.unavailable("tinygrad@cpu") or "")
    (tmp_path / "clang-0").touch(0o755)
    assert _tinygrad.unavailable("tinygrad@cpu") is None
