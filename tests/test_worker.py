"""The worker's own modules, in this process: memory formats, one case on one function, backends by name."""

from __future__ import annotations

import ast
import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from correct import prepare

from bnaudit import worker
from bnaudit.inputs import Inputs
from bnaudit.scenario import Case
from bnaudit.subject import CASE_FIELDS
from bnaudit.worker import environment, execution, layout, plugin, protocol
from bnaudit.worker.backends import BACKENDS, _torch
from bnaudit.worker.execution import Execution, Implementation, NoResult, Tensors, difference, run
from bnaudit.worker.rounding import widen

Array = npt.NDArray[Any]
FOLDER = Path(worker.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))
FORMATS = ("contiguous", "channels_last", "strided")
TEXT = "input: {distribution: normal, mean: 3}\nshape: [2, 3, 4, 5]\n"


def execute(case: Case, inputs: Inputs, function: Callable[..., Any], form: str) -> Execution:
    request = {name: getattr(case, name) for name in CASE_FIELDS}
    return run(Implementation(function, form), request, Tensors(request, inputs.files, form))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 3, 4), (0, 3, 4, 5)])
def test_every_memory_format_holds_the_same_values(
    memory_format: str, shape: tuple[int, ...]
) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    laid = layout.lay_out(values, memory_format)
    np.testing.assert_array_equal(laid, values)
    assert layout.first_change(laid, values, lambda stored: stored) is None
    assert not np.shares_memory(laid, values)


def test_a_strided_tensor_begins_three_elements_in_and_skips_every_second() -> None:
    laid = layout.lay_out(np.ones((2, 3, 4), np.float32), "strided")
    allocation = laid.base
    assert allocation is not None
    assert allocation.size == 3 + 2 * laid.size
    assert laid.ctypes.data - allocation.ctypes.data == 3 * laid.itemsize
    assert laid.strides == (96, 32, 8)
    assert np.isnan(allocation).sum() == 3 + laid.size


LITTLE = [shape for rank in (2, 3, 4) for shape in itertools.product((1, 2, 3), repeat=rank)]


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_only_a_strided_tensor_is_taken_for_one(
    tmp_path: Path, dtype: type, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "x.npy")
    alike = 0
    for shape in (*LITTLE, (0, 3), (0, 2, 3), (5, 1), (7, 1, 1, 1)):
        values: Array = np.arange(steps * np.prod(shape)).reshape(steps, *shape).astype(dtype)
        np.save(path, values)
        steps_in_memory = [np.load(path)[step] for step in range(steps)]
        alike += steps_in_memory[0].size * layout.STEP + layout.OFFSET == values.size
        for step, contiguous in enumerate(steps_in_memory):
            assert layout.allocation(contiguous) is None, (shape, step)
            last = layout.lay_out(contiguous, "channels_last")
            assert layout.allocation(last) is None, (shape, step)
            strided = layout.lay_out(contiguous, "strided")
            for array in (strided, strided.view()):
                memory = layout.allocation(array)
                assert memory is not None, (shape, step)
                assert memory.size == layout.OFFSET + layout.STEP * array.size
                np.testing.assert_array_equal(memory[layout.OFFSET :: layout.STEP], array.ravel())
    assert (alike > 0) == (
        steps in (3, 5)
    )  # where a contiguous tensor's memory is as large as a strided one's


