"""Plug-ins that take torch tensors: good ones, and ones with one mistake each, named after it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.utils.parametrize
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


class NoForward(torch.nn.Module):  # type: ignore[misc]
    """Has all that a BatchNorm keeps, under its names."""

    def __init__(self, num_features: int, *, eps: float, momentum: float, affine: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_features))
        self.bias = torch.nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))


class OtherValueError(AnyRank):
    def forward(self, x: Any) -> Any:
        return torch.nn.GroupNorm(2, 3)(x)


class NoGraph(AnyRank):
    def forward(self, x: Any) -> Any:
        return super().forward(x).detach()


class UnderNoGrad(AnyRank):
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            return super().forward(x)


class ChangesWeight(AnyRank):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        with torch.no_grad():
            self.weight[1] *= 2
        return y


class ChangesBias(AnyRank):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        self.bias.data += 0.5
        return y


class ReturnsTuple(AnyRank):
    def forward(self, x: Any) -> Any:
        return super().forward(x), None


class ReturnsDict(AnyRank):
    def forward(self, x: Any) -> Any:
        return {"y": super().forward(x)}


class ReturnsArray(AnyRank):
    def forward(self, x: Any) -> Any:
        return super().forward(x).detach().float().numpy()


class Gamma(NoForward):
    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.gamma = self.weight
        del self.weight


class OnlyMeans(AnyRank):
    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.running_var = None


class ListOfMeans(NoForward):
    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        del self._buffers["running_mean"]
        self.__dict__["running_mean"] = [0.0] * num_features


class Lazy(torch.nn.LazyBatchNorm2d):  # type: ignore[misc]
    def __init__(self, num_features: int, *, eps: float, momentum: float, affine: bool) -> None:
        super().__init__(eps, momentum, affine)


class Parametrized(AnyRank):
    """Computes its weight from another parameter, whenever it is asked for it."""

    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        torch.nn.utils.parametrize.register_parametrization(self, "weight", torch.nn.Softplus())


class OnMeta(AnyRank):
    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, device="meta", **settings)


# --- unusual, but right ----------------------------------------------------------------------------


class Silent(AnyRank):
    """Its to() and train() return nothing."""

    def to(self, *arguments: Any, **options: Any) -> None:
        super().to(*arguments, **options)

    def train(self, mode: bool = True) -> None:
        super().train(mode)


class Frozen(AnyRank):
    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.requires_grad_(False)


class Buffers(AnyRank):
    """Keeps weight and bias in buffers."""

    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **{**settings, "affine": False})
        del self.weight, self.bias
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))


# --- one mistake each ------------------------------------------------------------------------------


instance = AnyRank(3)
part = functools.partial(AnyRank, track_running_stats=True)


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
    return (x.detach() * weight.view(1, -1, 1, 1)).to(x.dtype)


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
    return torch.special.bessel_j0(x)


def own_words(x: Any, *arguments: Arguments, **options: Any) -> Any:
    raise RuntimeError("\"special\" not implemented for 'Half'")


def inner_refusal(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return _Refusing.apply(x)


class _Refusing(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, x: Any) -> Any:
        return x * 1

    @staticmethod
    def backward(context: Any, grad_output: Any) -> Any:
        raise NotImplementedError("no backward yet")


class _Forward(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, x: Any) -> Any:
        return x * 1


def no_backward(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return _Forward.apply(x)


def from_meta(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.to("meta").cpu()


def meta_graph(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.to("meta")


def nested(x: Any, *arguments: Arguments, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor(list(x.detach().unbind()))


def without_an_array(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.detach().as_subclass(_Arrayless)


class _Arrayless(torch.Tensor):  # type: ignore[misc]
    def detach(self) -> Any:
        raise TypeError("no detach")


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
