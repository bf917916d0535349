"""bnaudit selftest."""

from __future__ import annotations

import os

import click

from bnaudit.cli.common import PATHS, console, explained, interruptible, make_room, save

PROCESSES = min(4, os.cpu_count() or 1)
"""At once; each may hold several tensors of the largest case in float64."""


@click.command(epilog="Exit: 0 all found and none flagged, 1 otherwise, 2 usage, 3 failed, 130.")
@PATHS
@click.option("--json", "target", metavar="FILE", help="Save what was found as JSON; - for stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def selftest(paths: tuple[str, ...], target: str | None, quiet: bool) -> int:
    """Runs planted faults, and correct variants, through the scenarios.

    PATH is as for bnaudit run. Default: all shipped scenarios, of which some must find each fault, and none
    may flag a correct variant.
    """
    with explained(), interruptible():
        from bnaudit import selftest as testing
        from bnaudit.progress import CaseProgress
        from bnaudit.render.selftest import selftest as render
        from bnaudit.scenario import load
        from bnaudit.subject import scratch_folder

        make_room([("--json", target)], [("PATH", path) for path in paths])
        scenarios = load(paths)
        work = testing.plan(scenarios)
        outcomes = []
        with scratch_folder() as scratch, CaseProgress(len(work), quiet=quiet) as progress:
            if work:
                progress.case(work[0].case.id)
            for outcome in testing.run(work, scratch, processes=PROCESSES):
                outcomes.append(outcome)
                progress.case(outcome.case)
        found = testing.Matrix.of(scenarios, outcomes)
        screen = console(stderr=target == "-")
        for line in render(found, screen.width):
            screen.print(line)
        save(target, found.to_json())
        return found.exit_code
