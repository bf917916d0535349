"""`caffe-2016`: BVLC Caffe's BatchNormLayer of April 2016 on ATLAS, bit for bit.

Source: BVLC/caffe d21772c0, src/caffe/layers/batch_norm_layer.cpp, with the BLAS that its Makefile
defaults to. The blob is an (N·C, S) matrix, S the spatial size, m = N·S; 1/m rides on the first gemv:

    mean = gemvᵀ(gemv(x, 1/m))            var = gemvᵀ(gemv((x - mean)², 1/m))
    y = (x - mean) / sqrt(var + eps)

`layer_*` are that layer for any BLAS; `ATLAS` is the order of additions of ATLAS 3.10.3's generic
build, checked against that library on thousands of random shapes and alignments in both dtypes. Only
the sign of a zero is not reproduced: where x equals the mean, ATLAS's gemm returns -0 or +0 according
to the matrix's size. weight and bias are Caffe's separate Scale layer: y·weight, then + bias.

eps and moving_average_fraction are protobuf floats: both are rounded to float32, also in double.

Running statistics. Caffe keeps scaled sums in blobs that start at zero, with f = 1 - momentum,

    b2 = f·b2 + 1      b0 = f·b0 + mean      b1 = f·b1 + m/(m-1)·var

and inference normalizes by b0·(1/b2) and b1·(1/b2). Those two are what is returned as running_mean and
running_var, and what is expected in inference, where b2 = 1 then gives the same bits. Whatever the
running statistics were before the first training step has no weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np

from ._numpy import empty_batch, sequential

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy is enough."""
    return None


class Blas(NamedTuple):
    """The three products that the layer makes with vectors of ones.

    Attributes:
        gemv: matrix (R, K), factor -> (R,): factor · matrix · 1.
        gemv_transposed: matrix (R, K) -> (K,): matrixᵀ · 1.
        outer: vector (R,), K -> (R, K): vector · 1ᵀ, the gemm with inner dimension 1.
    """

    gemv: Callable[[Array, float], Array]
    gemv_transposed: Callable[[Array], Array]
    outer: Callable[[Array, int], Array]


# --- ATLAS's order of additions ---------------------------------------------------------------------


def _atlas_chain(terms: Array) -> Array:
    """Row sums from left to right, starting from +0."""
    return sequential(terms) + terms.dtype.type(0)


def _atlas_dot(terms: Array) -> Array:
    """Row sums in the order of ?dot: four interleaved accumulators in float32, a chain in float64."""
    if terms.dtype == np.float64:
        return _atlas_chain(terms)
    columns = terms.shape[1]
    fours = columns - columns % 4
    total = np.zeros(terms.shape[0], terms.dtype)
    if fours:
        lane = [_atlas_chain(terms[:, k:fours:4]) for k in range(4)]
        total = (lane[0] + lane[1]) + (lane[2] + lane[3])
    for k in range(fours, columns):
        total = total + terms[:, k]
    return total


def _atlas_block(rows: int, columns: int, dtype: Any) -> int:
    """Columns that ?gemv takes at a time; it depends on the cache level that holds the operands."""
    size = (rows * columns + rows + columns) * dtype.itemsize
    if dtype == np.float32:
        return 720 if size <= 2**15 else 6552
    return 472 if size <= 2**15 else 3272 if size <= 2**20 else 5460


def _atlas_gemv(matrix: Array, factor: float) -> Array:
    rows, columns = matrix.shape
    alpha = matrix.dtype.type(factor)
    if columns < 15:
        return _atlas_chain(matrix * alpha)
    if columns == 15 or rows < 4:
        return alpha * _atlas_dot(matrix)
    # The factor goes on the shorter of the two vectors.
    terms = matrix * alpha if columns < rows else matrix
    fours = rows - rows % 4
    width = _atlas_block(rows, columns, matrix.dtype)
    total = np.zeros(rows, matrix.dtype)
    for start in range(0, columns, width):
        block = terms[:, start : start + width]
        total[:fours] += _atlas_chain(block[:fours])
        if fours < rows:
            total[fours:] += _atlas_dot(block[fours:])
    return total if columns < rows else alpha * total


