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
running_var, and what is expected in inference (so b2 = 1 there, which changes no bit). Whatever the
running statistics were before the first training step has no weight. The blobs themselves cannot be
recovered from the quotients, so training returns them under the key "state", and the next step takes
them by the keyword `state`; without it, the step is the first.
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
    total: Array = sequential(terms) + terms.dtype.type(0)
    return total


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
        scaled: Array = alpha * _atlas_dot(matrix)
        return scaled
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
    matrix: Array = np.ascontiguousarray(x).reshape(x.shape[0] * x.shape[1], -1)
    return matrix


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
    quotient: Array = dx / std
    return quotient


def batch_norm(
    x: Array,
    weight: Optional[Array],
    bias: Optional[Array],
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Optional[Array] = None,
    state: Optional[Tuple[Array, Array, Array]] = None,
) -> Dict[str, Any]:
    """Run Caffe's layer on ATLAS; the running statistics are the blobs' quotients (see above).

    Args:
        state: the blobs (b0, b1, b2) that the step before returned; None before the first step.
    """
    if x.shape[0] == 0:
        return dict(
            empty_batch(x, weight, bias, running_mean, running_var, training, grad_output is not None)
        )
    real = x.dtype.type
    matrix, images, channels = as_matrix(x), x.shape[0], x.shape[1]
    outputs: Dict[str, Any] = {}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if training:
            centred, mean, var = layer_statistics(matrix, images, ATLAS)
            if state is None:
                state = (np.zeros(channels, real), np.zeros(channels, real), np.zeros(1, real))
            count = matrix.size // channels
            state = _next_blobs(state, mean, var, count, real(np.float32(1 - momentum)))
            outputs["batch_mean"], outputs["batch_var"], outputs["state"] = mean, var, state
            scale = real(1) / state[2]
            outputs["running_mean"], outputs["running_var"] = scale * state[0], scale * state[1]
        else:
            mean, var = running_mean.astype(real), running_var.astype(real)
            centred = matrix - spread(mean, matrix, images, ATLAS)
        std = spread(np.sqrt(var + real(np.float32(eps))), matrix, images, ATLAS)
        outputs.update(finish(x, centred, std, weight, bias, grad_output, training, ATLAS))
    return outputs
