"""OpenVINO's CPU plug-in: a model of one BatchNormInference node, whose parameters are constants.

OpenVINO does not train: there are no batch statistics and no gradients. It folds the parameters into x·a + b
with b = bias - running_mean·a, which cancels where x is near a large running mean. The precision hint is
float32, also where the processor has bfloat16; float64 is computed in float32 without a word. The parameters
must have the type of x. A case without affine parameters gets ones and zeros, since the node's inputs are not
optional. Every memory format is copied into a C-contiguous tensor.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import openvino
        import openvino.opset13  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            return "openvino cannot be imported: %s" % error
        return "openvino is not installed in this environment (pip install openvino)"
    except Exception as error:  # a broken installation raises whatever it likes
        return "openvino cannot be imported: %s" % error
    return None


def openvino_cpu(
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
    """BatchNormInference; NotImplementedError for training and for what the node refuses.

    momentum and grad_output are not used.
    """
    if training:
        raise NotImplementedError("OpenVINO has BatchNormInference only: it does not train")
    import openvino
    from openvino import opset13

    if weight is None:
        weight, bias = _ones(running_mean), np.zeros_like(running_mean)
    given = _tensor(x)
    parameter = opset13.parameter(list(x.shape), given.element_type)
    constants = [
        opset13.constant(_tensor(array)) for array in (weight, bias, running_mean, running_var)
    ]
    try:
        node = opset13.batch_norm_inference(parameter, *constants, eps)
    except RuntimeError as error:
        raise NotImplementedError(str(error)) from error
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", "0")),  # 0: its own choice
    }
    model = openvino.Model([node], [parameter], "bnaudit")
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    request.infer([given])
    y = np.array(request.get_output_tensor(0).data)
    version = openvino.get_version().split("-")[0]
    kernel = "openvino %s CPU, %s" % (version, _kernels(compiled))
    return {"y": y.view(x.dtype), "kernel": kernel}


def _ones(like: Array) -> Array:
    """Ones, in bfloat16's bits where those are."""
    return np.full_like(like, 0x3F80 if like.dtype == np.uint16 else 1)


def _tensor(array: Any) -> Any:
    """A tensor of OpenVINO's in memory of its own; uint16 holds the bits of bfloat16."""
    import openvino

    if array.dtype != np.uint16:
        return openvino.Tensor(np.ascontiguousarray(array))
    tensor = openvino.Tensor(openvino.Type.bf16, list(array.shape))
    tensor.data[...] = array.view(np.float16)  # as OpenVINO shows bfloat16 to NumPy
    return tensor


def _kernels(compiled: Any) -> str:
    """What the plug-in runs between the model's input and its output."""
    found = []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, primitive = (info[name].astype(str) for name in ("layerType", "primitiveType"))
        if kind not in ("Input", "Output", "Const"):
            found.append("%s %s" % (kind, primitive))
    return ", ".join(found)
