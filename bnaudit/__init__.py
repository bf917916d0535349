"""Audits BatchNorm implementations numerically against a certified float64 reference.

For a test suite of one's own: `cases`, `judge`; see `bnaudit.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnaudit.api import Case, DeviationError, Inputs, Result, Step, cases, judge

__version__ = "0.1.0"

__all__ = ["Case", "DeviationError", "Inputs", "Result", "Step", "cases", "judge"]


def __getattr__(name: str) -> Any:
    """Loads the interface when it is first asked for: `bnaudit --help` does without NumPy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bnaudit import api

    return getattr(api, name)
