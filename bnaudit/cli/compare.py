"""bnaudit compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import Command, console, explained, interruptible, make_room, save

if TYPE_CHECKING:
    from bnaudit.compare import Comparison, FailOn
    from bnaudit.report import CaseRecord


def judged_by(command: Command) -> Command:
    """The options that say what a regression is."""
    factor = click.option(
        "--factor",
        type=click.FloatRange(min=1),
        default=4.0,
        show_default=True,
        help="Growth of ×bound from which on a deviation above the tight bound is a regression.",
    )
    fail_on = click.option(
        "--fail-on",
        type=click.Choice(["regression", "change", "never"]),
        default="regression",
        show_default=True,
        help="What exits with 1, in a gated backend.",
    )
    return factor(fail_on(command))


def saved_as(command: Command) -> Command:
    """The options that save a comparison."""
    json = click.option(
        "--json", "target", metavar="FILE", help="Save the comparison as JSON; - for stdout."
    )
    markdown = click.option("--markdown", metavar="FILE", help="Save it as Markdown; - for stdout.")
    return json(markdown(command))


@click.command(
    epilog="Exit: 0 no regression, 1 regression, 2 usage, 3 inputs differ, 5 nothing in common, 130."
)
@click.argument("old")
@click.argument("new")
@judged_by
@click.option(
    "--map",
    "renamed",
    multiple=True,
    metavar="OLD=NEW",
    help="Compare OLD's backend with NEW's backend of another name; repeatable.",
)
@saved_as
def compare(
    old: str,
    new: str,
    factor: float,
    fail_on: FailOn,
    renamed: tuple[str, ...],
    target: str | None,
    markdown: str | None,
) -> int:
    """Shows what changed between two reports, the worst first.

    OLD and NEW are files that bnaudit run --json wrote.
    """
    context = click.get_current_context()
    refuse_contradictions(factor, target, markdown)
    with explained(), interruptible():
        from bnaudit import compare as comparing
        from bnaudit.report import load

        make_room([("--json", target), ("--markdown", markdown)], [("OLD", old), ("NEW", new)])
        names = {}
        for pair in renamed:
            before, equals, after = pair.partition("=")
            if not (before and equals and after):
                raise click.UsageError(f"--map takes OLD=NEW, not {pair!r}", context)
            names[before] = after
        reports = load(Path(old)), load(Path(new))
        try:
            found = comparing.compare(*reports, factor=factor, renamed=names, fail_on=fail_on)
        except comparing.ComparisonError as error:
            raise click.UsageError(str(error), context) from error
        return present(found, reports[1].cases, target, markdown)


def refuse_contradictions(factor: float, target: str | None, markdown: str | None) -> None:
    """Raises click.UsageError for options that cannot be followed."""
    context = click.get_current_context()
    if not math.isfinite(factor):
        raise click.UsageError(f"--factor takes a finite number, not {factor}", context)
    if target == "-" == markdown:
        raise click.UsageError("only one of --json and --markdown can be -", context)


def present(
    found: Comparison, cases: Sequence[CaseRecord], target: str | None, markdown: str | None
) -> int:
    """Prints a comparison, saves it where the options say, and returns its exit code."""
    from bnaudit.render import comparison as rendering

    by_id = {case.id: case for case in cases}
    screen = console(stderr="-" in (target, markdown))
    for part in rendering.comparison(found, by_id):
        screen.print(part)
    for destination, text in (
        (target, f"{found.model_dump_json(indent=1)}\n"),
        (markdown, rendering.markdown(found, by_id)),
    ):
        save(destination, text)
    return found.exit_code
