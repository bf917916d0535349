"""bnaudit run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import CONFIG, PATHS, explained, interruptible, limits
from bnaudit.cli.conduct import Audit
from bnaudit.cli.outputs import Outputs, gate_options, output_options, read_baseline
from bnaudit.cli.screen import Screen

if TYPE_CHECKING:
    from bnaudit.report import FailOn

CHECKS = ("repeat", "threads", "channels", "batch-order", "inference", "backends")
"""Those of bnaudit.consistency, which loads too much for --help."""


@click.command(
    epilog="Exit: 0 pass, 1 fail, 2 usage, 3 incomplete, 4 untrusted, 5 nothing gated, 130."
)
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
    "--env",
    "specifications",
    multiple=True,
    metavar="NAME=SPEC",
    help="Another environment, for backends named NAME:BACKEND (without -b: all its frameworks). SPEC is "
    "an interpreter, a virtual environment's folder, cmd:COMMAND, or requirements such as "
    "'python3.10 torch==2.4.0', which are installed into a cache; repeatable.",
)
@CONFIG
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
@limits
@click.option("-x", "stop_early", is_flag=True, help="Stop at the first gated failure.")
@click.option(
    "--consistency",
    is_flag=True,
    help="Also fail where a result depends on what it must not: all of the checks below.",
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    type=click.Choice(CHECKS),
    help="One check of --consistency alone: a second call, the number of threads, the other channels, the "
    "order of the batch, inference after training, two gated backends too far apart; repeatable.",
)
@click.option(
    "--json",
    "target",
    metavar="FILE",
    help="Save the report as JSON, as results come; - for stdout.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what an interrupted run with the same --json FILE has saved, and run the rest.",
)
@output_options
@gate_options
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Every row and every finding, with whole tracebacks."
)
def run(
    paths: tuple[str, ...],
    backends: tuple[str, ...],
    specifications: tuple[str, ...],
    config: str | None,
    expression: str | None,
    required: tuple[str, ...],
    threads: int,
    timeout: float,
    stop_early: bool,
    consistency: bool,
    checks: tuple[str, ...],
    target: str | None,
    resume: bool,
    baseline: str | None,
    write_baseline: str | None,
    fail_on: FailOn,
    quiet: bool,
    verbose: bool,
    **formats: str | None,
) -> int:
    """Audits backends on the cases of scenarios.

    PATH is a scenario file, a folder of them, or the name of a shipped scenario. Default: all shipped
    scenarios.
    """
    if quiet and verbose:
        raise click.UsageError("-q and -v exclude each other", click.get_current_context())
    if resume and target in (None, "-"):
        raise click.UsageError("--resume takes --json FILE", click.get_current_context())
    if stop_early and baseline:
        raise click.UsageError(
            "-x stops at the first failure, which --baseline may accept: leave out one of them",
            click.get_current_context(),
        )
    with explained(verbose), interruptible():
        from bnaudit import config as settings
        from bnaudit.scenario import load

        places = settings.load(config).with_given(specifications)
        scenarios = load(paths)
        path = Path(target) if target not in (None, "-") else None
        audit = Audit(
            scenarios=scenarios,
            specifications=places,
            backends=backends,
            required=required,
            expression=expression,
            threads=threads,
            timeout=timeout,
            stop_early=stop_early,
            checks=CHECKS if consistency else checks,
            must_check=checks,
            fail_on=fail_on,
            baseline=read_baseline(baseline),
            path=path,
            resume=resume,
        )
        outputs = Outputs(
            target,
            write_baseline,
            formats,
            [("--baseline", baseline), ("--config", config), *(("PATH", path) for path in paths)],
        )
        screen = Screen(stderr=outputs.on_stdout, verbose=verbose, path=target)
        report, writer, end = audit.conduct(screen, quiet=quiet)
        if target == "-":
            sys.stdout.buffer.write(writer.text())
        try:
            if end is None:
                screen.close(report)
                if path is not None:
                    screen.say(f"report {path}")
            elif isinstance(end, BrokenPipeError):
                raise end
            else:
                saved = f", which are in {path}; --resume runs the rest" if path is not None else ""
                click.echo(
                    f"bnaudit: interrupted after {len(report.results)} results{saved}", err=True
                )
        finally:
            outputs.write(report)
        if end is None:
            outputs.announce(report, screen.say)
        return report.exit_code
