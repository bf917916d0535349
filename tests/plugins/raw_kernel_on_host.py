"""CuPy's RawKernel on the host, as far as a plug-in needs it: compiled by g++, the threads are fibers."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HEADERS = Path(__file__).resolve().parents[1] / "cuda_on_host"


class RawKernel:
    """A kernel, compiled at once."""

    def __init__(self, code: str, name: str) -> None:
        text = f'#include "cuda_on_host.h"\n{code}\nCUDA_ON_HOST_KERNEL(0, {name})\n'
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/kernel.so"
            command = ["g++", "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", f"-I{HEADERS}", "-x", "c++"]
            command += ["-", "-shared", "-fPIC", "-o", path]
            subprocess.run(command, input=text, text=True, check=True)
            self._library = ctypes.CDLL(path)
        self._library.parameters_0.restype = ctypes.c_char_p
        self._library.launch_0.restype = ctypes.c_char_p
        self._kinds = self._library.parameters_0().decode().split()

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
        assert len(args) == len(self._kinds)
        values = []
        for argument, kind in zip(args, self._kinds, strict=True):
            # What CuPy makes of Python's numbers: pointers and integers of 64 bits, and doubles.
            assert type(argument) is (float if kind == "f8" else int)
            assert kind in ("f8", "i8", "*f4")
            make: Any = ctypes.c_double if kind == "f8" else ctypes.c_longlong
            values.append(make(argument))
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        error = self._library.launch_0(grid[0], block[0], addresses, False)
        if error:
            raise RuntimeError(error.decode())


@contextlib.contextmanager
def _external_stream(pointer: int) -> Iterator[None]:
    assert pointer == 0
    yield


cuda = SimpleNamespace(ExternalStream=_external_stream)
