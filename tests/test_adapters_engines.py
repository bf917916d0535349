"""The adapters of Haiku, OpenVINO, OpenCV, ncnn and NNabla, in environments of their own.

See `frameworks` for where these are.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from correct import outputs as right_outputs
from correct import prepare
from frameworks import DTYPES, GRADIENTS, RUNNING, SHAPES, Environments, command, compare
from frameworks import fields as asymmetric

from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.backends import _haiku, _ncnn, _nnabla, _opencv, _openvino


class Framework(NamedTuple):
    """What an adapter takes and returns.

    module: the package's name. statistics: the batch statistics that it hands out. trains: also takes
    batch statistics and gives gradients. correction: 0 for n, 1 for n - 1. computes: the dtype that it
    computes in for another one.
    """

    module: str
    dtypes: tuple[str, ...]
    trains: bool = False
    statistics: frozenset[str] = frozenset()
    correction: int = 1
    computes: tuple[tuple[str, str], ...] = ()


PLACES = {"haiku": "jax"}
"""Environments that are not named like the framework."""

FRAMEWORKS = {
    "haiku": Framework("haiku", DTYPES, trains=True, correction=0),
    "nnabla": Framework(
        "nnabla",
        ("float16", "float32"),
        trains=True,
        statistics=frozenset({"batch_mean", "batch_var"}),
    ),
    "openvino": Framework("openvino", DTYPES, computes=(("float64", "float32"),)),
    "opencv": Framework("cv2", ("float16", "float32")),
    "ncnn": Framework("ncnn", ("float32",)),
}
TRAINING = [name for name, framework in FRAMEWORKS.items() if framework.trains]
INFERENCE_ONLY = [name for name, framework in FRAMEWORKS.items() if not framework.trains]
KINDS: dict[str, dict[str, str]] = {
    "training": {},
    "backward": {"backward": "true"},
    "no-affine": {"backward": "true", "affine": "null"},
    "inference": {"mode": "inference", "backward": "true"},
    "inference-no-affine": {"mode": "inference", "affine": "null"},
    "steps": {"steps": "3"},
    "cumulative": {"steps": "3", "momentum": "null"},
}


def fields(**changes: str) -> str:
    """As in other frameworks, with what OpenVINO asks for and an eps that is no power of two."""
    return asymmetric(**{"param_dtype": "same", "eps": "1e-5", **changes})


def run(subjects: Environments, framework: str, folder: Path, text: str) -> Reply:
    return subjects[PLACES.get(framework, framework)].run(
        f"{framework}@cpu", *prepare(folder, text)
    )


def done(subjects: Environments, framework: str, folder: Path, text: str) -> Reply:
    reply = run(subjects, framework, folder, text)
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    return reply


EVERY = [
    (name, rank, dtype, kind)
    for name in FRAMEWORKS
    for rank, dtype, kind in itertools.product(SHAPES, DTYPES, KINDS)
    if (rank == 4 and dtype == "float32")
    or ((rank == 4 or dtype == "float32") and kind in ("backward", "inference"))
]


@pytest.mark.parametrize(("name", "rank", "dtype", "kind"), EVERY)
def test_every_kind_of_case_gives_the_right_quantities_or_a_refusal(
    subjects: Environments, tmp_path: Path, name: str, rank: int, dtype: str, kind: str
) -> None:
    command(PLACES.get(name, name))
    framework = FRAMEWORKS[name]
    text = fields(shape=f"[{SHAPES[rank]}]", dtype=dtype, **KINDS[kind])
    case, inputs = prepare(tmp_path, text)
    reply = subjects[PLACES.get(name, name)].run(f"{name}@cpu", case, inputs)
    if dtype not in framework.dtypes or (case.mode == "training" and not framework.trains):
        assert reply.outcome == "unsupported", reply
        assert reply.reason
        return
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    assert reply.declarations.running_var_correction == framework.correction
    assert (reply.kernel or "").startswith(name)
    expected = right_outputs(case, inputs, correction=framework.correction)
    compare(reply, expected, dtype, computed=dict(framework.computes).get(dtype))
    names = {"y"} | RUNNING
    if case.mode == "training":
        names |= framework.statistics
    if case.backward and framework.trains:
        names |= GRADIENTS if case.affine else {"grad_input"}
    assert reply.outputs.keys() == names


@pytest.mark.parametrize("name", TRAINING)
def test_other_conventions_would_be_noticed(
    subjects: Environments, tmp_path: Path, name: str
) -> None:
    command(PLACES.get(name, name))
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
    command(PLACES.get(name, name))
    mode = "training" if FRAMEWORKS[name].trains else "inference"
    text = fields(shape="[4, 3, 5, 6]", memory_format=memory_format, backward="true", mode=mode)
    case, inputs = prepare(tmp_path, text)
    reply = subjects[PLACES.get(name, name)].run(f"{name}@cpu", case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    right = right_outputs(case, inputs, correction=FRAMEWORKS[name].correction)
    compare(reply, right, "float32")


@pytest.mark.parametrize("name", ["haiku", "nnabla", "opencv"])
def test_16_bit_tensors_go_with_float32_parameters(
    subjects: Environments, tmp_path: Path, name: str
) -> None:
    command(PLACES.get(name, name))
    mode = "training" if FRAMEWORKS[name].trains else "inference"
    text = fields(
        shape="[4, 3, 5, 6]", dtype="float16", param_dtype="statistics", backward="true", mode=mode
    )
    case, inputs = prepare(tmp_path, text)
    reply = subjects[PLACES.get(name, name)].run(f"{name}@cpu", case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    right = right_outputs(case, inputs, correction=FRAMEWORKS[name].correction)
    compare(reply, right, "float16")


@pytest.mark.parametrize("name", INFERENCE_ONLY)
def test_every_channel_and_image_has_its_own_place(
    subjects: Environments, tmp_path: Path, name: str
) -> None:
    """Enough channels for the packed layouts of vector units, and some more."""
    command(PLACES.get(name, name))
    case, inputs = prepare(tmp_path, fields(shape="[3, 37, 3, 5]", mode="inference"))
    reply = subjects[PLACES.get(name, name)].run(f"{name}@cpu", case, inputs)
    compare(reply, right_outputs(case, inputs), "float32")


RESNET = "shape: [32, 64, 56, 56]\ninput: {distribution: constant, value: 3.3}\n"
OFFSET = "input: {distribution: normal, mean: 1e4}\nshape: [16, 8, 32, 32]\n"


def test_a_constant_of_a_resnet_layer_is_nan_in_nnabla(
    subjects: Environments, tmp_path: Path
) -> None:
    outputs = done(subjects, "nnabla", tmp_path, RESNET).outputs
    assert np.isnan(outputs["y"]).all()
    assert (outputs["batch_var"] < 0).all()


def test_haiku_takes_the_root_of_a_negative_variance(
    subjects: Environments, tmp_path: Path
) -> None:
    outputs = done(subjects, "haiku", tmp_path, OFFSET).outputs
    assert np.isnan(outputs["y"]).any()
    case, inputs = prepare(tmp_path, OFFSET)
    right = right_outputs(case, inputs, correction=0)["running_var"]
    assert np.abs(outputs["running_var"] - right).max() > 0.1  # of a variance of 1, a tenth of it


def test_haiku_averages_as_over_many_steps(subjects: Environments, tmp_path: Path) -> None:
    """A new average's correction of its zero start would forget the running statistics of the case."""
    text = fields(shape="[4, 3, 5, 6]", momentum="0.001")
    case, inputs = prepare(tmp_path, text)
    outputs = done(subjects, "haiku", tmp_path, text).outputs
    np.testing.assert_allclose(outputs["running_mean"], inputs.running_mean, atol=0.01)
    right = right_outputs(case, inputs, correction=0)
    np.testing.assert_allclose(outputs["running_mean"], right["running_mean"], atol=1e-5)


