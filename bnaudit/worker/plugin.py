"""Plug-ins: a user's own BatchNorm, named FILE.py:NAME or package.module:NAME, with @cpu or @cuda at the end.

The contract, here and for the built-in backends:

    def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):

x and grad_output are (N, C, *) arrays in the case's dtype and memory format (bfloat16 as ml_dtypes.bfloat16),
weight, bias, running_mean and running_var (C,) arrays in the statistics dtype, or in the case's dtype where
the case says `param_dtype: same`. weight and bias are None together. grad_output is given when gradients are
asked for. momentum is the weight of the new batch in this call: for the cumulative average (`momentum: null`)
the worker passes 1/t at step t. The function is called once per step, with the running statistics it left.

It returns y, or a dict with y and whatever it computes of batch_mean, batch_var, invstd, running_mean,
running_var, grad_input, grad_weight and grad_bias; `kernel` may say in words what ran. What is not returned
is not judged, and None is as good as a key left out. Other keys are ignored, but for those that look like one
of these, misspelt or by another usual name (mean, dx, dgamma), that is not there. y and grad_input have x's
shape and the case's dtype, per-channel quantities the shape (C,) and any floating-point dtype. running_mean
and running_var may be updated in place instead (where one of them changes, both are judged); a returned key
wins. x, weight, bias and grad_output must be left as they are, and so must the gaps beside the elements of a
strided tensor, which hold NaN.

Raising NotImplementedError says "not this case", and its message why; to say so only when called again is a
fault. Attributes of the function declare its conventions: `running_var_correction` (1: n / (n − 1), the
default; 0: biased) and `running_update` ("ema", the default; "caffe": scaled sums).

With the attribute `tensors = "torch"` the function gets torch tensors instead, on the CPU or, for a name that
ends in @cuda, on the GPU, with the same strides and dtypes (bfloat16 as torch.bfloat16), and returns tensors,
wherever they are. Where gradients are asked for and it returns none, they are autograd's: x, weight and bias
require them, and y is differentiated with grad_output. A y without a graph has no gradients, which then are
not judged. Running out of GPU memory, and operators that torch does not have for a dtype, say "not this case";
other NotImplementedErrors of torch's own (of a tensor on the meta device, of a backward that is missing) do
not.

The third form is a subclass of torch.nn.Module, built anew for every call as BatchNorm2d is:

    BatchNorm(num_features, eps=eps, momentum=momentum, affine=True or False)

It is moved to the device and to the dtype of the running statistics; weight, bias, running_mean and
running_var, of shape (C,), are copied into it; it is called with x in training mode or after eval(), and
returns y alone, which must have a graph where gradients are asked for. The gradients are autograd's, but none
for a weight and a bias that do not require them, and the running statistics those that it has afterwards.
weight and bias must be left as they are. num_batches_tracked is left alone. One without running statistics
does not take part in inference. A ValueError from torch's own BatchNorm, of a rank, a size or an eps that it
does not take, says "not this case".

Each plug-in has a process of its own, which runs in an empty folder of its own: files beside the plug-in are
found by Path(__file__).parent. What glibc, NumPy and torch's GPU allocator hand out to it holds NaN, so that
an element it forgets to write shows. The last step is called twice, with the same tensors: other bits the
second time (NaN excepted) make the result a warn at least.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from typing import TYPE_CHECKING

from .execution import ASKING, Implementation, NoResult, message
from .poison import poison_malloc

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEVICES = ("cpu", "cuda")

ARGUMENTS = ("x", "weight", "bias", "running_mean", "running_var")

MODULE = "BatchNorm2d(num_features, eps=…, momentum=…, affine=…)"


COMPILED = ("torch._dynamo.", "torch.jit.")
"""How the names of the modules begin in which the classes of compiled and scripted modules are."""


class Unavailable(Exception):  # noqa: N818 - an outcome
    """A backend that cannot run here; the message says why."""


def is_plugin(backend: str) -> bool:
    """Whether a backend's name is that of a plug-in: built-in names have no colon."""
    return ":" in backend


def split(backend: str) -> tuple[str, str, str]:
    """FILE.py or package.module, NAME and device ("cpu" where none is given) of a plug-in's name."""
    target, _, name = backend.rpartition(":")
    name, at, device = name.partition("@")
    return target, name, device if at else "cpu"


