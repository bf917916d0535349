"""Plug-ins that take torch tensors: functions that ask for them, and classes built like BatchNorm2d.

Both become functions of NumPy arrays (bfloat16 as its bits in uint16), which is what the worker calls: the
tensors' way to the device and back, gradients by autograd, and torch's own refusals are dealt with here.
"""

from __future__ import annotations

import functools
import os
import traceback
from typing import TYPE_CHECKING

import numpy as np

from . import layout
from .backends import _torch
from .execution import IN_FULL, QUANTITIES, RUNNING, NoResult, describe, traced, wrong_type
from .poison import poison_torch
from .rounding import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .rounding import Array

    Tensor = Any  # torch.Tensor, where torch is
    Returned = dict[Any, Any]

DECLARATIONS = ("running_var_correction", "running_update")

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
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise NotImplementedError(refusal) from error
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
    """Why the case is not for torch, or for this GPU; None where the error is the plug-in's own."""
    import torch

    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the case needs more GPU memory than there is: %s" % text.partition(". ")[0]
    if isinstance(error, RuntimeError) and "not implemented for '" in text:
        return text  # an operator without code for this dtype
    if isinstance(error, ValueError) and error.__traceback__ is not None:
        # What BatchNorm itself turns down: a rank, a single value per channel.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if frame.filename.startswith(os.path.dirname(torch.nn.__file__) + os.sep):
            return text
    return None


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
    module = module.to(device=x.device, dtype=running_mean.dtype).train(options["training"])
    for own, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _set(module, own, value)
    kept = [own for own in RUNNING if getattr(module, own, None) is not None]
    if len(kept) < len(RUNNING) and not options["training"]:
        raise NotImplementedError("%s keeps no running statistics to run inference with" % name)
    for own in kept:
        _set(module, own, running_mean if own == "running_mean" else running_var)
    x.requires_grad_(grad_output is not None)
    y = module(x)
    returned = {"y": y, **{own: getattr(module, own) for own in kept}}
    leaves = {"x": x, "weight": None, "bias": None}
    if weight is not None:
        leaves.update(weight=module.weight, bias=module.bias)
    returned.update(_gradients(y, leaves, grad_output))
    return returned


def _set(module: Any, name: str, value: Tensor) -> None:
    """Copies a value into a module's parameter or buffer; the module's dtype is the value's."""
    import torch

    own = getattr(module, name, None)
    place = "%s.%s" % (type(module).__name__, name)
    if not isinstance(own, torch.Tensor):
        raise NoResult("contract", "%s is %r, not a parameter" % (place, own))
    if own.shape != value.shape:
        text = "%s has shape %s, not %s"
        raise NoResult("contract", text % (place, tuple(own.shape), tuple(value.shape)))
    with torch.no_grad():
        own.copy_(value)


def _gradients(y: Any, leaves: Mapping[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    """The gradients for the leaves that are there; none where y has no graph, or none were asked for."""
    import torch

    if grad_output is None or not isinstance(y, torch.Tensor) or not y.requires_grad:
        return {}
    if y.shape != grad_output.shape:
        text = "y has shape %s, not %s"
        raise NoResult("contract", text % (tuple(y.shape), tuple(grad_output.shape)))
    wanted = {name: leaves[leaf] for name, leaf in GRADIENTS.items() if leaves[leaf] is not None}
    gradients = torch.autograd.grad(
        y, list(wanted.values()), grad_output.to(y.device, y.dtype), allow_unused=True
    )
    found = dict(zip(wanted, gradients))  # noqa: B905 - Python 3.7 has no strict
    for name, gradient in found.items():
        if gradient is None:
            text = "autograd finds no %s: y was computed without %s, or a backward returned None for it"
            raise NoResult("contract", text % (name, GRADIENTS[name]))
    return found


def _to_array(name: str, value: Any, x: Tensor) -> Array:
    """A returned tensor as a host array, bfloat16 as uint16; raises NoResult "contract" for anything else."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise wrong_type(name, value, "torch tensor")
    dtype = str(value.dtype).partition(".")[2]
    if name in IN_FULL and value.dtype != x.dtype:
        wanted = str(x.dtype).partition(".")[2]
        raise NoResult("contract", "%s is %s, not %s" % (name, dtype, wanted))
    if dtype not in DTYPES:
        raise NoResult("contract", "%s is %s, not one of %s" % (name, dtype, ", ".join(DTYPES)))
    if value.layout != torch.strided or value.device.type == "meta":
        kind = "on the meta device" if value.device.type == "meta" else "sparse"
        raise NoResult("contract", "%s is %s, not a dense tensor of values" % (name, kind))
    return _torch.to_array(value)


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
