"""ONNX Runtime's CPU provider: a model of one BatchNormalization node (opset 15), in inference and in training.

ONNX's momentum is the weight of the old running statistic, and its running variance is the biased one. The
batch statistics are not among the node's outputs, and it has no gradients. momentum and epsilon are
attributes, which are float32 also where the tensors are float64. Around a float16 node ONNX Runtime inserts
casts to float32 and back, running statistics included. A case without affine parameters gets ones and zeros,
since the node's inputs are not optional. Every memory format is copied into a C-contiguous tensor.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

OPSET = 15
"""The first in which x, the parameters and the running statistics may differ in type; the last that changed."""

IR_VERSION = 8
"""The model format of that opset."""


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    for module in ("onnxruntime", "onnx"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                text = "%s is not installed in this environment (pip install onnxruntime onnx)"
                return text % module
            return "%s cannot be imported: %s" % (module, error)
        except Exception as error:  # a broken installation raises whatever it likes
            return "%s cannot be imported: %s" % (module, error)
    return None


def onnxruntime_cpu(
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
    """BatchNormalization; NotImplementedError for a dtype without a kernel. grad_output is not used."""
    import onnxruntime

    if weight is None:
        weight, bias = np.ones_like(running_mean), np.zeros_like(running_mean)
    session = _session(x.dtype, running_mean.dtype, x.ndim, training, 1 - momentum, eps)
    arrays = (x, weight, bias, running_mean, running_var)
    feeds = dict(zip(NAMES, (np.ascontiguousarray(array) for array in arrays)))  # noqa: B905
    outputs = dict(zip(_results(training), session.run(None, feeds)))  # noqa: B905 - Python 3.7
    provider = session.get_providers()[0]
    mode = "training_mode=%d" % training
    kernel = "onnxruntime %s %s, opset %d, %s" % (onnxruntime.__version__, provider, OPSET, mode)
    return dict(outputs, kernel=kernel)


onnxruntime_cpu.running_var_correction = 0  # type: ignore[attr-defined]

NAMES = ("x", "weight", "bias", "old_mean", "old_var")
"""The node's inputs, in its order."""


def _results(training: bool) -> tuple[str, ...]:
    """The node's outputs, in its order, by our names."""
    return ("y", "running_mean", "running_var") if training else ("y",)


@functools.lru_cache(maxsize=64)
def _session(
    dtype: np.dtype[Any],
    param_dtype: np.dtype[Any],
    rank: int,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """An InferenceSession for inputs of any lengths. momentum: ONNX's."""
    import onnxruntime
    from onnx import helper
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    kind, param_kind = _kind(dtype), _kind(param_dtype)
    node = helper.make_node(
        "BatchNormalization",
        NAMES,
        _results(training),
        epsilon=eps,
        momentum=momentum,
        training_mode=int(training),
    )
    full = dict.fromkeys(("x", "y"), kind)
    inputs = [
        helper.make_tensor_value_info(
            name, full.get(name, param_kind), [None] * (rank if name == "x" else 1)
        )
        for name in NAMES
    ]
    outputs = [
        helper.make_tensor_value_info(name, full.get(name, param_kind), None)
        for name in _results(training)
    ]
    graph = helper.make_graph([node], "bnaudit", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: its own choice
    options.log_severity_level = 3  # errors: that a node is in training mode is no news here
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except NoKernel as error:
        raise NotImplementedError("%s, in %s" % (error, _name(dtype))) from error


def _kind(dtype: np.dtype[Any]) -> int:
    """ONNX's number of a dtype; uint16 holds the bits of bfloat16."""
    from onnx import TensorProto, helper

    if dtype == np.uint16:
        return int(TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def _name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == np.uint16 else dtype.name
