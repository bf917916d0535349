"""tinygrad: tinygrad.nn.BatchNorm on its CPU device, and gradients by Tensor.gradient.

The kernels are generated and compiled for each shape, by clang or the compiler that CC names. The batch
statistics are those of the module's calc_stats, in x's dtype. With 16-bit tensors and float32 parameters y
is float32, and is rounded here to x's dtype. Every memory format is copied into a C-contiguous tensor.
Requires tinygrad 0.14.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

DEVICE = "CPU"


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import tinygrad  # noqa: F401
        from tinygrad.helpers import TRAINING  # noqa: F401 - older ones have Tensor.train instead
    except ModuleNotFoundError as error:
        if error.name != "tinygrad":
            return "tinygrad cannot be imported: %s" % error
        return "tinygrad is not installed in this environment (pip install tinygrad)"
    except Exception as error:  # a broken installation raises whatever it likes
        return "tinygrad cannot be imported: %s" % error
    compiler = _compiler()
    if shutil.which(compiler) is None:
        text = "tinygrad needs a compiler for its CPU, and there is no %s (apt-get install clang)"
        return text % compiler
    return None


def _compiler() -> str:
    """The program that tinygrad calls, which must take clang's options."""
    return os.environ.get("CC", "clang")


@functools.lru_cache(maxsize=None)
def _compiler_version() -> str:
    """The first line of what the compiler says of itself."""
    said = subprocess.run([_compiler(), "--version"], stdout=subprocess.PIPE)
    return said.stdout.decode(errors="replace").partition("\n")[0]


def tinygrad_cpu(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Array | None = None,
) -> Outputs:
    """One call of a new module.

    Raises NotImplementedError where its arithmetic of sizes divides by zero, and for bfloat16 where the
    compiler has none.
    """
    import tinygrad
    from tinygrad.helpers import Context

    first = _tensor(x)
    norm = tinygrad.nn.BatchNorm(x.shape[1], eps, weight is not None, momentum=momentum)
    norm.running_mean = _tensor(running_mean)
    norm.running_var = _tensor(running_var)
    if weight is not None:
        norm.weight, norm.bias = _tensor(weight), _tensor(bias)
    leaves = [first] if weight is None else [first, norm.weight, norm.bias]
    # tinygrad's cache on disk does not know which compiler its kernels are from.
    settings = {"TRAINING": int(training), "CACHELEVEL": 0}
    if "OMP_NUM_THREADS" in os.environ:
        settings["NUM_CPU_THREADS"] = int(os.environ["OMP_NUM_THREADS"])
    wanted: Outputs = {}
    with Context(**settings):
        try:
            y = norm(first)
        except ZeroDivisionError as error:
            text = "a single value per channel: tinygrad raises ZeroDivisionError: %s"
            raise NotImplementedError(text % error) from error
        wanted["y"] = y.cast(first.dtype)
        if training:
            wanted["batch_mean"], wanted["batch_var"] = norm.calc_stats(first)
            wanted["running_mean"], wanted["running_var"] = norm.running_mean, norm.running_var
        if grad_output is not None:
            gradients = y.gradient(*leaves, gradient=_tensor(grad_output).cast(y.dtype))
            names = ("grad_input", "grad_weight", "grad_bias")
            wanted.update(zip(names, gradients))  # noqa: B905 - Python 3.7
        try:
            tinygrad.Tensor.realize(
                *wanted.values()
            )  # at once, so that they share what is computed
            outputs: Outputs = {name: _to_numpy(tensor) for name, tensor in wanted.items()}
        except subprocess.CalledProcessError as error:
            if x.dtype != np.uint16:
                raise
            text = "tinygrad's bfloat16 is not compiled by %s"
            raise NotImplementedError(text % _compiler_version()) from error
    kernel = "tinygrad %s %s, %s"
    return dict(outputs, kernel=kernel % (_version(), DEVICE, _compiler_version()))


def _tensor(values: Array | None) -> Any:
    """A tensor on the CPU device, in tinygrad's own memory; uint16 holds the bits of bfloat16."""
    import tinygrad

    values = np.ascontiguousarray(values)
    tensor = tinygrad.Tensor(values, device=DEVICE).realize()
    return tensor.bitcast(tinygrad.dtypes.bfloat16) if values.dtype == np.uint16 else tensor


def _to_numpy(tensor: Any) -> Array:
    """The tensor's values; bfloat16 as its bits in uint16."""
    import tinygrad

    if tensor.dtype == tinygrad.dtypes.bfloat16:
        tensor = tensor.bitcast(tinygrad.dtypes.uint16)
    array: Array = tensor.numpy()
    return array


def _version() -> str:
    from importlib.metadata import version

    return version("tinygrad")
