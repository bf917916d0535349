"""borisgin's Caffe layers of April and May 2016; that of 25 April is NVCaffe 0.15's.

Sources: borisgin/caffe d53c1404 (8 April, `borisgin_0_15`), a87cfe78 (20 April, `bn_apr20`), edc1e7d1
(25 April) and the same in NVIDIA/caffe 7f42af01 (`nvcaffe_0_15`), 19270d51 (4 May, `bn_may4`). All run on
ATLAS. With sum(v) = gemvᵀ(gemv(v)) and F = 1/m, which is multiplied in after both sums,

    mean = F·sum(x)     var = F·sum((x - mean)²)     inv = (var + eps)^(-1/2)
    y = (x - mean)·inv·scale + bias

What differs numerically:

borisgin_0_15   running statistics are plain moving averages, of the biased variance
bn_apr20        from the 201st training forward on the batch variance is clipped to [v/4, 4·v], v the channel's
                running variance, and to eps from below, before it normalizes and before it is averaged
nvcaffe_0_15    the first forward's statistics replace the running ones; the upper end of the clip is
                4·(average of v over the channels + v), and eps is no lower end
bn_may4         the same without clipping, its switch being off by default; inv is 1 divided by a rounded root

The power is rounded once; only in bn_may4 is it two operations. The sum over the channels is ?asum's. eps
and moving_average_fraction are floats also in double. Backward, also in inference, is that of training
without clipping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

import numpy as np

from ._blas import ATLAS, Blas, atlas_asum
from ._caffe import as_matrix, centre, channel_sums, spread
from ._numpy import empty_batch

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Clip = Callable[[Array, Array, float], Array]

CLIP_START = 200
"""Training forwards before the first clip."""

CLIP = 4.0


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy is enough."""
    return None


# --- the clips: batch variance, running variance, eps -> clipped variance ------------------------------


def no_clip(var: Array, running_var: Array, eps: float) -> Array:
    """Leave the variance as it is."""
    return var


def clip_of_april_20(var: Array, running_var: Array, eps: float) -> Array:
    """Clip to a quarter and four times the running variance, and at least eps."""
    real = var.dtype.type
    var = np.maximum(real(1 / CLIP) * running_var, np.minimum(real(CLIP) * running_var, var))
    return np.maximum(real(eps), var)


def clip_of_april_25(var: Array, running_var: Array, eps: float) -> Array:
    """Clip to a quarter of the running variance and four times its sum with the channels' average."""
    real = var.dtype.type
    average = atlas_asum(running_var) / real(var.size)
    upper = real(CLIP) * (average + running_var)
    return np.maximum(real(1 / CLIP) * running_var, np.minimum(upper, var))


# --- the reciprocal of the standard deviation ----------------------------------------------------------


def power(values: Array) -> Array:
    """Return values^(-1/2) through the C library's pow in double, rounded to the dtype of values."""
    # Scalars go to the C library; NumPy's vector code for whole arrays differs with the processor.
    return np.array([v**-0.5 for v in values.astype(np.float64)]).astype(values.dtype)


def reciprocal_root(values: Array) -> Array:
    """Return 1 / sqrt(values), each operation rounded."""
    return values.dtype.type(1) / np.sqrt(values)


# --- the layer -----------------------------------------------------------------------------------------


class NvCaffe:
    """One version of the layer.

    Args:
        clip: what happens to the variance from training forward 201 on.
        copies_first: the first training forward's statistics replace the running ones.
        invert: var + eps -> reciprocal of its root.
        blas: whose order of additions.
    """

    widened = True
    counts_steps = True
    running_var_correction = 0

    def __init__(
        self,
        clip: Clip,
        copies_first: bool,
        invert: Callable[[Array], Array] = power,
        blas: Blas = ATLAS,
    ) -> None:
        """Keep what tells this version from the others."""
        self.clip = clip
        self.copies_first = copies_first
        self.invert = invert
        self.blas = blas

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
        """Run training forward `step`, counted from 1, or inference; all in the dtype of x."""
        if x.shape[0] == 0:
            backward = grad_output is not None
            return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
        real, images, blas = x.dtype.type, x.shape[0], self.blas
        matrix = as_matrix(x)
        mean, var = running_mean.astype(real), running_var.astype(real)
        outputs = {}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if training:
                running = mean, var
                mean = self._means(matrix, images)
            centred = centre(matrix, mean, images, blas)
            if training:
                var = self._means(centred * centred, images)
                outputs["batch_mean"], outputs["batch_var"] = mean, var
                if step > CLIP_START:
                    var = self.clip(var, running[1], float(np.float32(eps)))
                kept = self._average(running, (mean, var), momentum, step)
                outputs["running_mean"], outputs["running_var"] = kept
            inv = spread(self.invert(var + real(np.float32(eps))), matrix, images, blas)
            normalized = centred * inv
            y, scale = normalized, None
            if weight is not None:
                scale = spread(weight.astype(real), matrix, images, blas)
                y = y * scale
            if bias is not None:
                y = y + spread(bias.astype(real), matrix, images, blas)
            outputs["y"] = y.reshape(x.shape)
            if grad_output is not None:
                grad = as_matrix(grad_output)
                if weight is not None:
                    outputs["grad_weight"] = channel_sums(grad * normalized, images, 1.0, blas)
                if bias is not None:
                    outputs["grad_bias"] = channel_sums(grad, images, 1.0, blas)
                grad = grad if scale is None else grad * scale
                dx = spread(self._means(grad * normalized, images), matrix, images, blas)
                dx = dx * normalized
                dx = spread(self._means(grad, images), matrix, images, blas) + dx
                outputs["grad_input"] = ((grad - dx) * inv).reshape(x.shape)
        return outputs

    def _means(self, matrix: Array, images: int) -> Array:
        factor = matrix.dtype.type(1.0 / (images * matrix.shape[1]))
        return factor * channel_sums(matrix, images, 1.0, self.blas)

    def _average(
        self,
        running: Tuple[Array, Array],
        batch: Tuple[Array, Array],
        momentum: Optional[float],
        step: int,
    ) -> Tuple[Array, Array]:
        """Move the running statistics; momentum None is the cumulative average, 1 / step."""
        if step == 1 and self.copies_first:
            return batch
        fraction = np.float32(1 - (1.0 / step if momentum is None else momentum))
        old, new = float(fraction), float(np.float32(1) - fraction)
        axpby = self.blas.axpby
        return axpby(new, batch[0], old, running[0]), axpby(new, batch[1], old, running[1])


borisgin_0_15 = NvCaffe(no_clip, copies_first=False)
bn_apr20 = NvCaffe(clip_of_april_20, copies_first=False)
nvcaffe_0_15 = NvCaffe(clip_of_april_25, copies_first=True)
bn_may4 = NvCaffe(no_clip, copies_first=True, invert=reciprocal_root)
