"""Apache MXNet: mx.nd.BatchNorm with fix_gamma off, and gradients by mx.autograd.

MXNet's momentum is the weight of the old running statistic, and its running variance is the biased one. Only
backward moves the running statistics: a training step without a gradient of y gets one of zeros. Its operator
hands out the mean and 1 / sqrt(var + eps). A case without affine parameters gets ones and zeros. channels_last
runs with axis=-1, which is another kernel. Settings of MXNet's own, such as MXNET_MKLDNN_ENABLED=0, are the
user's; `kernel` repeats that one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

SWITCH = "MXNET_MKLDNN_ENABLED"


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import mxnet  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "mxnet":
            return "mxnet cannot be imported: %s" % error
        text = "mxnet is not installed in this environment (Python 3.8: pip install %s)"
        return text % "mxnet==1.9.1 numpy==1.23.5"
    except Exception as error:  # with NumPy 1.24 an AttributeError
        return "mxnet cannot be imported: %s" % error
    return None


def mxnet_cpu(
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
    """Forward and backward; NotImplementedError for bfloat16, empty batches and 16-bit parameters."""
    import mxnet

    if x.dtype == np.uint16:
        raise NotImplementedError("MXNet: data type 'bfloat16' not understood")
    if not x.size:
        raise NotImplementedError("MXNet takes a length of 0 for one that is not known yet")
    affine = weight is not None
    last = _is_channels_last(x)
    options = {"eps": eps, "momentum": 1 - momentum, "axis": -1 if last else 1}
    gamma = weight if affine else np.ones_like(running_mean)
    beta = bias if affine else np.zeros_like(running_mean)
    leaves = [_array(_moved(x, last)), _array(gamma), _array(beta)]
    running = [_array(running_mean), _array(running_var)]
    for leaf in leaves:
        leaf.attach_grad()
    try:
        with mxnet.autograd.record(train_mode=training):
            y, mean, invstd = mxnet.nd.BatchNorm(
                *leaves, *running, fix_gamma=False, output_mean_var=True, **options
            )
        if grad_output is not None:
            y.backward(_array(_moved(grad_output, last)), train_mode=training)
        elif training:
            y.backward(mxnet.nd.zeros_like(y))
        outputs: Outputs = {"y": _back(y, last)}
    except mxnet.MXNetError as error:
        if "requires uniform type" not in str(error):
            raise
        raise NotImplementedError(str(error).strip().splitlines()[-1]) from error
    if training:
        outputs.update(batch_mean=mean.asnumpy(), invstd=invstd.asnumpy())
        outputs.update(running_mean=running[0].asnumpy(), running_var=running[1].asnumpy())
    if grad_output is not None:
        outputs["grad_input"] = _back(leaves[0].grad, last)
        if affine:
            outputs["grad_weight"] = leaves[1].grad.asnumpy()
            outputs["grad_bias"] = leaves[2].grad.asnumpy()
    kernel = "mxnet %s, axis=%d" % (mxnet.__version__, options["axis"])
    if SWITCH in os.environ:
        kernel += ", %s=%s" % (SWITCH, os.environ[SWITCH])
    return dict(outputs, kernel=kernel)


mxnet_cpu.running_var_correction = 0  # type: ignore[attr-defined]


def _is_channels_last(x: Array) -> bool:
    moved = np.moveaxis(x, 1, -1)
    return bool(moved.flags.c_contiguous and not x.flags.c_contiguous)


def _moved(x: Array, last: bool) -> Array:
    """x in the order of axes that the operator gets."""
    return np.moveaxis(x, 1, -1) if last else x


def _array(values: Array | None) -> Any:
    """An NDArray in MXNet's own memory."""
    import mxnet

    values = np.ascontiguousarray(values)
    return mxnet.nd.array(values, ctx=mxnet.cpu(), dtype=values.dtype)


def _back(values: Any, last: bool) -> Array:
    """The NDArray as (N, C, *)."""
    array: Array = values.asnumpy()
    return np.moveaxis(array, -1, 1) if last else array
