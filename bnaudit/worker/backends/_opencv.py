"""OpenCV's dnn module: a network of one BatchNormalization node, read from an ONNX model with its parameters.

OpenCV does not train: there are no batch statistics and no gradients. It folds the parameters into x·a + b
with b = bias - running_mean·a, which cancels where x is near a large running mean. A network computes in
float32: 16-bit tensors are widened on the way in, and y is rounded here to x's dtype. A case without affine
parameters gets ones and zeros, since the node's inputs are not optional. Every memory format is copied into a
C-contiguous tensor.
"""

from __future__ import annotations

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
    for module in ("cv2", "onnx"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                text = "%s is not installed in this environment "
                text += "(pip install opencv-python-headless onnx 'protobuf<7')"
                return text % module
            return "%s cannot be imported: %s" % (module, error)
        except Exception as error:  # a broken installation raises whatever it likes
            return "%s cannot be imported: %s" % (module, error)
    return None


def opencv_cpu(
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
    """A forward pass; NotImplementedError for training, bfloat16 and what OpenCV refuses by an error.

    momentum and grad_output are not used.
    """
    if training:
        raise NotImplementedError("OpenCV's dnn module runs networks: it does not train")
    if x.dtype == np.uint16:
        raise NotImplementedError("OpenCV takes no bfloat16 from NumPy")
    import cv2

    if weight is None:
        weight, bias = np.ones_like(running_mean), np.zeros_like(running_mean)
    # OpenCV 5.0 dies of a model in a bytes object.
    model = np.frombuffer(_model(x, (weight, bias, running_mean, running_var), eps), np.uint8)
    cv2.setNumThreads(int(os.environ.get("OMP_NUM_THREADS", "-1")))  # -1: its own choice
    try:
        network = cv2.dnn.readNetFromONNX(model)
        network.setInput(np.ascontiguousarray(x))
        y = network.forward()
    except cv2.error as error:
        raise NotImplementedError(str(error).strip()) from error
    if y is None:
        raise NotImplementedError("OpenCV returns nothing for an empty batch")
    kernel = "opencv %s dnn, %s" % (cv2.__version__, ", ".join(network.getLayerTypes()))
    return {"y": y.astype(x.dtype), "kernel": kernel}


def _model(x: Array, parameters: tuple[Array | None, ...], eps: float) -> bytes:
    """The ONNX model of a BatchNormalization with the parameters (scale, B, mean, var) inside."""
    from onnx import helper, numpy_helper

    names = ("weight", "bias", "running_mean", "running_var")
    node = helper.make_node("BatchNormalization", ("x", *names), ("y",), epsilon=eps)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    ends = [helper.make_tensor_value_info(name, kind, x.shape) for name in ("x", "y")]
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in zip(names, parameters)  # noqa: B905 - Python 3.7
    ]
    graph = helper.make_graph([node], "bnaudit", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
