"""TensorFlow 2 on the CPU: the fused operator, and the statistics and the formula of tf.nn.

tensorflow, tensorflow_nchw    tf.raw_ops.FusedBatchNormV3, run eagerly, with channels last or first: another
                               kernel each, and another again where oneDNN is switched off
tensorflow_moments             tf.nn.moments, two passes, and tf.nn.batch_normalization,
                               x·(scale·rsqrt(var + eps)) + (offset - mean·that), which cancels
tensorflow_xla                 the same in tf.function(jit_compile=True)

The fused operator moves the running statistics, by the unbiased variance, and on the CPU its first two
reserve spaces hold the batch's mean and biased variance. It has no float64, and its parameters are float32.
tf.nn moves no running statistics. Where x has 16 bits and the parameters have 32, x is first cast to float32,
as Keras does. Tensors that the fused operator does not take, of other ranks than 4, are reshaped to rank 4.
Gradients are a GradientTape's.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from ._channels_last import channels_first, channels_last, native, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run here, or None."""
    reason = cannot_import("pip install tensorflow-cpu")
    if reason is not None:
        return reason
    import tensorflow as tf

    version = str(tf.__version__)
    if version.startswith("1."):
        return "TensorFlow %s is too old: 2 is needed" % version
    return None


def cannot_import(install: str) -> str | None:
    """Why TensorFlow cannot be imported here, or None. install: the command that installs it.

    Settles, if nothing imported it before, that it has the audit's threads.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["KERAS_HOME"] = os.getcwd()  # or else Keras writes to the user's home
    if "OMP_NUM_THREADS" in os.environ:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["OMP_NUM_THREADS"]
        os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    try:
        import tensorflow  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "tensorflow":
            return "tensorflow is not installed in this environment (%s)" % install
        return "tensorflow cannot be imported: %s" % error
    except Exception as error:  # of another version than what it imports, it raises what it likes
        return "tensorflow cannot be imported: %s: %s" % (type(error).__name__, error)
    return None


def describe() -> dict[str, Any]:
    """Numerical settings of TensorFlow in this process, for a report."""
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default")
    return {"devices": [], "flags": {"onednn": onednn}}


class TensorFlow:
    """One path, as a backend.

    forward(x, weight, bias, running_mean, running_var, training, momentum, eps) -> (y, dict of others).
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        path: str,
        *,
        last: bool = True,
        fused: bool = False,
        xla: bool = False,
    ) -> None:
        """last: x goes in with its channels last. fused: and with rank 4."""
        self.forward = forward
        self.path = path
        self.last = last
        self.fused = fused
        self.xla = xla

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
        """Runs one step; raises NotImplementedError, in TensorFlow's words, for what it does not take."""
        import tensorflow as tf

        refusals = tf.errors.InvalidArgumentError, tf.errors.UnimplementedError
        step = _step(self.forward, self.xla, training, momentum, eps)
        with tf.device("/CPU:0"):
            tensors = [None if a is None else tf.constant(a) for a in (self._in(x), native(weight))]
            tensors += [None if bias is None else tf.constant(native(bias))]
            tensors += [tf.constant(native(a)) for a in (running_mean, running_var)]
            upstream = None if grad_output is None else tf.constant(self._in(grad_output))
            try:
                y, others, gradients = step(tensors, upstream)
            except refusals as error:
                raise NotImplementedError(error.message.splitlines()[0]) from error
        outputs = {name: stored(value) for name, value in others.items()}
        outputs["y"] = self._out(y, x.shape)
        if gradients:
            outputs["grad_input"] = self._out(gradients[0], x.shape)
            outputs.update(zip(("grad_weight", "grad_bias"), map(stored, gradients[1:])))  # noqa: B905
        where = "channels last" if self.last else "channels first"
        return dict(outputs, kernel="tensorflow %s %s, %s" % (tf.__version__, self.path, where))

    def _in(self, array: Any) -> Any:
        array = channels_last(array) if self.last else np.array(native(array), order="C")
        if not self.fused or array.ndim == 4:
            return array
        n, c = len(array), array.shape[-1 if self.last else 1]
        rest = array.size // max(n * c, 1)
        return array.reshape((n, rest, 1, c) if self.last else (n, c, rest, 1))

    def _out(self, tensor: Any, shape: tuple[int, ...]) -> Array:
        array = np.asarray(tensor)
        if not self.last:
            return stored(array).reshape(shape)
        return channels_first(array.reshape((shape[0], *shape[2:], shape[1])))


@functools.lru_cache(maxsize=1)
def _step(
    forward: Callable[..., Any], xla: bool, training: bool, momentum: float, eps: float
) -> Callable[..., Any]:
    """step(tensors, upstream) -> y, the other quantities by name, and the gradients in order."""
    import tensorflow as tf

    def step(tensors: Any, upstream: Any) -> Any:
        leaves = [tensor for tensor in tensors[:3] if tensor is not None]
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            y, others = forward(*tensors, training, momentum, eps)
        if upstream is None:
            return y, others, []
        zero = tf.UnconnectedGradients.ZERO
        return y, others, tape.gradient(y, leaves, upstream, unconnected_gradients=zero)

    return tf.function(step, jit_compile=True) if xla else step


def _fused(
    data_format: str,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    import tensorflow as tf

    # TensorFlow itself names one or the other dtype, as it comes.
    if x.dtype == tf.float64 or running_mean.dtype != tf.float32:
        text = "FusedBatchNormV3 takes float16, bfloat16 and float32, with parameters in float32"
        raise NotImplementedError(text)
    y, mean, var, batch_mean, batch_var, _ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.ones_like(running_mean) if weight is None else weight,
        offset=tf.zeros_like(running_mean) if bias is None else bias,
        mean=running_mean,
        variance=running_var,
        epsilon=eps,
        exponential_avg_factor=momentum,
        data_format=data_format,
        is_training=training,
    )
    if not training:
        return y, {}
    statistics = {"batch_mean": batch_mean, "batch_var": batch_var}
    return y, dict(statistics, running_mean=mean, running_var=var)


def _moments(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    import tensorflow as tf

    wide = x if x.dtype == running_mean.dtype else tf.cast(x, running_mean.dtype)
    mean, var = running_mean, running_var
    if training:
        mean, var = tf.nn.moments(wide, list(range(len(x.shape) - 1)))
    y = tf.nn.batch_normalization(wide, mean, var, bias, weight, eps)
    return tf.cast(y, x.dtype), {"batch_mean": mean, "batch_var": var} if training else {}


tensorflow = TensorFlow(functools.partial(_fused, "NHWC"), "FusedBatchNormV3", fused=True)
tensorflow_nchw = TensorFlow(
    functools.partial(_fused, "NCHW"), "FusedBatchNormV3", last=False, fused=True
)
tensorflow_moments = TensorFlow(_moments, "tf.nn.moments")
tensorflow_xla = TensorFlow(_moments, "tf.nn.moments under XLA", xla=True)
