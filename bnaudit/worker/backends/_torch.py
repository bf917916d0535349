"""PyTorch's BatchNorm: torch.nn.functional.batch_norm as its users call it, and its forced paths.

F.batch_norm decides y, the running statistics and, by autograd, the gradients. The batch statistics, which
it does not hand out, come from a second call of the operator below it (`torch._batch_norm_impl_index`, on
copies of the running statistics), whose last result says which implementation torch chose: 0 its own,
1 cuDNN, 2 MIOpen. Both calls choose the same: the choice depends on torch's settings and on the arguments, but
on no tensor's values. torch-mkldnn gives F.batch_norm a tensor in oneDNN's layout, for which torch has no other
kernel; there the operator hands out the variance instead of its inverse root. Requires torch 1.13 or later; 2.4
for torch-compile.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
from typing import TYPE_CHECKING

import numpy as np

from .. import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]
    Tensor = Any  # torch.Tensor, where torch is

IMPLEMENTATIONS = ("native", "cudnn", "miopen")
"""By the index that torch._batch_norm_impl_index returns."""

_compiled: dict[tuple[Any, ...], str] = {}
"""What torch.compile last compiled for, and a digest of the code, so that many steps are compiled once."""

PYTHON_COMMENT = re.compile(r"^\s*# .*\n", re.MULTILINE)
"""Lines of generated code that hold paths and counters; its C++ has comments of another kind."""

TRITON_CAPABILITY = (7, 0)
"""Compute capability of the oldest GPU that Triton compiles for."""

CUDNN_MIN_EPS = 1e-5
"""CUDNN_BN_MIN_EPSILON of cuDNN 7; later versions allow 0, and then torch does not refuse."""

CUDNN_MOST_IMAGES = {True: 880801, False: 65535}
"""Batch size up to which torch uses cuDNN, in training and in inference (_select_batch_norm_backend)."""

CUDNN_MOST_ELEMENTS = 2**31 - 2

MKLDNN_REFUSALS = (
    "currently mkldnn ",
    "dense_to_mkldnn expects ",
    "itensor_view_from_dense expects ",
    "get_mkldnn_dtype: unsupported ",
    "MKLDNN does not support ",
    "could not create a primitive descriptor",  # oneDNN has none for this dtype on this processor
)
"""What torch says of a rank, dtype, mode or size that its oneDNN path does not take."""


def unavailable(name: str) -> str | None:
    """Why a backend of this module cannot run here, or None."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            return "torch cannot be imported: %s" % error
        return "torch is not installed in this environment (pip install 'bnaudit[torch]')"
    except Exception as error:  # a broken installation raises whatever it likes
        return "torch cannot be imported: %s: %s" % (type(error).__name__, error)
    if name.endswith("@cuda"):
        if torch.version.cuda is None and torch.version.hip is None:
            return "torch %s is built without CUDA" % torch.__version__
        if not torch.cuda.is_available():
            return "no GPU: torch %s finds none" % torch.__version__
    if name.startswith("torch-cudnn"):
        if torch.version.hip is not None:
            return "torch %s is built for ROCm, which has no cuDNN" % torch.__version__
        if not torch.backends.cudnn.is_available():
            return "torch %s is built without cuDNN" % torch.__version__
    if name.startswith("torch-mkldnn") and not torch.backends.mkldnn.is_available():
        return "torch %s is built without oneDNN (MKL-DNN)" % torch.__version__
    if name.startswith("torch-compile"):
        return _cannot_compile(name.partition("@")[2])
    return None


def _cannot_compile(device: str) -> str | None:
    """Why Inductor cannot generate code for a device that torch has, or None."""
    import torch

    if not hasattr(torch, "compile"):
        return "torch %s has no torch.compile" % torch.__version__
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return "Inductor needs a C++ compiler, and there is no %s" % compiler
        return None
    if importlib.util.find_spec("triton") is None:
        return "Inductor needs Triton for GPUs (pip install triton)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < TRITON_CAPABILITY:
        text = "Triton needs a GPU of compute capability %d.%d, and %s has %d.%d"
        name = torch.cuda.get_device_name()
        return text % (*TRITON_CAPABILITY, name, *capability)
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is neither gcc nor clang"
    return None