AT_THE_MEAN = """
mode: inference
shape: [4, 3, 8, 8]
input: {distribution: constant, value: 1e8}
running: {mean: 1e8, var: 0}
"""


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("openvino", 100, 1500), ("ncnn", 100, 5000), ("haiku", 0, 0), ("nnabla", 0, 0)],
)
def test_a_shift_folded_from_a_large_mean_is_not_undone_by_the_product(
    subjects: Environments, tmp_path: Path, name: str, low: float, high: float
) -> None:
    outputs = done(subjects, name, tmp_path, AT_THE_MEAN).outputs
    assert low <= np.abs(outputs["y"]).max() <= high


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("openvino", 0.01, 0.2),
        ("opencv", 0.01, 0.2),
        ("ncnn", 0.01, 0.2),
        ("haiku", 0, 1e-5),
        ("nnabla", 0, 1e-5),
    ],
)
def test_folding_costs_what_the_running_mean_is_rounded_by(
    subjects: Environments, tmp_path: Path, name: str, low: float, high: float
) -> None:
    """At 1e6, a float32 is known to 0.03; x minus the mean is exact there."""
    text = "mode: inference\nshape: [4, 3, 8, 8]\ninput: {distribution: normal, mean: 1e6}\n"
    text += "running: {mean: 1e6, var: 0.7}\n"
    right = right_outputs(*prepare(tmp_path, text))["y"]
    outputs = done(subjects, name, tmp_path, text).outputs
    assert low <= np.abs(outputs["y"] - right).max() <= high


