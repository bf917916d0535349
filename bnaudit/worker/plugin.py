"""Plug-ins: a user's own BatchNorm, named FILE.py:NAME or package.module:NAME, with @cpu at the end or not.

The contract, here and for the built-in backends:

    def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):

x and grad_output are (N, C, *) arrays in the case's dtype and memory format (bfloat16 as ml_dtypes.bfloat16),
weight, bias, running_mean and running_var (C,) arrays in the statistics dtype, or in the case's dtype where
the case says `param_dtype: same`. weight and bias are None together. grad_output is given when gradients are
asked for. momentum is the weight of the new batch in this call: for the cumulative average (`momentum: null`)
the worker passes 1/t at step t. The function is called once per step, with the running statistics it left.

It returns y, or a dict with y and whatever it computes of batch_mean, batch_var, invstd, running_mean,
running_var, grad_input, grad_weight and grad_bias; `kernel` may say in words what ran. Other keys are
ignored, and None is as good as a key left out. y and grad_input have x's shape and the case's dtype,
per-channel quantities the shape (C,) and any floating-point dtype. running_mean and running_var may be
updated in place instead; a returned key wins. x, weight, bias and grad_output must be left as they are.

Raising NotImplementedError says "not this case", and its message why. Attributes of the function declare its
conventions: `running_var_correction` (1: n / (n − 1), the default; 0: biased) and `running_update` ("ema",
the default; "caffe": scaled sums).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


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


def load(backend: str, folder: str) -> Callable[..., Any]:
    """Imports a plug-in's function; modules are looked for in `folder` first, a file's in the file's folder.

    Raises Unavailable where it is not there or of a kind this version does not run, and whatever the
    module itself raises.
    """
    target, name, device = split(backend)
    if device != "cpu":
        raise Unavailable("a NumPy plug-in runs on the cpu, not on %s" % device)
    if target.endswith(".py"):
        module = _load_file(os.path.join(folder, target))
    else:
        sys.path.insert(0, folder)
        try:
            module = importlib.import_module(target)
        except ImportError as error:
            raise Unavailable("%s cannot be imported: %s" % (target, error)) from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise Unavailable("%s has no function named %s" % (target, name))
    if isinstance(function, type) or not callable(function):
        raise Unavailable("%s in %s is not a function" % (name, target))
    tensors = getattr(function, "tensors", "numpy")
    if tensors != "numpy":
        text = "%s asks for %r tensors; this version hands out NumPy's"
        raise Unavailable(text % (name, tensors))
    return function


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
        raise Unavailable("%s cannot be imported: %s" % (path, error)) from error
    return module
