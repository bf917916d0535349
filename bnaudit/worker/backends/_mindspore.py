"""MindSpore: ops.BatchNorm on the CPU, where oneDNN computes it, and gradients by mindspore.vjp.

Its momentum is the weight of the new batch, and its running variance is the unbiased one. NHWC is for GPUs (on
the CPU it is accepted, and gives other numbers), so every memory format is copied into a C-contiguous tensor.
The running statistics are moved in place; in 16 bits they are not moved at all. Subnormal numbers are flushed
to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

REFUSAL = "For primitive[BatchNorm], "
"""How it begins what it says of a rank, a dtype or an eps that it does not take."""


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import mindspore  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "mindspore":
            return "mindspore cannot be imported: %s" % error
        return "mindspore is not installed in this environment (pip install mindspore)"
    except Exception as error:  # a broken installation raises whatever it likes
        return "mindspore cannot be imported: %s" % error
    return None


def mindspore_cpu(
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
    """One call; NotImplementedError, in MindSpore's words, for what the operator does not take."""
    import mindspore

    if x.dtype == np.uint16:
        raise NotImplementedError("MindSpore's BatchNorm takes no bfloat16 on the CPU")
    mindspore.set_context(device_target="CPU")
    affine = weight is not None
    leaves = [
        _tensor(x),
        _tensor(weight if affine else np.ones_like(running_mean)),
        _tensor(bias if affine else np.zeros_like(running_mean)),
    ]
    running = [mindspore.Parameter(_tensor(array)) for array in (running_mean, running_var)]
    gradients: Any = ()
    try:
        operator = mindspore.ops.BatchNorm(is_training=training, epsilon=eps, momentum=momentum)
        if grad_output is None:
            found = operator(*leaves, *running)
        else:

            def forward(*leaves: Any) -> Any:
                outputs = operator(*leaves, *running)
                return outputs[0], outputs  # only the first is differentiated

            _, pull, found = mindspore.vjp(forward, *leaves, has_aux=True)
            gradients = pull(_tensor(grad_output))
    except (TypeError, ValueError) as error:
        if REFUSAL not in str(error):
            raise
        raise NotImplementedError(str(error).splitlines()[0]) from error
    outputs = {"y": found[0].asnumpy()}
    if training:
        outputs["running_mean"], outputs["running_var"] = (array.asnumpy() for array in running)
        if x.size and running_mean.dtype == np.float32:
            outputs["batch_mean"], outputs["batch_var"] = found[3].asnumpy(), found[4].asnumpy()
    # Without weight and bias nothing is asked of the gradients after the first.
    names = ("grad_input", "grad_weight", "grad_bias") if affine else ("grad_input",)
    outputs.update((name, g.asnumpy()) for name, g in zip(names, gradients))  # noqa: B905
    return dict(outputs, kernel="mindspore %s NCHW" % mindspore.__version__)


def _tensor(values: Array | None) -> Any:
    """A tensor in MindSpore's own memory."""
    import mindspore

    return mindspore.Tensor(np.array(values, order="C"))
