"""What the commands share: exit codes, errors as one sentence, signals, and where text goes.

Only click is imported at once, so that `bnaudit --help` is immediate.
"""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

USAGE, INCOMPLETE, UNTRUSTED, INTERRUPTED = 2, 3, 4, 130
"""Exit codes; the audit itself decides on the others."""

PATHS = click.argument("paths", nargs=-1, metavar="[PATH]...")


class Failure(click.ClickException):
    """An error that ends the command with its own exit code."""

    def __init__(self, message: str, code: int) -> None:
        """Takes the sentence that is shown, and the exit code."""
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def explained(verbose: bool = False) -> Iterator[None]:
    """Turns whatever is raised into one sentence and an exit code; verbose: after the traceback."""
    try:
        yield
    except (click.ClickException, BrokenPipeError):
        raise
    except Exception as error:
        from bnaudit.environments import EnvironmentSpecError
        from bnaudit.reference import EnvironmentFaultError
        from bnaudit.report import ReportError
        from bnaudit.scenario import ScenarioError
        from bnaudit.selection import SelectionError
        from bnaudit.subject import SubjectError

        if isinstance(error, EnvironmentSpecError | ReportError | ScenarioError | SelectionError):
            raise Failure(str(error), USAGE) from error
        if isinstance(error, SubjectError):
            raise Failure(str(error), INCOMPLETE) from error
        if isinstance(error, EnvironmentFaultError):
            raise Failure(str(error), UNTRUSTED) from error
        if verbose:
            traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error} (-v shows where)"
        raise Failure(message, INCOMPLETE) from error


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes the first of Ctrl-C, SIGTERM and SIGHUP a KeyboardInterrupt, and ignores what follows.

    Signals that the caller has us ignore (nohup) stay ignored.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if previous[number] is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        for other in heeded:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, previous[number])


def console(*, stderr: bool = False) -> Console:
    """Where renderables are printed: plain text but for the styles they name."""
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1 here
            raise BrokenPipeError

    return QuietConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def show(renderable: RenderableType) -> None:
    """Prints on stdout."""
    console().print(renderable)


def announce(text: str) -> None:
    """Says on stderr what is going on."""
    click.echo(f"bnaudit: {text}", err=True)


def save(destination: str | None, text: str) -> None:
    """Writes a text where an option says: nowhere, to stdout (-) or into a file."""
    from bnaudit.report import ReportError

    if destination == "-":
        click.echo(text, nl=False)
    elif destination is not None:
        try:
            Path(destination).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReportError(f"cannot write {destination}: {error.strerror}") from error