def test_a_strided_tensor_skips_elements_also_where_all_lengths_are_1() -> None:
    assert layout.lay_out(np.ones((1, 1, 1), np.float32), "strided").strides == (8, 8, 8)
    assert layout.lay_out(np.ones((1, 3, 1, 1), np.float32), "strided").strides == (24, 8, 8, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("place", [-3, -1, 1, 7, 23])
def test_a_write_into_a_gap_is_found(dtype: type, place: int) -> None:
    laid = layout.lay_out(np.ones((2, 3, 2), dtype), "strided")
    assert layout.changed_gap(laid) is None
    assert laid.base is not None
    laid.base[3 + place] = 0
    assert layout.changed_gap(laid) == place


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_changed_bit_is_found_even_if_the_value_is_equal(
    memory_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "BLOCK", 16)
    values = np.zeros((5, 3, 2, 2), np.float32)
    laid = layout.lay_out(values, memory_format)
    laid[3, 1, 0, 1] = -0.0
    assert layout.first_change(laid, values, lambda stored: stored) == (3, 1, 0, 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("param_dtype", ["statistics", "same"])
def test_a_widened_function_gets_exact_values_and_is_rounded_once(
    tmp_path: Path, memory_format: str, dtype: str, param_dtype: str
) -> None:
    text = f"{TEXT}dtype: {dtype}\nparam_dtype: {param_dtype}\nmemory_format: {memory_format}\n"
    case, inputs = prepare(tmp_path, text)
    wide = np.float64 if dtype == "float64" else np.float32
    tie = (
        1 + 2.0**-8 + 2.0**-40
    )  # float32 in between would lose the last bit, and with it the rounding

    def function(x: Array, weight: Array, *arguments: Array, **options: Any) -> dict[str, Array]:
        np.testing.assert_array_equal(x, widen(inputs.x[0], dtype))
        assert {a.dtype for a in (x, weight, *arguments)} == {np.dtype(wide)}
        running = np.full(3, tie)
        return {"y": np.full(x.shape, tie), "running_mean": running}

    outputs = execute(case, inputs, function, "widened").outputs
    stored = outputs["y"]
    assert stored.dtype == inputs.x.dtype
    expected = {
        "float16": 1 + 2.0**-8,
        "bfloat16": 1.0078125,
        "float32": 1 + 2.0**-8,
        "float64": tie,
    }
    np.testing.assert_array_equal(widen(stored, dtype), np.full(case.shape, expected[dtype], wide))
    assert outputs["running_mean"].dtype == np.float64


def test_a_stored_function_gets_bfloat16_as_bits_and_returns_bits(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, TEXT + "dtype: bfloat16\nparam_dtype: same\n")

    def function(x: Array, weight: Array, *arguments: Any, **options: Any) -> dict[str, Array]:
        assert x.dtype == weight.dtype == np.uint16
        return {"y": x, "batch_mean": weight}

    outputs = execute(case, inputs, function, "stored").outputs
    np.testing.assert_array_equal(outputs["y"], inputs.x[0])
    np.testing.assert_array_equal(outputs["batch_mean"], np.ones(3, np.float32))


def test_running_statistics_are_handed_on_in_the_dtype_of_the_parameters(tmp_path: Path) -> None:
    text = TEXT + "dtype: float16\nparam_dtype: same\nsteps: 3\n"
    case, inputs = prepare(tmp_path, text)
    seen = []

    def function(
        x: Array, weight: Array, bias: Array, mean: Array, var: Array, **options: Any
    ) -> dict[str, Array]:
        seen.append((mean.dtype, mean[0]))
        return {"y": x, "running_mean": mean.astype(np.float64) + 1 / 3}

    outputs = execute(case, inputs, function, "numpy").outputs
    third = np.float16(1 / 3)
    second = np.float16(float(third) + 1 / 3)
    half = np.dtype(np.float16)
    assert seen == [(half, 0), (half, third), (half, second)]
    assert outputs["running_mean"][0] == float(second) + 1 / 3
    assert "running_var" not in outputs


def test_a_function_that_counts_steps_gets_the_step_and_the_cases_momentum(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, TEXT + "steps: 2\nmomentum: null\n")
    seen = []

    def function(x: Array, *arguments: Any, step: int, momentum: Any, **options: Any) -> Array:
        seen.append((step, momentum))
        return x

    function.counts_steps = True  # type: ignore[attr-defined]
    execute(case, inputs, function, "widened")
    assert seen == [(1, None), (2, None)]


def test_gradients_count_only_where_they_were_asked_for(tmp_path: Path) -> None:
    def function(x: Array, *arguments: Any, **options: Any) -> dict[str, Array]:
        ones = np.ones(3, np.float32)
        return {"y": x, "grad_input": x, "grad_weight": ones, "grad_bias": ones, "batch_var": ones}

    def returned(text: str) -> set[str]:
        case, inputs = prepare(tmp_path, TEXT + text)
        return execute(case, inputs, function, "numpy").outputs.keys() - {"y", "batch_var"}

    assert returned("") == set()
    assert returned("backward: true\n") == {"grad_input", "grad_weight", "grad_bias"}
    assert returned("backward: true\naffine: null\n") == {"grad_input"}


@pytest.mark.parametrize("name", ["x", "grad_output", "weight", "bias"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_any_input_changed_in_place_is_a_fault(
    tmp_path: Path, name: str, memory_format: str
) -> None:
    case, inputs = prepare(tmp_path, TEXT + f"backward: true\nmemory_format: {memory_format}\n")

    def function(
        x: Array, weight: Array, bias: Array, *arguments: Any, grad_output: Array, **options: Any
    ) -> Array:
        tensor = {"x": x, "weight": weight, "bias": bias, "grad_output": grad_output}[name]
        tensor[-1] = 5
        return x

    with pytest.raises(NoResult, match=rf"^{name} was changed in place: {name}\[") as caught:
        execute(case, inputs, function, "numpy")
    assert caught.value.outcome == "contract"


def test_a_write_beside_a_strided_tensor_is_a_fault(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, TEXT + "memory_format: strided\n")

    def function(x: Array, *arguments: Any, **options: Any) -> Array:
        beyond = np.lib.stride_tricks.as_strided(x, (x.size * 2,), (x.itemsize,))
        beyond[1] = 0
        return x

    with pytest.raises(NoResult, match="x: a gap was written to, 1 place after"):
        execute(case, inputs, function, "numpy")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (1, "1 place after the first element"),
        (3, "3 places after the first element"),
        (-1, "1 place before the first element"),
        (-3, "3 places before the first element"),
    ],
)
def test_a_gap_is_named_by_its_distance_from_the_first_element(
    tmp_path: Path, place: int, text: str
) -> None:
    case, inputs = prepare(tmp_path, TEXT + "memory_format: strided\n")

    def function(x: Array, *arguments: Any, **options: Any) -> Array:
        memory = layout.allocation(x)
        assert memory is not None
        memory[layout.OFFSET + place] = 0
        return x

    with pytest.raises(NoResult, match=f", {text}$"):
        execute(case, inputs, function, "numpy")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ({"output": 1, "mean": 2}, "'output' is no quantity: y is meant?"),
        ({"Y": 1}, "'Y' is no quantity: y is meant?"),
        ({"y": 1, "mean": 2}, "'mean' is no quantity: batch_mean is meant?"),
        ({"y": 1, "Var": 2}, "'Var' is no quantity: batch_var is meant?"),
        ({"y": 1, "dx": 2}, "'dx' is no quantity: grad_input is meant?"),
        ({"y": 1, "dgamma": 2}, "'dgamma' is no quantity: grad_weight is meant?"),
        ({"y": 1, "rstd": 2}, "'rstd' is no quantity: invstd is meant?"),
        ({"result": 1, "batch_mean": 2, 3: 4}, "no y was returned, only result, batch_mean, 3"),
        ({"y": None, "batch_var": None, "odd\x1b": 1}, "no y was returned, only odd\\x1b"),
        ({}, "no y was returned"),
    ],
)
def test_other_keys_say_which_quantity_is_meant_or_what_was_returned(
    tmp_path: Path, returned: dict[Any, Any], reason: str
) -> None:
    case, inputs = prepare(tmp_path, TEXT)
    with pytest.raises(NoResult) as caught:
        execute(case, inputs, lambda *_, **__: returned, "numpy")
    assert (caught.value.outcome, caught.value.reason) == ("contract", reason)


