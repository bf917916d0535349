"""NVRTC, which is g++ here."""

from __future__ import annotations

from .. import _raw


def compile_using_nvrtc(
    source: str,
    options: tuple[str, ...] = (),
    arch: str | None = None,
    filename: str = "kern.cu",
    name_expressions: tuple[str, ...] = (),
) -> tuple[bytes, dict[str, str]]:
    """What Module.load takes, and the symbols of the named instances."""
    library = _raw.compile_library(source, options, name_expressions)
    return bytes(library), {name: str(i) for i, name in enumerate(name_expressions)}