def test_openvino_folds_float16_parameters_past_what_float16_holds(
    subjects: Environments, tmp_path: Path
) -> None:
    text = AT_THE_MEAN.replace("1e8", "1e4") + "dtype: float16\nparam_dtype: same\n"
    outputs = done(subjects, "openvino", tmp_path, text).outputs
    assert not np.isfinite(outputs["y"].astype(float)).any()


def test_openvino_computes_float64_in_float32(subjects: Environments, tmp_path: Path) -> None:
    text = fields(shape="[4, 3, 5, 6]", dtype="float64", mode="inference")
    reply = done(subjects, "openvino", tmp_path, text)
    with pytest.raises(AssertionError):
        compare(reply, right_outputs(*prepare(tmp_path, text)), "float64")
    assert "f32" in (reply.kernel or "")


@pytest.mark.parametrize("name", ["haiku", "openvino", "ncnn"])
def test_an_empty_batch_has_an_empty_result(
    subjects: Environments, tmp_path: Path, name: str
) -> None:
    reply = done(subjects, name, tmp_path, fields(shape="[0, 3, 2, 2]", mode="inference"))
    assert reply.outputs["y"].shape == (0, 3, 2, 2)


def test_an_empty_batch_ends_nnabla(tmp_path: Path) -> None:
    with (
        scratch_folder() as scratch,
        Subject(command=command("nnabla"), scratch=scratch) as subject,
    ):
        reply = subject.run("nnabla@cpu", *prepare(tmp_path, fields(shape="[0, 3, 2, 2]")))
    assert reply.outcome == "crash"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("haiku", {"momentum": "0"}, "must be less than 1"),
        ("openvino", {}, "does not train"),
        ("opencv", {}, "does not train"),
        ("ncnn", {}, "does not train"),
        (
            "openvino",
            {"mode": "inference", "dtype": "float16", "param_dtype": "statistics"},
            "Input element types do not match",
        ),
        ("opencv", {"mode": "inference", "dtype": "float64"}, "Assertion failed"),
        ("opencv", {"mode": "inference", "dtype": "bfloat16"}, "no bfloat16"),
        ("opencv", {"mode": "inference", "shape": "[0, 3]"}, "empty batch"),
        ("ncnn", {"mode": "inference", "dtype": "float16"}, "float32"),
        ("nnabla", {"dtype": "float64"}, "Unknown data type config is given"),
        ("nnabla", {"dtype": "bfloat16"}, "no bfloat16"),
    ],
)
def test_what_a_framework_refuses_is_unsupported_in_its_words(
    subjects: Environments, tmp_path: Path, name: str, changes: dict[str, str], words: str
) -> None:
    reply = run(subjects, name, tmp_path, fields(**{"shape": "[4, 3]", **changes}))
    assert reply.outcome == "unsupported", reply
    assert words in (reply.reason or "")


MODULES: dict[str, Any] = {
    "haiku": _haiku,
    "nnabla": _nnabla,
    "openvino": _openvino,
    "opencv": _opencv,
    "ncnn": _ncnn,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_framework_is_unavailable_and_a_command_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    package = FRAMEWORKS[name].module
    monkeypatch.setitem(sys.modules, package, None)
    reason = MODULES[name].unavailable(f"{name}@cpu")
    assert f"{package} is not installed in this environment (pip install" in (reason or "")


@pytest.mark.parametrize("name", MODULES)
def test_a_broken_framework_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = FRAMEWORKS[name].module
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{package}.py"
    for source, words in (
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        ("raise AttributeError('np.bool is gone')\n", "np.bool is gone"),
    ):
        file.write_text(source)
        importlib.invalidate_caches()
        reason = MODULES[name].unavailable(f"{name}@cpu")
        assert (reason or "").startswith(f"{package} cannot be imported: ")
        assert words in (reason or "")
