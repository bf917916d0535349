"""Haiku: haiku.BatchNorm, compiled by XLA for the CPU.

Haiku computes the variance as E[x²] - E[x]², whatever the mean, in the dtype of x, and does not clip it at 0; y
is (x - mean)·(scale·rsqrt(var + eps)) + offset. The running variance is the biased one. decay_rate is the
weight of the old value in an average that starts at 0 and is divided by 1 - decay_rate^t; a case's running
statistics are handed over as such an average at the largest t that Haiku counts to, where nothing is left to
correct. With 16-bit tensors and float32 parameters y is float32, and is rounded here to x's dtype. Batch
statistics are not handed out.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from . import _jax
from ._jax import affine, cannot_import, prepare, step

if TYPE_CHECKING:
    from typing import Any

    Outputs = dict[str, Any]

STEPS = 2**31 - 2
"""The last step but one that an int32 counts."""


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    return cannot_import("haiku", "pip install jax dm-haiku")


def describe() -> dict[str, Any]:
    """Settings of XLA in this process, for a report."""
    return _jax.describe()


def haiku_cpu(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    *,
    training: bool,
    momentum: float,
    eps: float,
    grad_output: Any = None,
) -> Outputs:
    """One step, gradients by jax.vjp; NotImplementedError for a momentum of 0."""
    import haiku
    import jax

    if momentum == 0:
        raise NotImplementedError("Haiku's decay rate is 1 - momentum, and must be less than 1")
    prepare(x.dtype)
    parameters = affine(weight, bias)
    forward = _forward(bool(parameters), training, momentum, eps)
    running = {"mean": running_mean, "var": running_var}
    outputs = step(forward, x, parameters, running, grad_output)
    versions = (haiku.__version__, jax.__version__)
    return dict(outputs, kernel="haiku %s, jax %s, XLA, channels last" % versions)


haiku_cpu.running_var_correction = 0  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _forward(has_affine: bool, training: bool, momentum: float, eps: float) -> Any:
    import haiku

    def norm(x: Any) -> Any:
        module = haiku.BatchNorm(has_affine, has_affine, 1 - momentum, eps, name="norm")
        return module(x, is_training=training)

    transformed = haiku.transform_with_state(norm)

    def forward(x: Any, parameters: Any, running: Any) -> Any:
        shape = (1,) * (x.ndim - 1) + (-1,)
        variables = {}
        if has_affine:
            scale, offset = parameters["weight"], parameters["bias"]
            variables["norm"] = {"scale": scale.reshape(shape), "offset": offset.reshape(shape)}
        state = {_average(name): _averaged(running[name].reshape(shape)) for name in running}
        y, left = transformed.apply(variables, state, None, x)
        moved = {"running_" + name: left[_average(name)]["average"] for name in running}
        return y, {name: average.reshape(-1) for name, average in moved.items()}

    return forward


def _average(name: str) -> str:
    return "norm/~/%s_ema" % name


def _averaged(value: Any) -> dict[str, Any]:
    import jax

    return {"counter": jax.numpy.int32(STEPS), "hidden": value, "average": value}
