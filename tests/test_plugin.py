"""Plug-ins of torch tensors, and what a plug-in of any kind is told about its mistakes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from correct import prepare

from bnaudit import subject as subject_module
from bnaudit.inputs import Inputs
from bnaudit.reference import Declarations, Reference
from bnaudit.scenario import Case
from bnaudit.subject import CASE_FIELDS, Subject, scratch_folder
from bnaudit.verdict import Verdict, judge
from bnaudit.worker import execution, plugin, poison
from bnaudit.worker.backends import _torch
from bnaudit.worker.execution import Execution, Implementation, NoResult, Tensors, run
from bnaudit.worker.rounding import widen

torch = pytest.importorskip("torch")

Array = npt.NDArray[Any]
PLUGINS = Path(__file__).parent / "plugins"
FILE = str(PLUGINS / "torch_tensors.py")
FORMATS = ("contiguous", "channels_last", "strided")
DTYPES = ("float16", "bfloat16", "float32", "float64")
SMALL = "input: {distribution: normal, mean: 3}\nshape: [2, 3, 4, 5]\n"
BACKWARD = SMALL + "backward: true\n"
PARAMETERS = (
    "affine: {weight: {distribution: normal, mean: 1}, bias: {distribution: normal}}\n"
    "running: {mean: {distribution: normal}, var: {distribution: uniform, low: 1, high: 2}}\n"
)


@pytest.fixture(autouse=True)
def _unpoisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's malloc stays as it is; workers' are tested in workers."""
    monkeypatch.setattr(plugin, "poison_malloc", lambda: None)


def execute(case: Case, inputs: Inputs, implementation: Implementation) -> Execution:
    request = {name: getattr(case, name) for name in CASE_FIELDS}
    return run(implementation, request, Tensors(request, inputs.files, implementation.form))


def load(name: str) -> Implementation:
    return plugin.load(f"{FILE}:{name}", "/")


