"""Keras 3: keras.layers.BatchNormalization on the CPU, on each of its backends.

The layer's dtype is the case's, or a mixed policy where 16-bit tensors have 32-bit parameters; statistics of
16-bit tensors are computed in float32. The running variance is the biased one, and Keras's momentum the weight
of the old value. What differs numerically:

keras_jax          jnp.var, then x·inv + (offset - mean·inv); under jax.jit, as its trainer runs it
keras_tensorflow   tf.nn.moments, two passes, and the same formula; eager
keras_torch        E[x²] - E[x]², not clipped, then (x - mean)·inv + offset; eager

With dtype float64 the layer computes in float32 on JAX and torch, though its weights and output say float64.
Gradients are the backend's own. Batch statistics are not handed out.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from . import _jax, _tensorflow, _torch
from ._channels_last import channels_first, channels_last, native, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Outputs = dict[str, Any]


def unavailable(name: str) -> str | None:
    """Why the backend `name`, keras-FRAMEWORK@cpu, cannot run here, or None.

    Settles which backend Keras has in this process.
    """
    framework = name.partition("@")[0].partition("-")[2]
    os.environ["KERAS_BACKEND"] = framework
    os.environ["KERAS_TORCH_DEVICE"] = "cpu"
    os.environ["KERAS_HOME"] = os.getcwd()  # or else it writes to the user's home
    if framework == "jax":
        reason = _jax.cannot_import("jax", "pip install jax")
    elif framework == "tensorflow":
        reason = _tensorflow.cannot_import("pip install tensorflow-cpu")
    else:
        reason = _torch.unavailable("torch@cpu")
    reason = reason or _jax.cannot_import("keras", "pip install keras")
    if reason is not None:
        return reason
    import keras

    if keras.__version__ < "3":
        return "Keras %s is too old: 3 is needed" % keras.__version__
    return None


def describe() -> dict[str, Any]:
    """Numerical settings of Keras's backend in this process, for a report."""
    modules = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
    module = modules.get(os.environ.get("KERAS_BACKEND", ""))
    return {"devices": [], "flags": {}} if module is None else module.describe()


class Keras:
    """The layer on one backend.

    step(layer, x, weight, bias, running_mean, running_var, grad_output, training) -> quantities.
    """

    running_var_correction = 0

    def __init__(self, step: Callable[..., Outputs], where: str) -> None:
        """where: the backend, and how the layer is called."""
        self.step = step
        self.where = where

    def __call__(
        self,
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
        """Runs one step."""
        import keras

        _jax_64_bits(x.dtype)
        dtypes = _name(x), _name(running_mean)
        layer = _layer(x.ndim, x.shape[1], weight is not None, momentum, eps, *dtypes)
        statistics = running_mean, running_var
        outputs = self.step(layer, x, weight, bias, *statistics, grad_output, training)
        kernel = "keras %s on %s, channels last" % (keras.__version__, self.where)
        return dict(outputs, kernel=kernel)


def _name(array: Any) -> str:
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype.name)


def _jax_64_bits(dtype: Any) -> None:
    if os.environ["KERAS_BACKEND"] == "jax":
        _jax.prepare(dtype)


@functools.lru_cache(maxsize=1)
def _layer(
    rank: int,
    channels: int,
    has_affine: bool,
    momentum: float,
    eps: float,
    dtype: str,
    param_dtype: str,
) -> Any:
    """The layer; its weights are still to be given."""
    import keras

    layer = keras.layers.BatchNormalization(
        axis=-1,
        momentum=1 - momentum,
        epsilon=eps,
        center=has_affine,
        scale=has_affine,
        dtype=dtype if dtype == param_dtype else "mixed_" + dtype,
    )
    layer.build((None,) * (rank - 1) + (channels,))
    return layer


def _by_jax(
    layer: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    grad_output: Any,
    training: bool,
) -> Outputs:
    running = {"mean": running_mean, "var": running_var}
    parameters = _jax.affine(weight, bias)
    return _jax.step(_stateless(layer, training), x, parameters, running, grad_output)


@functools.lru_cache(maxsize=1)
def _stateless(layer: Any, training: bool) -> Callable[..., Any]:
    def forward(x: Any, parameters: Any, running: Any) -> Any:
        trainable = [parameters["weight"], parameters["bias"]] if parameters else []
        others = [running["mean"], running["var"]]
        y, (mean, var) = layer.stateless_call(trainable, others, x, training=training)
        return y, {"running_mean": mean, "running_var": var}

    return forward


def _give(layer: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> list[Any]:
    """Copies the tensors into the layer; returns its variables that have gradients."""
    layer.moving_mean.assign(running_mean)
    layer.moving_variance.assign(running_var)
    if weight is None:
        return []
    layer.gamma.assign(weight)
    layer.beta.assign(bias)
    return [layer.gamma.value, layer.beta.value]


def _by_tensorflow(
    layer: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    grad_output: Any,
    training: bool,
) -> Outputs:
    import tensorflow as tf

    with tf.device("/CPU:0"):
        leaves = [tf.constant(channels_last(x))]
        leaves += _give(layer, *map(native, (weight, bias, running_mean, running_var)))
        with tf.GradientTape() as tape:
            tape.watch(leaves[:1])
            y = layer(leaves[0], training=training)
        outputs = {"y": channels_first(y)}
        if grad_output is not None:
            upstream = tf.constant(channels_last(grad_output))
            gradients = list(map(np.asarray, tape.gradient(y, leaves, upstream)))
            outputs["grad_input"] = channels_first(gradients[0])
            outputs.update(zip(("grad_weight", "grad_bias"), map(stored, gradients[1:])))  # noqa: B905
    outputs["running_mean"] = stored(layer.moving_mean.numpy())
    outputs["running_var"] = stored(layer.moving_variance.numpy())
    return outputs


def _by_torch(
    layer: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    grad_output: Any,
    training: bool,
) -> Outputs:
    import torch

    def tensor(array: Any) -> Any:
        return None if array is None else _torch.to_tensor(array, "cpu")

    def last(array: Any) -> Any:
        return tensor(stored(channels_last(array)))

    def first(result: Any) -> Any:
        return np.moveaxis(_torch.to_array(result), -1, 1)

    leaves = [last(x).requires_grad_(grad_output is not None)]
    leaves += _give(layer, *map(tensor, (weight, bias, running_mean, running_var)))
    y = layer(leaves[0], training=training)
    outputs = {"y": first(y)}
    if grad_output is not None:
        gradients = torch.autograd.grad(y, leaves, last(grad_output))
        outputs["grad_input"] = first(gradients[0])
        pairs = zip(("grad_weight", "grad_bias"), gradients[1:])  # noqa: B905 - Python 3.7
        outputs.update({name: _torch.to_array(gradient) for name, gradient in pairs})
    outputs["running_mean"] = _torch.to_array(layer.moving_mean.value).copy()
    outputs["running_var"] = _torch.to_array(layer.moving_variance.value).copy()
    return outputs


keras_jax = Keras(_by_jax, "JAX, jit")
keras_tensorflow = Keras(_by_tensorflow, "TensorFlow, eager")
keras_torch = Keras(_by_torch, "torch, eager")
