"""MLX: mlx.nn.BatchNorm on the CPU, and gradients by mlx.core.vjp.

The module takes channels last, so every other memory format is copied into that one; the batch statistics
stay inside it. With 16-bit tensors and float32 parameters its y is float32, and is rounded here to x's dtype;
means and variances it computes in x's dtype. The gradients come from a second module, which repeats the
forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import mlx
        import mlx.core
        import mlx.nn  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "mlx":
            return "mlx cannot be imported: %s" % error
        return "mlx is not installed in this environment (pip install 'mlx[cpu]')"
    except Exception as error:  # without mlx-cpu the shared library is missing
        return "mlx cannot be imported: %s" % error
    return None


def mlx_cpu(
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
) -> Outputs:
    """One call of a new module; NotImplementedError for what it refuses by a ValueError."""
    import mlx.core
    import mlx.nn

    def module(parameters: list[Any]) -> Any:
        norm = mlx.nn.BatchNorm(x.shape[1], eps, momentum, affine=bool(parameters))
        if parameters:
            norm.weight, norm.bias = parameters
        norm.running_mean, norm.running_var = _array(running_mean), _array(running_var)
        return norm.train(training)

    with mlx.core.stream(mlx.core.cpu):
        parameters = [] if weight is None else [_array(weight), _array(bias)]
        given = _array(np.moveaxis(x, 1, -1))
        try:
            norm = module(parameters)
            y = norm(given)
        except ValueError as error:
            raise NotImplementedError(str(error)) from error
        outputs = {"y": _back(y.astype(given.dtype))}
        if training:
            outputs["running_mean"] = _to_numpy(norm.running_mean)
            outputs["running_var"] = _to_numpy(norm.running_var)
        if grad_output is not None:
            gradient = _array(np.moveaxis(grad_output, 1, -1)).astype(y.dtype)
            _, found = mlx.core.vjp(
                lambda first, *rest: module(list(rest))(first), [given, *parameters], [gradient]
            )
            outputs["grad_input"] = _back(found[0].astype(given.dtype))
            for name, value in zip(("grad_weight", "grad_bias"), found[1:]):  # noqa: B905
                outputs[name] = _to_numpy(value)
    return dict(outputs, kernel="mlx %s, channels last" % mlx.core.__version__)


def _array(values: Array | None) -> Any:
    """An array of MLX's; uint16 holds the bits of bfloat16."""
    import mlx.core

    values = np.ascontiguousarray(values)
    bfloat16 = values.dtype == np.uint16
    dtype = mlx.core.bfloat16 if bfloat16 else getattr(mlx.core, values.dtype.name)
    if not values.size:  # sums of an empty array that comes from NumPy are garbage, or do not end
        return mlx.core.zeros(values.shape, dtype)
    return mlx.core.array(values).view(dtype) if bfloat16 else mlx.core.array(values, dtype)


def _to_numpy(values: Any) -> Array:
    import mlx.core

    if values.dtype == mlx.core.bfloat16:
        values = values.view(mlx.core.uint16)
    return np.array(values)


def _back(values: Any) -> Array:
    """The tensor as (N, C, *)."""
    return np.moveaxis(_to_numpy(values), -1, 1)
