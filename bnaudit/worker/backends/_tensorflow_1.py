"""TensorFlow 1 on the CPU: tf.layers.batch_normalization in a graph, with its fused operator.

The operator takes tensors of rank 4 with the channels last, to which others are reshaped; one chain of float32
additions a thread. The layer raises an eps below 1.001e-5 to that, in silence: cuDNN once asked for it. The
running variance is the unbiased one, and TensorFlow's momentum the weight of the old value, which is moved by
the difference times 1 - momentum. On the CPU the operator's reserve spaces hold the batch's mean and biased
variance. Gradients are tf.gradients's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from . import _tensorflow
from ._channels_last import stored

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

INSTALL = "pip install 'tensorflow<2' 'protobuf<3.21' 'numpy<1.19', with Python 3.7"


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run here, or None."""
    reason = _tensorflow.cannot_import(INSTALL)
    if reason is not None:
        return reason
    import tensorflow as tf

    version = str(tf.__version__)
    if version.startswith("1.") and hasattr(tf, "layers"):
        return None
    return "TensorFlow %s is not TensorFlow 1 (%s)" % (version, INSTALL)


def tensorflow_1(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Any = None,
) -> Outputs:
    """tf.layers.batch_normalization(fused=True) in a session of its own."""
    import tensorflow as tf

    if x.dtype == np.float64 or running_mean.dtype != np.float32:
        text = "FusedBatchNorm takes float16, bfloat16 and float32, with parameters in float32"
        raise NotImplementedError(text)
    dtype = tf.bfloat16 if x.dtype == np.uint16 else tf.as_dtype(x.dtype)
    tensor = _rank_4(x, dtype)
    feed, fetch = {}, {}
    with tf.Graph().as_default() as graph:
        entry = tf.placeholder(dtype, tensor.shape)
        layer = tf.layers.BatchNormalization(
            axis=-1,
            momentum=1 - momentum,
            epsilon=eps,
            center=bias is not None,
            scale=weight is not None,
            fused=True,
        )
        y = layer.apply(entry, training=training)
        feed[entry], fetch["y"] = tensor, y
        if training:
            (operator,) = (op for op in graph.get_operations() if op.type == "FusedBatchNormV3")
            fetch["batch_mean"], fetch["batch_var"] = operator.outputs[3:5]
        if grad_output is not None:
            names = {"grad_input": entry, "grad_weight": layer.gamma, "grad_bias": layer.beta}
            names = {name: leaf for name, leaf in names.items() if leaf is not None}
            upstream = tf.placeholder(dtype, tensor.shape)
            feed[upstream] = _rank_4(grad_output, dtype)
            fetch.update(zip(names, tf.gradients(y, list(names.values()), [upstream])))  # noqa: B905
        with tf.Session(config=_threads()) as session:
            given = {layer.gamma: weight, layer.beta: bias}
            given.update({layer.moving_mean: running_mean, layer.moving_variance: running_var})
            for variable, value in given.items():
                if value is not None:
                    variable.load(value, session)
            found, _ = session.run([fetch, layer.updates if training else []], feed)
            moved = session.run([layer.moving_mean, layer.moving_variance])
    outputs = {name: stored(value) for name, value in found.items()}
    outputs["running_mean"], outputs["running_var"] = moved
    for name in {"y", "grad_input"} & outputs.keys():
        last = outputs[name].reshape((x.shape[0], *x.shape[2:], x.shape[1]))
        outputs[name] = np.moveaxis(last, -1, 1)
    kernel = "tensorflow %s tf.layers, FusedBatchNormV3, channels last"
    return dict(outputs, kernel=kernel % tf.__version__)


def _rank_4(array: Array, dtype: Any) -> Array:
    """(N, C, *) as stored -> a copy with rank 4 and the channels last, in TensorFlow's dtype."""
    last = np.array(np.moveaxis(array, 1, -1), order="C")
    if last.ndim != 4:
        n, c = array.shape[:2]
        last = last.reshape((n, array.size // max(n * c, 1), 1, c))
    return last.view(dtype.as_numpy_dtype)


def _threads() -> Any:
    import tensorflow as tf

    # No tf.device: oneDNN's bfloat16 kernels are none to the placement, which then refuses.
    return tf.ConfigProto(
        intra_op_parallelism_threads=int(os.environ.get("OMP_NUM_THREADS", "0")),
        inter_op_parallelism_threads=1,
        device_count={"GPU": 0},
    )
