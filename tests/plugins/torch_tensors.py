"""Plug-ins that take torch tensors: good ones, and ones with one mistake each, named after it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

Arguments = Any


def functional(
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
) -> Any:
    return torch.nn.functional.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps
    )


def everything(
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
) -> dict[str, Any]:
    """What it was given, as results: nothing of it is a BatchNorm."""
    assert isinstance(x, torch.Tensor)
    assert x.requires_grad == (grad_output is not None)
    tensors = (x, weight, bias, running_mean, running_var, grad_output)
    assert len({t.device for t in tensors if t is not None}) == 1
    running_mean += momentum
    result = {"y": x * 1, "kernel": f"{x.dtype} {weight.dtype} {x.stride()}"}
    result.update(batch_mean=weight, batch_var=bias, running_var=running_var.double() + 1 / 3)
    if grad_output is not None:
        result.update(grad_input=grad_output, grad_weight=bias, grad_bias=weight)
    return result


everything.running_update = "caffe"  # type: ignore[attr-defined]


class AnyRank(_BatchNorm):  # type: ignore[misc]
    """BatchNorm of every rank."""

    def _check_input_dim(self, input: Any) -> None:
        pass


class TwoDimensional(torch.nn.BatchNorm2d):  # type: ignore[misc]
    """Only (N, C, H, W)."""


class Unaffected(AnyRank):
    """Keeps no running statistics."""

    running_var_correction = 0

    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, track_running_stats=False, **settings)


# --- one mistake each ------------------------------------------------------------------------------


class NoModule:
    pass


class NoEps(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, num_features: int, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__()


class NoWeight(AnyRank):
    def __init__(self, num_features: int, *, eps: float, momentum: float, affine: bool) -> None:
        super().__init__(num_features, eps, momentum, affine=False)


class WrongShape(AnyRank):
    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features + 1, **settings)


class OwnValueError(AnyRank):
    def forward(self, x: Any) -> Any:
        raise ValueError("mine")


instance = AnyRank(3)


def no_grad_output(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, *, training: bool
) -> Any:
    return x


def numpy_out(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.detach().float().numpy()


def a_tuple(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.clone(), x.mean()


def float32_out(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.detach().float()


def wrong_shape(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.flatten()


def integer_mean(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    return {"y": x.clone(), "batch_mean": torch.zeros(x.shape[1], dtype=torch.int32)}


def sparse(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.detach().to_sparse()


def meta(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.detach().to("meta")


def misspelt(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    return {"y": x.clone(), "grad_imput": x.clone()}


def nothing(x: Any, *arguments: Arguments, **options: Any) -> None:
    return None


def detached_input(x: Any, weight: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.detach() * weight.view(1, -1, 1, 1)


def in_place(x: Any, *arguments: Arguments, **options: Any) -> Any:
    with torch.no_grad():
        x[0, 1, 2, 3] = 7
    return x.clone()


def in_place_gap(x: Any, *arguments: Arguments, **options: Any) -> Any:
    with torch.no_grad():
        x.as_strided((1,), (1,), x.storage_offset() + 1).fill_(0)
    return x.clone()


def in_place_graph(x: Any, *arguments: Arguments, **options: Any) -> Any:
    x -= 1
    return x


def no_operator(x: Any, *arguments: Arguments, **options: Any) -> Any:
    raise RuntimeError("\"special\" not implemented for 'Half'")


def out_of_memory(x: Any, *arguments: Arguments, **options: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


def asynchronous_error(x: Any, *arguments: Arguments, **options: Any) -> Any:
    torch.cuda.fail_later("CUDA error: an illegal memory access was encountered")
    return x.clone()


def forgets_the_end(x: Any, *arguments: Arguments, **options: Any) -> Any:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y.view(-1)[:-3] = 1
    return y


calls = 0


def forgets_the_end_later(x: Any, *arguments: Arguments, **options: Any) -> Any:
    """Writes all of its first output, in memory that is free again by the second call."""
    global calls
    calls += 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y.view(-1)[: -3 if calls > 1 else None] = 1
    return y


def drifts(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    global calls
    calls += 1
    y = torch.zeros_like(x)
    y[0, 1] = calls
    return {"y": y.detach(), "batch_mean": torch.full((x.shape[1],), float(calls))}


def same_memory(x: Any, *arguments: Arguments, **options: Any) -> Any:
    """Other values each time, returned in the same memory."""
    drifts.memory = getattr(drifts, "memory", torch.zeros(x.shape))  # type: ignore[attr-defined]
    drifts.memory += 1  # type: ignore[attr-defined]
    return drifts.memory  # type: ignore[attr-defined]


def only_once(x: Any, *arguments: Arguments, **options: Any) -> Any:
    global calls
    calls += 1
    if calls % 2 == 0:
        raise NotImplementedError("once is enough")
    return x.clone()


for _function in [value for value in list(vars().values()) if callable(value)]:
    if getattr(_function, "__module__", None) == __name__ and not isinstance(_function, type):
        _function.tensors = "torch"

functional_on_tpu = 3


def strange_tensors(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x


strange_tensors.tensors = "cupy"  # type: ignore[attr-defined]


def forgot_to_ask(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.clone()


def returns_a_tensor(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return torch.from_numpy(x)
