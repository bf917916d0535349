"""PyTorch's adapter, and what it finds."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from correct import outputs as right_outputs
from correct import prepare

from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.backends import _torch
from bnaudit.worker.execution import Tensors
from bnaudit.worker.rounding import widen

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)

NORMAL = "input: {distribution: normal, mean: 1.5}\n"
CUDNN = ("torch-cudnn@cuda", "torch-cudnn-benchmark@cuda", "torch-cudnn-deterministic@cuda")
CUDA = ("torch@cuda", "torch-native@cuda", *CUDNN, "torch-compile@cuda")
HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as subject:
        yield subject


@pytest.fixture(scope="module")
def flags(subject: Subject) -> dict[str, Any]:
    subject.describe(["torch@cpu"])
    found: dict[str, Any] = subject.environment()["flags"]
    return found


def run(subject: Subject, folder: Path, text: str, backend: str = "torch@cpu") -> Reply:
    return subject.run(backend, *prepare(folder, text))


def constant(value: float, shape: str, **fields: object) -> str:
    rest = "".join(f"{name}: {field}\n" for name, field in fields.items())
    return f"input: {{distribution: constant, value: {value}}}\nshape: [{shape}]\n{rest}"


LITTLE = [shape for rank in (2, 3, 4) for shape in itertools.product((1, 2, 3), repeat=rank)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_tensor_has_the_arrays_values_and_strides(
    tmp_path: Path, dtype: str, memory_format: str, steps: int
) -> None:
    torch = pytest.importorskip("torch")
    stored = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    request = {"dtype": dtype, "param_dtype": "same", "memory_format": memory_format}
    path = str(tmp_path / "x.npy")
    for shape in (*LITTLE, (0, 3), (5, 1), (7, 1, 1, 1)):
        values = np.arange(1, 1 + steps * np.prod(shape)).reshape(steps, *shape).astype(stored)
        np.save(path, values)
        tensors = Tensors(request, {"x": path}, "stored")
        for step in range(steps):
            array = tensors.given("x", step)
            tensor: Any = _torch.to_tensor(array, "cpu")
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tuple(tensor.shape) == shape
            assert tensor.numel() == 0 or tensor.data_ptr() == array.ctypes.data
            if tensor.numel() > 0:
                assert tensor.stride() == tuple(s // array.itemsize for s in array.strides)
            bits = tensor.view(getattr(torch, f"int{8 * array.itemsize}")).numpy()
            np.testing.assert_array_equal(bits, values[step].view(bits.dtype))
            np.testing.assert_array_equal(_torch.to_array(tensor), values[step])


def test_a_conjugate_and_a_negative_are_computed_before_they_are_read() -> None:
    torch = pytest.importorskip("torch")
    negative = torch._neg_view(torch.tensor([1.0, -2.0]))
    np.testing.assert_array_equal(_torch.to_array(negative), [-1, 2])
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    np.testing.assert_array_equal(_torch.to_array(conjugate), [-2, 4])


def largest(reply: Reply) -> float:
    assert (reply.outcome, reply.reason) == ("done", None)
    return float(np.abs(reply.outputs["y"]).max())


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "fields",
    [
        "backward: true\naffine: {weight: {distribution: normal}, bias: 2}\n",
        "backward: true\naffine: null\nparam_dtype: same\n",
        "mode: inference\nbackward: true\nrunning: {mean: 1, var: 2}\n",
        "steps: 3\nmomentum: null\n",
    ],
    ids=["training", "no-affine", "inference", "cumulative"],
)
def test_every_kind_of_case_gives_the_right_quantities(
    subject: Subject, tmp_path: Path, memory_format: str, dtype: str, fields: str
) -> None:
    text = f"{NORMAL}shape: [4, 3, 5, 6]\ndtype: {dtype}\nmemory_format: {memory_format}\n{fields}"
    case, inputs = prepare(tmp_path, text)
    reply = subject.run("torch@cpu", case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None)
    assert (reply.kernel or "").startswith(f"native {memory_format} ")
    expected = right_outputs(case, inputs)
    if case.mode == "training" and "invstd" in reply.outputs:
        expected["invstd"] = 1 / np.sqrt(np.asarray(expected["batch_var"], np.float64) + case.eps)
    names = {"y", "running_mean", "running_var"}
    if case.backward:
        names |= {"grad_input"} | ({"grad_weight", "grad_bias"} if case.affine else set())
    # 16-bit parameters: torch hands its statistics out in 16 bits, which is not what it computed with.
    if case.mode == "training" and not (case.param_dtype == "same" and "16" in dtype):
        names |= {"batch_mean", "invstd"}
    assert reply.outputs.keys() == names
    for name, got in reply.outputs.items():
        right, near = expected[name], 64 * HALF[dtype]
        if name in ("y", "grad_input"):
            got, right = widen(got, dtype), widen(right, dtype)
        np.testing.assert_allclose(got, right, atol=near, rtol=near, err_msg=name)


def test_torch_says_which_instructions_it_was_dispatched_for(
    subject: Subject, tmp_path: Path, flags: dict[str, Any]
) -> None:
    kernel = run(subject, tmp_path, NORMAL + "shape: [4, 3]\n").kernel
    assert kernel == f"native contiguous {flags['cpu_capability']}"
    assert flags["threads"] == 2


@pytest.mark.parametrize("backend", ["torch@cpu", "torch-compile@cpu"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shape: [1, 3]\n", "Expected more than 1 value per channel when training"),
        ("shape: [4, 3]\neps: 0\n", "eps must be positive"),
    ],
)
def test_documented_refusals_are_unsupported_in_torchs_words(
    subject: Subject, tmp_path: Path, backend: str, text: str, words: str
) -> None:
    reason = subject.describe([backend])[backend]
    if reason is not None:
        pytest.skip(reason)
    reply = run(subject, tmp_path, NORMAL + text, backend)
    assert reply.outcome == "unsupported"
    assert words in (reply.reason or "")


@pytest.mark.parametrize("shape", ["0, 3", "0, 3, 4, 5"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_an_empty_batch_leaves_everything_as_it_was(
    subject: Subject, tmp_path: Path, shape: str, mode: str
) -> None:
    reply = run(subject, tmp_path, f"{NORMAL}shape: [{shape}]\nbackward: true\nmode: {mode}\n")
    assert reply.outcome == "done"
    assert reply.outputs["y"].size == reply.outputs["grad_input"].size == 0
    np.testing.assert_array_equal(reply.outputs["running_mean"], [0, 0, 0])
    np.testing.assert_array_equal(reply.outputs["running_var"], [1, 1, 1])
    np.testing.assert_array_equal(reply.outputs["grad_weight"], [0, 0, 0])
    assert "batch_mean" not in reply.outputs


def test_a_constant_of_10000_is_off_by_0_0269_on_a_cpu_with_fma(
    subject: Subject, tmp_path: Path, flags: dict[str, Any]
) -> None:
    # y = x·alpha + (beta − mean·alpha): the product is rounded in one term and not in the other.
    if flags["cpu_capability"] not in ("AVX2", "AVX512"):
        pytest.skip(f"torch's kernels for {flags['cpu_capability']} may not use FMA")
    assert largest(run(subject, tmp_path, constant(10000, "1, 1, 3, 3"))) == pytest.approx(
        0.0269, abs=1e-4
    )


def test_a_constant_of_3_3_in_channels_last_depends_on_the_threads(
    subject: Subject, tmp_path: Path, flags: dict[str, Any]
) -> None:
    if flags["cpu_capability"] not in ("AVX2", "AVX512"):
        pytest.skip("the figures are those of x86-64")
    text = constant(3.3, "32, 64, 56, 56", memory_format="channels_last")
    case, inputs = prepare(tmp_path, text)
    assert largest(subject.run("torch@cpu", case, inputs)) == pytest.approx(0.467, abs=0.01)
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=1) as single:
        assert largest(single.run("torch@cpu", case, inputs)) == pytest.approx(0.26, abs=0.01)


def test_a_constant_of_3_3_is_nearly_right_when_contiguous(
    subject: Subject, tmp_path: Path
) -> None:
    assert largest(run(subject, tmp_path, constant(3.3, "32, 64, 56, 56"))) < 1e-4


def test_inductor_keeps_a_constant_and_is_compiled_once_for_many_steps(
    subject: Subject, tmp_path: Path
) -> None:
    backend = "torch-compile@cpu"
    reason = subject.describe([backend])[backend]
    if reason is not None:
        pytest.skip(reason)
    text = constant(3.3, "4, 3, 5, 5", backward="true", steps=20)
    reply = run(subject, tmp_path, text, backend)
    assert largest(reply) == 0
    assert (reply.kernel or "").startswith("inductor contiguous ")
    assert {"running_mean", "running_var", "grad_input", "grad_weight"} <= reply.outputs.keys()
    assert "batch_mean" not in reply.outputs


def test_generated_code_is_known_by_a_digest_that_depends_on_the_case_alone(
    subject: Subject, tmp_path: Path
) -> None:
    backend = "torch-compile@cpu"
    reason = subject.describe([backend])[backend]
    if reason is not None:
        pytest.skip(reason)
    first, other, again = (
        run(subject, tmp_path, f"{NORMAL}shape: [{shape}]\n", backend).kernel or ""
        for shape in ("4, 3, 5, 5", "4, 3, 6, 6", "4, 3, 5, 5")
    )
    assert re.fullmatch(r"inductor contiguous \S+, code [0-9a-f]{12}", first)
    assert first == again != other


def test_the_digest_of_generated_code_ignores_where_and_when_it_was_generated() -> None:
    from bnaudit.worker.backends._torch import digest

    code = "# AOT ID: ['1_forward']\nkernel = cpp('''\n#pragma omp simd\nx * 2\n''')\n"
    again = "# AOT ID: ['7_forward']\n    # kernel path: /tmp/a/b.py\n" + code.split("\n", 1)[1]
    assert digest([code]) == digest([again])
    assert len({digest([code]), digest([code, code]), digest([code.replace("2", "3")])}) == 3
    assert digest([code]) != digest([code.replace("#pragma omp simd\n", "")])


MKLDNN = "torch-mkldnn@cpu"


def mkldnn(subject: Subject, folder: Path, text: str) -> Reply:
    reason = subject.describe([MKLDNN])[MKLDNN]
    if reason is not None:
        pytest.skip(reason)
    return run(subject, folder, text, MKLDNN)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_onednns_path_gives_the_right_quantities(
    subject: Subject, tmp_path: Path, dtype: str, memory_format: str
) -> None:
    text = (
        f"{NORMAL}shape: [4, 3, 5, 6]\ndtype: {dtype}\nmemory_format: {memory_format}\n"
        "backward: true\nmomentum: 0.25\nsteps: 2\n"
        "affine: {weight: {distribution: normal, mean: 1}, bias: {distribution: normal}}\n"
    )
    reply = mkldnn(subject, tmp_path, text)
    assert (reply.outcome, reply.reason) == ("done", None)
    assert re.fullmatch(r"mkldnn \d+\.\d+\.\d+", reply.kernel or "")
    expected = right_outputs(*prepare(tmp_path, text))
    assert reply.outputs.keys() == expected.keys() - {"invstd"}
    for name, got in reply.outputs.items():
        right, near = expected[name], 64 * HALF[dtype]
        if name in ("y", "grad_input"):
            got, right = widen(got, dtype), widen(right, dtype)
        np.testing.assert_allclose(got, right, atol=near, rtol=near, err_msg=name)


def test_onednns_path_is_another_kernel(subject: Subject, tmp_path: Path) -> None:
    assert largest(mkldnn(subject, tmp_path, constant(10000, "1, 1, 3, 3"))) == 0
    reply = mkldnn(subject, tmp_path, constant(3.3, "32, 64, 56, 56"))
    assert largest(reply) > 50 * largest(run(subject, tmp_path, constant(3.3, "32, 64, 56, 56")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shape: [4, 3, 7]\n", "currently mkldnn training only support 2d batchnorm"),
        ("shape: [4, 3]\nmode: inference\n", "inference only support 2d and 3d batchnorm"),
        ("shape: [4, 3, 5, 6]\ndtype: float64\n", "dense_to_mkldnn expects"),
        ("shape: [4, 3, 5, 6]\ndtype: bfloat16\nparam_dtype: same\n", "bfloat16 for float32"),
        ("shape: [4, 3, 5, 6]\naffine: null\n", "only support affine model"),
        ("shape: [4, 3, 5, 6]\nmode: inference\nbackward: true\n", "only support train model"),
        ("shape: [0, 3, 5, 6]\n", "unsupported data type"),
        ("shape: [1, 3, 1, 1]\n", "Expected more than 1 value per channel"),
    ],
)
def test_what_onednns_path_does_not_take_is_unsupported_in_torchs_words(
    subject: Subject, tmp_path: Path, text: str, words: str
) -> None:
    reply = mkldnn(subject, tmp_path, NORMAL + text)
    assert reply.outcome == "unsupported"
    assert words in (reply.reason or "")


def test_another_kernel_than_onednns_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    x, channels = np.ones((4, 3, 5, 5), np.float32), np.ones(3, np.float32)
    options: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5, "grad_output": None}
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda tensor: tensor)
    with pytest.raises(
        RuntimeError, match=r"torch\.strided tensor: oneDNN's BatchNorm did not run"
    ):
        _torch.torch_mkldnn_cpu(x, channels, channels, channels.copy(), channels.copy(), **options)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "built without oneDNN" in (_torch.unavailable(MKLDNN) or "")


@pytest.mark.parametrize("backend", CUDA)
def test_without_a_gpu_the_cuda_backends_say_why(subject: Subject, backend: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = subject.describe([backend])[backend] or ""
    if torch.version.cuda is None and torch.version.hip is None:
        assert reason == f"torch {torch.__version__} is built without CUDA"
    else:
        assert reason.startswith("no GPU: ")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
def test_on_a_gpu_the_named_implementation_runs(
    subject: Subject, tmp_path: Path, backend: str, memory_format: str
) -> None:
    reason = subject.describe([backend])[backend]
    if reason is not None:
        pytest.skip(reason)
    text = f"{NORMAL}shape: [4, 3, 5, 6]\nbackward: true\nmemory_format: {memory_format}\n"
    case, inputs = prepare(tmp_path, text)
    reply = subject.run(backend, case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None)
    persistent = "spatial-persistent" if memory_format == "channels_last" else "spatial"
    words = {
        "torch@cuda": "",
        "torch-native@cuda": "native ",
        "torch-compile@cuda": "inductor ",
        **dict.fromkeys(CUDNN, rf"cudnn \d+\.\d+\.\d+ {persistent} "),
    }
    assert re.match(words[backend], reply.kernel or "")
    expected = right_outputs(case, inputs)
    np.testing.assert_allclose(reply.outputs["y"], expected["y"], atol=1e-5)
    np.testing.assert_allclose(reply.outputs["grad_input"], expected["grad_input"], atol=1e-5)


def test_a_forced_path_that_did_not_run_is_an_error_and_cudnns_limits_are_refusals() -> None:
    pytest.importorskip("torch")
    x, ones = np.ones((4, 3, 5, 5), np.float32), np.ones(3, np.float32)
    options: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5, "grad_output": None}

    def force(expected: str, weight: Any = ones, **changed: Any) -> Any:
        tensors = (x, weight, weight, ones.copy(), ones.copy())
        return _torch._eager("cpu", tensors, expected=expected, **{**options, **changed})

    assert force("native")["kernel"].startswith("native")
    with pytest.raises(RuntimeError, match="torch ran its native BatchNorm, not cudnn"):
        force("cudnn")
    with pytest.raises(NotImplementedError, match="needs weight and bias"):
        force("cudnn", weight=None)
    with pytest.raises(NotImplementedError, match="CUDNN_BN_MIN_EPSILON"):
        force("cudnn", eps=1e-6)
    with pytest.raises(NotImplementedError, match="rank 2"):
        _torch._eager("cpu", (x[:, :, 0, 0], *[ones] * 4), expected="cudnn", **options)


@pytest.mark.parametrize(
    ("shape", "dtype", "training", "words"),
    [
        ((0, 3, 5, 5), "float32", True, "an empty batch"),
        ((65536, 1, 1), "float32", False, "a batch of more than 65535 in inference"),
        ((880802, 1, 1), "float32", True, "a batch of more than 880801 in training"),
        ((2, 2**15, 2**15), "float32", True, "more than 2147483646 elements"),
        ((4, 3, 5, 5), "bfloat16", True, "torch.bfloat16 with parameters in torch.float32"),
    ],
)
def test_what_torch_does_not_give_to_cudnn_is_refused_with_the_rule(
    shape: tuple[int, ...], dtype: str, training: bool, words: str
) -> None:
    torch = pytest.importorskip("torch")
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    weight = torch.empty(shape[1], device="meta")
    with pytest.raises(NotImplementedError, match=words):
        _torch._refuse_for_cudnn(x, weight, training, 1e-5)
    within = torch.empty((65535, 1, 1), device="meta")
    _torch._refuse_for_cudnn(within, weight[:1], training, 1e-5)


@pytest.mark.parametrize(
    ("memory_format", "training", "mode"),
    [
        ("contiguous_format", True, "spatial"),
        ("channels_last", True, "spatial-persistent"),
        ("channels_last", False, "spatial"),
    ],
)
def test_cudnns_mode_follows_the_memory_format(
    memory_format: str, training: bool, mode: str
) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3, 4, 5).to(memory_format=getattr(torch, memory_format))
    assert _torch._cudnn_mode(x, training) == mode


@pytest.mark.parametrize(
    ("number", "text"), [(None, None), (8907, "8.9.7"), (90201, "9.2.1"), (91002, "9.10.2")]
)
def test_cudnns_version_is_readable(
    monkeypatch: pytest.MonkeyPatch, number: int | None, text: str | None
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert _torch._cudnn_version() == text


def test_too_little_gpu_memory_is_unsupported_and_other_errors_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    gpu = SimpleNamespace(total_memory=12 * 2**30, name="A100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)

    @_torch.within_memory
    def fail(*tensors: Any, **options: Any) -> dict[str, Any]:
        raise options["error"]

    words = "needs more GPU memory than the 12.0 GiB of A100"
    exhausted = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    for error in (exhausted, RuntimeError("CUDA error: out of memory")):
        with pytest.raises(NotImplementedError, match=words):
            fail(error=error)
    with pytest.raises(RuntimeError, match="misaligned"):
        fail(error=RuntimeError("CUDA error: misaligned address"))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch with CUDA, cuDNN and an H100, as far as it says so."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "H100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton")
    return monkeypatch


def test_with_a_gpu_what_else_is_missing_is_named(pretended_gpu: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from bnaudit.worker.backends._torch import unavailable

    pretended_gpu.setenv("CC", "cc")
    assert [unavailable(name) for name in CUDA] == [None] * len(CUDA)
    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert unavailable("torch-compile@cuda") == (
        "Triton needs a GPU of compute capability 7.0, and H100 has 6.1"
    )
    pretended_gpu.setattr(importlib.util, "find_spec", lambda name: None)
    assert unavailable("torch-compile@cuda") == (
        "Inductor needs Triton for GPUs (pip install triton)"
    )
    pretended_gpu.setattr(torch.backends.cudnn, "is_available", lambda: False)
    for name in CUDNN:
        assert unavailable(name) == f"torch {torch.__version__} is built without cuDNN"
    pretended_gpu.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in (unavailable("torch-cudnn@cuda") or "")
    assert unavailable("torch-native@cuda") is None


def test_triton_needs_a_c_compiler(pretended_gpu: pytest.MonkeyPatch) -> None:
    from bnaudit.worker.backends._torch import unavailable

    pretended_gpu.delenv("CC", raising=False)
    pretended_gpu.setenv("PATH", "")
    assert unavailable("torch-compile@cuda") == (
        "Triton needs a C compiler, and there is neither gcc nor clang"
    )
