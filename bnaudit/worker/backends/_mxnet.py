"""MXNet's BatchNorm operator of April 2016, as it computed on the CPU and on the GPU.

Source: dmlc/mxnet ee1d3c65, src/operator/batch_norm-inl.h, on mshadow 9ff5a2f9. float32 only, tensors of two
or four dimensions. Two passes; the factor C / size is applied once, to the finished sum:

    mean = factor·Σx     var = factor·Σ(x - mean)²     y = (x - mean) / sqrt(var + eps)·gamma + beta

What differs numerically:

mxnet_2016             each sum is a chain over an image's plane, and a chain over the images
mxnet_2016_gpu         each sum is one block of 256 threads
mxnet_2016_fix_gamma   as mxnet_2016 with fix_gamma on, its default: training ignores gamma in y and in the
                       gradient's direct term, while the gradients through mean and variance still contain it,
                       and inference does, too; there is no gradient of gamma

The running statistics, of the biased variance, are moved by backward: without a grad_output they stay as they
were. Inference is one product and one sum, x·(gamma / std) + (beta - gamma·mean / std), which cancels where
the mean is large; it has no backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, Optional

import numpy as np

from ._blas import chain
from ._blocks import block_sums
from ._numpy import channel_rows, empty_batch, expand

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

THREADS = 256


def unavailable(name: str) -> Optional[str]:
    """Return why the backend `name` cannot run here: never, NumPy is enough."""
    return None


def chain_sums(x: Array) -> Array:
    """(N, C, *) -> (C,): a chain over each image's plane, then one over the images."""
    images, channels = x.shape[:2]
    return chain(chain(x.reshape(images * channels, -1)).reshape(images, channels).T)


def tree_sums(x: Array) -> Array:
    """(N, C, *) -> (C,): one block of threads for each channel."""
    return block_sums(channel_rows(x), THREADS)


class MxNet2016:
    """The operator with one device's order of additions."""

    widened = True
    running_var_correction = 0

    def __init__(self, total: Callable[[Array], Array], fix_gamma: bool = False) -> None:
        """Keep the sum and the flag."""
        self.total = total
        self.fix_gamma = fix_gamma

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
        """Run forward and, with a grad_output, backward, in float32; raises NotImplementedError."""
        if x.dtype == np.float64:
            raise NotImplementedError("MXNet of April 2016 computes in float32 only")
        if x.ndim not in (2, 4):
            raise NotImplementedError("MXNet of April 2016 takes tensors of 2 or 4 dimensions")
        if grad_output is not None and not training:
            raise NotImplementedError("MXNet of April 2016 has no backward pass in inference")
        if x.shape[0] == 0:
            backward = grad_output is not None
            return empty_batch(x, weight, bias, running_mean, running_var, training, backward)
        x, epsilon = np.ascontiguousarray(x), np.float32(eps)
        gamma = np.ones(x.shape[1], np.float32) if weight is None else weight
        beta = np.zeros(x.shape[1], np.float32) if bias is None else bias
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not training:
                std = np.sqrt(running_var + epsilon)
                shift = expand(beta - gamma * running_mean / std, x)
                return {"y": expand(gamma / std, x) * x + shift}
            scale = np.float32(x.shape[1]) / np.float32(x.size)
            mean = scale * self.total(x)
            centred = x - expand(mean, x)
            var = scale * self.total(np.square(centred))
            normalized = centred / expand(np.sqrt(var + epsilon), x)
            y = normalized if self.fix_gamma else normalized * expand(gamma, x)
            outputs = {"y": y + expand(beta, x), "batch_mean": mean, "batch_var": var}
            kept, new = running_mean, running_var
            if grad_output is not None:
                fraction = np.float32(1 - momentum)
                rest = np.float32(1) - fraction
                kept, new = kept * fraction + mean * rest, new * fraction + var * rest
                grad = np.ascontiguousarray(grad_output)
                outputs.update(self._backward(grad, normalized, centred, var + epsilon, gamma))
            outputs["running_mean"], outputs["running_var"] = kept, new
        if weight is None or self.fix_gamma:
            outputs.pop("grad_weight", None)
        if bias is None:
            outputs.pop("grad_bias", None)
        return outputs

    def _backward(
        self, grad: Array, normalized: Array, centred: Array, var: Array, gamma: Array
    ) -> Dict[str, Array]:
        """Gradients, with eps already in var; the gradients of var and mean always contain gamma."""
        real = np.float32
        scale = real(grad.shape[1]) / real(grad.size)
        scaled = grad * expand(gamma, grad)
        # In float64 and rounded: powf's last bit is the C library's own.
        slope = np.power(var.astype(np.float64), -1.5).astype(np.float32)
        invstd = real(1) / np.sqrt(var)
        grad_var = self.total(scaled * centred * real(-0.5) * expand(slope, grad))
        grad_mean = self.total(scaled) * (real(-1) / np.sqrt(var))
        grad_mean = grad_mean + scale * self.total(real(-2) * centred) * grad_var
        direct = grad if self.fix_gamma else scaled
        grad_input = direct * expand(invstd, grad)
        grad_input = grad_input + expand(grad_var, grad) * scale * real(2) * centred
        return {
            "grad_input": grad_input + expand(grad_mean, grad) * scale,
            "grad_weight": self.total(grad * normalized),
            "grad_bias": self.total(grad),
        }


mxnet_2016 = MxNet2016(chain_sums)
mxnet_2016_gpu = MxNet2016(tree_sums)
mxnet_2016_fix_gamma = MxNet2016(chain_sums, fix_gamma=True)
