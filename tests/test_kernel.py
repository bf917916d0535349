"""batchnorm.cu: executed on the host, where it must return its NumPy twin's bits, and compiled for GPUs."""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.inputs import make
from bnaudit.scenario import Case, load, shipped
from bnaudit.subject import Subject, scratch_folder
from bnaudit.worker.backends import _numpy
from bnaudit.worker.layout import lay_out
from bnaudit.worker.rounding import DTYPES, round_to, statistics_dtype, widen

Array = npt.NDArray[Any]

STAND_IN = Path(__file__).parent / "cuda_on_host"
BACKENDS = "bnaudit.worker.backends"
FORMATS = ("contiguous", "channels_last", "strided")
SOURCE = Path(_numpy.__file__).parents[1] / "batchnorm.cu"

on_host = pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no g++ to compile batchnorm.cu for the host"
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the stand-in compiles."""
    return tmp_path_factory.mktemp("cuda_on_host")


@pytest.fixture
def backend(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """_welford_cuda on the stand-in for CuPy, both loaded for one test, between fences around all memory."""
    ours = ("cupy", f"{BACKENDS}._cupy", f"{BACKENDS}._welford_cuda")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("CUDA_ON_HOST_CACHE", str(compiled))
    memory = importlib.import_module("cupy.cuda.memory")
    fence, fenced = 4096, []
    allocate = memory.Memory.__init__

    def allocate_fenced(self: Any, size: int) -> None:
        allocate(self, size + 2 * fence)
        fenced.append(self.host)
        del memory._alive[self.ptr]
        self.host, self.size = self.host[fence : fence + size], size
        self.ptr += fence
        memory._alive[self.ptr] = self

    monkeypatch.setattr(memory.Memory, "__init__", allocate_fenced)
    yield importlib.import_module(f"{BACKENDS}._welford_cuda")
    for whole in fenced:  # reading beyond an end finds NaN, writing there leaves something else
        assert (whole[:fence] == 0xFF).all()
        assert (whole[-fence:] == 0xFF).all()
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)


# --- the kernel against its twin ----------------------------------------------------------------------


def shape_of(n: int, channels: int) -> tuple[int, ...]:
    """A shape (N, C, H, W) with n elements per channel, N and W greater than 1 where n allows it."""
    images = next(k for k in (3, 2, 5, 7, 1) if n % k == 0)
    width = next(k for k in (2, 3, 5, 7, 1) if n // images % k == 0)
    return images, channels, n // images // width, width


def normal(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


class Step:
    """One step's arguments, stored as the case has them, and what the twin returns for them."""

    def __init__(
        self, x: Array, dtype: str, *, affine: bool = True, training: bool = True,
        param_dtype: str | None = None, backward: bool = True, **options: float,
    ) -> None:  # fmt: skip
        channels, self.dtype = x.shape[1], dtype
        self.param_dtype = param_dtype or statistics_dtype(dtype)
        self.x = round_to(x, dtype)
        self.grad = round_to(normal(x.shape, 1), dtype) if backward else None
        weight, bias, mean, var = (
            round_to(values, self.param_dtype)
            for values in (
                normal((channels,), 2), normal((channels,), 3),
                normal((channels,), 4), normal((channels,), 5) ** 2,
            )
        )  # fmt: skip
        self.parameters = [weight if affine else None, bias if affine else None, mean, var]
        self.options = {"training": training, "momentum": 0.1, "eps": 1e-5, **options}

    def twin(self) -> dict[str, Array]:
        """What welford@cpu returns, its tensors rounded once by the worker."""
        welford: Any = _numpy.welford
        parameters = (p if p is None else widen(p, self.param_dtype) for p in self.parameters)
        grad = None if self.grad is None else widen(self.grad, self.dtype)
        with np.errstate(all="ignore"):  # as in a worker
            outputs: dict[str, Array] = welford(
                widen(self.x, self.dtype), *parameters, grad_output=grad, **self.options
            )
        for name in ("y", "grad_input"):
            if name in outputs:
                outputs[name] = round_to(outputs[name], self.dtype)
        return outputs

    def kernel(self, backend: Any, memory_format: str = "contiguous") -> dict[str, Any]:
        """What welford@cuda returns on the host."""
        parameters = (p if p is None else p.copy() for p in self.parameters)
        grad = None if self.grad is None else lay_out(self.grad, memory_format)
        outputs: dict[str, Any] = backend.welford(
            lay_out(self.x, memory_format), *parameters, grad_output=grad, **self.options
        )
        return outputs

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """The quantities whose bits differ from the twin's, a NaN being as good as any other."""
        return [name for name, right in self.twin().items() if not same(right, found[name])]


