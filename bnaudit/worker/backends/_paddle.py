"""PaddlePaddle: paddle.nn.functional.batch_norm, and gradients by paddle.grad.

Paddle's momentum is the weight of the old running statistic, and its running variance is the biased one. The
function does not hand out the batch statistics. channels_last runs with data_format NHWC, which is another
kernel than NCHW; every other memory format is copied into a C-contiguous tensor. With a single value per
channel y is x and the running statistics stay: that is returned as it comes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

NO_KERNEL = re.compile(r"The kernel .* is not registered")


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import paddle  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "paddle":
            return "paddle cannot be imported: %s" % error
        return "paddle is not installed in this environment (pip install paddlepaddle)"
    except Exception as error:  # a broken installation raises whatever it likes
        return "paddle cannot be imported: %s" % error
    return None


def paddle_cpu(
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
    """One call; NotImplementedError for a dtype without a kernel, which is every one of 16 bits."""
    import paddle

    if x.dtype == np.uint16:
        raise NotImplementedError("Paddle has no batch_norm kernel for bfloat16 on the CPU")
    last = _is_channels_last(x)
    first = _tensor(_moved(x, last))
    leaves = [first] if weight is None else [first, _tensor(weight), _tensor(bias)]
    for leaf in leaves:
        leaf.stop_gradient = grad_output is None
    running = [_tensor(running_mean), _tensor(running_var)]
    try:
        y = paddle.nn.functional.batch_norm(
            first,
            *running,
            *(leaves[1:] or (None, None)),
            training=training,
            momentum=1 - momentum,
            epsilon=eps,
            data_format="NHWC" if last else "NCHW",
        )
    except RuntimeError as error:
        found = NO_KERNEL.search(str(error))
        if found is None:
            raise
        raise NotImplementedError(found.group()) from error
    outputs: Outputs = {"y": _back(y, last)}
    if training:
        outputs["running_mean"], outputs["running_var"] = (array.numpy() for array in running)
    if grad_output is not None:
        gradients = paddle.grad([y], leaves, [_tensor(_moved(grad_output, last))])
        outputs["grad_input"] = _back(gradients[0], last)
        for name, gradient in zip(("grad_weight", "grad_bias"), gradients[1:]):  # noqa: B905
            outputs[name] = gradient.numpy()
    kernel = "paddle %s %s" % (paddle.__version__, "NHWC" if last else "NCHW")
    return dict(outputs, kernel=kernel)


paddle_cpu.running_var_correction = 0  # type: ignore[attr-defined]


def _is_channels_last(x: Array) -> bool:
    moved = np.moveaxis(x, 1, -1)
    return bool(moved.flags.c_contiguous and not x.flags.c_contiguous)


def _moved(x: Array, last: bool) -> Array:
    """x in the order of axes that the function gets."""
    return np.moveaxis(x, 1, -1) if last else x


def _tensor(values: Array | None) -> Any:
    """A tensor on the CPU, in Paddle's own memory."""
    import paddle

    return paddle.to_tensor(np.ascontiguousarray(values), place=paddle.CPUPlace())


def _back(values: Any, last: bool) -> Array:
    """The tensor as (N, C, *)."""
    array: Array = values.numpy()
    return np.moveaxis(array, -1, 1) if last else array