def load(backend: str, folder: str) -> Implementation:
    """Imports a plug-in; modules are looked for in `folder` first, a file's in the file's folder.

    Raises Unavailable where it is not there or cannot run here, NoResult "contract" where it cannot be
    called as it should, and whatever the module itself raises.
    """
    target, name, device = split(backend)
    if "@" in target.rpartition(":")[2]:
        raise Unavailable("a device has no number: CUDA_VISIBLE_DEVICES chooses the GPU of @cuda")
    if device not in DEVICES:
        raise Unavailable("there is no device %s: a plug-in runs @cpu or @cuda" % (device or "''"))
    if target.endswith(".py"):
        module = _load_file(os.path.join(folder, target))
    else:
        sys.path.insert(0, folder)
        try:
            module = importlib.import_module(target)
        except ImportError as error:
            raise Unavailable("%s cannot be imported: %s" % (target, message(error))) from error
    found = getattr(module, name, None)
    if found is None:
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        near = ", ".join(difflib.get_close_matches(name, own, 3, 0))
        text = "%s has no function named %s" % (target, name)
        more = ", …" if len(own) > 3 else ""
        raise Unavailable(text + ("; it has %s%s" % (near, more) if near else ""))
    implementation = _implementation(found, "%s in %s" % (name, target), device)
    poison_malloc()
    return implementation


def _implementation(found: Any, place: str, device: str) -> Implementation:
    # A plug-in that has not imported torch holds no module of it.
    module_type = getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", ())
    is_module = isinstance(found, type) and issubclass(found, module_type)
    if isinstance(found, type) and not is_module:
        raise Unavailable(
            "%s is a class, but no torch.nn.Module: a function is called for, or a class built like %s"
            % (place, MODULE)
        )
    if isinstance(found, functools.partial) and isinstance(found.func, type):
        text = "%s is a functools.partial of %s: a module plug-in must be a class, built like %s"
        raise Unavailable(text % (place, found.func.__name__, MODULE))
    if isinstance(found, module_type) and type(found).__module__.startswith(COMPILED):
        text = "%s is a compiled module: called for is a function that asks for torch tensors and calls it, "
        text += "or a subclass that compiles its forward"
        raise Unavailable(text % place)
    if isinstance(found, module_type):
        text = "%s is a module; its class %s is called for, built like %s"
        raise Unavailable(text % (place, type(found).__name__, MODULE))
    if not callable(found):
        raise Unavailable("%s is not a function, but of type %s" % (place, type(found).__name__))
    tensors = "torch" if is_module else getattr(found, "tensors", "numpy")
    if tensors not in ("numpy", "torch"):
        text = "%s asks for %r tensors; there are 'numpy' (the default) and 'torch'"
        raise Unavailable(text % (place, tensors))
    if not is_module:
        _check_signature(found, place)
    if tensors == "numpy":
        if device != "cpu":
            text = "%s takes NumPy arrays, which are on the cpu; %s"
            raise Unavailable(text % (place, ASKING))
        return Implementation(found, "numpy", repeated=True, poisoned=True)
    from . import torch_plugin

    reason = torch_plugin.unavailable(device)
    if reason is not None:
        raise Unavailable("%s takes torch tensors: %s" % (place, reason))
    return Implementation(torch_plugin.adapt(found, device), "stored", repeated=True, poisoned=True)


def _check_signature(function: Callable[..., Any], place: str) -> None:
    options = dict.fromkeys(("training", "momentum", "eps", "grad_output"))
    try:
        inspect.signature(function).bind(*ARGUMENTS, **options)
    except ValueError:
        pass  # a builtin does not tell
    except TypeError as error:
        call = ", ".join([*ARGUMENTS, *("%s=…" % name for name in options)])
        raise NoResult(
            "contract", "%s cannot be called with (%s): %s" % (place, call, error)
        ) from error


def _load_file(path: str) -> Any:
    if not os.path.isfile(path):
        raise Unavailable("there is no file %s" % path)
    sys.path.insert(0, os.path.dirname(path))
    module_name = os.path.splitext(os.path.basename(path))[0]
    if module_name in sys.modules:  # a file called numpy.py must not replace NumPy
        module_name = "bnaudit_plugin_" + module_name
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None  # noqa: S101 - the file is there
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        text = "%s cannot be imported: %s" % (path, message(error))
        if "relative import" in text:
            text += " (a file is in no package: name it package.module:NAME)"
        raise Unavailable(text) from error
    return module
