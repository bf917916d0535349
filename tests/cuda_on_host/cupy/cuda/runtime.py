"""The CUDA runtime of one device that is not there."""

from __future__ import annotations

from typing import Any

CUDA = 13020
is_hip = False


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def driverGetVersion() -> int:  # noqa: N802 - CUDA's name
    return CUDA


def runtimeGetVersion() -> int:  # noqa: N802
    return CUDA


def getDeviceCount() -> int:  # noqa: N802
    return 1


def getDeviceProperties(device: int) -> dict[str, Any]:  # noqa: N802
    assert device == 0
    return {"name": b"host stand-in", "major": 9, "minor": 0}


def deviceSynchronize() -> None:  # noqa: N802
    pass


def memGetInfo() -> tuple[int, int]:  # noqa: N802
    """Free and total bytes."""
    return 1 << 30, 1 << 30