def same(a: Array, b: Array) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.dtype == np.uint16:
        a, b = widen(a, "bfloat16"), widen(b, "bfloat16")
    bits = f"u{a.itemsize}"
    pairs = (np.ascontiguousarray(array).view(bits) for array in (a, b))
    return bool((np.equal(*pairs) | (np.isnan(a) & np.isnan(b))).all())


LENGTHS = (
    1, 2, 9, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 16383, 16384, 16385, 40_000,
)  # fmt: skip


@on_host
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_twin_return_the_same_bits(backend: Any, dtype: str, n: int) -> None:
    x = normal(shape_of(n, channels=2), 0) * 1.5 + 0.7
    training = Step(x, dtype)
    for memory_format in FORMATS:
        assert not training.differences(training.kernel(backend, memory_format)), memory_format
    for other in (
        Step(x, dtype, training=False),
        Step(x, dtype, affine=False, momentum=0.75, eps=0.125),
        Step(x, dtype, affine=False, training=False, backward=False),
    ):
        assert not other.differences(other.kernel(backend))


@on_host
@pytest.mark.parametrize("channels", [1, 63, 64, 65, 257])
@pytest.mark.parametrize(
    ("memory_format", "dtype"), [("channels_last", "float32"), ("strided", "bfloat16")]
)
def test_the_number_of_channels_changes_nothing(
    backend: Any, channels: int, memory_format: str, dtype: str
) -> None:
    step = Step(normal(shape_of(18, channels), 0), dtype)
    found = step.kernel(backend, memory_format)
    assert not step.differences(found)
    alone = Step(normal(shape_of(18, channels), 0), dtype)
    alone.x, alone.grad = step.x[:, -1:], None
    alone.parameters = [p if p is None else p[-1:] for p in step.parameters]
    assert same(alone.kernel(backend)["y"], found["y"][:, -1:])


@on_host
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 7), (2, 3, 2, 3, 5), (1, 1, 1, 1)])
def test_every_rank_is_taken(backend: Any, shape: tuple[int, ...]) -> None:
    step = Step(normal(shape, 0), "float32")
    for memory_format in FORMATS:
        assert not step.differences(step.kernel(backend, memory_format))


@on_host
@pytest.mark.parametrize("blocks", [256, 257, 600])
def test_partial_results_of_many_blocks_are_merged_alike(backend: Any, blocks: int) -> None:
    step = Step(normal((1, 1, blocks * 64 * 256 - 1), 0), "float16")
    assert not step.differences(step.kernel(backend, "contiguous"))


SPECIAL: dict[str, Callable[[Array], Array]] = {
    "constant 3.3": lambda z: np.full_like(z, 3.3),
    "constant 12345.678": lambda z: np.full_like(z, 12345.678),
    "constant 3e38": lambda z: np.full_like(z, 3e38),
    "zeros of both signs": lambda z: z * 0,
    "offset": lambda z: z + 1e4,
    "outlier": lambda z: np.where(z == z.max(), 6e4, z),
    "squares overflow": lambda z: z * 1e20,
    "differences overflow": lambda z: np.sign(z) * 3e38,
    "subnormal": lambda z: z * 1e-40,
    "subnormal variance": lambda z: 1 + z * 1e-20,
    "tiny float16": lambda z: z * 2e-7,
    "one NaN": lambda z: np.where(z == z.max(), np.nan, z),
    "one infinity": lambda z: np.where(z == z.max(), np.inf, z),
    "infinities": lambda z: np.where(abs(z) > 1, np.copysign(np.inf, z), z),
    "last is infinite": lambda z: np.where(z == z[-1, -1, -1, -1], np.inf, z),
}


