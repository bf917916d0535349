"""Models of cuDNN 4 and 5 in spatial mode, after the documented arithmetic; cuDNN's own bits are not known.

Source: cudnn.h of the two versions, and how NVCaffe 0.15 called them. Two passes in the dtype of x, sums by
blocks of 512 threads, 1/m multiplied in after the sum:

    mean = Σx·(1/m)     var = Σ(x - mean)²·(1/m)     invstd = 1 / sqrt(var + eps)
    y = (x - mean)·invstd·scale + bias

What differs between the two is the second running tensor:

cudnn_v4   a moving average of invstd, and inference multiplies by it
cudnn_v5   a moving average of the unbiased variance, and inference adds eps and takes the root

cuDNN refuses an eps below 1e-5, and has no backward pass for inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

import numpy as np

from ._blocks import block_sums
from ._numpy import channel_rows, from_rows

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

THREADS = 512

MIN_EPSILON = 1e-5
"""cuDNN's CUDNN_BN_MIN_EPSILON."""


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy is enough."""
    return None


class Cudnn:
    """The model; averages_invstd tells version 4 from version 5."""

    widened = True

    def __init__(self, averages_invstd: bool) -> None:
        """Keep what the second running tensor means."""
        self.averages_invstd = averages_invstd

    def __call__(
        self,
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
        """Run one step in the dtype of x; raises NotImplementedError where cuDNN refuses."""
        if eps < MIN_EPSILON:
            raise NotImplementedError("cuDNN takes no eps below %g" % MIN_EPSILON)
        if grad_output is not None and not training:
            raise NotImplementedError("cuDNN has no backward pass for inference")
        if x.shape[0] == 0:
            raise NotImplementedError("cuDNN takes no empty batch")
        real = x.dtype.type
        rows = channel_rows(x)
        outputs = {}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            mean, var = running_mean.astype(real), running_var.astype(real)
            if training:
                part = real(1) / real(rows.shape[1])
                mean = block_sums(rows, THREADS) * part
                var = block_sums(np.square(rows - mean[:, None]), THREADS) * part
                invstd = real(1) / np.sqrt(var + real(eps))
                outputs = {"batch_mean": mean, "batch_var": var, "invstd": invstd}
                new = invstd if self.averages_invstd else var * _correction(rows)
                outputs["running_mean"] = _average(running_mean, mean, momentum)
                outputs["running_var"] = _average(running_var, new, momentum)
            elif self.averages_invstd:
                invstd = var
            else:
                invstd = real(1) / np.sqrt(var + real(eps))
            normalized = (rows - mean[:, None]) * invstd[:, None]
            y = normalized if weight is None else normalized * weight.astype(real)[:, None]
            y = y if bias is None else y + bias.astype(real)[:, None]
            outputs["y"] = from_rows(y, x.shape)
            if grad_output is not None:
                grad = channel_rows(grad_output)
                grad_bias = block_sums(grad, THREADS)
                grad_weight = block_sums(grad * normalized, THREADS)
                if weight is not None:
                    outputs["grad_weight"] = grad_weight
                if bias is not None:
                    outputs["grad_bias"] = grad_bias
                grad = grad - (grad_bias * part)[:, None]
                grad = grad - normalized * (grad_weight * part)[:, None]
                slope = invstd if weight is None else weight.astype(real) * invstd
                outputs["grad_input"] = from_rows(grad * slope[:, None], x.shape)
        return outputs


def _correction(rows: Array) -> Any:
    count = rows.shape[1]
    return rows.dtype.type(count / (count - 1) if count > 1 else 1)


def _average(running: Array, new: Array, momentum: float) -> Array:
    real = new.dtype.type
    return new * real(momentum) + running.astype(real) * real(1 - momentum)


cudnn_v4 = Cudnn(averages_invstd=True)
cudnn_v5 = Cudnn(averages_invstd=False)
