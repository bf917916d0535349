"""What run, show and check have in common: the formats of a report, baselines, and GitHub Actions."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bnaudit.cli.common import Files, make_room, save

if TYPE_CHECKING:
    from bnaudit.baseline import Baseline
    from bnaudit.report import Report

FORMATS = {
    "junit": "JUnit XML",
    "sarif": "SARIF 2.1.0",
    "markdown": "Markdown",
    "html": "a page of HTML",
    "accuracy": "a table of accuracy in Markdown",
}

SUMMARY_BYTES = 1 << 20
"""What GitHub takes as the summary of a step."""

Command = TypeVar("Command", bound=Callable[..., Any])


def output_options(command: Command) -> Command:
    """Adds an option for each of FORMATS."""
    for name, words in reversed(FORMATS.items()):
        help_ = f"Save the report as {words}; - for stdout."
        command = click.option(f"--{name}", metavar="FILE", help=help_)(command)
    return command


def gate_options(command: Command) -> Command:
    """Adds --baseline, --write-baseline and --fail-on."""
    for option in (
        click.option(
            "--fail-on",
            type=click.Choice(["fail", "warn", "never"]),
            default="fail",
            show_default=True,
            help="The deviation that exits with 1.",
        ),
        click.option(
            "--write-baseline",
            metavar="FILE",
            help="Save what deviates as known, with the reasons that FILE has already.",
        ),
        click.option(
            "--baseline",
            metavar="FILE",
            help="Accept known deviations: only new or worse ones fail.",
        ),
    ):
        command = option(command)
    return command


def read_baseline(file: str | None) -> Baseline | None:
    """The baseline that an option names."""
    if file is None:
        return None
    from bnaudit.baseline import load

    return load(Path(file))


class Outputs:
    """Where a report is to be written, checked before anything runs."""

    def __init__(
        self,
        json: str | None,
        write_baseline: str | None,
        formats: Mapping[str, str | None],
        read: Files,
    ) -> None:
        """Takes the options' values, those of FORMATS by name, and what the command reads.

        Raises click.UsageError.
        """
        self._formats = {name: file for name, file in formats.items() if file is not None}
        self._baseline = None if write_baseline is None else Path(write_baseline)
        self._entries: int | None = None
        to_stdout = [name for name, file in {"json": json, **formats}.items() if file == "-"]
        if len(to_stdout) > 1:
            names = " and ".join(f"--{name}" for name in to_stdout)
            raise click.UsageError(f"only one of {names} can be -", click.get_current_context())
        self.on_stdout = bool(to_stdout)
        if write_baseline == "-":
            raise click.UsageError(
                "--write-baseline takes a file, not -", click.get_current_context()
            )
        options = {"json": json, **formats, "write-baseline": write_baseline}
        make_room([(f"--{name}", file) for name, file in options.items()], read)
        self._earlier = (
            read_baseline(str(self._baseline))
            if self._baseline is not None and self._baseline.exists()
            else None
        )

    def write(self, report: Report) -> None:
        """Writes every format that was asked for, and the baseline unless the run was interrupted."""
        for name, file in self._formats.items():
            save(file, _rendered(name, report))
        if self._baseline is not None and report.verdict != "interrupted":
            from bnaudit import baseline

            self._entries = baseline.write(
                report, self._baseline, self._earlier, date.today(), report.fail_on
            )

    def announce(self, report: Report, say: Callable[[str], None]) -> None:
        """Says what was written, and tells GitHub Actions where it runs."""
        for name, file in self._formats.items():
            if file != "-":
                say(f"{name} {file}")
        if self._entries is not None:
            entries = "1 entry" if self._entries == 1 else f"{self._entries} entries"
            say(f"baseline {self._baseline}: {entries}")
        _tell_github(report, stderr=self.on_stdout)


def _rendered(name: str, report: Report) -> str:
    """The report in one of FORMATS, each the function of its name in the module of its name."""
    module = importlib.import_module(f"bnaudit.render.{name}")
    return str(getattr(module, name)(report))


def _tell_github(report: Report, *, stderr: bool) -> None:
    """Appends to the job's summary and annotates files, if this is a job of GitHub Actions."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        from bnaudit.render.markdown import markdown

        path = Path(summary)
        try:
            room = SUMMARY_BYTES - (path.stat().st_size if path.exists() else 0)
            text = markdown(report, most_bytes=room)
            if len(text.encode()) <= room:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
        except OSError as error:
            click.echo(f"bnaudit: no job summary: {error.strerror} ({path})", err=True)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        from bnaudit.render.markdown import workflow_commands

        for line in workflow_commands(report):
            click.echo(line, err=stderr)