@on_host
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_give_the_same_bits(backend: Any, dtype: str, name: str) -> None:
    for n in (1, 9, 33, 400, 20_000):
        x = SPECIAL[name](normal(shape_of(n, channels=2), 0))
        for training, eps in ((True, 0.0), (True, 1e-5), (False, 1e-5)):
            step = Step(x, dtype, training=training, eps=eps)
            assert not step.differences(step.kernel(backend)), (n, training, eps)


@on_host
@pytest.mark.parametrize("n", [1, 9, 257, 40_000])
@pytest.mark.parametrize("value", [100, 3.3, 12345.678, 1e-30, 3e38])
def test_a_constant_channel_is_exactly_the_bias(backend: Any, value: float, n: int) -> None:
    step = Step(np.full(shape_of(n, channels=2), value), "float32")
    outputs = step.kernel(backend)
    assert (outputs["batch_mean"] == np.float32(value)).all()
    assert (outputs["batch_var"] == 0).all()
    bias = step.parameters[1]
    assert bias is not None
    assert (outputs["y"] == bias[:, None, None]).all()


@on_host
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_in_16_bits_are_widened(backend: Any, dtype: str) -> None:
    for training in (True, False):
        step = Step(normal((4, 3, 5, 5), 0), dtype, param_dtype=dtype, training=training)
        assert not step.differences(step.kernel(backend))


@on_host
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch_leaves_everything_as_it_was(backend: Any, dtype: str) -> None:
    step = Step(np.zeros((0, 2, 3)), dtype)
    outputs = step.kernel(backend)
    assert outputs["y"].shape == outputs["grad_input"].shape == (0, 2, 3)
    for name, before in zip(("running_mean", "running_var"), step.parameters[2:], strict=True):
        assert before is not None
        assert same(outputs[name], before)
    assert not outputs["grad_weight"].any()


@on_host
def test_inputs_stay_as_they_are(backend: Any) -> None:
    step = Step(normal((2, 3, 4, 5), 0), "float32")
    x, grad = lay_out(step.x, "strided"), lay_out(step.grad, "strided")  # type: ignore[arg-type]
    parameters = [p.copy() for p in step.parameters if p is not None]
    backend.welford(x, *parameters, grad_output=grad, **step.options)
    assert same(x, step.x)
    assert step.grad is not None
    assert same(grad, step.grad)
    for before, after in zip(step.parameters, parameters, strict=True):
        assert before is not None
        assert same(before, after)


@on_host
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_in_which_threads_run_changes_nothing(backend: Any, dtype: str) -> None:
    step = Step(normal(shape_of(40_000, channels=1), 0), dtype)
    importlib.import_module("cupy._raw").descending = True  # type: ignore[attr-defined]
    assert not step.differences(step.kernel(backend))


def test_the_twins_lanes_are_the_kernels_geometry() -> None:
    source = SOURCE.read_text()
    names = {"WARP": _numpy.WARP, "THREADS": _numpy.THREADS, "LONGEST": _numpy.LONGEST}
    for name, value in names.items():
        assert f"constexpr int {name} = {value};" in source
    for n in range(1, 100_000, 331):
        lanes = _numpy.lanes_of(n)
        assert lanes % 256 == 0
        assert (lanes - 256) * 64 < n <= lanes * 64


# --- shipped scenarios, by way of a worker --------------------------------------------------------------


def compare(subject: Subject, cases: list[Case], folder: Path) -> None:
    """Asserts that both run and return equal bits in every case that they take."""
    assert subject.describe(["welford@cuda"]) == {"welford@cuda": None}
    for case in cases:
        inputs = make(case, folder)
        kernel, twin = (
            subject.run(f"welford@{device}", case, inputs) for device in ("cuda", "cpu")
        )
        assert (kernel.outcome, twin.outcome) == ("done", "done"), (case.id, kernel)
        assert kernel.outputs.keys() == twin.outputs.keys()
        for name, right in twin.outputs.items():
            assert same(kernel.outputs[name], right), (case.id, name)
        assert kernel.not_repeatable is None
        for path in folder.iterdir():
            path.unlink()


