"""bnaudit check."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import console, explained, interruptible, save
from bnaudit.cli.outputs import Outputs, gate_options, output_options, read_baseline

if TYPE_CHECKING:
    from bnaudit.baseline import Baseline
    from bnaudit.rejudge import Overrides
    from bnaudit.report import FailOn, Report


@click.command(
    epilog="Exit: 0 pass, 1 fail, 2 usage, 3 incomplete, 4 untrusted, 5 nothing gated, 130."
)
@click.argument("report_file", metavar="REPORT")
@click.option(
    "--thresholds",
    metavar="FILE",
    help="Limits in place of the scenarios', for what is gated: YAML with thresholds, as in a scenario, "
    "and scenarios, which has others for single ones by name.",
)
@click.option("--json", "target", metavar="FILE", help="Save the report as judged; - for stdout.")
@output_options
@gate_options
@click.option("-v", "--verbose", is_flag=True, help="Every row and every finding in full.")
def check(
    report_file: str,
    thresholds: str | None,
    target: str | None,
    baseline: str | None,
    write_baseline: str | None,
    fail_on: FailOn,
    verbose: bool,
    **formats: str | None,
) -> int:
    """Judges a saved report again, without running anything.

    REPORT is a file that bnaudit run --json wrote. Today's rules, other thresholds and a baseline decide;
    the exit code is that of a run.
    """
    with explained(verbose), interruptible():
        from bnaudit.render.console import whole
        from bnaudit.report import load

        report = load(Path(report_file))
        outputs = Outputs(
            target,
            write_baseline,
            formats,
            [("REPORT", report_file), ("--thresholds", thresholds), ("--baseline", baseline)],
        )
        overrides = _overrides(thresholds, report)
        judged = _judged(report, overrides, read_baseline(baseline), fail_on)
        screen = console(stderr=outputs.on_stdout)
        save(target, judged.to_json())
        outputs.write(judged)
        path = target if target not in (None, "-") else None
        for part in whole(judged, screen.width, verbose=verbose, path=path):
            screen.print(part)
        outputs.announce(judged, screen.print)
        return judged.exit_code


def _judged(
    report: Report, overrides: Overrides, baseline: Baseline | None, fail_on: FailOn
) -> Report:
    from bnaudit.baseline import accept
    from bnaudit.rejudge import concluded, judged_again

    results, controls = judged_again(report, overrides)
    notes: list[str] = []
    if baseline is not None:
        cases = {case.id: case for case in report.cases}
        results, notes = accept(
            baseline, results, cases, report.environments, today=date.today(), fail_on=fail_on
        )
    return concluded(report, results, controls, fail_on=fail_on, notes=notes)


def _overrides(file: str | None, report: Report) -> Overrides:
    """The thresholds that an option names; each scenario must be one of the report's."""
    from bnaudit.document import load_as
    from bnaudit.rejudge import Overrides
    from bnaudit.report import ReportError

    if file is None:
        return Overrides()
    overrides = load_as(Overrides, Path(file), ReportError)
    known = {case.scenario for case in report.cases}
    for name in overrides.scenarios:
        if name not in known:
            raise ReportError(
                f"{file}: scenarios: found {name!r}; the report has {', '.join(sorted(known))}"
            )
    return overrides