def test_another_name_beside_the_quantity_itself_is_ignored(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, TEXT)

    def function(x: Array, *arguments: Any, **options: Any) -> dict[str, Any]:
        return {"y": x, "out": 1, "batch_mean": x.mean((0, 2, 3)), "mean": "mine", "scale": 3}

    assert execute(case, inputs, function, "numpy").outputs.keys() == {"y", "batch_mean"}


def test_every_other_name_is_of_a_quantity() -> None:
    assert set(execution.SYNONYMS.values()) <= set(execution.QUANTITIES)
    assert not execution.SYNONYMS.keys() & set(execution.QUANTITIES)


def test_without_ml_dtypes_bfloat16_is_unsupported_for_numpy_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, inputs = prepare(tmp_path, TEXT + "dtype: bfloat16\n")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(NoResult, match="ml_dtypes is not installed") as caught:
        execute(case, inputs, lambda x, *_, **__: x, "numpy")
    assert caught.value.outcome == "unsupported"


def test_small_inputs_are_kept_for_the_next_backend_and_large_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, inputs = prepare(tmp_path, TEXT)
    request = {"dtype": "float32", "param_dtype": "same", "memory_format": "strided"}
    for limit, kept in ((1 << 26, True), (64, False)):
        monkeypatch.setattr(execution, "KEPT", limit)
        tensors = Tensors(request, inputs.files, "numpy")
        first = tensors.given("x", 0)
        tensors.forget(0)
        assert (tensors.given("x", 0) is first) == kept == tensors.kept
    assert case.memory_format == "contiguous"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("my_bn.py:batch_norm", ("my_bn.py", "batch_norm", "cpu")),
        ("a b/my@home.py:batch_norm@cpu", ("a b/my@home.py", "batch_norm", "cpu")),
        ("package.module:Norm@cuda", ("package.module", "Norm", "cuda")),
    ],
)
def test_the_name_of_a_plugin_has_three_parts(name: str, parts: tuple[str, str, str]) -> None:
    assert plugin.is_plugin(name)
    assert plugin.split(name) == parts


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_of_the_table_is_where_it_says(name: str) -> None:
    backend = BACKENDS[name]
    module = importlib.import_module(f"bnaudit.worker.backends.{backend.module}")
    assert callable(getattr(module, backend.function))
    assert backend.kind in ("real", "specimen")
    assert module.unavailable(name) is None or isinstance(module.unavailable(name), str)
    assert not plugin.is_plugin(name)
    assert name.endswith(("@cpu", "@cuda"))