def _atlas_gemv_transposed(matrix: Array) -> Array:
    return _atlas_chain(matrix.T)


def _atlas_outer(vector: Array, columns: int) -> Array:
    return np.broadcast_to(vector[:, None], (vector.size, columns))


ATLAS = Blas(_atlas_gemv, _atlas_gemv_transposed, _atlas_outer)


# --- the layer --------------------------------------------------------------------------------------


def as_matrix(x: Array) -> Array:
    """Return x, (N, C, *) in any strides, as Caffe's blob: an (N·C, S) C-contiguous matrix."""
    return np.ascontiguousarray(x).reshape(x.shape[0] * x.shape[1], -1)


def channel_sums(matrix: Array, images: int, factor: float, blas: Blas) -> Array:
    """Return factor · the sum of each channel, (C,): one gemv over S, one over the N images."""
    return blas.gemv_transposed(blas.gemv(matrix, factor).reshape(images, -1))


def spread(vector: Array, matrix: Array, images: int, blas: Blas) -> Array:
    """Return a per-channel vector (C,) repeated to the matrix's shape (N·C, S)."""
    return blas.outer(np.tile(vector, images), matrix.shape[1])


def layer_statistics(x: Array, images: int, blas: Blas) -> Tuple[Array, Array, Array]:
    """Return the centred matrix, the batch mean and the biased batch variance."""
    factor = 1.0 / (images * x.shape[1])
    mean = channel_sums(x, images, factor, blas)
    centred = x - spread(mean, x, images, blas)
    return centred, mean, channel_sums(centred * centred, images, factor, blas)


def layer_backward(grad: Array, y: Array, std: Array, images: int, blas: Blas) -> Array:
    """Return (grad - mean(grad) - mean(grad·y)·y) / std in the order of the layer's Backward_cpu.

    All are (N·C, S); y is the layer's own output, before the Scale layer.
    """
    dx = y * spread(channel_sums(y * grad, images, 1.0, blas), y, images, blas)
    dx = spread(channel_sums(grad, images, 1.0, blas), y, images, blas) + dx
    dx = grad.dtype.type(-1.0 / (images * grad.shape[1])) * dx + grad
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
        y = y + spread(bias.astype(like.dtype), std, images, blas)
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
    """The layer on ATLAS. It keeps its blobs from one training step to the next, as Caffe's does."""

    widened = True
    counts_steps = True
    running_update = "caffe"

    def __init__(self) -> None:
        """Start without blobs: the first step has to be step 1."""
        self.blobs: Tuple[Array, Array, Array] = (np.zeros(0), np.zeros(0), np.zeros(0))

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

        momentum None, the cumulative average, is f = 1.
        """
        backward = grad_output is not None
        if x.shape[0] == 0:
            return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
        real = x.dtype.type
        matrix, images, channels = as_matrix(x), x.shape[0], x.shape[1]
        outputs = {}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if training:
                centred, mean, var = layer_statistics(matrix, images, ATLAS)
                b0, b1, b2 = self._move_blobs(mean, var, matrix.size // channels, momentum, step)
                scale = real(1) / b2
                outputs["batch_mean"], outputs["batch_var"] = mean, var
                outputs["running_mean"], outputs["running_var"] = scale * b0, scale * b1
            else:
                mean, var = running_mean.astype(real), running_var.astype(real)
                centred = matrix - spread(mean, matrix, images, ATLAS)
            std = spread(np.sqrt(var + real(np.float32(eps))), matrix, images, ATLAS)
            outputs.update(finish(centred, std, x, weight, bias, grad_output, training, ATLAS))
        return outputs

    def _move_blobs(
        self, mean: Array, var: Array, count: int, momentum: Optional[float], step: int
    ) -> Tuple[Array, Array, Array]:
        real = mean.dtype.type
        fraction = real(np.float32(1 if momentum is None else 1 - momentum))
        unbiased = real(count / (count - 1) if count > 1 else 1) * var
        zero = np.zeros_like(mean)
        b0, b1, b2 = (zero, zero, zero[:1]) if step == 1 else self.blobs
        self.blobs = fraction * b0 + mean, fraction * b1 + unbiased, fraction * b2 + real(1)
        return self.blobs


caffe_2016 = Caffe2016()
