"""Plug-ins that take torch tensors: functions that ask for them, and classes built like BatchNorm2d.

Both become functions of NumPy arrays (bfloat16 as its bits in uint16), which is what the worker calls: the
tensors' way to the device and back, gradients by autograd, and torch's own refusals are dealt with here.
"""

from __future__ import annotations

import dis
import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from . import layout
from .backends import _torch
from .execution import (
    IN_FULL,
    OUT_OF_MEMORY,
    QUANTITIES,
    RUNNING,
    NoResult,
    describe,
    message,
    traced,
    wrong_type,
)
from .poison import poison_torch
from .rounding import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .rounding import Array

    Tensor = Any  # torch.Tensor, where torch is
    Returned = dict[Any, Any]

DECLARATIONS = ("running_var_correction", "running_update")

DISPATCHER = ("Could not run '", "Cannot copy out of meta tensor")
"""How NotImplementedErrors of torch's own begin that mean a kind of tensor, not a dtype."""

GRADIENTS = {"grad_input": "x", "grad_weight": "weight", "grad_bias": "bias"}
"""By the tensor that each is the gradient for."""


def unavailable(device: str) -> str | None:
    """Why no torch tensors can be had on the device, or None."""
    return _torch.unavailable("torch@" + device)


def adapt(target: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A function of arrays that calls a function of tensors, or a class of modules, on "cpu" or "cuda"."""
    call = _call_module if isinstance(target, type) else _call_function

    def batch_norm(*arrays: Array | None, grad_output: Array | None, **options: Any) -> Returned:
        return _run(functools.partial(call, target), device, (*arrays, grad_output), options)

    for name in DECLARATIONS:
        if hasattr(target, name):
            setattr(batch_norm, name, getattr(target, name))
    return batch_norm


def _run(
    call: Callable[..., Returned],
    device: str,
    arrays: tuple[Array | None, ...],
    options: Mapping[str, Any],
) -> Returned:
    """One call, complete when this returns. arrays: x, weight, bias, running_mean, running_var, grad_output."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        torch.set_num_threads(int(threads))
    try:
        tensors = [_torch.to_tensor(array, device) for array in arrays]
        x: Tensor = tensors[0]
        if device == "cuda":
            poison_torch(x.numel() * x.element_size())
        returned = call(tensors, options)
        if device == "cuda":
            torch.cuda.synchronize()  # so that a kernel's error is this call's
    except NoResult:
        raise
    except Exception as error:
        refusal = _refusal(error)
        if refusal is not None:
            raise NotImplementedError(refusal) from error
        if isinstance(error, NotImplementedError) and not _is_own(error):
            raise NoResult("raised", describe(error), traced(error)) from error
        raise
    outputs = {
        name: value if value is None or name not in QUANTITIES else _to_array(name, value, x)
        for name, value in returned.items()
    }
    if device == "cuda":
        for array, tensor in zip(arrays, tensors):  # noqa: B905 - Python 3.7 has no strict
            if array is not None:
                _bring_back(array, tensor)
    return outputs


def _refusal(error: Exception) -> str | None:
    """Why the case is not for torch, or for this GPU; None for every other error."""
    import torch

    text = message(error)
    # Other libraries say so in errors of their own: CUDA's is a RuntimeError, CuPy's a MemoryError.
    is_short = "out of memory" in text.lower() and isinstance(error, (RuntimeError, MemoryError))
    if is_short or isinstance(error, torch.cuda.OutOfMemoryError):
        return "%s there is: %s" % (OUT_OF_MEMORY, text.partition(". ")[0])
    filename, function, by_statement = _origin(error)
    nn = os.path.dirname(torch.nn.__file__)
    if isinstance(error, RuntimeError) and "not implemented for '" in text:
        # An operator without code for this dtype. Who writes so in Python is not the operator.
        return None if by_statement and not _is_torchs(filename) else text
    if isinstance(error, ValueError) and by_statement:
        # What BatchNorm itself turns down: a rank, a single value per channel, an eps.
        checks = function in ("_verify_batch_size", "batch_norm")
        if filename == os.path.join(nn, "modules", "batchnorm.py") or (
            checks and filename == os.path.join(nn, "functional.py")
        ):
            return text
    return None


def _is_own(error: NotImplementedError) -> bool:
    """Whether the plug-in says "not this case", and not torch "not with this tensor" or "not overridden"."""
    return not _is_torchs(_origin(error)[0]) and not message(error).startswith(DISPATCHER)


def _is_torchs(filename: str) -> bool:
    import torch

    return filename.startswith(os.path.dirname(torch.__file__) + os.sep)


def _origin(error: BaseException) -> tuple[str, str, bool]:
    """The file and the function that an error comes from, and whether from a raise statement in it."""
    frames = error.__traceback__
    assert frames is not None  # noqa: S101 - it was raised
    while frames.tb_next is not None:
        frames = frames.tb_next
    code = frames.tb_frame.f_code
    operation = dis.opname[code.co_code[frames.tb_lasti]]
    return code.co_filename, code.co_name, operation == "RAISE_VARARGS"


def _call_function(function: Callable[..., Any], tensors: list[Tensor], options: Any) -> Returned:
    x, weight, bias, running_mean, running_var, grad_output = tensors
    leaves = {"x": x, "weight": weight, "bias": bias}
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_(grad_output is not None)
    value = function(x, weight, bias, running_mean, running_var, grad_output=grad_output, **options)
    returned = dict(value) if isinstance(value, dict) else {"y": value}
    if not any(returned.get(name) is not None for name in GRADIENTS):
        returned.update(_gradients(returned.get("y"), leaves, grad_output))
    return returned


def _call_module(module_class: Any, tensors: list[Tensor], options: Any) -> Returned:
    x, weight, bias, running_mean, running_var, grad_output = tensors
    name = module_class.__name__
    settings = {"eps": options["eps"], "momentum": options["momentum"]}
    settings["affine"] = weight is not None
    try:
        module = module_class(x.shape[1], **settings)
    except NotImplementedError:
        raise
    except Exception as error:
        call = "%s(%d, eps=%r, momentum=%r, affine=%r)" % (name, x.shape[1], *settings.values())
        text = "%s cannot be built: %s" % (call, describe(error))
        raise NoResult("contract", text, traced(error)) from error
    # Statements: to() and train() may be overridden without a return.
    module.to(device=x.device, dtype=running_mean.dtype)
    module.train(options["training"])
    leaves = {"x": x, "weight": None, "bias": None}
    if weight is not None:
        leaves["weight"] = _set(module, "weight", weight)
        leaves["bias"] = _set(module, "bias", bias)
    kept = [own for own in RUNNING if getattr(module, own, None) is not None]
    if len(kept) < len(RUNNING) and not options["training"]:
        raise NotImplementedError("%s keeps no running statistics to run inference with" % name)
    for own in kept:
        _set(module, own, running_mean if own == "running_mean" else running_var)
    before = {own: leaves[own].detach().clone() for own in ("weight", "bias") if weight is not None}
    x.requires_grad_(grad_output is not None)
    y = module(x)
    for own, was in before.items():
        changed = _first_change(was, leaves[own])
        if changed is not None:
            values = (name, own, own, changed, was[changed].item(), leaves[own][changed].item())
            text = "%s.%s was changed in place: %s[%d] was %s and is now %s" % values
            raise NoResult("contract", text)
    if isinstance(y, (tuple, list, dict)):
        text = "%s returned a %s: a module plug-in returns y alone"
        raise NoResult("contract", text % (name, type(y).__name__))
    returned = {"y": y, **{own: getattr(module, own) for own in kept}}
    gradients = _gradients(y, leaves, grad_output)
    if grad_output is not None and getattr(y, "requires_grad", None) is False:
        raise NoResult("contract", "y has no graph: no gradient reaches x")
    returned.update(gradients)
    return returned


def _set(module: Any, name: str, value: Tensor) -> Tensor:
    """The module's own parameter or buffer, with a value copied into it; the module's dtype is the value's."""
    import torch

    owner, kind = type(module).__name__, "buffer" if name in RUNNING else "parameter"
    place = "%s.%s" % (owner, name)
    if not hasattr(module, name):
        raise NoResult("contract", "%s has no %s %s of shape (C,)" % (owner, kind, name))
    own = getattr(module, name)
    if not isinstance(own, torch.Tensor):
        found = "None" if own is None else "of type %s" % type(own).__name__
        raise NoResult("contract", "%s is %s, not a %s" % (place, found, kind))
    if torch.nn.parameter.is_lazy(own):
        raise NoResult("contract", "%s is uninitialized (a lazy module)" % place)
    if own.shape != value.shape:
        text = "%s has shape %s, not %s"
        raise NoResult("contract", text % (place, tuple(own.shape), tuple(value.shape)))
    with torch.no_grad():
        own.copy_(value)
    if _first_change(own, getattr(module, name)) is not None:
        text = "%s does not keep the values that are copied into it (a parametrization?)"
        raise NoResult("contract", text % place)
    return own


def _first_change(was: Tensor, now: Tensor) -> int | None:
    """The first channel whose bits differ, or None."""
    index = layout.first_change(_torch.to_array(now), _torch.to_array(was), lambda stored: stored)
    return None if index is None else index[0]


def _gradients(y: Any, leaves: Mapping[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    """The gradients for the leaves that require one; none where y has no graph, or none were asked for."""
    import torch

    if grad_output is None or not isinstance(y, torch.Tensor):
        return {}
    _check("y", y, leaves["x"])
    if not y.requires_grad:
        return {}
    if y.shape != grad_output.shape:
        text = "y has shape %s, not %s"
        raise NoResult("contract", text % (tuple(y.shape), tuple(grad_output.shape)))
    wanted = {
        name: leaves[leaf]
        for name, leaf in GRADIENTS.items()
        if leaves[leaf] is not None and leaves[leaf].requires_grad  # a frozen parameter does not
    }
    gradients = torch.autograd.grad(
        y, list(wanted.values()), grad_output.to(y.device, y.dtype), allow_unused=True
    )
    found = dict(zip(wanted, gradients))  # noqa: B905 - Python 3.7 has no strict
    for name, gradient in found.items():
        if gradient is None:
            text = "autograd finds no %s: y was computed without %s, or a backward returned None for it"
            raise NoResult("contract", text % (name, GRADIENTS[name]))
    return found


def _check(name: str, value: Any, x: Tensor) -> None:
    """Raises NoResult "contract" unless a returned value is a dense tensor of a dtype that it may have."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise wrong_type(name, value, "torch tensor")
    dtype = str(value.dtype).partition(".")[2]
    if name in IN_FULL and value.dtype != x.dtype:
        wanted = str(x.dtype).partition(".")[2]
        raise NoResult("contract", "%s is %s, not %s" % (name, dtype, wanted))
    if dtype not in DTYPES:
        raise NoResult("contract", "%s is %s, not one of %s" % (name, dtype, ", ".join(DTYPES)))
    kind = None
    if value.is_nested:
        kind = "nested"
    elif value.device.type == "meta":
        kind = "on the meta device"
    elif value.layout != torch.strided:
        kind = "of layout " + str(value.layout).partition(".")[2]
    if kind is not None:
        raise NoResult("contract", "%s is %s, not a dense tensor of values" % (name, kind))


def _to_array(name: str, value: Any, x: Tensor) -> Array:
    """A returned tensor as a host array, bfloat16 as uint16; raises NoResult "contract" for anything else."""
    _check(name, value, x)
    try:
        return _torch.to_array(value)
    except (RuntimeError, TypeError, ValueError) as error:  # a masked tensor, for one
        text = "%s, of type %s, cannot be turned into an array: %s"
        raise NoResult(
            "contract", text % (name, type(value).__name__, message(error)), traced(error)
        ) from error


def _bring_back(array: Array, tensor: Tensor) -> None:
    """Writes what the tensor's memory holds now, gaps included, to the array that it was made from."""
    memory = layout.allocation(array)
    if memory is None:
        memory = array
    else:
        tensor = tensor.detach().as_strided((memory.size,), (1,), 0)
    after = _torch.to_array(tensor)
    # Written only where something changed: until then large inputs are pages of a file.
    if not np.array_equal(layout.bits(memory), layout.bits(after)):
        memory[...] = after
