"""The backends on CuPy, on a stand-in for CuPy that executes their host code without a GPU."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from correct import outputs as right_outputs
from correct import prepare

from bnaudit.subject import Subject, scratch_folder
from bnaudit.worker.backends import _gemm
from bnaudit.worker.layout import OFFSET, STEP, lay_out

Array = npt.NDArray[Any]

STAND_IN = Path(__file__).parent / "cuda_on_host"
PACKAGE = "bnaudit.worker.backends"
MODULES = (f"{PACKAGE}._cupy", f"{PACKAGE}._gemm_cuda", f"{PACKAGE}._chainer_cuda")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

BACKENDS = ("gemm@cuda", "gemm-tf32@cuda", "chainer-2016@cuda")
FORMATS = ("contiguous", "channels_last", "strided")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for the kernels that the stand-in compiles, so that it compiles them once."""
    return str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def loaded() -> dict[str, types.ModuleType]:
    """The modules, and all of the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STAND_IN)
        for name in ours():
            patch.delitem(sys.modules, name)
        for name in (*MODULES, *stand_in()):
            importlib.import_module(name)
        modules = {name: sys.modules[name] for name in ours()}
        for name in modules:
            del sys.modules[name]
    return modules


@pytest.fixture
def stood_in(
    loaded: dict[str, types.ModuleType], compiled: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The modules, with the stand-in as their CuPy until the end of the test."""
    monkeypatch.setenv("CUDA_ON_HOST_CACHE", compiled)
    for name, entry in loaded.items():
        monkeypatch.setitem(sys.modules, name, entry)
    return {name.rpartition(".")[2]: loaded[name] for name in MODULES}


@pytest.fixture
def module(stood_in: dict[str, Any]) -> Any:
    """What every backend on CuPy shares."""
    return stood_in["_cupy"]


@pytest.fixture
def gemm(stood_in: dict[str, Any]) -> Any:
    """Caffe's layer."""
    return stood_in["_gemm_cuda"]


@pytest.fixture
def chainer(stood_in: dict[str, Any]) -> Any:
    """Chainer's layer."""
    return stood_in["_chainer_cuda"]


def stand_in() -> dict[str, Path]:
    """The stand-in's modules and their files."""
    paths = {path.relative_to(STAND_IN).with_suffix(""): path for path in STAND_IN.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): paths[name] for name in sorted(paths)}


def ours() -> list[str]:
    """What is loaded of CuPy, and the modules that use it."""
    return [name for name in sys.modules if name.split(".")[0] == "cupy" or name in MODULES]


def arguments(shape: tuple[int, ...], dtype: str, memory_format: str) -> tuple[list[Array], Array]:
    """x, weight, bias, running mean and variance, and grad_output: small integers.

    Sums of them are exact in any order, and so are the mean and the variance of a power of two of them.
    """
    draw = np.random.default_rng([*shape]).integers
    x, grad = (lay_out(draw(-8, 8, shape).astype(dtype), memory_format) for _ in range(2))
    return [x, *(draw(1, 5, shape[1]).astype(dtype) for _ in range(4))], grad


def run(function: Callable[..., Any], given: list[Any], **options: Any) -> dict[str, Any]:
    options = {"training": True, "momentum": 0.5, "eps": 0.25, **options}
    outputs: dict[str, Any] = function(*given, **options)
    return outputs


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object) -> Any:
        raise error

    return fail


