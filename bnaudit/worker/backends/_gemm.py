"""`gemm`: the BatchNorm of Caffe's GPU layer, two passes of gemv and gemm, on the BLAS under NumPy.

The steps are those of `_caffe`; what differs numerically is the order of additions, which is the BLAS's
own and may change with the shape, the CPU and the number of threads; the running statistics, which are
exponential moving averages with the unbiased variance; and eps, which is not rounded to float32.

Every product is a call of np.dot. NumPy hands a matrix times a vector to cblas_?gemv (to cblas_?dot or
cblas_?axpy where one of them is a single row or number) and a column times a row to cblas_?gemm. np.dot
takes no factor, so that of the first gemv is multiplied into the vector of ones: what a BLAS that scales
the vector computes, and where Caffe's 100.000015 comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

import numpy as np

from ._blas import Blas
from ._caffe import as_matrix, finish, layer_statistics, spread
from ._numpy import empty_batch, update_running

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy always has a BLAS."""
    return None


def _gemv(matrix: Array, factor: float) -> Array:
    return np.dot(matrix, np.full(matrix.shape[1], factor, matrix.dtype))


def _gemv_transposed(matrix: Array) -> Array:
    return np.dot(matrix.T, np.ones(matrix.shape[0], matrix.dtype))


def _outer(vector: Array, columns: int) -> Array:
    return np.dot(vector[:, None], np.ones((1, columns), vector.dtype))


NUMPY = Blas(_gemv, _gemv_transposed, _outer)


def gemm(
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
) -> Dict[str, Array]:
    """Run one step, all in the dtype of x, which is copied to a contiguous (N·C, S) matrix."""
    images = x.shape[0]
    if images == 0:
        backward = grad_output is not None
        return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
    real = x.dtype.type
    matrix = as_matrix(x)
    outputs = {}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if training:
            centred, mean, var = layer_statistics(matrix, images, NUMPY)
            outputs["batch_mean"], outputs["batch_var"] = mean, var
            count = matrix.size // x.shape[1]
            outputs.update(update_running(running_mean, running_var, mean, var, count, momentum))
        else:
            mean, var = running_mean.astype(real), running_var.astype(real)
            centred = matrix - spread(mean, matrix, images, NUMPY)
        std = spread(np.sqrt(var + real(eps)), matrix, images, NUMPY)
        outputs.update(finish(centred, std, x, weight, bias, grad_output, training, NUMPY))
    return outputs


gemm.widened = True  # type: ignore[attr-defined]
