"""Flax: flax.linen.BatchNorm and flax.nnx.BatchNorm, compiled by XLA for the CPU.

By default Flax computes the variance as max(0, E[x²] - E[x]²) (use_fast_variance), whatever the mean, in
float32 or wider. y is x - mean, times rsqrt(var + eps)·scale, plus bias. The running variance is the biased
one, and Flax's momentum the weight of the old value. The result of 16-bit tensors is float32 unless a dtype is
asked for; here it is rounded to x's dtype as the last step. Batch statistics are not handed out.

linen casts x to float32 where it takes the statistics and again where it normalizes, so that the gradient of a
16-bit x is a sum of two terms that were rounded to 16 bits before they cancel. nnx casts it once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from . import _jax
from ._jax import affine, cannot_import, prepare, step

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Outputs = dict[str, Any]


def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run here, or None."""
    install = "pip install flax"
    if name.startswith("flax-nnx"):
        return cannot_import("flax", install) or cannot_import("flax.nnx", install)
    return cannot_import("flax", install) or cannot_import("flax.linen", install)


def describe() -> dict[str, Any]:
    """Settings of XLA in this process, for a report."""
    return _jax.describe()


class Flax:
    """One of Flax's modules with one setting of use_fast_variance, as a backend."""

    running_var_correction = 0

    def __init__(self, module: Callable[..., Callable[..., Any]], name: str, fast: bool) -> None:
        """module(affine, training, momentum, eps, fast) -> forward, as `_jax.step` takes it."""
        self.module = module
        self.name = name
        self.fast = fast

    def __call__(
        self,
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
        """Runs one step; gradients by jax.vjp."""
        import flax
        import jax

        prepare(x.dtype)
        parameters = affine(weight, bias)
        forward = self.module(bool(parameters), training, momentum, eps, self.fast)
        running = {"mean": running_mean, "var": running_var}
        outputs = step(forward, x, parameters, running, grad_output)
        versions = (flax.__version__, self.name, jax.__version__)
        return dict(outputs, kernel="flax %s %s, jax %s, XLA, channels last" % versions)


@functools.lru_cache(maxsize=1)
def _linen(has_affine: bool, training: bool, momentum: float, eps: float, fast: bool) -> Any:
    from flax import linen

    module = linen.BatchNorm(
        use_running_average=not training,
        momentum=1 - momentum,
        epsilon=eps,
        use_scale=has_affine,
        use_bias=has_affine,
        use_fast_variance=fast,
    )

    def forward(x: Any, parameters: Any, running: Any) -> Any:
        variables = {"batch_stats": running}
        if has_affine:
            variables["params"] = {"scale": parameters["weight"], "bias": parameters["bias"]}
        y, changed = module.apply(variables, x, mutable=["batch_stats"])
        left = changed["batch_stats"]
        return y, {"running_mean": left["mean"], "running_var": left["var"]}

    return forward


@functools.lru_cache(maxsize=1)
def _nnx(has_affine: bool, training: bool, momentum: float, eps: float, fast: bool) -> Any:
    from flax import nnx

    def forward(x: Any, parameters: Any, running: Any) -> Any:
        module = nnx.BatchNorm(
            x.shape[-1],
            use_running_average=not training,
            momentum=1 - momentum,
            epsilon=eps,
            use_scale=has_affine,
            use_bias=has_affine,
            use_fast_variance=fast,
            rngs=nnx.Rngs(0),
        )
        module.mean.value, module.var.value = running["mean"], running["var"]
        if has_affine:
            module.scale.value, module.bias.value = parameters["weight"], parameters["bias"]
        y = module(x)
        return y, {"running_mean": module.mean.value, "running_var": module.var.value}

    return forward


flax = Flax(_linen, "linen, use_fast_variance", True)
flax_stable = Flax(_linen, "linen, use_fast_variance off", False)
flax_nnx = Flax(_nnx, "nnx, use_fast_variance", True)
