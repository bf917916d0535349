"""bnaudit show."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import console, explained, interruptible
from bnaudit.cli.outputs import Outputs, output_options

if TYPE_CHECKING:
    from bnaudit.report import Report, ResultRecord


@click.command(epilog="Exit: 0 shown, whatever the verdict; 2 usage. bnaudit check judges.")
@click.argument("report_file", metavar="REPORT")
@click.argument("finding", required=False, metavar="[N]", type=click.IntRange(min=1))
@click.option("--case", "case", metavar="ID", help="The result of this case, with --backend.")
@click.option("--backend", metavar="NAME", help="The result of this backend, with --case.")
@output_options
@click.option("-v", "--verbose", is_flag=True, help="Every row and every finding in full.")
def show(
    report_file: str,
    finding: int | None,
    case: str | None,
    backend: str | None,
    verbose: bool,
    **formats: str | None,
) -> int:
    """Shows a saved report, or all that it knows of finding N.

    REPORT is a file that bnaudit run --json wrote; N is the number of a finding in it.
    """
    context = click.get_current_context()
    if (case is None) != (backend is None):
        raise click.UsageError("--case and --backend go together", context)
    if finding is not None and case is not None:
        raise click.UsageError("N and --case exclude each other", context)
    whole_only = [name for name, file in formats.items() if file is not None]
    if whole_only and (finding is not None or case is not None):
        raise click.UsageError(
            f"--{whole_only[0]} saves the whole report: leave out N, --case and --backend", context
        )
    with explained(verbose), interruptible():
        from bnaudit.render.console import whole
        from bnaudit.render.detail import detail
        from bnaudit.report import load

        report = load(Path(report_file))
        outputs = Outputs(None, None, formats, [("REPORT", report_file)])
        screen = console(stderr=outputs.on_stdout)
        outputs.write(report)
        if finding is None and (case is None or backend is None):
            for part in whole(report, screen.width, verbose=verbose, path=report_file):
                screen.print(part)
        else:
            result, others = _found(report, finding, case, backend)
            for part in detail(report, result, others):
                screen.print(part)
        return 0


def _found(
    report: Report, finding: int | None, case: str | None, backend: str | None
) -> tuple[ResultRecord, list[ResultRecord]]:
    """The result that is meant, and the others of its finding."""
    from bnaudit.findings import clusters
    from bnaudit.report import ReportError

    if finding is None:
        for result in report.results:
            if (result.case, result.backend) == (case, backend):
                return result, []
        backends = sorted({result.backend for result in report.results if result.case == case})
        if backends:
            where = f"its results are of {', '.join(backends)}"
        else:
            near = difflib.get_close_matches(
                case or "", [record.id for record in report.cases], n=1
            )
            meant = f" (did you mean {near[0]}?)" if near else " (bnaudit list cases prints ids)"
            where = f"there is no such case{meant}"
        raise ReportError(f"the report has no result of {case!r} on {backend!r}: {where}")
    found = clusters(report)
    for one in found:
        if one.number == finding:
            return one.worst, [result for result in one.results if result is not one.worst]
    accepted = f"1 to {len(found)}" if found else "none: it has no finding"
    raise ReportError(f"the report has no finding {finding}; accepted: {accepted}")
