"""BVLC Caffe's BatchNormLayer of April 2016, bit for bit, with the factor and the BLAS of choice.

Source: BVLC/caffe d21772c0, src/caffe/layers/batch_norm_layer.cpp. The blob is an (N·C, S) matrix, S the
spatial size, m = N·S; as shipped, 1/m rides on the first gemv:

    mean = gemvᵀ(gemv(x, 1/m))            var = gemvᵀ(gemv((x - mean)², 1/m))
    y = (x - mean) / sqrt(var + eps)

`layer_*` are that layer for any BLAS. What differs numerically:

caffe_2016                         as shipped, on ATLAS, which the Makefile defaults to
caffe_2016_gemv2                   1/m on the second gemv
caffe_2016_split                   1/S on the first, 1/N on the second
caffe_2016_reference, …_openblas_… as shipped, in the order of additions of another BLAS (see `_blas`)

weight and bias are Caffe's separate Scale layer: y·weight, then + bias. eps and moving_average_fraction
are protobuf floats: both are rounded to float32, also in double.

Running statistics. Caffe keeps scaled sums in blobs that start at zero, with f = 1 - momentum,

    b2 = f·b2 + 1      b0 = f·b0 + mean      b1 = f·b1 + m/(m-1)·var

and inference normalizes by b0·(1/b2) and b1·(1/b2). Those two are what is returned as running_mean and
running_var, and what is expected in inference, where b2 = 1 then gives the same bits. Whatever the
running statistics were before the first training step has no weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

import numpy as np

from ._blas import (
    ATLAS,
    OPENBLAS_HASWELL,
    OPENBLAS_NEHALEM,
    OPENBLAS_SANDYBRIDGE,
    REFERENCE,
    Blas,
)
from ._numpy import empty_batch

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Factors = Callable[[int, int], Tuple[float, float]]


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy is enough."""
    return None


# --- where the factor goes: images N, spatial size S -> the factors of the two gemvs --------------------


def in_first(images: int, size: int) -> Tuple[float, float]:
    """Put all of it on the first gemv, as shipped."""
    return 1.0 / (images * size), 1.0


def in_second(images: int, size: int) -> Tuple[float, float]:
    """Put all of it on the second gemv."""
    return 1.0, 1.0 / (images * size)


def in_both(images: int, size: int) -> Tuple[float, float]:
    """Let each gemv average what it sums."""
    return 1.0 / size, 1.0 / images


# --- the layer --------------------------------------------------------------------------------------


def as_matrix(x: Array) -> Array:
    """Return x, (N, C, *) in any strides, as Caffe's blob: an (N·C, S) C-contiguous matrix."""
    return np.ascontiguousarray(x).reshape(x.shape[0] * x.shape[1], -1)


def channel_sums(
    matrix: Array, images: int, factor: float, blas: Blas, second: float = 1.0
) -> Array:
    """Return factor · second · the sum of each channel, (C,): a gemv over S, then one over the images.

    The first gemv gets `factor`, the other one `second`.
    """
    per_image = blas.gemv(matrix, factor).reshape(images, -1)
    if second == 1:
        return blas.gemv_transposed(per_image)
    return blas.gemv_transposed(per_image, second)


def spread(vector: Array, matrix: Array, images: int, blas: Blas) -> Array:
    """Return a per-channel vector (C,) repeated to the matrix's shape (N·C, S)."""
    return blas.outer(blas.repeat(vector, images), matrix.shape[1])


def centre(matrix: Array, mean: Array, images: int, blas: Blas) -> Array:
    """Return the matrix minus each channel's mean, by the gemm with alpha -1 and beta 1."""
    return blas.add_outer(matrix, -1, blas.repeat(mean, images))


def layer_statistics(
    x: Array, images: int, blas: Blas, factors: Factors = in_first
) -> Tuple[Array, Array, Array]:
    """Return the centred matrix, the batch mean and the biased batch variance."""
    first, second = factors(images, x.shape[1])
    mean = channel_sums(x, images, first, blas, second)
    centred = centre(x, mean, images, blas)
    return centred, mean, channel_sums(centred * centred, images, first, blas, second)


def layer_backward(grad: Array, y: Array, std: Array, images: int, blas: Blas) -> Array:
    """Return (grad - mean(grad) - mean(grad·y)·y) / std in the order of the layer's Backward_cpu.

    All are (N·C, S); y is the layer's own output, before the Scale layer.
    """
    dx = y * spread(channel_sums(y * grad, images, 1.0, blas), y, images, blas)
    dx = blas.add_outer(dx, 1, blas.repeat(channel_sums(grad, images, 1.0, blas), images))
    dx = blas.axpby(1.0, grad, -1.0 / (images * grad.shape[1]), dx)
    return dx / std