def within_memory(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """The function, with NotImplementedError where the GPU runs out of memory."""

    @functools.wraps(function)
    def refusing(*tensors: Array | None, **options: Any) -> Outputs:
        try:
            return function(*tensors, **options)
        except RuntimeError as error:
            # The allocator, the driver and a rank of a group raise different types.
            if "out of memory" not in str(error):
                raise
            import torch

            gpu = torch.cuda.get_device_properties(0)
            text = "the case needs more GPU memory than the %.1f GiB of %s"
            raise NotImplementedError(text % (gpu.total_memory / 2**30, gpu.name)) from error

    return refusing


def torch_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the CPU."""
    return _eager("cpu", tensors, **options)


@within_memory
def torch_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the GPU, whichever implementation torch chooses."""
    return _eager("cuda", tensors, **options)


@within_memory
def torch_native_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the GPU with cuDNN switched off."""
    import torch

    with torch.backends.cudnn.flags(enabled=False):
        return _eager("cuda", tensors, expected="native", **options)


@within_memory
def torch_cudnn_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the GPU, refused unless cuDNN is what runs."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False):
        return _eager("cuda", tensors, expected="cudnn", **options)


@within_memory
def torch_cudnn_benchmark_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm by cuDNN with torch.backends.cudnn.benchmark on."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        return _eager("cuda", tensors, expected="cudnn", **options)


@within_memory
def torch_cudnn_deterministic_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm by cuDNN with torch.backends.cudnn.deterministic on."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        return _eager("cuda", tensors, expected="cudnn", **options)


def torch_mkldnn_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm of x in oneDNN's layout, whatever layout it comes in; RuntimeError if another kernel ran.

    Raises NotImplementedError, in torch's words, where oneDNN's path does not take the case.
    """
    try:
        return _mkldnn(tensors, **options)
    except RuntimeError as error:
        words = str(error)
        if not any(refusal in words for refusal in MKLDNN_REFUSALS):
            raise
        raise NotImplementedError(words.splitlines()[0]) from error


def _mkldnn(
    tensors: tuple[Array | None, ...], *, grad_output: Array | None, **options: Any
) -> Outputs:
    import torch

    x, running_mean, running_var, weight, bias = _ordered(tensors, "cpu")
    if running_mean.dtype in (torch.float16, torch.bfloat16):
        # It would: y is garbage, and the process may die of it or give other backends' cases wrong values.
        text = (
            "torch's oneDNN path takes parameters in %s for float32, past the end of their memory"
        )
        raise NotImplementedError(text % str(running_mean.dtype).replace("torch.", ""))
    before = running_mean.clone(), running_var.clone()

    def batch_norm(x: Tensor, *others: Tensor, **options: Any) -> Tensor:
        y = torch.nn.functional.batch_norm(x.to_mkldnn(), *others, **options)
        if not y.is_mkldnn:
            raise RuntimeError(
                "torch returned a %s tensor: oneDNN's BatchNorm did not run" % y.layout
            )
        return y.to_dense()

    arguments = (x, running_mean, running_var, weight, bias)
    outputs = _differentiated(batch_norm, arguments, options, to_tensor(grad_output, "cpu"))
    if options["training"] and x.numel():
        rest = (options["momentum"], options["eps"], False)
        with torch.no_grad():
            _, batch_mean, batch_var, *_ = torch._batch_norm_impl_index(
                x.to_mkldnn(), weight, bias, *before, True, *rest
            )
        outputs["batch_mean"] = to_array(batch_mean.to_dense())
        outputs["batch_var"] = to_array(batch_var.to_dense())
    return dict(outputs, kernel="mkldnn %s" % _mkldnn_version())


def torch_compile_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """torch.compile of F.batch_norm; raises RuntimeError if Inductor generated no kernel for it."""
    return _inductor("cpu", tensors, **options)


@within_memory
def torch_compile_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """torch.compile of F.batch_norm on the GPU; RuntimeError if Inductor generated no kernel for it."""
    return _inductor("cuda", tensors, **options)


def _inductor(
    device: str, tensors: tuple[Array | None, ...], *, grad_output: Array | None, **options: Any
) -> Outputs:
    import torch
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    x, running_mean, running_var, weight, bias = _ordered(tensors, device)
    gradient = to_tensor(grad_output, device)
    arguments = (x, running_mean, running_var, weight, bias)
    _refuse(_on_meta, arguments, options)
    compiled = torch.compile(torch.nn.functional.batch_norm, fullgraph=True, dynamic=False)
    step = functools.partial(_differentiated, compiled, arguments, options, gradient)
    forms = (device, x.shape, x.stride(), x.dtype, running_mean.dtype)
    signature = (*forms, weight is None, gradient is None, *options.values())
    if signature in _compiled:
        outputs = step()
    else:
        # One at a time: Dynamo gives up on a function that it has compiled for too many shapes.
        _compiled.clear()
        metrics.reset()
        outputs, code = run_and_get_code(step)  # after torch._dynamo.reset()
        if x.numel() and not metrics.generated_kernel_count:
            text = "Inductor generated no kernel: torch.compile fell back to another path"
            raise RuntimeError(text)
        _compiled[signature] = digest(code)
    kernel = "inductor %s %s, code %s"
    found = (_memory_format(x), _where(device), _compiled[signature])
    return dict(outputs, kernel=kernel % found)


def digest(code: Sequence[str]) -> str:
    """12 hexadecimal digits that tell pieces of generated code from others, wherever they were generated."""
    plain = "\0".join(PYTHON_COMMENT.sub("", piece) for piece in code)
    return hashlib.sha256(plain.encode()).hexdigest()[:12]


def _eager(
    device: str,
    tensors: tuple[Array | None, ...],
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Array | None,
    expected: str | None = None,
) -> Outputs:
    """F.batch_norm, and the batch statistics and implementation from the operator below it.

    expected: the implementation that must have run, else RuntimeError, or NotImplementedError where cuDNN
    itself does not take such a case.
    """
    import torch

    x, running_mean, running_var, weight, bias = _ordered(tensors, device)
    options = {"training": training, "momentum": momentum, "eps": eps}
    before = running_mean.clone(), running_var.clone()
    outputs = _differentiated(
        torch.nn.functional.batch_norm,
        (x, running_mean, running_var, weight, bias),
        options,
        to_tensor(grad_output, device),
    )
    with torch.no_grad():
        _, batch_mean, invstd, _, index = torch._batch_norm_impl_index(
            x, weight, bias, *before, training, momentum, eps, torch.backends.cudnn.enabled
        )
    implementation = IMPLEMENTATIONS[index]
    if expected not in (None, implementation):
        if expected == "cudnn":
            _refuse_for_cudnn(x, weight, training, eps)
        raise RuntimeError("torch ran its %s BatchNorm, not %s" % (implementation, expected))
    # Statistics in 16 bits (16-bit parameters) are a rounded copy of what torch computed with.
    if training and x.numel() and batch_mean.dtype in (torch.float32, torch.float64):
        outputs.update(batch_mean=to_array(batch_mean), invstd=to_array(invstd))
    if implementation == "cudnn":
        implementation += " %s %s" % (_cudnn_version(), _cudnn_mode(x, training))
    kernel = "%s %s %s" % (implementation, _memory_format(x), _where(device))
    return dict(outputs, kernel=kernel)


def _differentiated(
    batch_norm: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    options: dict[str, Any],
    grad_output: Tensor | None,
    *,
    allow_unused: bool = False,
) -> Outputs:
    """y, the running statistics and, where grad_output is given, the gradients by autograd.

    allow_unused: whether a gradient may be None, which is zero, or is an error.
    """
    import torch

    x, running_mean, running_var, weight, bias = arguments
    leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    for leaf in leaves.values():
        leaf.requires_grad_(grad_output is not None)
    y = _refuse(batch_norm, arguments, options)
    outputs = {"y": y, "running_mean": running_mean, "running_var": running_var}
    if grad_output is not None:
        gradients = torch.autograd.grad(
            y, list(leaves.values()), grad_output, allow_unused=allow_unused
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients):  # noqa: B905 - Python 3.7
            outputs[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: to_array(tensor) for name, tensor in outputs.items()}


def _refuse(
    batch_norm: Callable[..., Tensor], arguments: tuple[Tensor, ...], options: dict[str, Any]
) -> Tensor:
    """Calls; torch's documented refusals (one value per channel, eps, a dtype) become NotImplementedError."""
    try:
        return batch_norm(*arguments, **options)
    except ValueError as error:
        raise NotImplementedError(str(error)) from error
    except RuntimeError as error:
        if "not implemented for '" in str(error):
            raise NotImplementedError(str(error)) from error
        raise


def _on_meta(*arguments: Tensor | None, **options: Any) -> Tensor:
    """F.batch_norm's checks of its arguments, without any arithmetic."""
    import torch

    shapes = [None if tensor is None else tensor.to("meta") for tensor in arguments]
    return torch.nn.functional.batch_norm(*shapes, **options)


def _refuse_for_cudnn(x: Tensor, weight: Tensor | None, training: bool, eps: float) -> None:
    """Raises NotImplementedError if the case is outside what cuDNN or torch's use of it supports."""
    import torch

    if weight is None:
        raise NotImplementedError("cuDNN's BatchNorm needs weight and bias")
    if x.dim() < 3:
        raise NotImplementedError("torch does not use cuDNN for inputs of rank 2")
    if eps < CUDNN_MIN_EPS:
        raise NotImplementedError("cuDNN needs eps >= %g (CUDNN_BN_MIN_EPSILON)" % CUDNN_MIN_EPS)
    if x.dtype == torch.bfloat16 or weight.dtype in (torch.float16, torch.bfloat16):
        text = "torch does not use cuDNN for %s with parameters in %s"
        raise NotImplementedError(text % (x.dtype, weight.dtype))
    if not x.numel():
        raise NotImplementedError("torch does not use cuDNN for an empty batch")
    if x.numel() > CUDNN_MOST_ELEMENTS:
        text = "torch does not use cuDNN for more than %d elements"
        raise NotImplementedError(text % CUDNN_MOST_ELEMENTS)
    most = CUDNN_MOST_IMAGES[training]
    if len(x) > most:
        mode = "training" if training else "inference"
        text = "torch does not use cuDNN for a batch of more than %d in %s"
        raise NotImplementedError(text % (most, mode))


def _cudnn_mode(x: Tensor, training: bool) -> str:
    """cudnnBatchNormMode_t as torch chooses it (getCudnnBatchNormMode in ATen/native/cudnn/BatchNorm.cpp).

    The persistent mode limits the range of values. Per-activation, which torch has for rank 2, never runs:
    for such inputs it does not use cuDNN.
    """
    if training and _memory_format(x) == "channels_last":
        return "spatial-persistent"
    return "spatial"


def _cudnn_version() -> str | None:
    """cuDNN's version, such as 9.2.1; None where torch has none."""
    import torch

    number = torch.backends.cudnn.version()
    if number is None:
        return None
    unit = 10000 if number >= 90000 else 1000  # since cuDNN 9 the minor version has two digits
    return "%d.%d.%d" % (number // unit, number % unit // 100, number % 100)


def _ordered(tensors: tuple[Array | None, ...], device: str) -> tuple[Tensor, ...]:
    """The five tensors in the order of F.batch_norm's parameters, and torch with the audit's threads."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        torch.set_num_threads(int(threads))
    x, weight, bias, running_mean, running_var = (to_tensor(array, device) for array in tensors)
    return x, running_mean, running_var, weight, bias


def to_tensor(array: Array | None, device: str) -> Tensor | None:
    """The array (uint16: bfloat16's bits) as a tensor with its strides; on the CPU, in its memory.

    A strided array takes its whole allocation along, so that its gaps hold NaN on the GPU as well.
    """
    import torch

    if array is None:
        return None
    allocation = layout.allocation(array)
    memory = array if allocation is None else allocation
    if memory.dtype == np.uint16:
        tensor = torch.from_numpy(memory.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(memory)
    tensor = tensor.to(device)
    if allocation is None:
        return tensor
    strides = [stride // array.itemsize for stride in array.strides]
    return tensor.as_strided(array.shape, strides, layout.OFFSET)


def to_array(tensor: Tensor) -> Array:
    """The tensor's values (bfloat16 as its bits in uint16) on the host; on the CPU, in its memory.

    Raises what torch raises for tensors that NumPy cannot hold.
    """
    import torch

    # A conjugate or a negative may be a flag on memory that holds something else.
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: Array = tensor.numpy()
    return array


def _memory_format(x: Tensor) -> str:
    """Which of torch's CPU kernels x's strides select."""
    import torch

    if x.is_contiguous():
        return "contiguous"
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return "channels_last"
    return "strided"


def _where(device: str) -> str:
    """What the kernels ran on: an instruction set, or a GPU's name."""
    import torch

    name: str = torch.cuda.get_device_name() if device == "cuda" else _capability()
    return name


def _mkldnn_version() -> str:
    """Version of the oneDNN in torch, such as 3.12.0."""
    import torch

    found = re.search(r"MKL-DNN v(\S+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def _capability() -> str:
    """The instruction set that torch's CPU kernels were dispatched for, such as AVX512."""
    import torch

    found = re.search(r"CPU capability usage: (.*)", torch.__config__.show())
    return found.group(1).strip() if found else "unknown"


def describe() -> dict[str, Any]:
    """Devices and numerical settings of torch in this process, for a report; none without torch."""
    if unavailable("torch@cpu") is not None:
        return {"devices": [], "flags": {}}
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        driver = torch._C._cuda_getDriverVersion()
        name = torch.cuda.get_device_name(index)
        devices.append(
            {
                "name": name,
                "driver": "%d.%d" % (driver // 1000, driver % 1000 // 10),
                "cuda": torch.version.cuda,
                "cudnn": _cudnn_version(),
            }
        )
    flags = {
        "cpu_capability": _capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
    }
    return {"devices": devices, "flags": flags}
