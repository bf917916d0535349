"""NNabla: nnabla.functions.batch_normalization on the CPU, with gradients by its backward pass.

decay_rate is the weight of the old running statistic; the running variance is the unbiased one. The function
is compiled for float ("cpu:float") and for 16 bits ("cpu:half"), which casts the parameters and keeps the
statistics in 16 bits, too; there is none for float64 and none for bfloat16. An empty batch ends the process by
a division by zero. Every memory format is copied into a C-contiguous array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

TYPES = {"float16": "half", "float32": "float"}
"""NNabla's names of the dtypes that it has."""


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import nnabla
        import nnabla.ext_utils
        import nnabla.functions  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "nnabla":
            return "nnabla cannot be imported: %s" % error
        return "nnabla is not installed in this environment (pip install nnabla)"
    except Exception as error:  # a broken installation raises whatever it likes
        return "nnabla cannot be imported: %s" % error
    return None


def nnabla_cpu(
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
    """One call; NotImplementedError for a dtype that NNabla has no function for."""
    import nnabla
    import nnabla.ext_utils

    if x.dtype == np.uint16:
        raise NotImplementedError("NNabla takes no bfloat16 from NumPy")
    kind = TYPES.get(x.dtype.name, x.dtype.name)
    try:
        context = nnabla.ext_utils.get_extension_context("cpu", type_config=kind)
    except ValueError as error:
        raise NotImplementedError("NNabla: %s" % error) from error
    shape = (1, x.shape[1]) + (1,) * (x.ndim - 2)
    given = _variable(x)
    parameters = [
        None if array is None else _variable(array.reshape(shape)) for array in (bias, weight)
    ]
    running = [_variable(array.reshape(shape)) for array in (running_mean, running_var)]
    with nnabla.context_scope(context):
        found = nnabla.functions.batch_normalization(
            given,
            *parameters,
            *running,
            axes=[1],
            decay_rate=1 - momentum,
            eps=eps,
            batch_stat=training,
            output_stat=training,
        )
        y = found[0] if training else found
        y.forward()
        outputs = {"y": y.d}
        if training:
            outputs["batch_mean"], outputs["batch_var"] = (array.d.ravel() for array in found[1:])
            outputs["running_mean"], outputs["running_var"] = (array.d.ravel() for array in running)
        if grad_output is not None:
            outputs.update(_gradients(y, given, parameters, grad_output))
    kernel = "nnabla %s, %s" % (nnabla.__version__, context.backend[0])
    return dict(outputs, kernel=kernel)


def _variable(array: Array) -> Any:
    import nnabla

    variable = nnabla.Variable(array.shape, need_grad=True)
    variable.d = array
    return variable


def _gradients(y: Any, given: Any, parameters: list[Any], grad_output: Array) -> dict[str, Array]:
    """The gradients of x and of bias and weight, where there are these."""
    names = ("grad_input", "grad_bias", "grad_weight")
    leaves = {
        name: leaf
        for name, leaf in zip(names, (given, *parameters))  # noqa: B905 - Python 3.7
        if leaf is not None
    }
    for leaf in leaves.values():
        leaf.g = 0  # backward adds to what is there
    y.backward(np.ascontiguousarray(grad_output))
    return {
        name: leaf.g if name == "grad_input" else leaf.g.ravel() for name, leaf in leaves.items()
    }