def finish(
    centred: Array,
    std: Array,
    like: Array,
    weight: Optional[Array],
    bias: Optional[Array],
    grad_output: Optional[Array],
    training: bool,
    blas: Blas,
) -> Dict[str, Array]:
    """Divide by the standard deviation, apply the Scale layer, and go back through both.

    Args:
        centred: x minus its mean, (N·C, S).
        std: sqrt(var + eps), (N·C, S).
        like: x itself, (N, C, *), for its shape.

    Returns y and, with a grad_output, grad_input and the gradients of the parameters there are.
    """
    images = like.shape[0]
    normalized = centred / std
    slope = None if weight is None else spread(weight.astype(like.dtype), std, images, blas)
    y = normalized if slope is None else normalized * slope
    if bias is not None:
        y = blas.add_outer(y, 1, blas.repeat(bias.astype(like.dtype), images))
    outputs = {"y": y.reshape(like.shape)}
    if grad_output is not None:
        grad = as_matrix(grad_output)
        if weight is not None:
            outputs["grad_weight"] = channel_sums(grad * normalized, images, 1.0, blas)
        if bias is not None:
            outputs["grad_bias"] = channel_sums(grad, images, 1.0, blas)
        if slope is not None:
            grad = grad * slope
        dx = layer_backward(grad, normalized, std, images, blas) if training else grad / std
        outputs["grad_input"] = dx.reshape(like.shape)
    return outputs


class Caffe2016:
    """The layer on one BLAS. It keeps its blobs from one training step to the next, as Caffe's does."""

    widened = True
    counts_steps = True
    running_update = "caffe"

    def __init__(self, blas: Blas = ATLAS, factors: Factors = in_first) -> None:
        """Start without blobs: the first step has to be step 1."""
        self.blas = blas
        self.factors = factors
        self.step = 0
        self.before = self.blobs = (np.zeros(0), np.zeros(0), np.zeros(0))

    def __call__(
        self,
        x: Array,
        weight: Optional[Array],
        bias: Optional[Array],
        running_mean: Array,
        running_var: Array,
        *,
        training: bool,
        momentum: Optional[float],
        eps: float,
        grad_output: Optional[Array] = None,
        step: int = 1,
    ) -> Dict[str, Array]:
        """Run one step, all in the dtype of x; the blobs are zero before step 1.

        The same step again starts from the same blobs. momentum None, the cumulative average, is f = 1.
        """
        backward = grad_output is not None
        if x.shape[0] == 0:
            return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
        real, blas = x.dtype.type, self.blas
        matrix, images, channels = as_matrix(x), x.shape[0], x.shape[1]
        outputs = {}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if training:
                centred, mean, var = layer_statistics(matrix, images, blas, self.factors)
                b0, b1, b2 = self._move_blobs(mean, var, matrix.size // channels, momentum, step)
                scale = real(1) / b2
                outputs["batch_mean"], outputs["batch_var"] = mean, var
                outputs["running_mean"], outputs["running_var"] = scale * b0, scale * b1
            else:
                mean, var = running_mean.astype(real), running_var.astype(real)
                centred = centre(matrix, mean, images, blas)
            std = spread(np.sqrt(var + real(np.float32(eps))), matrix, images, blas)
            outputs.update(finish(centred, std, x, weight, bias, grad_output, training, blas))
        return outputs

    def _move_blobs(
        self, mean: Array, var: Array, count: int, momentum: Optional[float], step: int
    ) -> Tuple[Array, Array, Array]:
        real = mean.dtype.type
        fraction = float(np.float32(1 if momentum is None else 1 - momentum))
        correction = count / (count - 1) if count > 1 else 1.0
        if step == 1:
            zero = np.zeros_like(mean)
            self.before = zero, zero, zero[:1]
        elif step != self.step:
            self.before = self.blobs
        self.step = step
        b0, b1, b2 = self.before
        axpby = self.blas.axpby
        b0, b1 = axpby(1.0, mean, fraction, b0), axpby(correction, var, fraction, b1)
        self.blobs = b0, b1, real(fraction) * b2 + real(1)
        return self.blobs


caffe_2016 = Caffe2016()
caffe_2016_gemv2 = Caffe2016(factors=in_second)
caffe_2016_split = Caffe2016(factors=in_both)
caffe_2016_reference = Caffe2016(REFERENCE)
caffe_2016_openblas_nehalem = Caffe2016(OPENBLAS_NEHALEM)
caffe_2016_openblas_sandybridge = Caffe2016(OPENBLAS_SANDYBRIDGE)
caffe_2016_openblas_haswell = Caffe2016(OPENBLAS_HASWELL)