def test_the_default_backends_are_the_documented_ones() -> None:
    default = {name for name, backend in BACKENDS.items() if backend.default}
    specimens = {f"{name}@{device}" for name in ("gemm", "welford") for device in ("cpu", "cuda")}
    assert default == {"torch@cpu", "torch@cuda", *specimens}


def test_a_repeated_function_is_called_once_more_with_what_the_last_step_was_given(
    tmp_path: Path,
) -> None:
    case, inputs = prepare(tmp_path, TEXT + "steps: 3\nmomentum: null\n")
    calls = []

    def function(
        x: Array, weight: Array, bias: Array, mean: Array, var: Array, **options: Any
    ) -> dict[str, Array]:
        calls.append((x.tobytes(), mean.copy(), options["momentum"]))
        mean += 1
        return {"y": x.copy(), "running_var": var * 2}

    request = {name: getattr(case, name) for name in CASE_FIELDS}
    for repeated in (False, True):
        calls.clear()
        tensors = Tensors(request, inputs.files, "numpy")
        done = run(Implementation(function, "numpy", repeated), request, tensors)
        steps = [0, 1, 2, 2] if repeated else [0, 1, 2]
        assert [x for x, _, _ in calls] == [inputs.x[step].tobytes() for step in steps]
        assert [float(mean[0]) for _, mean, _ in calls] == steps
        assert [momentum for _, _, momentum in calls] == [1 / (step + 1) for step in steps]
        np.testing.assert_array_equal(done.outputs["running_mean"], np.full(3, 3, np.float32))
        np.testing.assert_array_equal(done.outputs["running_var"], np.full(3, 8, np.float32))
        assert done.not_repeatable is None


