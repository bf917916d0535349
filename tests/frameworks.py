"""The environments that adapters are tested in: those of a bnaudit.yaml, as far as they have been built.

BNAUDIT_FRAMEWORKS names the file; `make frameworks` builds those of frameworks.yaml. What is missing is skipped
with the reason.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from bnaudit import config
from bnaudit.building import Request
from bnaudit.environments import read, resolve
from bnaudit.subject import Subject, scratch_folder

VARIABLE = "BNAUDIT_FRAMEWORKS"


@functools.cache
def _specifications(file: str) -> dict[str, str]:
    return config.load(file).environments


def command(name: str) -> tuple[str, ...]:
    """What starts the environment's Python, or a skip."""
    file = os.environ.get(VARIABLE)
    if not file:
        pytest.skip(f"{VARIABLE} names no file of environments")
    spec = _specifications(file).get(name)
    if spec is None:
        pytest.skip(f"{file} has no environment {name}")
    found = read(name, spec)
    if isinstance(found, Request) and not found.is_built():
        pytest.skip(f"the environment {name} of {file} is not built (make frameworks)")
    if not isinstance(found, Request) and not Path(found.command[0]).exists():
        pytest.skip(f"there is no {found.command[0]}")
    return resolve(name, spec, lambda headline: nullcontext(lambda line: None)).command


class Environments:
    """Subjects by environment, each made when it is first asked for."""

    def __init__(self, scratch: Path) -> None:
        """scratch: where they exchange tensors."""
        self._scratch = scratch
        self._made: dict[str, Subject] = {}

    def __getitem__(self, name: str) -> Subject:
        """The environment's subject, or a skip."""
        if name not in self._made:
            self._made[name] = Subject(name=name, command=command(name), scratch=self._scratch)
        return self._made[name]

    def close(self) -> None:
        """Ends all workers."""
        for subject in self._made.values():
            subject.close()


@contextmanager
def environments() -> Iterator[Environments]:
    """All that tests ask for, closed at the end."""
    # What is on the auditor's own path is not meant for other Pythons.
    with scratch_folder() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        made = Environments(scratch)
        yield made
        made.close()
