"""Chainer: chainer.functions.batch_normalization and fixed_batch_normalization, with gradients by chainer.grad.

Chainer's decay is the weight of the old running statistic. The batch statistics are those that the function's
node in the graph keeps for the backward pass; with 16-bit parameters they are 16-bit numbers, and Chainer
computes with these. A case without affine parameters gets ones and zeros, as Chainer's own link does. x is
handed over with its strides: on the CPU the sums are NumPy's, whose order follows the memory.
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
        import chainer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "chainer":
            return "chainer cannot be imported: %s" % error
        return (
            "chainer is not installed in this environment "
            "(pip install 'setuptools<74' wheel 'numpy<2', then "
            "pip install --no-build-isolation chainer==7.8.1)"
        )
    except Exception as error:  # with NumPy 2 an AttributeError
        return "chainer cannot be imported: %s" % error
    return None


def chainer_cpu(
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
    """One call, which updates the running statistics in place.

    Raises NotImplementedError for bfloat16 and for the gradient of an empty batch.
    """
    import chainer

    if x.dtype == np.uint16:
        raise NotImplementedError("Chainer has no bfloat16")
    affine = weight is not None
    gamma = weight if affine else np.ones_like(running_mean)
    beta = bias if affine else np.zeros_like(running_mean)
    leaves = [chainer.Variable(array) for array in (x, gamma, beta)]
    outputs: Outputs = {}
    if training:
        y = chainer.functions.batch_normalization(
            *leaves,
            eps=eps,
            running_mean=running_mean,
            running_var=running_var,
            decay=1 - momentum,
        )
        node = y.creator
        outputs.update(batch_mean=node.mean, batch_var=node.var, invstd=node.inv_std)
        outputs.update(running_mean=running_mean, running_var=running_var)
    else:
        y = chainer.functions.fixed_batch_normalization(*leaves, running_mean, running_var, eps=eps)
        node = y.creator
    outputs["y"] = y.array
    if grad_output is not None:
        try:
            found = chainer.grad([y], leaves, [chainer.Variable(grad_output)])
        except ZeroDivisionError as error:
            text = "the gradient of an empty batch: Chainer raises ZeroDivisionError: %s"
            raise NotImplementedError(text % error) from error
        names = ("grad_input", "grad_weight", "grad_bias")
        for name, gradient in zip(names if affine else names[:1], found):  # noqa: B905
            outputs[name] = gradient.array
    kernel = "chainer %s %s, NumPy %s"
    versions = (chainer.__version__, type(node).__name__, np.__version__)
    return dict(outputs, kernel=kernel % versions)