# --- arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 3, 3), (1, 3, 1, 2), (4, 3, 2), (0, 3, 2)])
def test_an_array_on_the_device_has_the_same_values_and_strides(
    module: Any, shape: tuple[int, ...], memory_format: str, dtype: str
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    array = lay_out(values, memory_format)
    device = module.to_device(array)
    assert (device.shape, device.dtype, device.strides) == (shape, array.dtype, array.strides)
    host = module.to_host(device)
    np.testing.assert_array_equal(host, values)
    assert host.flags.c_contiguous


def test_the_gaps_of_a_strided_array_are_nan_on_the_device_too(module: Any) -> None:
    array = lay_out(np.ones((2, 3, 4), np.float32), "strided")
    memory = module.to_device(array).data.mem.host.view(np.float32).copy()
    assert memory.size == OFFSET + STEP * array.size
    assert (memory[OFFSET::STEP] == 1).all()
    memory[OFFSET::STEP] = np.nan
    assert np.isnan(memory).all()


# --- Caffe's layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 4), (2, 5, 16), (8, 3), (1, 1, 2, 2), (1, 4)])
def test_gemm_on_cublas_equals_gemm_on_numpys_blas_where_sums_are_exact(
    gemm: Any, shape: tuple[int, ...], dtype: str, memory_format: str, training: bool
) -> None:
    given, grad = arguments(shape, dtype, memory_format)
    got = run(gemm.gemm, given, training=training, grad_output=grad)
    letter = "S" if dtype == "float32" else "D"
    assert got.pop("kernel") == f"cublas{letter}gemv, cublas{letter}gemm, TF32 off, cuBLAS 13.2.0"
    expected = run(_gemm.gemm, given, training=training, grad_output=grad)
    assert got.keys() == expected.keys()
    for name in ("y", "grad_weight", "grad_input"):  # of rounded terms, or with a fused product
        near = 1e3 * np.finfo(dtype).eps
        np.testing.assert_allclose(
            got.pop(name), expected[name], rtol=near, atol=near, err_msg=name
        )
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


DEFECTS = {
    "rows and columns swapped in gemv": ("operation, columns, rows, *a", "operation, rows, columns, *a"),
    "the other operation in the first gemv": ("CUBLAS_OP_T, blob", "CUBLAS_OP_N, blob"),
    "a wrong leading dimension in gemv": ("matrix.data.ptr, columns)", "matrix.data.ptr, rows)"),
    "the operands of gemm not exchanged": ("plain, plain, columns, rows", "plain, plain, rows, columns"),
    "a wrong leading dimension in gemm": ("product.data.ptr, columns)", "product.data.ptr, rows)"),
    "old memory added in gemm": ("0 if onto is None else 1", "1"),
    "the mean not added onto x": ("0 if onto is None else 1", "0"),
    "channels and spatial size swapped": ("(channels, blob.spatial,", "(blob.spatial, channels,"),
    "no factor": ("blob.sums(centred, 1.0 / count)", "blob.sums(centred)"),
    "factors in the device's memory": ("CUBLAS_POINTER_MODE_HOST", "CUBLAS_POINTER_MODE_DEVICE"),
    "eps outside of the root": (
        '_apply("powx", _apply("add_scalar", var, float(eps)), 0.5)',
        '_apply("add_scalar", _apply("powx", var, 0.5), float(eps))',
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(gemm: Any, defect: str) -> None:
    source = Path(gemm.__file__).read_text()
    assert source.count(DEFECTS[defect][0]) == 1
    spoilt = types.ModuleType(MODULES[1])
    spoilt.__package__ = gemm.__package__
    exec(source.replace(*DEFECTS[defect]), spoilt.__dict__)
    test = test_gemm_on_cublas_equals_gemm_on_numpys_blas_where_sums_are_exact
    with pytest.raises((AssertionError, ValueError, TypeError, RuntimeError)):
        test(spoilt, (4, 3, 2, 4), "float32", "contiguous", True)


def test_caffes_kernels_compile_for_gpus(gemm: Any, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    names = re.findall(r"^ELEMENTWISE\((\w+)", gemm.CAFFE_KERNELS, re.MULTILINE)
    assert len(names) == 8
    instances = [f"(void*){name}<{kind}>" for name in names for kind in ("float", "double")]
    source = tmp_path / "caffe.cu"
    source.write_text(f"{gemm.CAFFE_KERNELS}\nvoid* instances[] = {{{', '.join(instances)}}};\n")
    command = ["nvcc", "-cubin", "-arch=sm_80", "-Werror=all-warnings", "-o", "caffe.cubin"]
    subprocess.run([*command, source.name], cwd=tmp_path, check=True)


def test_tf32_rounds_the_mean_to_11_bits_and_is_off_again_afterwards(gemm: Any) -> None:
    from cupy.cuda import cublas

    before = dict(cublas.modes)
    x = np.full((2, 1, 4), 1 + 2.0**-11, np.float32)  # a sum of eight is exact
    given = [x, None, None, np.zeros(1, np.float32), np.ones(1, np.float32)]
    assert (run(gemm.gemm, given)["y"] == 0).all()
    got = run(gemm.gemm_tf32, given)
    assert got["batch_mean"] == 1 + 2.0**-11  # gemv has no TF32
    np.testing.assert_allclose(got["y"], 2.0**-11 / 0.5, rtol=1e-3)
    assert "TF32 on" in got["kernel"]
    assert cublas.modes == before


def test_cublass_modes_are_restored_after_an_error(
    gemm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cupy.cuda import cublas

    before = dict(cublas.modes)
    monkeypatch.setattr(cublas, "sgemm", raiser(cublas.CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")))
    given, _ = arguments((2, 3, 4), "float32", "contiguous")
    with pytest.raises(cublas.CUBLASError, match="NOT_SUPPORTED"):
        run(gemm.gemm_tf32, given)
    assert cublas.modes == before


def test_gemm_keeps_subnormal_numbers_and_leaves_arithmetic_to_no_kernel_of_cupys(
    gemm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    monkeypatch.setattr(cupy, "ElementwiseKernel", raiser(AssertionError("flushes to zero")))
    monkeypatch.setattr(cupy.ndarray, "_operate", raiser(AssertionError("flushes to zero")))
    tiny, zero, one = (np.full(1, value, np.float32) for value in (1e-40, 0, 1))
    x = tiny.reshape(1, 1)
    given = [x, one, zero, zero, one]
    got = run(gemm.gemm, given, training=False, eps=0.0, grad_output=x)
    assert got["y"] == got["grad_input"] == tiny


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("gemm", "float16", "there is no cublasHgemv"),
        ("gemm", "uint16", "there is no cublasHgemv"),
        ("gemm_tf32", "uint16", "there is no cublasHgemv"),
        ("gemm_tf32", "float64", "TF32 is a mode of float32 products"),
        ("chainer_2016", "float16", "float32 only"),
        ("chainer_2016", "float64", "float32 only"),
    ],
)
def test_what_a_backend_does_not_take_is_refused_in_words(
    gemm: Any, chainer: Any, name: str, dtype: str, words: str
) -> None:
    given, _ = arguments((2, 3, 4), dtype, "contiguous")
    functions = {**vars(gemm), **vars(chainer)}
    with pytest.raises(NotImplementedError, match=words):
        run(functions[name], given)


def test_an_empty_batch_leaves_everything_as_it_was_or_is_refused(gemm: Any, chainer: Any) -> None:
    given, grad = arguments((0, 3, 2), "float32", "contiguous")
    got = run(gemm.gemm, given, grad_output=grad)
    assert got["y"].shape == got["grad_input"].shape == (0, 3, 2)
    np.testing.assert_array_equal(got["running_var"], given[4])
    with pytest.raises(NotImplementedError, match="divides by the batch's size"):
        run(chainer.chainer_2016, given)


# --- Chainer's layer --------------------------------------------------------------------------------


def test_chainers_running_variance_contains_eps_and_its_inference_adds_none(chainer: Any) -> None:
    x = np.full((2, 1, 2), 3, np.float32)
    given = [x, None, None, np.zeros(1, np.float32), np.full(1, 4, np.float32)]
    got = run(chainer.chainer_2016, given)
    assert (got["batch_mean"], got["batch_var"]) == (3, 0)
    assert (got["running_mean"], got["running_var"]) == (1.5, 2 + np.float32(0.5 * 4 / 3) * 0.25)
    assert (got["y"] == 0).all()
    assert (run(chainer.chainer_2016, given, training=False)["y"] == 3 / 2).all()


def test_chainers_sums_are_cupys_own_and_cub_is_back_afterwards(chainer: Any) -> None:
    from cupy import _core

    before = list(_core.get_reduction_accelerators())
    assert before  # or the stand-in's reduction could not refuse
    given, grad = arguments((4, 3, 2), "float32", "contiguous")
    assert run(chainer.chainer_2016, given, grad_output=grad)["kernel"].endswith("without CUB")
    assert _core.get_reduction_accelerators() == before


# --- all, through the worker ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(compiled: str) -> Iterator[Subject]:
    """A worker that finds the stand-in, in an environment that does not."""
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as subject:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(STAND_IN))
            patch.setenv("CUDA_ON_HOST_CACHE", compiled)
            subject.describe(list(BACKENDS))  # starts it
        yield subject


NEAR = {"gemm@cuda": 1e-5, "gemm-tf32@cuda": 1e-2, "chainer-2016@cuda": 1e-5}
"""TF32 keeps 11 bits of the mean and of the standard deviation."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "fields",
    [
        "backward: true\naffine: {weight: {distribution: normal}, bias: 2}\n",
        "backward: true\naffine: null\n",
        "mode: inference\nbackward: true\nrunning: {mean: 1, var: 2}\n",
        "steps: 3\nmomentum: null\n",
    ],
    ids=["training", "no-affine", "inference", "cumulative"],
)
def test_every_kind_of_case_gives_the_right_quantities(
    subject: Subject, tmp_path: Path, backend: str, memory_format: str, fields: str
) -> None:
    text = "input: {distribution: normal, mean: 1.5}\nshape: [4, 3, 5, 6]\neps: 1e-7\n"
    case, inputs = prepare(tmp_path, f"{text}memory_format: {memory_format}\n{fields}")
    assert subject.describe([backend]) == {backend: None}
    reply = subject.run(backend, case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None)
    names = {"y", "running_mean", "running_var"}
    if case.mode == "training":
        names |= {"batch_mean", "batch_var"}
    if case.backward:
        names |= {"grad_input"} | ({"grad_weight", "grad_bias"} if case.affine else set())
    assert reply.outputs.keys() == names
    expected = right_outputs(case, inputs)
    for name, got in reply.outputs.items():
        near = NEAR[backend] * (40 if name == "grad_weight" else 1)  # a sum of 120 terms
        np.testing.assert_allclose(got, expected[name], atol=near, rtol=near, err_msg=name)


def test_the_device_and_its_software_are_described(module: Any) -> None:
    assert module.describe() == {
        "devices": [{"name": "host stand-in", "driver": "13.2", "cuda": "13.2", "cudnn": None}],
        "flags": {"nvrtc": "13.2", "cublas": "13.2.0", "tf32_override": None},
    }


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_on_a_gpu_the_right_quantities_come_out(
    tmp_path: Path, backend: str, memory_format: str
) -> None:
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as real:
        reason = real.describe([backend])[backend]
        if reason is not None:
            pytest.skip(reason)
        for number, fields in enumerate(("backward: true\n", "mode: inference\nbackward: true\n")):
            folder = tmp_path / str(number)
            folder.mkdir()
            test = test_every_kind_of_case_gives_the_right_quantities
            test(real, folder, backend, memory_format, fields)


@pytest.mark.gpu
def test_on_a_gpu_gemm_keeps_subnormal_numbers(tmp_path: Path) -> None:
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as real:
        reason = real.describe(["gemm@cuda"])["gemm@cuda"]
        if reason is not None:
            pytest.skip(reason)
        text = "input: {distribution: constant, value: 1e-40}\nshape: [1, 1]\neps: 0\n"
        case, inputs = prepare(tmp_path, text + "mode: inference\nrunning: {mean: 0, var: 1}\n")
        reply = real.run("gemm@cuda", case, inputs)
        assert reply.outputs["y"] == inputs.x[0]


# --- what is missing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("driver", "extra"), [(13010, "cuda13"), (12040, "cuda12")])
def test_without_cupy_the_reason_names_the_command_that_installs_it_for_the_driver(
    module: Any, monkeypatch: pytest.MonkeyPatch, driver: int, extra: str
) -> None:
    class Library:
        @staticmethod
        def cuDriverGetVersion(version: Any) -> None:  # noqa: N802 - CUDA's name
            version._obj.value = driver

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: Library())
    expected = f"CuPy is not installed in this environment (pip install 'bnaudit[{extra}]')"
    assert {module.unavailable(name) for name in BACKENDS} == {expected}
    assert module.describe() == {"devices": [], "flags": {}}


def test_without_cupy_and_without_a_driver_it_is_the_driver_that_is_missing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(module.ctypes, "CDLL", refuse)
    assert module.unavailable("gemm@cuda") == "no GPU: there is no NVIDIA driver"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "try:\n    raise ImportError('libcudart.so.13: cannot open')\n"
            "except ImportError as error:\n    raise ImportError('=====\\nhelp\\n=====') from error\n",
            "CuPy cannot be imported: libcudart.so.13: cannot open",
        ),
        ("import fastrlock_that_is_missing\n", "CuPy cannot be imported: No module named 'fastr"),
        ("import warnings; warnings.warn('two CuPys are installed'); import gone", "CuPy cannot"),
    ],
)
def test_a_cupy_that_cannot_be_imported_is_a_reason_and_nothing_is_warned_of(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "cupy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert module.unavailable("gemm@cuda").startswith(reason)


def test_a_missing_or_old_driver_and_a_missing_device_are_told_apart(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cupy.cuda import runtime

    error = runtime.CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
    monkeypatch.setattr(runtime, "getDeviceCount", raiser(error))
    assert module.unavailable("gemm@cuda") == f"no GPU: {error}"
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: 12040)
    reason = module.unavailable("gemm@cuda")
    assert "driver is one for CUDA 12.4, and CuPy 14.2.0 is built for CUDA 13.2" in reason
    assert "pip install 'bnaudit[cuda" in reason
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: 0)
    assert module.unavailable("gemm@cuda") == "no GPU: there is no NVIDIA driver"
    monkeypatch.setattr(runtime, "is_hip", True)
    assert module.unavailable("gemm@cuda") == "CuPy 14.2.0 is built for ROCm, not for CUDA"
    assert module.describe() == {"devices": [], "flags": {}}


def test_missing_parts_of_the_toolkit_are_reasons_with_the_command(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy
    from cupy.cuda import cublas

    command = "(pip install 'cupy-cuda13x[ctk]>=14')"
    gone = raiser(ImportError("libcublas.so.13: cannot open shared object file"))
    monkeypatch.setattr(cublas, "getVersion", gone)
    found = {name: module.unavailable(name) for name in BACKENDS}
    text = f"CuPy loads no cuBLAS: libcublas.so.13: cannot open shared object file {command}"
    assert found == {**dict.fromkeys(BACKENDS[:2], text), "chainer-2016@cuda": None}
    assert module.describe()["flags"]["cublas"] is None
    monkeypatch.setattr(cupy, "zeros", raiser(RuntimeError("\n=====\nno libnvrtc.so.13\nmore\n")))
    found = {name: module.unavailable(name) for name in BACKENDS}
    assert set(found.values()) == {f"CuPy compiles no kernel: no libnvrtc.so.13 {command}"}


def test_tf32_is_unavailable_where_it_could_not_be_on(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cupy.cuda import runtime

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert module.unavailable("gemm-tf32@cuda") == "NVIDIA_TF32_OVERRIDE=0 switches TF32 off"
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda device: {"major": 7})
    assert "compute capability 8 or later" in module.unavailable("gemm-tf32@cuda")
    assert module.unavailable("gemm@cuda") is None


def test_too_little_memory_is_a_refusal_and_a_cuda_error_keeps_its_text(
    gemm: Any, chainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy
    from cupy.cuda import memory, runtime

    given, _ = arguments((2, 3, 4), "float32", "contiguous")
    for function in (gemm.gemm, chainer.chainer_2016):
        with monkeypatch.context() as patch:
            patch.setattr(cupy, "asarray", raiser(memory.OutOfMemoryError(1 << 40, 1 << 30)))
            with pytest.raises(NotImplementedError, match="more GPU memory than the 1 GiB"):
                run(function, given)
            error = runtime.CUDARuntimeError(700, "cudaErrorIllegalAddress: an illegal access")
            patch.undo()
            patch.setattr(runtime, "deviceSynchronize", raiser(error))
            with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
                run(function, given)


# --- the stand-in itself ----------------------------------------------------------------------------

OWN = {
    "cupy.cuda.cublas": {"modes", "DEFAULT_MATH", "TF32_TENSOR_OP_MATH"},
    "cupy.cuda.device": {"HANDLE"},
    "cupy.cuda.memory": {"is_device", "view"},
    "cupy.cuda.runtime": {"CUDA"},
}
"""Names that are the stand-in's."""


def offered() -> list[str]:
    """The dotted names that the stand-in defines at the places where CuPy has them."""
    names = ["cupy.ElementwiseKernel", "cupy.ReductionKernel"]
    for module, path in stand_in().items():
        if module in ("cupy._kernels", "cupy._raw"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.append(f"{module}.{node.name}")
            if isinstance(node, ast.ClassDef) and node.name == "ndarray":
                methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
                names += [f"{module}.ndarray.{method.name}" for method in methods]
            if isinstance(node, ast.Assign):
                targets = (target for target in node.targets if isinstance(target, ast.Name))
                names += [f"{module}.{target.id}" for target in targets]
    private = {f"{module}.{name}" for module, own in OWN.items() for name in own}
    dunder = {"__init__", "__array__", "__all__", "__getattr__"}
    public = (name for name in names if not re.search(r"\._(?!core)(?!_)", name))
    return sorted(n for n in {*public} - private if n.rpartition(".")[2] not in dunder)


LOOK_UP = """
import operator, sys
try:
    import cupy, cupy.cuda.compiler, cupy.cuda.function
except ModuleNotFoundError:
    sys.exit("CuPy is not installed")
names = sys.argv[1:]
try:
    from cupy.cuda import cublas
except ImportError:
    names = [name for name in names if ".cublas." not in name]
for name in names:
    operator.attrgetter(name.partition(".")[2])(cupy)
"""


def test_the_stand_in_has_nothing_that_cupy_has_not() -> None:
    names = offered()
    assert len(names) > 40
    command = [sys.executable, "-c", LOOK_UP, *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.stderr == "CuPy is not installed\n":
        pytest.skip(result.stderr.strip())
    assert (result.returncode, result.stderr) == (0, "")


def test_the_stand_in_refuses_what_cupy_refuses(module: Any) -> None:
    import cupy

    one = cupy.ones(3, np.float32)
    for wrong in (lambda: np.asarray(one), lambda: one + np.ones(3), lambda: np.ones(3) * one):
        with pytest.raises(TypeError):
            wrong()
    kernel = cupy.ElementwiseKernel("T x, T y", "T z", "z = x + y", "add")
    np.testing.assert_array_equal(kernel(one, 1).get(), [2, 2, 2])
    with pytest.raises(TypeError, match="mismatched"):
        kernel(one, cupy.ones(3, np.float64))
    assert np.isnan(cupy.empty(3, np.float16).get()).all()
