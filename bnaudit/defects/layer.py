"""A correct BatchNorm in NumPy, cut into the parts that a fault may replace.

Everything is computed in the dtype that `read` gives the values in: float64 here, the statistics dtype in
some of the variants. Values are rows (C, n) of the channels' elements, N before the spatial axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnaudit.worker.backends._numpy import channel_rows, from_rows

Array = npt.NDArray[Any]
Outputs = dict[str, Any]


@dataclass
class Call:
    """The arguments of one call, as in the contract of a plug-in."""

    x: Array
    weight: Array | None
    bias: Array | None
    running_mean: Array
    running_var: Array
    training: bool
    momentum: float
    eps: float
    grad_output: Array | None = None

    @property
    def channels(self) -> int:
        """C."""
        return self.x.shape[1]

    @property
    def n(self) -> int:
        """Elements of a channel."""
        return self.x.size // self.channels

    @property
    def statistics_dtype(self) -> np.dtype[Any]:
        """float64 for float64 values, float32 for all others."""
        return np.dtype(np.float64 if self.x.dtype == np.float64 else np.float32)


class Layer:
    """A plug-in: batch normalization with statistics in float64, corrected for the mean's rounding.

    A fault is a subclass that replaces one method; its docstring says what is wrong, and where it was so.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Outputs:
        """The outputs of one call, all that there are."""
        return self.apply(Call(*arguments, **options))

    def apply(self, call: Call) -> Outputs:
        """The order of the parts."""
        rows = self.read(call, call.x)
        outputs: Outputs = {}
        mean, var = self.running(call, rows)
        if call.training:
            outputs["running_mean"], outputs["running_var"] = mean, var
            if call.n > 0:
                mean, var = self.statistics(call, rows)
                outputs["batch_mean"], outputs["batch_var"] = mean, var
                averages = self.average(call, mean, var)
                outputs["running_mean"], outputs["running_var"] = averages
        mean, var = self.used(call, rows, mean, var)
        invstd = self.invstd(call, var)
        outputs["y"] = self.write(call, self.normalize(call, rows, mean, invstd))
        if call.grad_output is not None:
            dy = self.read_gradient(call, call.grad_output)
            outputs.update(self.backward(call, rows, dy, mean, invstd))
        return outputs

    # --- values in and out

    def read(self, call: Call, tensor: Array) -> Array:
        """Rows of a tensor (N, C, *), in the dtype that everything is computed in."""
        return channel_rows(tensor).astype(np.float64)

    def read_gradient(self, call: Call, tensor: Array) -> Array:
        """Rows of grad_output."""
        return self.read(call, tensor)

    def write(self, call: Call, rows: Array) -> Array:
        """Rows as y, in the shape and dtype of x."""
        return from_rows(rows, call.x.shape).astype(call.x.dtype)

    def write_gradient(self, call: Call, rows: Array) -> Array:
        """Rows as grad_input."""
        return from_rows(rows, call.x.shape).astype(call.x.dtype)

    # --- statistics (C,)

    def running(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The running statistics as they were."""
        return call.running_mean.astype(rows.dtype), call.running_var.astype(rows.dtype)

    def statistics(self, call: Call, rows: Array) -> tuple[Array, Array]:
        """The batch's mean and biased variance; call.n > 0."""
        mean = rows.mean(axis=1)
        mean = mean + (rows - mean[:, None]).mean(axis=1)
        deviations = rows - mean[:, None]
        return mean, np.square(deviations).mean(axis=1)

    def used(self, call: Call, rows: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """What is normalized with: mean and var, the batch's in training, else the running ones."""
        return mean, var

    def average(self, call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
        """The running statistics after a training step."""
        unbiased = var * (call.n / max(call.n - 1, 1))
        return self.blend(call, mean, call.running_mean), self.blend(
            call, unbiased, call.running_var
        )

    def blend(self, call: Call, new: Array, old: Array) -> Array:
        """The exponential moving average."""
        return (1 - call.momentum) * old.astype(new.dtype) + call.momentum * new

    def invstd(self, call: Call, var: Array) -> Array:
        """1 / sqrt(var + eps)."""
        return 1 / np.sqrt(var + var.dtype.type(call.eps))

    # --- y and gradients, in rows

    def weight(self, call: Call, rows: Array) -> Array:
        """The weight (C,), 1 where there is none."""
        if call.weight is None:
            return np.ones(call.channels, rows.dtype)
        return call.weight.astype(rows.dtype)

    def bias(self, call: Call, rows: Array) -> Array:
        """The bias (C,), 0 where there is none."""
        if call.bias is None:
            return np.zeros(call.channels, rows.dtype)
        return call.bias.astype(rows.dtype)

    def normalize(self, call: Call, rows: Array, mean: Array, invstd: Array) -> Array:
        """y."""
        xhat = (rows - mean[:, None]) * invstd[:, None]
        return xhat * self.weight(call, rows)[:, None] + self.bias(call, rows)[:, None]

    def total(self, call: Call, rows: Array) -> Array:
        """Sums of rows, of a gradient."""
        total: Array = rows.sum(axis=1)
        return total

    def backward(self, call: Call, rows: Array, dy: Array, mean: Array, invstd: Array) -> Outputs:
        """All gradients."""
        xhat = (rows - mean[:, None]) * invstd[:, None]
        grad_bias = self.total(call, dy)
        grad_weight = self.total(call, dy * xhat)
        dx = self.input_gradient(call, dy, xhat, grad_weight, grad_bias, invstd)
        return {
            "grad_input": self.write_gradient(call, dx),
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
        }

    def input_gradient(
        self,
        call: Call,
        dy: Array,
        xhat: Array,
        grad_weight: Array,
        grad_bias: Array,
        invstd: Array,
    ) -> Array:
        """grad_input."""
        dx = dy
        if call.training:
            n = dy.dtype.type(max(call.n, 1))
            dx = dy - (grad_bias / n)[:, None] - xhat * (grad_weight / n)[:, None]
        return dx * (invstd * self.weight(call, dy))[:, None]


def blocks(rows: Array, length: int) -> list[Array]:
    """Rows cut into pieces of `length` columns; the last may be shorter."""
    return [rows[:, start : start + length] for start in range(0, rows.shape[1], length)]
