"""JAX: jax.nn.standardize, with weight and bias applied as its users do, compiled by XLA for the CPU.

The variance is max(0, E[x²] - E[x]²), in the dtype of x; inference standardizes with the running statistics.
JAX moves no running statistics and hands out no batch statistics, so that neither is returned. Every shape and
eps is compiled anew. Gradients are those of jax.vjp, in the same compiled function.

What the adapters of libraries on JAX share is here, too: `prepare` and `step`.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING

from ._channels_last import channels_first, channels_last, native, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Outputs = dict[str, Any]


def cannot_import(package: str, install: str) -> str | None:
    """Why a package cannot be imported here, or None. install: the command that installs it.

    Settles, for whatever imports JAX first, that it runs on the CPU with the audit's threads.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    if "OMP_NUM_THREADS" in os.environ:
        os.environ["NPROC"] = os.environ["OMP_NUM_THREADS"]  # the size of XLA's thread pool
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package.partition(".")[0]:
            return "%s is not installed in this environment (%s)" % (error.name, install)
        return "%s cannot be imported: %s" % (package, error)
    except Exception as error:  # of another version than what it imports, it raises what it likes
        return "%s cannot be imported: %s: %s" % (package, type(error).__name__, error)
    return None


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run here, or None."""
    return cannot_import("jax", "pip install jax") or _too_old()


def _too_old() -> str | None:
    import jax

    if hasattr(jax.nn, "standardize"):
        return None
    return "jax %s has no jax.nn.standardize" % jax.__version__


def describe() -> dict[str, Any]:
    """Settings of XLA in this process, for a report."""
    return {"devices": [], "flags": {"xla_flags": os.environ.get("XLA_FLAGS", "")}}


def prepare(dtype: Any) -> None:
    """Lets JAX have 64-bit numbers if the case has them, and else not, as its users do not."""
    import jax

    jax.config.update("jax_enable_x64", dtype == "float64")


def step(
    forward: Callable[..., Any],
    x: Any,
    parameters: dict[str, Any],
    running: dict[str, Any],
    grad_output: Any,
) -> Outputs:
    """y, what else `forward` returns and, where grad_output is given, the gradients.

    forward(x, parameters, running) -> (y, dict) is to be the same object for what is to be compiled once.
    x and grad_output are (N, C, *) as stored; parameters holds "weight" and "bias" or nothing.
    """
    import jax

    inputs = jax.device_put(
        (channels_last(x), _natives(parameters), _natives(running), channels_last(grad_output))
    )
    y, rest, gradients = _compiled(forward)(*inputs)
    outputs = {name: stored(value) for name, value in rest.items()}
    outputs["y"] = channels_first(y)
    if gradients is not None:
        outputs["grad_input"] = channels_first(gradients[0])
        for name, gradient in gradients[1].items():
            outputs["grad_" + name] = stored(gradient)
    return outputs


def _natives(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: native(array) for name, array in arrays.items()}


@functools.lru_cache(maxsize=1)
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    def whole(x: Any, parameters: Any, running: Any, grad_output: Any) -> Any:
        def as_x(x: Any, parameters: Any) -> Any:
            y, rest = forward(x, parameters, running)
            return y.astype(x.dtype), rest

        if grad_output is None:
            return (*as_x(x, parameters), None)
        y, pull_back, rest = jax.vjp(as_x, x, parameters, has_aux=True)
        return y, rest, pull_back(grad_output)

    return jax.jit(whole)


def affine(weight: Any, bias: Any) -> dict[str, Any]:
    """weight and bias by name; an empty dict where a case has none."""
    return {} if weight is None else {"weight": weight, "bias": bias}


def jax_nn(
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
    """jax.nn.standardize(x)·weight + bias over all axes but the channels'."""
    import jax

    prepare(x.dtype)
    running = {} if training else {"mean": running_mean, "var": running_var}
    outputs = step(_standardize(training, eps), x, affine(weight, bias), running, grad_output)
    return dict(outputs, kernel="jax %s, XLA, channels last" % jax.__version__)


@functools.lru_cache(maxsize=1)
def _standardize(training: bool, eps: float) -> Callable[..., Any]:
    import jax

    def forward(x: Any, parameters: Any, running: Any) -> Any:
        axes = tuple(range(x.ndim - 1))
        options = {} if training else {"mean": running["mean"], "variance": running["var"]}
        y = jax.nn.standardize(x, axis=axes, epsilon=eps, **options)
        if parameters:
            y = y * parameters["weight"] + parameters["bias"]
        return y, {}

    return forward