@pytest.mark.parametrize(
    ("second", "outcome", "reason"),
    [
        (NotImplementedError("no"), "contract", "no (when called again with the same tensors)"),
        (ValueError("no"), "raised", "ValueError: no (when called again with the same tensors)"),
        (None, "contract", "no y was returned (when called again with the same tensors)"),
    ],
)
def test_a_second_call_that_ends_otherwise_ends_the_case_so(
    tmp_path: Path, second: Exception | None, outcome: str, reason: str
) -> None:
    case, inputs = prepare(tmp_path, TEXT)
    calls = []

    def function(x: Array, *arguments: Any, **options: Any) -> Array | None:
        calls.append(x)
        if len(calls) == 1:
            return np.array(x)
        if second is not None:
            raise second
        return None

    request = {name: getattr(case, name) for name in CASE_FIELDS}
    tensors = Tensors(request, inputs.files, "numpy")
    with pytest.raises(NoResult) as caught:
        run(Implementation(function, "numpy", repeated=True), request, tensors)
    assert (caught.value.outcome, caught.value.reason) == (outcome, reason)


def test_plug_ins_and_built_in_backends_on_a_gpu_are_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "poison_malloc", lambda: None)
    monkeypatch.setattr(_torch, "unavailable", lambda name: None)
    mine = f"{Path(__file__).parent / 'plugins' / 'float64_statistics.py'}:batch_norm"
    for name, repeated, poisoned in (
        ("welford@cpu", False, False),
        ("torch@cpu", False, False),
        ("torch@cuda", True, False),
        (mine, True, True),
    ):
        implementation = protocol._implementation(name, "/")
        assert (implementation.repeated, implementation.poisoned) == (repeated, poisoned), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_worker_is_python_3_7_and_imports_only_what_it_may(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 7))
    allowed = {*sys.stdlib_module_names, "numpy", "ml_dtypes", "numba", "llvmlite"}
    frameworks = {
        "_torch.py": {"torch"},
        "_torch_sync.py": {"torch"},
        "torch_plugin.py": {"torch"},
        "poison.py": {"torch"},
        "_cupy.py": {"cupy", "cupy_backends"},
        "_gemm_cuda.py": {"cupy"},
        "_chainer_cuda.py": {"cupy"},
        "_welford_cuda.py": {"cupy", "cupy_backends"},
        "_chainer_real.py": {"chainer"},
        "_flax.py": {"flax", "jax"},
        "_jax.py": {"jax"},
        "_haiku.py": {"haiku", "jax"},
        "_ncnn.py": {"ncnn"},
        "_nnabla.py": {"nnabla"},
        "_opencv.py": {"cv2", "onnx"},
        "_openvino.py": {"openvino"},
        "_keras.py": {"keras", "jax", "tensorflow", "torch"},
        "_megengine.py": {"megengine"},
        "_mindspore.py": {"mindspore"},
        "_mlx.py": {"mlx"},
        "_mxnet_real.py": {"mxnet"},
        "_onnxruntime.py": {"onnx", "onnxruntime"},
        "_paddle.py": {"paddle"},
        "_tensorflow.py": {"tensorflow"},
        "_tensorflow_1.py": {"tensorflow"},
        "_tinygrad.py": {"tinygrad"},
    }
    allowed |= frameworks.get(path.name, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in allowed
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    assert future or not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in tree.body)


def test_describing_the_environment_imports_no_framework() -> None:
    code = (
        "import sys\nfrom bnaudit.worker import environment\n"
        "assert environment.describe('torch')['devices'] == []\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert environment.describe("numpy")["blas"] is not None


def test_another_dtype_in_a_second_call_is_a_difference_of_dtypes() -> None:
    first = {"batch_mean": np.zeros(2, np.float32)}
    second = {"batch_mean": np.zeros(2, np.float64)}
    assert difference(first, second, "float32") == "batch_mean was float32, then float64"


def test_versions_are_also_found_without_importlib_metadata() -> None:
    """As Python 3.7 has to."""
    from importlib import metadata

    for package in ("numpy", "ml_dtypes", "torch", "no-such-package"):
        try:
            expected: str | None = metadata.version(package)
        except metadata.PackageNotFoundError:
            expected = None
        assert environment._version(package) == expected
