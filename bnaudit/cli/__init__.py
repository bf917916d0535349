"""The command line: the only place that reads arguments, prints and exits.

Each module holds one command, or a few that belong together, and is imported at once; what a command needs
to do its work it imports when it is called, so that `bnaudit --help` is immediate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from bnaudit import __version__
from bnaudit.cli import catalogue, check, compare, probe, repro, run, selftest, show, upgrade
from bnaudit.cli.common import INCOMPLETE, INTERRUPTED, USAGE, Failure, find_cache


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; an error is one line on stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # σ and × in a locale that has neither
    try:
        find_cache()
        given = list(sys.argv[1:] if arguments is None else arguments)
        # Not cli.main, which makes an exit code of its own of a broken pipe.
        with cli.make_context("bnaudit", given) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = USAGE
    except click.ClickException as error:
        click.echo(f"bnaudit: {_one_line(error)}", err=True)
        code = error.code if isinstance(error, Failure) else USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("bnaudit: interrupted", err=True)
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        _silence()
        code = INTERRUPTED
    except OSError as error:
        click.echo(f"bnaudit: the system refuses: {error}", err=True)
        _silence()
        code = INCOMPLETE
    sys.exit(code)


def _silence() -> None:
    """Drops what standard output still holds: Python would complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    message = message.replace("is not a valid integer range", "is not an integer")
    message = message.replace("is not a valid float range", "is not a number")
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message = f"{message.rstrip('.')} (see {error.ctx.command_path} --help)"
    return message


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]}, epilog="Start with: bnaudit run smoke"
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Audits BatchNorm implementations numerically against a certified float64 reference."""


for command in (
    run.run,
    compare.compare,
    upgrade.upgrade,
    show.show,
    check.check,
    probe.probe,
    selftest.selftest,
    repro.repro,
    catalogue.list_,
    catalogue.schema,
    catalogue.doctor,
):
    cli.add_command(command)
