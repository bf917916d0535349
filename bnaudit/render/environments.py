"""Environments → what a terminal shows of them: interpreter, packages, what each can run, and the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bnaudit.building import Built
from bnaudit.environments import Described
from bnaudit.render.words import Hanging, count

PERIODS = (("day", 86400), ("hour", 3600), ("minute", 60))


def environments(entries: Iterable[Described], *, verbose: bool) -> RenderableType:
    """A row for each environment; verbose: with the reasons for what it cannot run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("environment", no_wrap=True)
    for heading in ("Python", "packages", "can run"):
        table.add_column(heading, overflow="fold")
    reasons: list[RenderableType] = []
    for entry in entries:
        table.add_row(entry.name, *_cells(entry))
        if verbose and entry.reasons is not None:
            reasons += ["", Text(entry.name, "bold"), *_reasons(entry.reasons)]
    return Group(table, *reasons)


def _cells(entry: Described) -> Iterator[RenderableType]:
    if entry.problem is not None:
        yield entry.spec
        yield ""
        yield Text(entry.problem, "yellow")
    elif entry.python is None or entry.packages is None or entry.reasons is None:
        yield entry.spec
        yield ""
        yield Text("not built yet: bnaudit run or --env builds it", "yellow")
    else:
        yield entry.python
        yield "\n".join(f"{name} {version}" for name, version in entry.packages.items())
        able = [name for name, reason in entry.reasons.items() if reason is None]
        yield Text("\n".join(able)) if able else Text("no framework", "yellow")


def _reasons(reasons: Mapping[str, str | None]) -> Iterator[RenderableType]:
    """The backends of each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield Hanging("  ", f"{', '.join(names)}: {reason}")


def cache(entries: Sequence[Built], folder: Path) -> Iterator[str]:
    """What was built, with size and age; lines that are not to be broken, because of their paths."""
    if not entries:
        yield f"none built yet; they would be in {folder}"
        return
    sizes = [entry.size for entry in entries]
    total = f"{count(len(entries), 'built environment')}, {bytes_of(sum(sizes))}"
    yield f"{total} (--prune removes them):"
    for entry, size in zip(entries, sizes, strict=True):
        yield f"  {entry.python} {' '.join(entry.requirements)}"
        yield f"    {bytes_of(size)}, {_age(entry.age)}, {entry.folder}"


def bytes_of(size: int) -> str:
    """A size in units of 1024."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if unit != "bytes" else f"{size} bytes"


def _age(seconds: float) -> str:
    for noun, length in PERIODS:
        if seconds >= length:
            return f"{count(int(seconds // length), noun)} old"
    return "new"
