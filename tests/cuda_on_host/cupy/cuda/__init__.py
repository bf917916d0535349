"""CUDA as CuPy hands it on."""

from . import cublas, device, memory, nvrtc, runtime
from .memory import MemoryPointer

__all__ = ["MemoryPointer", "cublas", "device", "memory", "nvrtc", "runtime"]
