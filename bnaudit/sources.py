"""Where a plug-in's function stands in its source, found without running any of it."""

from __future__ import annotations

import ast
from pathlib import Path

from bnaudit.report import SourcePlace
from bnaudit.scenario import displayed


def place_of(backend: str) -> SourcePlace | None:
    """The line that defines a plug-in's function or class; None for other backends, or where no file is found.

    backend: FILE.py:NAME or package.module:NAME, with or without @device, in no environment's name. A
    module is looked for below the working directory only.
    """
    target, colon, rest = backend.rpartition(":")
    if not colon:
        return None
    file = Path(target) if target.endswith(".py") else Path(*target.split(".")).with_suffix(".py")
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    return SourcePlace(file=displayed(file), line=_line(tree, rest.partition("@")[0]))


def _line(tree: ast.Module, name: str) -> int:
    """The line of the last definition of a name at the top level; 1 where there is none."""
    line = 1
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        if name in names:
            line = node.lineno
    return line
