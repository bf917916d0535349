"""PyTorch's BatchNorm: torch.nn.functional.batch_norm as its users call it, and its forced paths.

F.batch_norm decides y, the running statistics and, by autograd, the gradients. The batch statistics, which
it does not hand out, come from a second call of the operator below it (`torch._batch_norm_impl_index`, on
copies of the running statistics), whose last result says which implementation torch chose: 0 its own,
1 cuDNN, 2 MIOpen. Requires torch 1.13 or later; 2.0 for torch-compile.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]
    Tensor = Any  # torch.Tensor, where torch is

IMPLEMENTATIONS = ("native", "cudnn", "miopen")
"""By the index that torch._batch_norm_impl_index returns."""

_compiled: set[tuple[Any, ...]] = set()
"""What torch.compile last compiled for, so that a case of many steps is compiled once."""

CUDNN_MIN_EPS = 1e-5
"""CUDNN_BN_MIN_EPSILON of cuDNN 7; later versions allow 0, and then torch does not refuse."""


def unavailable(name: str) -> str | None:
    """Why a backend of this module cannot run here, or None."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            return "torch cannot be imported: %s" % error
        return "torch is not installed in this environment (pip install 'bnaudit[torch]')"
    except (ImportError, OSError) as error:  # a shared library that is missing or broken
        return "torch cannot be imported: %s" % error
    if name.endswith("@cuda"):
        if torch.version.cuda is None and torch.version.hip is None:
            return "torch %s is built without CUDA" % torch.__version__
        if not torch.cuda.is_available():
            return "no GPU: torch %s finds none" % torch.__version__
    if name == "torch-cudnn@cuda" and not torch.backends.cudnn.is_available():
        return "torch %s is built without cuDNN" % torch.__version__
    if name == "torch-compile@cpu":
        if not hasattr(torch, "compile"):
            return "torch %s has no torch.compile" % torch.__version__
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return "Inductor needs a C++ compiler, and there is no %s" % compiler
    return None


def torch_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the CPU."""
    return _eager("cpu", tensors, **options)


def torch_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the GPU, whichever implementation torch chooses."""
    return _eager("cuda", tensors, **options)


def torch_native_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the GPU with cuDNN switched off."""
    import torch

    with torch.backends.cudnn.flags(enabled=False):
        return _eager("cuda", tensors, expected="native", **options)


def torch_cudnn_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """F.batch_norm on the GPU, refused unless cuDNN is what runs."""
    import torch

    with torch.backends.cudnn.flags(enabled=True):
        return _eager("cuda", tensors, expected="cudnn", **options)


def torch_compile_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """torch.compile of F.batch_norm; raises RuntimeError if Inductor generated no kernel for it."""
    import torch
    from torch._inductor import metrics

    x, running_mean, running_var, weight, bias = _ordered(tensors, "cpu")
    grad_output = _tensor(options.pop("grad_output"), "cpu")
    arguments = (x, running_mean, running_var, weight, bias)
    _refuse(_on_meta, arguments, options)
    forms = (x.shape, x.stride(), x.dtype, running_mean.dtype)
    signature = (*forms, weight is None, grad_output is None, *options.values())
    if signature not in _compiled:
        # Dynamo gives up on a function that it has compiled for too many shapes: one at a time.
        torch._dynamo.reset()
        metrics.reset()
        _compiled.clear()
    compiled = torch.compile(torch.nn.functional.batch_norm, fullgraph=True, dynamic=False)
    outputs = _differentiated(compiled, arguments, options, grad_output)
    if x.numel() and not metrics.generated_kernel_count:
        raise RuntimeError("Inductor generated no kernel: torch.compile fell back to another path")
    _compiled.add(signature)
    return dict(outputs, kernel="inductor %s %s" % (_memory_format(x), _capability()))


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
        _tensor(grad_output, device),
    )
    with torch.no_grad():
        _, batch_mean, invstd, _, index = torch._batch_norm_impl_index(
            x, weight, bias, *before, training, momentum, eps, torch.backends.cudnn.enabled
        )
    implementation = IMPLEMENTATIONS[index]
    if expected not in (None, implementation):
        if expected == "cudnn":
            _refuse_for_cudnn(x, weight, eps)
        raise RuntimeError("torch ran its %s BatchNorm, not %s" % (implementation, expected))
    # Statistics in 16 bits (16-bit parameters) are a rounded copy of what torch computed with.
    if training and x.numel() and batch_mean.dtype in (torch.float32, torch.float64):
        outputs.update(batch_mean=_array(batch_mean), invstd=_array(invstd))
    where = _capability() if device == "cpu" else torch.cuda.get_device_name()
    return dict(outputs, kernel="%s %s %s" % (implementation, _memory_format(x), where))


def _differentiated(
    batch_norm: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    options: dict[str, Any],
    grad_output: Tensor | None,
) -> Outputs:
    """y, the running statistics and, where grad_output is given, the gradients by autograd."""
    import torch

    x, running_mean, running_var, weight, bias = arguments
    leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    for leaf in leaves.values():
        leaf.requires_grad_(grad_output is not None)
    y = _refuse(batch_norm, arguments, options)
    outputs = {"y": y, "running_mean": running_mean, "running_var": running_var}
    if grad_output is not None:
        gradients = torch.autograd.grad(y, list(leaves.values()), grad_output)
        outputs.update(zip(leaves, gradients))  # noqa: B905 - Python 3.7 has no strict
    return {name: _array(tensor) for name, tensor in outputs.items()}


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


def _refuse_for_cudnn(x: Tensor, weight: Tensor | None, eps: float) -> None:
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
    if x.numel() == 0 or x.numel() >= 2**31 - 1:
        raise NotImplementedError("torch does not use cuDNN for %d elements" % x.numel())


def _ordered(tensors: tuple[Array | None, ...], device: str) -> tuple[Tensor, ...]:
    """The five tensors in the order of F.batch_norm's parameters, and torch with the audit's threads."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        torch.set_num_threads(int(threads))
    x, weight, bias, running_mean, running_var = (_tensor(array, device) for array in tensors)
    return x, running_mean, running_var, weight, bias


def _tensor(array: Array | None, device: str) -> Tensor | None:
    """The array (uint16: bfloat16's bits) as a tensor with its strides; on the CPU, in its memory."""
    import torch

    if array is None:
        return None
    if array.dtype == np.uint16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    if device == "cpu":
        return tensor
    if tensor.dim() > 1 and _memory_format(tensor) == "strided":
        last = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())]  # noqa: B905
        extent = 1 + sum(last)
        memory = torch.full((extent,), float("nan"), dtype=tensor.dtype, device=device)
        return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    return tensor.to(device)


def _array(tensor: Tensor) -> Array:
    import torch

    tensor = tensor.detach().cpu()
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
        cudnn = torch.backends.cudnn.version()
        driver = torch._C._cuda_getDriverVersion()
        name = torch.cuda.get_device_name(index)
        devices.append(
            {
                "name": name,
                "driver": "%d.%d" % (driver // 1000, driver % 1000 // 10),
                "cuda": torch.version.cuda,
                "cudnn": None if cudnn is None else str(cudnn),
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