def cases_up_to(elements: int) -> list[Case]:
    """The shipped cases with at most so many elements in a batch."""
    cases = [case for scenario in load([str(shipped())]) for case in scenario.cases]
    return [c for c in cases if math.prod(c.shape) <= elements and c.unsupported() is None]


@on_host
def test_kernel_and_twin_agree_on_the_shipped_scenarios_small_cases(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("CUDA_ON_HOST_CACHE", str(compiled))
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        cases = cases_up_to(1_000)
        assert len(cases) > 100
        compare(subject, cases, tmp_path)


@pytest.mark.gpu
def test_kernel_and_twin_agree_on_the_shipped_scenarios_on_a_gpu(tmp_path: Path) -> None:
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        reason = subject.describe(["welford@cuda"])["welford@cuda"]
        if reason is not None:
            pytest.skip(reason)
        compare(subject, cases_up_to(2**31), tmp_path)


# --- what the comparison notices ----------------------------------------------------------------------------

REST = "i += own.step) {\n        const A value"
"""Of the loop of `moments`."""

DEFECTS = {
    "the other lane first": (
        "value = merge(value, from_lane_above(value, half))",
        "value = merge(from_lane_above(value, half), value)",
    ),
    "neighbours first": (
        "for (int half = width / 2; half > 0; half /= 2)",
        "for (int half = 1; half < width; half *= 2)",
    ),
    "the last block lost": ("b < blocks;", "b < blocks - 1;"),
    "contiguous slices": (
        "first = blockIdx.x % blocks * THREADS + threadIdx.x",
        "first = threadIdx.x * blocks + blockIdx.x % blocks",
    ),
    "a fused update of m2": (
        "some.m2 += delta * (value - some.mean)",
        "some.m2 = fma(delta, value - some.mean, some.m2)",
    ),
    "a fused merge of the mean": ("a.mean + delta * share,", "fma(delta, share, a.mean),"),
    "the mean's other merge": (
        "a.mean + delta * share,",
        "(A(a.count) * a.mean + A(b.count) * b.mean) / A(count),",
    ),
    "a reciprocal": ("some.mean += delta / A(some.count)", "some.mean += delta * (A(1) / A(some.count))"),
    "no elements with a weight of 0": ("if (b.count == 0) return a;", ""),
    "the last element lost": (f"i < n; {REST}", f"i < n - 1; {REST}"),
    "the incomplete round lost": (f"i < n; {REST}", f"i <= n - own.step; {REST}"),
    "a step beyond the end": (f"i < n; {REST}", f"i <= n; {REST}"),
    "no barrier": ("__syncthreads();", ""),
    "a barrier that a thread misses": ("__syncthreads();", "if (threadIdx.x != 255) __syncthreads();"),
    "a return before the barrier": (
        "Moments<A> some = {0, 0, 0};",
        "if (own.first >= n) return; Moments<A> some = {0, 0, 0};",
    ),
    "a shuffle without all lanes": ("if (threadIdx.x < WARP)", "if (threadIdx.x < WARPS)"),
    "a shuffle that not all lanes name": ("ALL = 0xffffffff", "ALL = 0x0000ffff"),
    "one image for all": ("i / positions * image + ", ""),
    "an unbiased variance": ("all.m2 / A(n)", "all.m2 / A(n - 1)"),
    "y rounded twice": (
        "to = __float2bfloat16_rn(value)",
        "to = __float2bfloat16_rn(__half2float(__float2half_rn(value)))",
    ),
    "the gradient's mean after xhat's": (
        "g - by_mean - xhat(widen(x[x_layout.at(own.c, i)])) * by_var",
        "g - xhat(widen(x[x_layout.at(own.c, i)])) * by_var - by_mean",
    ),
}  # fmt: skip
"""In every place where the first text stands in batchnorm.cu, the second is put."""

NOTICED = {
    "a barrier that a thread misses": "thread 0 waits for its block in line \\d+, thread 255 has",
    "a return before the barrier": "thread 0 waits for its warp in line \\d+, thread 9 has returned",
    "a shuffle without all lanes": "thread 0 waits for its warp in line \\d+, thread 8 has returned",
    "a shuffle that not all lanes name": "thread 16 waits for its warp",
}
"""The defects that the launch itself reports, and how."""


def changed(backend: Any, folder: Path, old: str, new: str) -> None:
    """Lets the backend compile another source."""
    source = SOURCE.read_text()
    assert old in source
    file = folder / "batchnorm.cu"
    file.write_text(source.replace(old, new))
    backend.SOURCE = str(file)


def shown(backend: Any, dtype: str) -> list[str]:
    """What differs in a few steps."""
    found = []
    for n, scale in ((9, 1.0), (9, 1e30), (400, 1.0), (40_000, 1.0)):
        step = Step((normal(shape_of(n, channels=2), 0) + 0.7) * scale, dtype)
        found += step.differences(step.kernel(backend))
    return found


@on_host
def test_without_a_defect_nothing_is_noticed(backend: Any) -> None:
    assert not shown(backend, "float32")
    assert not shown(backend, "bfloat16")


@on_host
@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_noticed(backend: Any, tmp_path: Path, name: str) -> None:
    changed(backend, tmp_path, *DEFECTS[name])
    dtype = "bfloat16" if "bfloat16" in DEFECTS[name][0] else "float32"
    if name in NOTICED:
        with pytest.raises(RuntimeError, match=NOTICED[name]):
            shown(backend, dtype)
    else:
        assert shown(backend, dtype)


@on_host
def test_contraction_into_fused_operations_is_noticed(backend: Any) -> None:
    """Which is what a compiler does that is not told -fmad=false."""
    if not importlib.import_module("cupy._raw").FUSED:
        pytest.skip("this is no x86 with fused operations")
    backend.OPTIONS = ()
    assert shown(backend, "float32")


# --- the host's part ----------------------------------------------------------------------------------------


@on_host
def test_the_stand_in_refuses_arguments_that_a_kernel_would_misread(backend: Any) -> None:
    import cupy  # type: ignore[import-not-found,unused-ignore]

    launch = backend._kernels("float32")["moments"]
    x, partial = cupy.zeros(9, np.float32), cupy.empty((1, 16), np.uint8)
    layout = np.array((9, 0, 0, 1), backend.LAYOUT)
    right = (x, layout, np.int64(9), partial)
    launch((1,), (256,), right)
    for place, wrong, message in (
        (0, cupy.zeros(9, np.float64), r"is \*f8, the parameter \*f4"),
        (0, np.zeros(9, np.float32), "Unsupported type"),
        (1, np.int64(9), "is i8, the parameter V32"),
        (2, 9, "Unsupported type"),
        (2, np.int32(9), "is i4, the parameter i8"),
        (3, cupy.empty((1, 24), np.uint8), r"is \*V24, the parameter \*V16"),
    ):
        arguments = [*right]
        arguments[place] = wrong
        with pytest.raises(TypeError, match=message):
            launch((1,), (256,), tuple(arguments))
    with pytest.raises(TypeError, match="3 arguments"):
        launch((1,), (256,), right[:3])
    with pytest.raises(ValueError, match="invalid configuration"):
        launch((0,), (256,), right)


@on_host
def test_an_error_on_the_device_names_the_kernel(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cupy.cuda import runtime  # type: ignore[import-not-found,unused-ignore]

    calls = iter([None, None])

    def synchronize() -> None:
        if next(calls, "error") == "error":
            text = "cudaErrorIllegalAddress: an illegal memory access was encountered"
            raise runtime.CUDARuntimeError(700, text)

    monkeypatch.setattr(runtime, "deviceSynchronize", synchronize)
    with pytest.raises(RuntimeError, match="kernel normalize: cudaErrorIllegalAddress: an illegal"):
        Step(normal((2, 3, 4), 0), "float32").kernel(backend)


@on_host
def test_more_blocks_than_a_grid_has_are_refused(backend: Any) -> None:
    x = np.broadcast_to(np.float32(1), (1, 2**31, 1))
    with pytest.raises(NotImplementedError, match="2147483648 blocks are more than"):
        backend.welford(x, None, None, None, None, training=True, momentum=0.1, eps=1e-5)


@on_host
def test_the_kernel_that_ran_is_named(backend: Any) -> None:
    kernel = Step(normal((2, 3, 4), 0), "bfloat16").kernel(backend)["kernel"]
    assert kernel == "batchnorm.cu<__nv_bfloat16, float>"


# --- compiled for GPUs --------------------------------------------------------------------------------------

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
INSTANCES = [
    f"{kernel}<{types}>"
    for kernels, parameters in (
        (("moments", "normalize", "gradient_sums", "input_gradient"),
         ("__half, float", "__nv_bfloat16, float", "float, float", "double, double")),
        (("statistics", "parameter_gradients"), ("float", "double")),
    )
    for kernel in kernels
    for types in parameters
]  # fmt: skip
OPTIONS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")


def check_ptx(ptx: str) -> None:
    """All instances are there, and nothing but operations that are rounded once, as NumPy's are."""
    assert len(re.findall(r"\.entry", ptx)) == len(INSTANCES)
    found = set(re.findall(r"^\s+([a-z0-9]+[a-z.0-9]*\.f(?:16|32|64))\s", ptx, re.MULTILINE))
    assert {"add.rn.f32", "div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"} <= found
    once = re.compile(r"(add|sub|mul|div|rcp|sqrt)\.rn\.f(32|64)|(ld|st|mov|setp|neg|selp|cvt)\b.*")
    assert not [operation for operation in found if not once.fullmatch(operation)]
    assert ".ftz" not in ptx


@functools.cache
def nvcc() -> tuple[str, ...]:
    """The architectures that nvcc knows."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return tuple(listed.stdout.split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_every_instance(tmp_path: Path, architecture: int) -> None:
    if f"compute_{architecture}" not in nvcc():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    source = tmp_path / "batchnorm.cu"
    addresses = ", ".join(f"(void*)&{instance}" for instance in INSTANCES)
    source.write_text(f"{SOURCE.read_text()}\nvoid* instances[] = {{{addresses}}};\n")
    # A virtual architecture's PTX goes on to the assembler, and both files are kept.
    command = ["nvcc", "-std=c++17", *OPTIONS, "-Werror=all-warnings", "-keep", "-cubin"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", str(source)]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    (ptx,) = tmp_path.glob("*.ptx")
    check_ptx(ptx.read_text())


@functools.cache
def nvrtc() -> tuple[Any, Path] | None:
    """NVRTC, of the loader's path, of pip or of a toolkit, and a folder with CUDA's headers."""
    folders = [Path(sysconfig.get_path("purelib"), "nvidia"), Path("/usr/local")]
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    names += [str(path) for folder in folders for path in folder.glob("*/lib*/libnvrtc.so*")]
    headers = [path for folder in folders for path in folder.glob("*/include/cuda_fp16.h")]
    for name in names:
        try:
            return (ctypes.CDLL(name), headers[0].parent) if headers else None
        except OSError:
            continue
    return None


def nvrtc_ptx(architecture: int, *options: str) -> str:
    """All instances as PTX."""
    found = nvrtc()
    if found is None:
        pytest.skip("there is no NVRTC, or there are no CUDA headers")
    library, headers = found
    program = ctypes.c_void_p()
    source = SOURCE.read_bytes()
    made = library.nvrtcCreateProgram(ctypes.byref(program), source, b"batchnorm.cu", 0, None, None)
    assert made == 0
    for instance in INSTANCES:
        assert library.nvrtcAddNameExpression(program, instance.encode()) == 0
    options = (f"-arch=compute_{architecture}", "-std=c++17", f"-I{headers}", *options)
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCompileProgram(program, len(options), texts)
    assert status == 0, nvrtc_text(library, program, "ProgramLog")
    ptx = nvrtc_text(library, program, "PTX")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx


def nvrtc_text(library: Any, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_every_instance(architecture: int) -> None:
    check_ptx(nvrtc_ptx(architecture, *OPTIONS))


@pytest.mark.parametrize("option", ["-fmad=true", "-ftz=true", "-prec-div=false"])
def test_operations_that_round_otherwise_are_noticed(option: str) -> None:
    """The last of several options counts, which is why the backend does not compile by cupy.RawModule."""
    ptx = nvrtc_ptx(90, *OPTIONS, option)
    with pytest.raises(AssertionError):
        check_ptx(ptx)
