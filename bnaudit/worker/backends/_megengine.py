"""MegEngine: megengine.functional.nn.batch_norm on the CPU, and gradients by a GradManager.

MegEngine's momentum is the weight of the old running statistic, and its running variance is the unbiased one.
The function does not hand out the batch statistics. Every memory format is copied into a C-contiguous tensor.
In inference the gradient of a float16 x is float32, which is rounded here, and that of the bias a sum in
float16.
Importing MegEngine makes its process flush subnormal numbers to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

RANKS = (2, 3, 4)


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import megengine  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "megengine":
            return "megengine cannot be imported: %s" % error
        return (
            "megengine is not installed in this environment (pip install megengine, on Python 3.8)"
        )
    except Exception as error:  # a broken installation raises whatever it likes
        return "megengine cannot be imported: %s" % error
    return None


def megengine_cpu(
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
    """One call; NotImplementedError for what MegEngine answers with other dtypes or without a reason."""
    import megengine
    import megengine.autodiff

    if x.dtype not in (np.float16, np.float32):
        dtype = "bfloat16" if x.dtype == np.uint16 else x.dtype.name
        raise NotImplementedError("MegEngine makes no %s tensor of NumPy's" % dtype)
    if x.ndim not in RANKS:
        raise NotImplementedError("MegEngine's BatchNorm takes inputs of rank 2, 3 or 4")
    if training and running_mean.dtype == np.float16:
        # It would: values are wrong, and the process may die of it, or be wrong in later cases as well.
        raise NotImplementedError("MegEngine writes past the end of what it keeps in float16")
    if not x.size and grad_output is not None:
        raise NotImplementedError("MegEngine raises AsyncError for the gradients of an empty batch")
    affine = weight is not None
    parameters = [
        _channels(weight if affine else np.ones_like(running_mean)),
        _channels(bias if affine else np.zeros_like(running_mean)),
    ]
    leaves = [_tensor(x), *(parameters if affine else [])]
    with megengine.autodiff.GradManager().attach(leaves) as manager:
        found = megengine.functional.nn.batch_norm(
            leaves[0],
            _channels(running_mean),
            _channels(running_var),
            *parameters,
            training=training,
            momentum=1 - momentum,
            eps=eps,
            inplace=False,
        )
        y, *running = found if training else [found]
        if grad_output is not None:
            manager.backward([y], [_tensor(grad_output)])
    outputs = {"y": y.numpy()}
    for name, value in zip(("running_mean", "running_var"), running):  # noqa: B905 - Python 3.7
        outputs[name] = value.numpy().reshape(-1)
    if grad_output is not None:
        outputs["grad_input"] = leaves[0].grad.numpy().astype(x.dtype)
        for name, leaf in zip(("grad_weight", "grad_bias"), leaves[1:]):  # noqa: B905
            outputs[name] = leaf.grad.numpy().reshape(-1)
    return dict(outputs, kernel="megengine %s NCHW" % megengine.__version__)


def _tensor(values: Array) -> Any:
    """A tensor in MegEngine's own memory."""
    import megengine

    return megengine.tensor(np.array(values, order="C"), device="cpux")


def _channels(values: Array | None) -> Any:
    """What the function takes for each channel."""
    return _tensor(np.asarray(values).reshape(1, -1, 1, 1))
