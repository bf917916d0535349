"""The accelerators of CuPy's reductions: CUB, as CuPy starts, or none."""

from __future__ import annotations

from . import core

_CUB = 1

_reduction_accelerators = [_CUB]


def get_reduction_accelerators() -> list[int]:
    return _reduction_accelerators


def set_reduction_accelerators(accelerators: list[int]) -> None:
    global _reduction_accelerators
    _reduction_accelerators = list(accelerators)


__all__ = ["core", "get_reduction_accelerators", "set_reduction_accelerators"]
