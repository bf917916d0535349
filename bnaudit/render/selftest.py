"""What the self-test found → what a person reads: the kill matrix, and what only one file finds.

A column of the matrix is a scenario file, by its number; a letter says by what a fault was found there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import PurePath

from rich.cells import set_cell_size
from rich.console import RenderableType
from rich.text import Text

from bnaudit.render.words import Hanging
from bnaudit.selftest import Kill, Matrix

LETTERS = {
    "y": ("y",),
    "g": ("grad_input", "grad_weight", "grad_bias"),
    "r": ("running_mean", "running_var"),
    "b": ("batch_mean", "batch_var", "invstd"),
}
"""What a cell says, by the quantities that failed; the first that applies."""

FEW = 3
"""Faults that are named of those that only one file finds; --json has them all."""

NARROWEST = 12
"""Columns that are left of a fault's name, however narrow the terminal is."""


def selftest(found: Matrix, width: int) -> Iterator[RenderableType]:
    """All lines, for a terminal of this width."""
    yield from _matrix(found, width)
    yield ""
    for number, file in enumerate(found.files, 1):
        kills = sum(file in files for files in found.kills.values())
        told = f"{PurePath(file).name} finds {kills}; alone: {_alone(found.alone[file])}"
        yield Hanging(f"{number:3} ", told)
    yield ""
    for name, reasons in found.errors.items():
        yield Hanging("  ", Text(f"{name} gave no outputs: {reasons[0]}", "yellow"))
    for variant, case, reason in found.flags:
        yield Hanging(
            "  ", Text(f"{variant} is correct, and was flagged in {case}: {reason}", "red")
        )
    for fault in found.survivors:
        yield Hanging("  ", Text(f"{fault} survived: {found.describe(fault)}", "red"))
    passed = found.exit_code == 0
    verdict = Text(f"{'PASS' if passed else 'FAIL'} (exit {found.exit_code})")
    verdict.stylize("bold green" if passed else "bold red")
    flagged = len({variant for variant, _, _ in found.flags})
    clean = len(found.variants) - flagged
    killed = len(found.faults) - len(found.survivors)
    cases = "1 case" if len(found.outcomes) == 1 else f"{len(found.outcomes)} cases"
    verdict.append(
        f": {killed} of {len(found.faults)} faults found, "
        f"{clean} of {len(found.variants)} correct variants clean, {cases}"
    )
    yield Hanging("", verdict)


def _matrix(found: Matrix, width: int) -> Iterator[RenderableType]:
    columns = len(found.files)
    longest = max(map(len, found.faults), default=0)
    room = min(longest, max(width - columns - 1, NARROWEST))
    numbers = range(1, columns + 1)
    for place in (10, 1):
        digits = "".join(str(n // place % 10) if n >= place else " " for n in numbers)
        yield Text(" " * (room + 1) + digits, "bold", no_wrap=True, overflow="crop")
    for fault in found.faults:
        files = found.kills[fault]
        cells = "".join(letter(files.get(file, ())) for file in found.files)
        line = Text(set_cell_size(fault, room) + " ", no_wrap=True, overflow="crop")
        yield line.append(cells, "" if files else "red")
    yield Text("y: the output, g: a gradient, r: a running, b: a batch statistic", "dim")


def letter(quantities: Collection[str]) -> str:
    """The cell for quantities that failed; a point for none."""
    for name, group in LETTERS.items():
        if any(quantity in quantities for quantity in group):
            return name
    return "·"


def _alone(kills: Sequence[Kill]) -> str:
    """Such as "eps-fixed (y, grad_input), eps-clamped (y) and 3 more"."""
    told = [
        f"{fault} ({', '.join(quantity for _, quantity in group)})"
        for fault, group in groupby(kills, key=lambda kill: kill[0])
    ]
    more = f" and {len(told) - FEW} more" if len(told) > FEW else ""
    return ", ".join(told[:FEW]) + more if told else "nothing"