def assert_same_bits(got: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, array in got.items():
        assert array.dtype == expected[name].dtype, name
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("name", ["functional", "AnyRank"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_function_and_a_module_around_torchs_batch_norm_give_its_bits(
    tmp_path: Path, name: str, dtype: str, memory_format: str, mode: str
) -> None:
    for parameters in ("param_dtype: same\n" + PARAMETERS, PARAMETERS, "affine: null\n"):
        text = (
            f"{BACKWARD}dtype: {dtype}\nmemory_format: {memory_format}\nmode: {mode}\n{parameters}"
        )
        steps = "steps: 3\nmomentum: null\n" if mode == "training" else ""
        case, inputs = prepare(tmp_path, text + steps)
        got = execute(case, inputs, load(name))
        right = execute(case, inputs, Implementation(_torch.torch_cpu, "stored")).outputs
        assert_same_bits(got.outputs, right)
        assert got.not_repeatable is None
        missing = {"batch_mean", "invstd"}  # which neither of the two returns
        assert got.outputs.keys() == right.keys() - missing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_tensors_have_the_cases_dtype_and_strides_and_come_back_as_they_are(
    tmp_path: Path, dtype: str, memory_format: str
) -> None:
    text = f"{BACKWARD}{PARAMETERS}dtype: {dtype}\nmemory_format: {memory_format}\n"
    case, inputs = prepare(tmp_path, text)
    done = execute(case, inputs, load("everything"))
    strides = {
        "contiguous": (60, 20, 5, 1),
        "channels_last": (60, 1, 15, 3),
        "strided": (120, 40, 10, 2),
    }[memory_format]
    statistics = "float64" if dtype == "float64" else "float32"
    assert done.kernel == f"torch.{dtype} torch.{statistics} {strides}"
    assert inputs.weight is not None
    assert inputs.bias is not None
    assert inputs.grad_output is not None
    expected = {
        "y": inputs.x[0],
        "grad_input": inputs.grad_output[0],
        "grad_weight": inputs.bias,
        "grad_bias": inputs.weight,
        "batch_mean": inputs.weight,
        "batch_var": inputs.bias,
        "running_mean": inputs.running_mean + inputs.running_mean.dtype.type(0.1),
        "running_var": inputs.running_var.astype(np.float64) + 1 / 3,
    }
    assert done.outputs.keys() == expected.keys()
    assert_same_bits(done.outputs, expected)


def test_declarations_are_those_of_the_function_or_the_class() -> None:
    assert load("everything").function.running_update == "caffe"  # type: ignore[attr-defined]
    assert load("Unaffected").function.running_var_correction == 0  # type: ignore[attr-defined]
    assert not hasattr(load("functional").function, "running_update")


def test_without_a_graph_there_are_no_gradients(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, BACKWARD)
    assert execute(case, inputs, load("forgets_the_end")).outputs.keys() == {"y"}


def test_a_module_without_running_statistics_takes_no_part_in_inference(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, SMALL)
    assert execute(case, inputs, load("Unaffected")).outputs.keys() == {"y"}
    case, inputs = prepare(tmp_path, SMALL + "mode: inference\n")
    with pytest.raises(NoResult, match="keeps no running statistics") as caught:
        execute(case, inputs, load("Unaffected"))
    assert caught.value.outcome == "unsupported"


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("numpy_out", "contract", "y is of type ndarray, not a torch tensor"),
        (
            "a_tuple",
            "contract",
            "y is of type tuple, not a torch tensor; more than y is returned as",
        ),
        ("float32_out", "contract", "y is float32, not bfloat16"),
        ("wrong_shape", "contract", "y has shape (120,), not (2, 3, 4, 5)"),
        ("integer_mean", "contract", "batch_mean is int32, not one of float16, bfloat16, float32,"),
        ("sparse", "contract", "y is of layout sparse_coo, not a dense tensor of values"),
        ("nested", "contract", "y is nested, not a dense tensor of values"),
        (
            "without_an_array",
            "contract",
            "y, of type _Arrayless, cannot be turned into an array: no detach",
        ),
        ("meta", "contract", "y is on the meta device, not a dense tensor of values"),
        ("misspelt", "contract", "'grad_imput' is no quantity: grad_input is meant?"),
        ("nothing", "contract", "no y was returned"),
        ("detached_input", "contract", "autograd finds no grad_input: y was computed without x"),
        ("in_place", "contract", "x was changed in place: x[0,1,2,3] was"),
        (
            "in_place_graph",
            "raised",
            "a leaf Variable that requires grad is being used in an in-place",
        ),
        ("no_operator", "unsupported", "not implemented for 'BFloat16'"),
        ("own_words", "raised", "RuntimeError: \"special\" not implemented for 'Half'"),
        ("inner_refusal", "unsupported", "no backward yet"),
        ("no_backward", "raised", "NotImplementedError: You must implement either the backward"),
        ("from_meta", "raised", "NotImplementedError: Cannot copy out of meta tensor"),
        ("meta_graph", "contract", "y is on the meta device, not a dense tensor of values"),
        ("NoForward", "raised", 'is missing the required "forward" function'),
        ("OnMeta", "raised", "NotImplementedError: Cannot copy out of meta tensor"),
        ("NoGraph", "contract", "y has no graph: no gradient reaches x"),
        ("UnderNoGrad", "contract", "y has no graph: no gradient reaches x"),
        (
            "ChangesWeight",
            "contract",
            "ChangesWeight.weight was changed in place: weight[1] was 1.0 and is now 2.0",
        ),
        (
            "ChangesBias",
            "contract",
            "ChangesBias.bias was changed in place: bias[0] was 0.0 and is now 0.5",
        ),
        (
            "ReturnsTuple",
            "contract",
            "ReturnsTuple returned a tuple: a module plug-in returns y alone",
        ),
        (
            "ReturnsDict",
            "contract",
            "ReturnsDict returned a dict: a module plug-in returns y alone",
        ),
        ("ReturnsArray", "contract", "y is of type ndarray, not a torch tensor"),
        ("Gamma", "contract", "Gamma has no parameter weight of shape (C,)"),
        ("ListOfMeans", "contract", "ListOfMeans.running_mean is of type list, not a buffer"),
        ("Lazy", "contract", "Lazy.weight is uninitialized (a lazy module)"),
        ("Parametrized", "contract", "Parametrized.weight does not keep the values that are"),
        ("out_of_memory", "unsupported", "more GPU memory than there is: CUDA out of memory"),
        ("only_once", "contract", "once is enough (when called again with the same tensors)"),
        (
            "NoEps",
            "contract",
            "NoEps(3, eps=1e-05, momentum=0.1, affine=True) cannot be built: Type",
        ),
        ("NoWeight", "contract", "NoWeight.weight is None, not a parameter"),
        ("WrongShape", "contract", "WrongShape.weight has shape (4,), not (3,)"),
        ("OwnValueError", "raised", "ValueError: mine"),
        ("OtherValueError", "raised", "ValueError: num_channels (3) must be divisible by"),
        ("OnlyMeans", "raised", "ValueError: running_mean and running_var must either both be"),
    ],
)
def test_each_mistake_is_told_in_a_sentence(
    tmp_path: Path, name: str, outcome: str, reason: str
) -> None:
    backward = (
        *("detached_input", "in_place_graph", "inner_refusal", "no_backward", "meta_graph"),
        *("NoGraph", "UnderNoGrad"),
    )
    text = BACKWARD if name in backward else SMALL
    case, inputs = prepare(tmp_path, text + "dtype: bfloat16\n")
    with pytest.raises(NoResult) as caught:
        execute(case, inputs, load(name))
    assert caught.value.outcome == outcome
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("functionel", plugin.Unavailable, "has no function named functionel; it has functional"),
        ("calls", plugin.Unavailable, "calls in {FILE} is not a function, but of type int"),
        (
            "NoModule",
            plugin.Unavailable,
            "is a class, but no torch.nn.Module: a function is called",
        ),
        (
            "instance",
            plugin.Unavailable,
            "is a module; its class AnyRank is called for, built like",
        ),
        (
            "part",
            plugin.Unavailable,
            "is a functools.partial of AnyRank: a module plug-in must be a class, built like Batch",
        ),
        ("strange_tensors", plugin.Unavailable, "asks for 'cupy' tensors; there are 'numpy' (the"),
        (
            "forgot_to_ask@cuda",
            plugin.Unavailable,
            "takes NumPy arrays, which are on the cpu; a func",
        ),
        (
            "functional@tpu",
            plugin.Unavailable,
            "there is no device tpu: a plug-in runs @cpu or @cuda",
        ),
        ("functional@", plugin.Unavailable, "there is no device ''"),
        ("functional@cuda:1", plugin.Unavailable, "a device has no number: CUDA_VISIBLE_DEVICES"),
        ("no_grad_output", NoResult, "got an unexpected keyword argument 'momentum'"),
    ],
)
def test_what_cannot_be_called_says_why_when_it_is_loaded(
    name: str, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error) as caught:
        load(name)
    assert reason.replace("{FILE}", FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compiled_or_scripted_module_is_told_what_to_be() -> None:
    module = torch.nn.BatchNorm2d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [torch.compile(module, backend="eager"), torch.jit.script(module)]
    for compiled in made:
        with pytest.raises(plugin.Unavailable, match="compiled module: called for is"):
            plugin._implementation(compiled, "compiled in FILE.py", "cpu")


@pytest.mark.parametrize("name", ["Silent", "Frozen", "Buffers"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_modules_parameters_may_be_frozen_and_its_methods_silent(
    tmp_path: Path, name: str, mode: str
) -> None:
    case, inputs = prepare(tmp_path, f"{BACKWARD}{PARAMETERS}mode: {mode}\n")
    right = execute(case, inputs, load("AnyRank")).outputs
    got = execute(case, inputs, load(name)).outputs
    assert_same_bits(got, right)
    frozen = {"grad_weight", "grad_bias"} if name != "Silent" else set()
    assert got.keys() == right.keys() - frozen
    assert "grad_input" in got


def test_only_gpu_memory_may_be_short_at_the_second_call_alone(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, SMALL)
    calls = []

    def function(x: Array, *arguments: Any, **options: Any) -> Array:
        calls.append(x)
        if len(calls) % 2 == 0:
            raise NotImplementedError(execution.OUT_OF_MEMORY + " there is")
        return np.array(x)

    with pytest.raises(NoResult, match="called again") as caught:
        execute(case, inputs, Implementation(function, "numpy", repeated=True))
    assert caught.value.outcome == "unsupported"
    for module in ("_torch.py", "_cupy.py"):  # the built-in backends begin in the same way
        source = (Path(execution.__file__).parent / "backends" / module).read_text()
        assert f'"{execution.OUT_OF_MEMORY} the' in source


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        (
            "forgot_to_ask",
            "raised",
            "AttributeError: 'numpy.ndarray' object has no attribute 'clone'",
        ),
        ("returns_a_tensor", "contract", "y is of type Tensor, not a NumPy array"),
    ],
)
def test_who_forgets_to_ask_for_tensors_is_told_how(
    tmp_path: Path, name: str, outcome: str, reason: str
) -> None:
    with pytest.raises(NoResult) as caught:
        execute(*prepare(tmp_path, SMALL), load(name))
    assert caught.value.outcome == outcome
    assert caught.value.reason.startswith(reason)
    assert 'gets torch tensors if its attribute tensors is "torch"' in caught.value.reason


def test_what_torchs_batch_norm_turns_down_is_unsupported(tmp_path: Path) -> None:
    for shape, reason in (
        ("[2, 3, 4]", "expected 4D input"),
        ("[1, 3, 1, 1]", "more than 1 value"),
        ("[2, 3, 4, 5]\neps: 0", "eps must be positive"),
    ):
        case, inputs = prepare(tmp_path, SMALL.replace("[2, 3, 4, 5]", shape))
        with pytest.raises(NoResult, match=reason) as caught:
            execute(case, inputs, load("TwoDimensional"))
        assert caught.value.outcome == "unsupported"


def test_a_plug_in_of_tensors_needs_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "without.py"
    path.write_text(
        "def batch_norm(x, *arguments, **options):\n    return x\nbatch_norm.tensors = 'torch'\n"
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(plugin.Unavailable, match="takes torch tensors: torch is not installed"):
        plugin.load(f"{path}:batch_norm", "/")


# --- called twice ----------------------------------------------------------------------------------


def verdict(case: Case, inputs: Inputs, done: Execution) -> Verdict:
    reference = Reference(case, inputs)
    measured = reference.measure(done.outputs, Declarations())
    return judge(case.thresholds, measured, reference.facts, done.not_repeatable)


def test_other_bits_the_second_time_are_found_and_named(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, SMALL)
    done = execute(case, inputs, load("drifts"))
    first = float(done.outputs["batch_mean"][0])
    assert done.not_repeatable == (
        f"y[0,1,0,0] was {first}, then {first + 1} (and 19 more), also batch_mean"
    )
    assert execute(case, inputs, load("functional")).not_repeatable is None


def test_a_result_in_the_same_memory_is_compared_with_what_it_was(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, SMALL)
    done = execute(case, inputs, load("same_memory"))
    value = float(done.outputs["y"][0, 0, 0, 0])
    assert done.not_repeatable == f"y[0,0,0,0] was {value}, then {value + 1} (and 119 more)"


def differing(first: dict[str, Array], second: dict[str, Array], dtype: str = "float32") -> str:
    return execution.difference(first, second, dtype) or ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_compared_and_a_nan_is_a_nan(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "BLOCK", 8)
    a = np.arange(-30, 30).reshape(5, 3, 4).astype(np.int8).astype(_storage(dtype))
    assert differing({"y": a}, {"y": a.copy()}, dtype) == ""
    quiet, other = _nans(dtype)
    one, two = a.copy(), a.copy()
    one[4, 1, 2], two[4, 1, 2] = quiet, other
    assert one.tobytes() != two.tobytes()
    assert differing({"y": one}, {"y": two}, dtype) == ""
    two[3, 0, 0] = 0  # +0 where the other has something else
    was = str(widen(a[3, 0, 0], dtype))
    assert differing({"y": one}, {"y": two}, dtype) == f"y[3,0,0] was {was}, then 0.0"
    two = one.copy()
    two[4, 1, 2] = 0
    assert differing({"y": one}, {"y": two}, dtype) == "y[4,1,2] was nan, then 0.0"


def _storage(dtype: str) -> str:
    return {"float16": "f2", "bfloat16": "u2", "float32": "f4", "float64": "f8"}[dtype]


def _nans(dtype: str) -> tuple[Any, Any]:
    if dtype == "bfloat16":
        return 0x7FC0, 0xFFFF
    kind = np.dtype(_storage(dtype))
    negative = np.full(1, -1, f"i{kind.itemsize}").view(kind)
    return np.array([np.nan], kind)[0], negative[0]


def test_the_sign_of_a_zero_and_a_missing_quantity_are_differences() -> None:
    zero = np.zeros(3, np.float32)
    assert differing({"invstd": zero}, {"invstd": -zero}) == (
        "invstd[0] was 0.0, then -0.0 (and 2 more)"
    )
    assert differing({"y": zero, "invstd": zero}, {"y": zero}) == "invstd was returned, then not"
    assert differing({"y": zero}, {"y": zero, "invstd": zero}) == (
        "invstd was not returned, then it was"
    )


def test_what_is_not_repeatable_is_a_warn_with_a_cause_of_its_own(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, SMALL)
    good = execute(case, inputs, load("functional"))
    assert verdict(case, inputs, good).status == "pass"
    judged = verdict(case, inputs, good._replace(not_repeatable="y[0] was 1.0, then 2.0"))
    assert (judged.status, judged.cause) == ("warn", "BN008 not reproducible")
    assert judged.reason == "not repeatable: y[0] was 1.0, then 2.0"
    wrong = good._replace(outputs={"y": good.outputs["y"] + np.float32(1)}, not_repeatable="why")
    judged = verdict(case, inputs, wrong)
    assert (judged.status, judged.cause) == ("fail", "BN008 not reproducible")
    assert (judged.reason or "").startswith("y: ")
    assert (judged.reason or "").endswith("; not repeatable: why")
    broken = good._replace(outputs={"y": good.outputs["y"] * np.nan}, not_repeatable="why")
    assert verdict(case, inputs, broken).cause == "BN005 non-finite output"
    assert verdict(case, inputs, broken._replace(not_repeatable=None)).status == "fail"


# --- in workers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with scratch_folder() as scratch, Subject(scratch=scratch, timeout=60) as subject:
        yield subject


def test_a_plug_in_of_tensors_runs_in_a_worker_and_its_result_is_judged(
    subject: Subject, tmp_path: Path
) -> None:
    case, inputs = prepare(tmp_path, BACKWARD)
    reply = subject.run(f"{FILE}:functional", case, inputs)
    assert (reply.outcome, reply.reason, reply.not_repeatable) == ("done", None, None)
    assert {"y", "grad_input", "grad_weight", "grad_bias"} <= reply.outputs.keys()
    reply = subject.run(f"{FILE}:drifts", case, inputs)
    assert (reply.not_repeatable or "").startswith("y[0,1,0,0] was 1.0, then 2.0 (and 19 more)")


GLIBC = pytest.mark.skipif(
    os.confstr("CS_GNU_LIBC_VERSION") is None
    if "CS_GNU_LIBC_VERSION" in os.confstr_names
    else True,
    reason="not glibc, whose malloc is what can be told to fill memory",
)


@GLIBC
@pytest.mark.parametrize("name", ["forgets_the_end", "forgets_the_end_later"])
@pytest.mark.parametrize("shape", ["[1, 1, 2, 2]", "[2, 3, 4, 5]", "[4, 16, 40, 40]"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_elements_that_are_never_written_are_nan(
    subject: Subject, tmp_path: Path, name: str, shape: str, dtype: str
) -> None:
    case, inputs = prepare(tmp_path, SMALL.replace("[2, 3, 4, 5]", shape) + f"dtype: {dtype}\n")
    reply = subject.run(f"{FILE}:{name}", case, inputs)
    assert reply.outcome == "done"
    # The second plug-in does write its first output, whose memory its second one may get.
    unwritten = bool(np.isnan(reply.outputs["y"].ravel()[-3:]).all())
    assert unwritten or "then nan" in (reply.not_repeatable or "")
    assert unwritten or name == "forgets_the_end_later"


FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from bnaudit.worker.poison import poison_malloc, poison_numpy
if sys.argv[2] == "poisoned":
    poison_malloc()
stale = 0
for size in (1, 2, 3, 7, 30, 63, 64, 120, 127, 128, 129, 255, 256, 257, 1000, 10**4, 10**6):
    for dtype in ("f2", "f4", "f8"):
        for again in range(2):
            if sys.argv[2] == "poisoned":
                poison_numpy()
            arrays = [np.empty(size, dtype) for _ in range(5)]
            stale += sum(not np.isnan(array).all() for array in arrays)
            assert not np.zeros(size, dtype).any()
            for array in arrays:
                array[:] = 1
            del arrays, array
print(stale)
"""


@GLIBC
def test_fresh_numpy_memory_holds_nan_whatever_its_size() -> None:
    def stale(how: str, tunables: str) -> int:
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        command = [sys.executable, "-c", FRESH, str(Path(poison.__file__).parents[2]), how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert stale("poisoned", poison.TUNABLES) == 0
    assert stale("as it is", "") > 100


def test_only_plug_ins_workers_are_started_with_the_tunables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    poisoned = subject_module._environment(2, poisoned=True)["GLIBC_TUNABLES"]
    assert poisoned == f"glibc.malloc.check=3:{poison.TUNABLES}"
    assert (
        subject_module._environment(2, poisoned=False)["GLIBC_TUNABLES"] == "glibc.malloc.check=3"
    )
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert subject_module._environment(2, poisoned=True)["GLIBC_TUNABLES"] == poison.TUNABLES


# --- on a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    """A subject whose workers' torch takes the host's memory for a GPU's."""
    folder = tmp_path / "in front"
    folder.mkdir()
    (folder / "torch.py").symlink_to(PLUGINS / "gpu_on_host.py")
    (folder / "cupy.py").symlink_to(PLUGINS / "raw_kernel_on_host.py")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with scratch_folder() as scratch, Subject(scratch=scratch, timeout=60) as subject:
        yield subject


@pytest.mark.parametrize("name", ["functional", "AnyRank", "everything"])
def test_on_the_gpu_all_is_as_on_the_cpu(gpu: Subject, tmp_path: Path, name: str) -> None:
    for memory_format in FORMATS:
        for dtype in ("bfloat16", "float32"):
            text = (
                f"{BACKWARD}{PARAMETERS}dtype: {dtype}\nmemory_format: {memory_format}\nsteps: 2\n"
            )
            case, inputs = prepare(tmp_path, text)
            there = gpu.run(f"{FILE}:{name}@cuda", case, inputs)
            assert (there.outcome, there.reason, there.not_repeatable) == ("done", None, None)
            here = execute(case, inputs, load(name))
            assert there.kernel == here.kernel
            assert_same_bits(dict(there.outputs), here.outputs)
            assert there.outputs.keys() == here.outputs.keys()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_on_the_gpu_an_input_changed_in_place_is_a_fault(
    gpu: Subject, tmp_path: Path, memory_format: str
) -> None:
    case, inputs = prepare(tmp_path, f"{SMALL}memory_format: {memory_format}\n")
    for _ in range(2):  # the inputs are whole again afterwards
        reply = gpu.run(f"{FILE}:in_place@cuda", case, inputs)
        assert reply.outcome == "contract"
        assert "x was changed in place: x[0,1,2,3] was " in (reply.reason or "")
        assert "now 7.0" in (reply.reason or "")
    if memory_format == "strided":
        reply = gpu.run(f"{FILE}:in_place_gap@cuda", case, inputs)
        assert (reply.outcome, reply.reason) == (
            "contract",
            "x: a gap was written to, 1 place after the first element",
        )


def test_a_kernels_error_is_its_own_calls_and_costs_only_the_worker(
    gpu: Subject, tmp_path: Path
) -> None:
    case, inputs = prepare(tmp_path, SMALL)
    backend = f"{FILE}:asynchronous_error@cuda"
    for _ in range(2):
        reply = gpu.run(backend, case, inputs)
        assert reply.outcome == "crash"
        assert reply.reason == (
            "RuntimeError: CUDA error: an illegal memory access was encountered"
        )
        assert backend not in gpu._workers


def test_the_environment_of_a_plug_in_on_the_gpu_names_the_gpu_once(gpu: Subject) -> None:
    assert gpu.environment()["devices"] == []
    names = [f"{FILE}:functional@cuda", f"{FILE}:everything@cuda"]
    assert set(gpu.describe(names).values()) == {None}
    found = gpu.environment()
    assert [device["name"] for device in found["devices"]] == ["a GPU on the host"]
    assert found["flags"]["tf32"] is not None


def test_without_a_gpu_a_plug_in_for_it_is_unavailable(subject: Subject, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reply = subject.run(f"{FILE}:functional@cuda", *prepare(tmp_path, SMALL))
    assert reply.outcome == "unavailable"
    assert "functional in" in (reply.reason or "")
    assert "takes torch tensors: " in (reply.reason or "")


class Allocator:
    """torch's caching allocator in short: two pools, best fit, blocks split and never given back."""

    def __init__(self, *segments: tuple[str, int, int]) -> None:
        """segments: kind, stream and size of memory that is cached, all of it one free block."""
        self.segments: list[dict[str, Any]] = [
            {
                "segment_type": kind,
                "device": 0,
                "stream": stream,
                "blocks": [{"size": size, "state": "inactive", "poisoned": False}],
            }
            for kind, stream, size in segments
        ]

    def full(self, shape: tuple[int], value: int, *, dtype: Any, device: str) -> Any:
        assert (value, dtype, device) == (255, torch.uint8, "cuda")
        size = -(-shape[0] // 512) * 512
        kind, least = ("small", 512) if size <= 1 << 20 else ("large", (1 << 20) + 1)
        fits = [
            (block["size"], i, j)
            for i, segment in enumerate(self.segments)
            if (segment["segment_type"], segment["stream"]) == (kind, 0)
            for j, block in enumerate(segment["blocks"])
            if block["state"] == "inactive" and block["size"] >= size
        ]
        if not fits:
            rounded = 2 << 20 if kind == "small" else max(size, 20 << 20)
            self.segments.append(Allocator((kind, 0, rounded)).segments[0])
            return self.full(shape, value, dtype=dtype, device=device)
        _, i, j = min(fits)
        blocks = self.segments[i]["blocks"]
        block = blocks[j]
        if block["size"] - size >= least:
            rest = {
                "size": block["size"] - size,
                "state": "inactive",
                "poisoned": block["poisoned"],
            }
            blocks.insert(j + 1, rest)
            block["size"] = size
        block.update(state="active_allocated", poisoned=True)
        return _Freed(block)

    def stale(self) -> int:
        return sum(
            not block["poisoned"]
            for segment in self.segments
            if segment["stream"] == 0
            for block in segment["blocks"]
        )

    def reserved(self) -> int:
        return sum(block["size"] for segment in self.segments for block in segment["blocks"])


class _Freed:
    def __init__(self, block: dict[str, Any]) -> None:
        self.block = block

    def __del__(self) -> None:
        self.block["state"] = "inactive"


@pytest.mark.parametrize("size", [512, 480_000, 3 << 20, 100 << 20])
def test_all_that_torchs_allocator_keeps_free_is_poisoned_and_nothing_more_is_taken(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    cached = [("small", 0, 2 << 20), ("large", 0, 20 << 20), ("large", 0, 33 << 20)]
    allocator = Allocator(*cached, ("large", 7, 5 << 20), ("small", 0, 3 * 512))
    monkeypatch.setattr(torch, "full", allocator.full)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: allocator.segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert allocator.stale() > 0
    poison.poison_torch(size)
    assert allocator.stale() == 0
    reserved = allocator.reserved()
    poison.poison_torch(size)
    assert allocator.reserved() == reserved


def test_where_memory_is_short_what_there_is_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(("small", 0, 2 << 20), ("large", 0, 20 << 20))

    def full(shape: tuple[int], value: int, **options: Any) -> Any:
        if shape[0] > 64 << 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return allocator.full(shape, value, **options)

    monkeypatch.setattr(torch, "full", full)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: allocator.segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert allocator.stale() == 2
    poison.poison_torch(1 << 40)
    assert allocator.stale() == 0


# --- the README's examples -------------------------------------------------------------------------


def assert_passes(subject: Subject, backend: str, folder: Path, *dtypes: str) -> None:
    """In every memory format, training over two steps and inference, in one block and in several."""
    for shape in ("[2, 3, 4, 5]", "[5, 2, 16, 17]"):
        for memory_format in FORMATS:
            for dtype in dtypes:
                text = f"{SMALL.replace('[2, 3, 4, 5]', shape)}memory_format: {memory_format}\n"
                for mode in ("steps: 2\n", "mode: inference\n"):
                    case, inputs = prepare(folder, f"{text}{mode}dtype: {dtype}\n{PARAMETERS}")
                    reply = subject.run(backend, case, inputs)
                    assert (reply.outcome, reply.reason) == ("done", None), reply.detail
                    assert reply.not_repeatable is None
                    reference = Reference(case, inputs)
                    measured = reference.measure(reply.outputs, Declarations())
                    judged = judge(case.thresholds, measured, reference.facts)
                    assert judged.status == "pass", (case.id, judged.reason)
                    assert {"y", "running_mean", "running_var"} <= judged.quantities.keys()


def test_the_readmes_triton_kernel_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend = f"{PLUGINS / 'readme_triton.py'}:batch_norm"
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        assert_passes(subject, backend, tmp_path, "float16", "bfloat16", "float32")
        for text in ("shape: [2, 3]\ndtype: float64\n", "shape: [0, 3]\n"):
            case, inputs = prepare(tmp_path, "input: {distribution: normal}\n" + text)
            assert subject.run(backend, case, inputs).outcome == "unsupported"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_readmes_cuda_kernel_passes_on_the_host(gpu: Subject, tmp_path: Path) -> None:
    backend = f"{PLUGINS / 'readme_cuda.py'}:batch_norm@cuda"
    assert_passes(gpu, backend, tmp_path, "float32")
    case, inputs = prepare(tmp_path, SMALL + "dtype: float16\n")
    assert gpu.run(backend, case, inputs).outcome == "unsupported"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("__syncthreads(), half > 0", "half > 0"),
        ("half = 128; ", "half = 64; "),
        ("training && i < n", "training && i < n - 1"),
        ("i % size * ss", "i % size"),
        ("(n > 1 ? n - 1 : 1)", "n"),
    ],
)
def test_a_mistake_in_the_readmes_cuda_kernel_is_found(
    gpu: Subject, tmp_path: Path, right: str, wrong: str
) -> None:
    source = (PLUGINS / "readme_cuda.py").read_text()
    assert right in source
    path = tmp_path / "wrong.py"
    path.write_text(source.replace(right, wrong))
    with pytest.raises(AssertionError):
        assert_passes(gpu, f"{path}:batch_norm@cuda", tmp_path, "float32")


@pytest.mark.parametrize("name", ["readme_triton.py", "readme_cuda.py"])
def test_the_readmes_examples_are_short(name: str) -> None:
    lines = (PLUGINS / name).read_text().splitlines()
    assert lines.pop(0) == "# mypy: ignore-errors"  # which the README does not show
    assert len(lines) < 40


# --- on a real GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["readme_triton.py", "readme_cuda.py"])
def test_the_readmes_kernels_pass_on_a_real_gpu(
    subject: Subject, tmp_path: Path, name: str
) -> None:
    backend = f"{PLUGINS / name}:batch_norm@cuda"
    reason = subject.describe([backend])[backend]
    if reason is not None:
        pytest.skip(reason)
    dtypes = ("float32",) if name == "readme_cuda.py" else ("float16", "bfloat16", "float32")
    assert_passes(subject, backend, tmp_path, *dtypes)


@pytest.mark.gpu
def test_on_a_real_gpu_a_function_around_torchs_batch_norm_gives_its_bits(
    subject: Subject, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for memory_format in FORMATS:
        for dtype in DTYPES:
            text = f"{BACKWARD}{PARAMETERS}dtype: {dtype}\nmemory_format: {memory_format}\n"
            case, inputs = prepare(tmp_path, text)
            for name in ("functional", "AnyRank"):
                got = subject.run(f"{FILE}:{name}@cuda", case, inputs)
                assert (got.outcome, got.reason) == ("done", None)
                right = subject.run("torch@cuda", case, inputs).outputs
                assert_same_bits(dict(got.outputs), dict(right))
    for name in ("in_place", "in_place_gap"):
        case, inputs = prepare(tmp_path, SMALL + "memory_format: strided\n")
        assert subject.run(f"{FILE}:{name}@cuda", case, inputs).outcome == "contract"
    case, inputs = prepare(tmp_path, SMALL)
    for _ in range(3):
        y = subject.run(f"{FILE}:forgets_the_end@cuda", case, inputs).outputs["y"]
        assert np.isnan(y.ravel()[-3:]).all()
