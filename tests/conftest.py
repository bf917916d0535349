"""What holds for all tests: they are no job of a CI, also where a job runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from frameworks import Environments, environments


@pytest.fixture(autouse=True, scope="session")
def _no_job() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def subjects() -> Iterator[Environments]:
    """Subjects of real frameworks, by environment."""
    with environments() as made:
        yield made
