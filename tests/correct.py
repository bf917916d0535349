"""BatchNorm in extended precision, rounded once at the end: a correct subject for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnaudit.inputs import Inputs, make
from bnaudit.scenario import Case, load
from bnaudit.worker.rounding import round_to, statistics_dtype, widen

Array = npt.NDArray[Any]


def prepare(folder: Path, text: str) -> tuple[Case, Inputs]:
    """The only case of a scenario given as YAML fields, and its inputs."""
    path = folder / "scenario.yaml"
    path.write_text("name: test\ndescription: A test.\n" + text)
    (case,) = load([str(path)])[0].cases
    target = folder / "inputs"
    target.mkdir(exist_ok=True)
    return case, make(case, target)


def _wide(values: Array | None, dtype: str, default: float, channels: int) -> Array:
    if values is None:
        return np.full(channels, default, np.longdouble)
    return widen(values, dtype).astype(np.longdouble)


@np.errstate(all="ignore")  # infinities and NaN are the right answers to some inputs
def outputs(case: Case, inputs: Inputs, *, correction: int = 1) -> dict[str, Array]:
    """All quantities of a case; y and grad_input in the case's storage, the rest in its statistics dtype."""
    params = case.dtype if case.param_dtype == "same" else case.statistics_dtype
    c = case.channels
    shape = (1, c) + (1,) * (len(case.shape) - 2)
    axes = (0, *range(2, len(case.shape)))
    weight = _wide(inputs.weight, params, 1, c).reshape(shape)
    bias = _wide(inputs.bias, params, 0, c).reshape(shape)
    running_mean = _wide(inputs.running_mean, params, 0, c)
    running_var = _wide(inputs.running_var, params, 1, c)
    n = case.n
    for step, stored in enumerate(inputs.x, 1):
        x = widen(stored, case.dtype).astype(np.longdouble)
        if case.mode == "inference":
            mean, var = running_mean, running_var
            d = x - mean.reshape(shape)
        else:
            # Exact for constants: the mean is corrected by that of the differences.
            first = (
                x[:1].reshape(x.shape[1], -1)[:, 0]
                if case.shape[0] == 1
                else x[0].reshape(c, -1)[:, 0]
            )
            mean = first + (x - first.reshape(shape)).mean(axes)
            d = x - mean.reshape(shape)
            var = (d * d).mean(axes)
            w = 1 / step if case.momentum is None else case.momentum
            running_mean = running_mean + w * (mean - running_mean)
            running_var = running_var + w * (var * n / max(n - correction, 1) - running_var)
    invstd = 1 / np.sqrt(var + np.longdouble(case.eps))
    xh = d * invstd.reshape(shape)
    result = {
        "y": round_to((xh * weight + bias).astype(np.float64), case.dtype),
        "running_mean": running_mean,
        "running_var": running_var,
    }
    if case.mode == "training":
        result |= {"batch_mean": mean, "batch_var": var, "invstd": invstd}
    if case.backward and inputs.grad_output is not None:
        dy = widen(inputs.grad_output[-1], case.dtype).astype(np.longdouble)
        grad_bias, grad_weight = dy.sum(axes), (dy * xh).sum(axes)
        slope = invstd.reshape(shape) * weight
        dx = dy * slope
        if case.mode == "training":
            dx = slope * (dy - grad_bias.reshape(shape) / n - xh * grad_weight.reshape(shape) / n)
        result["grad_input"] = round_to(dx.astype(np.float64), case.dtype)
        if case.affine is not None:
            result |= {"grad_weight": grad_weight, "grad_bias": grad_bias}
    statistics = np.dtype(statistics_dtype(case.dtype))
    return {
        name: value if name in ("y", "grad_input") else value.astype(statistics)
        for name, value in result.items()
    }
