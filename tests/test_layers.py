"""The shape of the code: imports run one way, and the auditor stays clear of frameworks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bnaudit
from bnaudit.cli import cli
from bnaudit.worker.backends import BACKENDS

PACKAGE = Path(bnaudit.__file__).parent
README = PACKAGE.parent / "README.md"

ORDER = (
    "worker",
    "defects",
    "document",
    "distributions",
    "scenario",
    "inputs",
    "certified",
    "bounds",
    "measure",
    "reference",
    "verdict",
    "subject",
    "building",
    "environments",
    "config",
    "consistency",
    "audit",
    "selection",
    "report",
    "findings",
    "writer",
    "sources",
    "rejudge",
    "resume",
    "baseline",
    "compare",
    "api",
    "sides",
    "literals",
    "calls",
    "repro",
    "shrink",
    "probe",
    "selftest",
    "render",
    "doctor",
    "progress",
    "cli",
    "__main__",
)
"""Modules of the auditor, each of which imports only those before it."""

HEAVY = ("torch", "cupy", "jax", "tensorflow")


def imported(source: str) -> Iterator[str]:
    """The modules of bnaudit that a module imports when it runs, not only for its types."""
    tree = ast.parse(source)
    for statement in tree.body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            statement.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnaudit"):
            path = (node.module or "").split(".")
            names = [path[1]] if len(path) > 1 else [alias.name for alias in node.names]
            yield from (name for name in names if not name.startswith("__version"))


def test_every_module_has_its_place_in_the_order() -> None:
    found = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir() if p.suffix in ("", ".py")}
    assert found - {"__init__", "__pycache__", "scenarios"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module: str) -> None:
    path = PACKAGE / module
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    below = ORDER[: ORDER.index(module) + (module in ("defects", "render", "cli"))]
    for file in files:
        for name in imported(file.read_text()):
            assert name in below, f"{file.name} imports {name}"


def test_the_order_of_imports_is_really_checked() -> None:
    assert list(imported("from bnaudit.cli import main\n")) == ["cli"]
    assert list(imported("def f():\n    from bnaudit import report\n")) == ["report"]


def loads(statement: str) -> set[str]:
    """Which of the heavy packages a statement brings into a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_auditor_imports_no_framework() -> None:
    modules = [name for name in ORDER if name not in ("worker", "__main__")]
    assert loads("\n".join(f"import bnaudit.{name}" for name in modules)) == set()


def test_an_imported_framework_would_be_noticed() -> None:
    pytest.importorskip("torch")
    assert loads("import torch") == {"torch"}


def test_help_imports_nothing_but_click() -> None:
    program = (
        "import sys, bnaudit.cli\n"
        "print(*[m for m in ('numpy', 'numba', 'pydantic', 'rich', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_readme_names_every_command_and_every_backend() -> None:
    text = README.read_text()
    for command in cli.commands:
        assert f"bnaudit {command}" in text, command
    for name in BACKENDS:
        assert f"`{name}`" in text or f"`{name.partition('@')[0]}`" in text, name


@pytest.mark.parametrize("name", ["readme_triton.py", "readme_cuda.py"])
def test_the_kernels_that_are_shown_are_those_that_are_tested(name: str) -> None:
    _, code = (Path(__file__).parent / "plugins" / name).read_text().split("\n", 1)
    assert code in (README.parent / "docs" / "plugins.md").read_text()


def test_every_link_within_the_readme_has_its_heading() -> None:
    text = README.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert links
    assert links <= anchors
