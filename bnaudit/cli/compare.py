"""bnaudit compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import console, explained, interruptible, save

if TYPE_CHECKING:
    from bnaudit.compare import FailOn


@click.command(
    epilog="Exit: 0 no regression, 1 regression, 2 usage, 3 inputs differ, 5 nothing in common, 130."
)
@click.argument("old")
@click.argument("new")
@click.option(
    "--factor",
    type=click.FloatRange(min=1),
    default=4.0,
    show_default=True,
    help="Growth of ×bound from which on a deviation above the tight bound is a regression.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["regression", "change", "never"]),
    default="regression",
    show_default=True,
    help="What exits with 1, in a gated backend.",
)
@click.option(
    "--map",
    "renamed",
    multiple=True,
    metavar="OLD=NEW",
    help="Compare OLD's backend with NEW's backend of another name; repeatable.",
)
@click.option("--json", "target", metavar="FILE", help="Save the comparison as JSON; - for stdout.")
@click.option("--markdown", metavar="FILE", help="Save it as Markdown; - for stdout.")
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
    if not math.isfinite(factor):
        raise click.UsageError(f"--factor takes a finite number, not {factor}", context)
    if target == "-" == markdown:
        raise click.UsageError("only one of --json and --markdown can be -", context)
    with explained(), interruptible():
        from bnaudit import compare as comparing
        from bnaudit.render import comparison as rendering
        from bnaudit.report import load

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
        cases = {case.id: case for case in reports[1].cases}
        screen = console(stderr="-" in (target, markdown))
        for part in rendering.comparison(found, cases):
            screen.print(part)
        for destination, text in (
            (target, f"{found.model_dump_json(indent=1)}\n"),
            (markdown, rendering.markdown(found, cases)),
        ):
            save(destination, text)
        return found.exit_code
