"""The command line: the only place that reads arguments, prints and exits.

Only click is imported at once, so that `bnaudit --help` is immediate.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnaudit import __version__

if TYPE_CHECKING:
    from bnaudit.audit import ControlOutcome, Event, Result, Selected
    from bnaudit.report import Report, ResultRecord, Writer
    from bnaudit.scenario import Scenario

INTERRUPTED = 130
UNTRUSTED = 4

PATHS = click.argument("paths", nargs=-1, metavar="[PATH]...")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: an error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # σ and × in a locale that has neither
    try:
        code = cli.main(args=arguments, prog_name="bnaudit", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        click.echo(f"bnaudit: {_one_line(error)}", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("bnaudit: interrupted", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = INTERRUPTED
    sys.exit(code)


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message = f"{message.rstrip('.')} (see {error.ctx.command_path} --help)"
    return message


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]}, epilog="Start with: bnaudit run smoke"
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Audits BatchNorm implementations numerically against a certified float64 reference."""


# --- run -------------------------------------------------------------------------------------------


@cli.command(epilog="Exit: 0 pass, 1 fail, 2 usage, 3 incomplete, 4 untrusted, 5 nothing gated, 130.")
@PATHS
@click.option(
    "-b",
    "--backend",
    "backends",
    multiple=True,
    metavar="BACKEND",
    help="A backend, a glob, real, specimens, all, FILE.py:NAME or package.module:NAME; repeatable. "
    "Default: the real frameworks of this interpreter, gemm and welford.",
)
@click.option(
    "-k",
    "expression",
    metavar="EXPR",
    help="Only cases and backends that match: and, or, not over parts of 'case backend'.",
)
@click.option(
    "--require",
    "required",
    multiple=True,
    metavar="BACKEND",
    help="Exit 3 if this backend is unavailable; repeatable.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Threads of the backends: results depend on them.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds a backend has for a case.",
)
@click.option("-x", "stop_early", is_flag=True, help="Stop at the first gated failure.")
@click.option(
    "--json", "target", metavar="FILE", help="Save the report as JSON, as results come; - for stdout."
)
@click.option(
    "--fail-on",
    type=click.Choice(["fail", "warn", "never"]),
    default="fail",
    show_default=True,
    help="The deviation that exits with 1.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Every row and finding, whole tracebacks.")
def run(
    paths: tuple[str, ...],
    backends: tuple[str, ...],
    expression: str | None,
    required: tuple[str, ...],
    threads: int,
    timeout: float,
    stop_early: bool,
    target: str | None,
    fail_on: str,
    quiet: bool,
    verbose: bool,
) -> int:
    """Audits backends on the cases of scenarios.

    PATH is a scenario file, a folder of them, or the name of a shipped scenario. Default: all shipped
    scenarios.
    """
    if quiet and verbose:
        raise click.UsageError("-q and -v exclude each other")
    with _explained(verbose), _interruptible():
        from bnaudit import audit, selection
        from bnaudit.report import Writer
        from bnaudit.scenario import load
        from bnaudit.subject import Subject, scratch_folder
        from bnaudit.worker.backends import BACKENDS

        matches = selection.matcher(expression) if expression is not None else _anything
        scenarios = load(paths)
        selected = selection.select(backends, required, BACKENDS)
        path = None if target in (None, "-") else Path(str(target))
        writer = Writer(path, ["bnaudit", *sys.argv[1:]])
        with (
            scratch_folder() as scratch,
            Subject(threads=threads, timeout=timeout, scratch=scratch) as subject,
        ):
            subject.describe([backend.name for backend in selected])
            writer.add_environment(subject.environment())
            events = audit.run(
                scenarios, selected, subject, scratch, matches=matches, stop_early=stop_early
            )
            screen = _Screen(scenarios, selected, matches, target == "-", quiet, verbose)
            results, controls, interrupted = _follow(events, writer, screen)
        summary = audit.summarize(
            len(writer.cases), results, controls, selected, fail_on=fail_on, interrupted=interrupted
        )
        report = writer.finish(summary.verdict, summary.exit_code)
        if target == "-":
            sys.stdout.buffer.write(writer.text())
            sys.stdout.flush()
        if interrupted:
            saved = f"; the report {path} has them" if path else ""
            click.echo(f"bnaudit: interrupted after {len(results)} results{saved}", err=True)
        else:
            screen.close(report, path)
        return summary.exit_code


def _anything(case: str, backend: str) -> bool:
    return True


def _follow(
    events: Iterator[Event], writer: Writer, screen: _Screen
) -> tuple[list[Result], list[ControlOutcome], bool]:
    """Saves and shows what happens; whether it was interrupted is the last item."""
    from bnaudit.audit import CaseFacts, ControlOutcome, Result

    results: list[Result] = []
    controls: list[ControlOutcome] = []
    complete: list[ResultRecord] = []

    def show() -> None:
        if complete:
            writer.save()
            screen.rows(complete, writer)
            complete.clear()

    scenario = None
    try:
        with screen.progress:
            for event in events:
                if isinstance(event, CaseFacts):
                    if event.case.scenario != scenario:
                        show()
                    scenario = event.case.scenario
                    writer.add_case(event)
                    screen.progress.case(event.case.id)
                elif isinstance(event, Result):
                    results.append(event)
                    complete.append(writer.add_result(event))
                else:
                    controls.append(event)
                    writer.add_control(event)
                    show()
            show()
    except (KeyboardInterrupt, BrokenPipeError):
        return results, controls, True
    return results, controls, False
