"""Compiled code."""

from __future__ import annotations

import ctypes
import os

from .._raw import Function


class Module:
    def load(self, cubin: bytes) -> None:
        self._library = ctypes.CDLL(os.fsdecode(cubin))

    def get_function(self, name: str) -> Function:
        return Function(self._library, name)
