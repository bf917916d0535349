"""ElementwiseKernel and ReductionKernel, their expressions evaluated by NumPy with a rounding after each.

Of C++ they take what means the same in Python: names, arithmetic, calls, and statements joined by ";".
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import _from_host, ndarray

FUNCTIONS = {"pow": np.power, "sqrt": np.sqrt}


class _Size:
    """A CIndexer of CuPy's reductions."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def _names(parameters: str) -> list[str]:
    pairs = [parameter.split() for parameter in parameters.split(",")]
    if any(kind != "T" for kind, _ in pairs):
        raise NotImplementedError(f"a parameter in {parameters!r} is not of type T")
    return [name for _, name in pairs]


def _bind(names: list[str], arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The type T, which is that of every array, and the arguments as NumPy's; a number becomes a T."""
    if len(arguments) != len(names):
        raise TypeError(f"{len(arguments)} arguments for {names}")
    dtypes = {argument.dtype for argument in arguments if isinstance(argument, ndarray)}
    if len(dtypes) != 1:
        raise TypeError(f"Type is mismatched: T is {dtypes}")
    (dtype,) = dtypes
    bound = {}
    for name, argument in zip(names, arguments, strict=True):
        if isinstance(argument, ndarray):
            bound[name] = argument._host
        elif isinstance(argument, (int, float)):
            bound[name] = dtype.type(argument)
        else:
            raise TypeError(f"Unsupported type {type(argument)}")
    return dtype, bound


def _evaluate(statements: str, names: dict[str, Any], results: list[str], dtype: Any) -> list[Any]:
    """What the statements assign to the results; C++'s numbers would not have the type T."""
    if re.search(r"\d", statements):
        raise NotImplementedError(f"a number in {statements!r}")
    scope = {"__builtins__": {}, **FUNCTIONS, **names}
    with np.errstate(all="ignore"):
        exec(statements, scope)
    values = [np.asarray(scope[name]) for name in results]
    assert all(value.dtype == dtype for value in values)
    return values


class ElementwiseKernel:
    def __init__(
        self, in_params: str, out_params: str, operation: str, name: str = "kernel"
    ) -> None:
        assert name.isidentifier()
        self._inputs, self._outputs = _names(in_params), _names(out_params)
        self._operation = operation

    def __call__(self, *arguments: Any) -> Any:
        dtype, bound = _bind(self._inputs, arguments)
        shape = np.broadcast_shapes(*(np.shape(value) for value in bound.values()))
        values = _evaluate(self._operation, bound, self._outputs, dtype)
        arrays = [_from_host(np.broadcast_to(value, shape)) for value in values]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)


class ReductionKernel:
    def __init__(
        self,
        in_params: str,
        out_params: str,
        map_expr: str,
        reduce_expr: str,
        post_map_expr: str,
        identity: str,
        name: str = "reduce_kernel",
    ) -> None:
        assert name.isidentifier()
        if (reduce_expr, identity) != ("a + b", "0"):
            raise NotImplementedError("a reduction that is not a sum")
        self._inputs, self._outputs = _names(in_params), _names(out_params)
        self._map, self._post_map = map_expr, post_map_expr

    def __call__(self, *arguments: Any, axis: tuple[int, ...]) -> ndarray:
        from ._core import get_reduction_accelerators

        if get_reduction_accelerators():
            raise NotImplementedError("CUB's reduction")
        dtype, bound = _bind(self._inputs, arguments)
        (mapped,) = _evaluate(f"mapped = {self._map}", bound, ["mapped"], dtype)
        with np.errstate(all="ignore"):
            total = np.add.reduce(mapped, axis=axis)
        numbers = {name: value for name, value in bound.items() if np.ndim(value) == 0}
        sizes = {"_in_ind": _Size(mapped.size), "_out_ind": _Size(total.size)}
        (result,) = _evaluate(
            self._post_map, {"a": total, **numbers, **sizes}, self._outputs, dtype
        )
        return _from_host(result)
