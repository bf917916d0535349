"""The adapters of MindSpore and MegEngine, and PyTorch's in Debian's PyTorch 1.13, on its Python.

See `frameworks` for where these are; Debian's is skipped where python3-torch is not installed.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from correct import outputs as right_outputs
from correct import prepare
from frameworks import DTYPES, GRADIENTS, RUNNING, SHAPES, Environments, compare, fields

from bnaudit.subject import Reply, Subject
from bnaudit.worker.backends import _megengine, _mindspore

DEBIAN_TORCH = Path("/usr/lib/python3/dist-packages/torch")


class Adapter(NamedTuple):
    """What a backend takes and returns. ranks: in training; dtypes: with parameters in float32 or float64.

    inference_gradients: whether it has gradients in inference, and would refuse a case that asks for them.
    """

    environment: str
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    statistics: frozenset[str]
    inference_gradients: bool = True


ADAPTERS = {
    "torch@cpu": Adapter(
        "torch-1",
        ("bfloat16", "float32", "float64"),
        (2, 3, 4, 5),
        frozenset({"batch_mean", "invstd"}),
    ),
    "torch-mkldnn@cpu": Adapter(
        "torch-1",
        ("bfloat16", "float32"),
        (4,),
        frozenset({"batch_mean", "batch_var"}),
        inference_gradients=False,
    ),
    "mindspore@cpu": Adapter(
        "mindspore", ("float16", "float32"), (2, 3, 4), frozenset({"batch_mean", "batch_var"})
    ),
    "megengine@cpu": Adapter("megengine", ("float16", "float32"), (2, 3, 4), frozenset()),
}
KINDS: dict[str, dict[str, str]] = {
    "backward": {"backward": "true"},
    "no-affine": {"backward": "true", "affine": "null"},
    "inference": {"mode": "inference"},
    "inference-backward": {"mode": "inference", "backward": "true"},
    "steps": {"steps": "3"},
}
EVERY = pytest.mark.parametrize("backend", ADAPTERS)


def chosen(subjects: Environments, backend: str) -> Subject:
    """The subject that has the backend, or a skip."""
    name = ADAPTERS[backend].environment
    if name == "torch-1" and not DEBIAN_TORCH.exists():
        pytest.skip("Debian's python3-torch is not installed")
    return subjects[name]


def done(subjects: Environments, backend: str, folder: Path, text: str) -> Reply:
    reply = chosen(subjects, backend).run(backend, *prepare(folder, text))
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    return reply


CASES = [
    (backend, rank, dtype, kind)
    for backend in ADAPTERS
    for rank, dtype, kind in itertools.product(SHAPES, DTYPES, KINDS)
    if dtype == "float32" or rank == 4
]


@pytest.mark.parametrize(("backend", "rank", "dtype", "kind"), CASES)
def test_every_kind_of_case_gives_the_right_quantities_or_a_refusal(
    subjects: Environments, tmp_path: Path, backend: str, rank: int, dtype: str, kind: str
) -> None:
    adapter = ADAPTERS[backend]
    subject = chosen(subjects, backend)
    case, inputs = prepare(tmp_path, fields(shape=f"[{SHAPES[rank]}]", dtype=dtype, **KINDS[kind]))
    ranks = adapter.ranks
    if backend == "torch-mkldnn@cpu" and kind == "inference":
        ranks = (*ranks, 5)  # which it has for inference only
    no_weight = backend == "torch-mkldnn@cpu" and case.affine is None
    no_gradients = kind == "inference-backward" and not adapter.inference_gradients
    reply = subject.run(backend, case, inputs)
    if dtype not in adapter.dtypes or rank not in ranks or no_weight or no_gradients:
        assert reply.outcome == "unsupported", reply
        assert reply.reason
        return
    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
    assert reply.kernel
    compare(reply, right_outputs(case, inputs), dtype)
    names = {"y"} | RUNNING
    if case.mode == "training":
        names |= adapter.statistics
    if case.backward:
        names |= GRADIENTS if case.affine else {"grad_input"}
    assert reply.outputs.keys() == names


@EVERY
def test_other_conventions_would_be_noticed(
    subjects: Environments, tmp_path: Path, backend: str
) -> None:
    reply = done(subjects, backend, tmp_path, fields(shape="[4, 3, 5, 6]"))
    for momentum, correction in (("0.25", 0), ("0.75", 1)):
        case, inputs = prepare(tmp_path, fields(shape="[4, 3, 5, 6]", momentum=momentum))
        with pytest.raises(AssertionError, match="running_"):
            compare(reply, right_outputs(case, inputs, correction=correction), "float32")


@pytest.mark.parametrize("memory_format", ["channels_last", "strided"])
@EVERY
def test_every_memory_format_gives_the_right_quantities(
    subjects: Environments, tmp_path: Path, backend: str, memory_format: str
) -> None:
    text = fields(shape="[4, 3, 5, 6]", memory_format=memory_format, backward="true")
    case, inputs = prepare(tmp_path, text)
    compare(done(subjects, backend, tmp_path, text), right_outputs(case, inputs), "float32")


RESNET = "shape: [32, 64, 56, 56]\ninput: {distribution: constant, value: %s}\n"


@pytest.mark.parametrize(
    ("backend", "value", "memory_format", "low", "high"),
    [
        ("torch@cpu", 3.3, "channels_last", 0.45, 0.48),
        ("torch@cpu", 3.3, "contiguous", 1e-5, 1e-4),
        ("torch-mkldnn@cpu", 3.3, "contiguous", 0.007, 0.008),
        ("mindspore@cpu", 3.3, "contiguous", 0.007, 0.008),
        ("megengine@cpu", 3.3, "contiguous", 0.25, 0.27),
        ("torch-mkldnn@cpu", 12345.678, "contiguous", 0.99, 1),
        ("mindspore@cpu", 12345.678, "contiguous", 0.99, 1),
        ("megengine@cpu", 12345.678, "contiguous", 0.99, 1),
    ],
)
def test_a_constant_of_a_resnet_layer_shows_how_it_is_added_up(
    subjects: Environments,
    tmp_path: Path,
    backend: str,
    value: float,
    memory_format: str,
    low: float,
    high: float,
) -> None:
    text = RESNET % value + f"memory_format: {memory_format}\n"
    reply = done(subjects, backend, tmp_path, text)
    assert low <= np.abs(reply.outputs["y"]).max() <= high


@pytest.mark.parametrize(
    ("value", "y"), [("100", -1.22e-4), ("1e4", 0.0269), ("12345.678", -0.0747), ("1e8", 484.55)]
)
def test_torch_1_13_turns_constants_into_the_same_as_2_13_does(
    subjects: Environments, tmp_path: Path, value: str, y: float
) -> None:
    text = f"shape: [1, 1, 3, 3]\ninput: {{distribution: constant, value: {value}}}\n"
    reply = done(subjects, "torch@cpu", tmp_path, text)
    if not (reply.kernel or "").endswith(("AVX2", "AVX512")):
        pytest.skip("the figures are those of x86-64 with FMA")
    np.testing.assert_allclose(reply.outputs["y"], y, rtol=5e-3)


def test_torch_1_13_lacks_what_came_later(subjects: Environments) -> None:
    subject = chosen(subjects, "torch@cpu")
    reasons = subject.describe(["torch-compile@cpu", "torch-sync@cpu", "torch-sync-4@cpu"])
    assert "has no torch.compile" in (reasons["torch-compile@cpu"] or "")
    for name in ("torch-sync@cpu", "torch-sync-4@cpu"):
        assert "2.0 is needed" in (reasons[name] or "")


def test_eps_may_be_0_in_torch_1_13(subjects: Environments, tmp_path: Path) -> None:
    for backend in ("torch@cpu", "torch-mkldnn@cpu"):
        text = fields(shape="[4, 3, 5, 6]", eps="0")
        case, inputs = prepare(tmp_path, text)
        compare(done(subjects, backend, tmp_path, text), right_outputs(case, inputs), "float32")


@pytest.mark.parametrize("backend", ["mindspore@cpu", "megengine@cpu"])
def test_subnormal_numbers_are_flushed(
    subjects: Environments, tmp_path: Path, backend: str
) -> None:
    text = "shape: [4, 3, 2, 2]\ninput: {distribution: subnormal}\neps: 1e-30\nmomentum: 1\n"
    outputs = done(subjects, backend, tmp_path, text).outputs
    assert not outputs["running_mean"].any()
    assert not outputs["y"].any()


def test_mindspore_does_not_move_running_statistics_in_16_bits(
    subjects: Environments, tmp_path: Path
) -> None:
    text = fields(shape="[4, 3, 5, 6]", dtype="float16", param_dtype="same")
    case, inputs = prepare(tmp_path, text)
    outputs = done(subjects, "mindspore@cpu", tmp_path, text).outputs
    np.testing.assert_array_equal(outputs["running_mean"], inputs.running_mean)
    right = right_outputs(case, inputs)["y"]
    np.testing.assert_allclose(outputs["y"], right, atol=0.02)


@pytest.mark.parametrize("backend", ["mindspore@cpu", "megengine@cpu"])
def test_a_single_value_leaves_no_running_variance(
    subjects: Environments, tmp_path: Path, backend: str
) -> None:
    outputs = done(subjects, backend, tmp_path, fields(shape="[1, 3]")).outputs
    assert np.isnan(outputs["running_var"]).all()
    assert np.isfinite(outputs["y"]).all()


@pytest.mark.parametrize(
    ("backend", "changes", "words"),
    [
        ("torch@cpu", {"dtype": "float16"}, "not implemented for 'Half'"),
        ("torch-mkldnn@cpu", {"dtype": "float16"}, "expects float or bfloat16"),
        ("mindspore@cpu", {"eps": "0"}, "eps must be in (0,1]"),
        ("mindspore@cpu", {"dtype": "float64"}, "must be a type of {Tensor[Float16]"),
        ("mindspore@cpu", {"shape": "[2, 3, 2, 2, 2]"}, "rank of images must be in [2,4]"),
        ("mindspore@cpu", {"dtype": "bfloat16"}, "no bfloat16"),
        ("megengine@cpu", {"dtype": "float64"}, "no float64"),
        ("megengine@cpu", {"dtype": "float16", "param_dtype": "same"}, "past the end"),
        ("torch-mkldnn@cpu", {"dtype": "bfloat16", "param_dtype": "same"}, "past the end"),
        ("megengine@cpu", {"shape": "[2, 3, 2, 2, 2]"}, "rank 2, 3 or 4"),
        ("megengine@cpu", {"shape": "[0, 3]", "backward": "true"}, "AsyncError"),
    ],
)
def test_what_a_framework_refuses_is_unsupported(
    subjects: Environments, tmp_path: Path, backend: str, changes: dict[str, str], words: str
) -> None:
    text = fields(**{"shape": "[4, 3, 5, 6]", **changes})
    reply = chosen(subjects, backend).run(backend, *prepare(tmp_path, text))
    assert reply.outcome == "unsupported", reply
    assert words in (reply.reason or "")


MODULES: dict[str, Any] = {"mindspore": _mindspore, "megengine": _megengine}


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_or_broken_framework_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    reason = MODULES[name].unavailable(f"{name}@cpu") or ""
    assert reason.startswith(f"{name} is not installed in this environment (pip install {name}")
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    for source, words in (
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        ("raise AttributeError('np.bool is gone')\n", "np.bool is gone"),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        assert words in (MODULES[name].unavailable(f"{name}@cpu") or "")
