"""ncnn: a network of one BatchNorm layer, run image by image.

ncnn does not train: there are no batch statistics and no gradients. When it loads the layer it folds the
parameters into x·a + b with b = bias - running_mean·a, which cancels where x is near a large running mean. It
computes in float32; its storage in 16 bits, which some processors have by default, is switched off. A case
without affine parameters gets ones and zeros. Every memory format is copied.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from ..rounding import Array

    Outputs = dict[str, Any]

NETWORK = """7767517
2 2
Input in 0 1 x
BatchNorm norm 1 1 x y 0=%d 1=%.9e
"""
"""ncnn's description of the network, without the number of channels and eps."""

NARROW = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")
"""Options that let ncnn keep tensors in 16 bits, or compute with them."""


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None."""
    try:
        import ncnn  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "ncnn":
            return "ncnn cannot be imported: %s" % error
        return "ncnn is not installed in this environment (pip install ncnn)"
    except Exception as error:  # a broken installation raises whatever it likes
        return "ncnn cannot be imported: %s" % error
    return None


def ncnn_cpu(
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
    """A forward pass; NotImplementedError for training and for anything but float32.

    momentum and grad_output are not used.
    """
    if training:
        raise NotImplementedError("ncnn runs networks: it does not train")
    if x.dtype != np.float32 or running_mean.dtype != np.float32:
        raise NotImplementedError("ncnn computes in float32")
    import ncnn

    if weight is None:
        weight, bias = np.ones_like(running_mean), np.zeros_like(running_mean)
    network = ncnn.Net()
    network.opt.num_threads = int(os.environ.get("OMP_NUM_THREADS", network.opt.num_threads))
    for name in NARROW:
        setattr(network.opt, name, False)
    _check(network.load_param_mem(NETWORK % (x.shape[1], eps)), "the network's description")
    with tempfile.NamedTemporaryFile() as file:
        file.write(np.concatenate([weight, running_mean, running_var, bias]).tobytes())
        file.flush()
        _check(network.load_model(file.name), "the network's parameters")
    y = np.empty(x.shape, x.dtype)
    for index, image in enumerate(x):
        extractor = network.create_extractor()
        # The layer writes where it reads, and ncnn dies of doing so in memory that is NumPy's.
        _check(extractor.input("x", ncnn.Mat(np.ascontiguousarray(image)).clone()), "the input")
        status, found = extractor.extract("y")
        _check(status, "the network")
        y[index] = np.array(found)
    return {"y": y, "kernel": "ncnn %s BatchNorm, float32" % ncnn.__version__}


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError("ncnn returns %d for %s" % (status, what))
