"""A well-behaved plug-in: every statistic in float64, each result rounded to its dtype at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Array | None = None,
) -> dict[str, Any]:
    channels = x.shape[1]
    shape = (1, channels) + (1,) * (x.ndim - 2)
    axes = (0, *range(2, x.ndim))
    n = x.size // channels
    wide, running_mean, running_var = (
        values.astype(np.float64) for values in (x, running_mean, running_var)
    )
    gamma = np.ones(channels) if weight is None else weight.astype(np.float64)
    beta = np.zeros(channels) if bias is None else bias.astype(np.float64)
    outputs: dict[str, Any] = {"kernel": "NumPy float64"}

    # Powers of two that keep the squares of large values finite and, without eps, those of tiny ones above 0.
    largest = np.max(np.abs(wide), axis=axes, initial=0, where=np.isfinite(wide))
    scale = np.ldexp(1.0, -np.maximum(np.frexp(largest)[1], 0 if eps else -1000))
    if training and n > 0:
        scaled = wide * scale.reshape(shape)
        mean = scaled.mean(axes)
        # The rounding of the mean is removed from it, and then from the variance: constants stay constant.
        mean = mean + (scaled - mean.reshape(shape)).mean(axes)
        centred = scaled - mean.reshape(shape)
        var = np.maximum((centred**2).mean(axes) - centred.mean(axes) ** 2, 0)
        batch_mean, batch_var = mean / scale, var / scale / scale
        outputs.update(batch_mean=batch_mean, batch_var=batch_var)
        running_mean = (1 - momentum) * running_mean + momentum * batch_mean
        running_var = (1 - momentum) * running_var + momentum * batch_var * (n / max(n - 1, 1))
    else:
        centred = (wide - running_mean.reshape(shape)) * scale.reshape(shape)
        var = running_var * scale * scale
    invstd = 1 / np.sqrt(var + eps * scale * scale)
    normalized = centred * invstd.reshape(shape)
    y = normalized * gamma.reshape(shape) + beta.reshape(shape)
    outputs.update(y=y.astype(x.dtype), running_mean=running_mean, running_var=running_var)

    if grad_output is not None:
        slope = grad_output.astype(np.float64)
        outputs["grad_bias"] = slope.sum(axes)
        outputs["grad_weight"] = (slope * normalized).sum(axes)
        if training and n > 0:
            along = (slope * normalized).mean(axes).reshape(shape)
            slope = slope - slope.mean(axes).reshape(shape) - normalized * along
        rate = (gamma * invstd * scale).reshape(shape)
        outputs["grad_input"] = (slope * rate).astype(x.dtype)
    return outputs
