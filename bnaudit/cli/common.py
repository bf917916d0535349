"""What the commands share: exit codes, errors as one sentence, signals, and where text goes.

Only click is imported at once, so that `bnaudit --help` is immediate.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

USAGE, INCOMPLETE, UNTRUSTED, INTERRUPTED = 2, 3, 4, 130
"""Exit codes; the audit itself decides on the others."""

CONFIG = click.option(
    "--config",
    metavar="FILE",
    help="Settings in YAML or TOML. Default: bnaudit.yaml, or [tool.bnaudit] in pyproject.toml.",
)

PATHS = click.argument("paths", nargs=-1, metavar="[PATH]...")


REPLACES = frozenset({("--json", "REPORT"), ("--write-baseline", "--baseline")})
"""What may be written over what was read."""

Command = TypeVar("Command", bound=Callable[..., Any])


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
        from bnaudit.building import BuildError
        from bnaudit.certified import EnvironmentFaultError
        from bnaudit.config import ConfigError
        from bnaudit.environments import EnvironmentSpecError
        from bnaudit.report import ReportError
        from bnaudit.scenario import ScenarioError
        from bnaudit.selection import SelectionError
        from bnaudit.subject import SubjectError

        if isinstance(
            error,
            ConfigError | EnvironmentSpecError | ReportError | ScenarioError | SelectionError,
        ):
            raise Failure(str(error), USAGE) from error
        if isinstance(error, BuildError):
            if error.output:
                click.echo(error.output, err=True)
            raise Failure(str(error), INCOMPLETE) from error
        if isinstance(error, SubjectError):
            raise Failure(str(error), INCOMPLETE) from error
        if isinstance(error, EnvironmentFaultError):
            raise Failure(str(error), UNTRUSTED) from error
        if verbose:
            traceback.print_exc()
        if isinstance(error, OSError):  # no room, no folder to write to
            message = f"the system refuses: {error} (-v shows where)"
        else:
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


def find_cache() -> None:
    """Gives Numba a folder for compiled code where it would find none that it may write to."""
    own = Path(__file__).parent.parent
    known = os.environ.get("XDG_CACHE_HOME")
    home = Path(known or os.path.expanduser("~/.cache"))  # noqa: PTH111 - there may be no home
    nearest = next(path for path in (home, *home.parents) if path.exists())
    if not any(os.access(path, os.W_OK) for path in (own, nearest)):
        folder = Path(tempfile.gettempdir(), f"bnaudit-numba-{os.getuid()}")
        os.environ.setdefault("NUMBA_CACHE_DIR", str(folder))


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds", context, parameter)
    return value


def limits(command: Command) -> Command:
    """The options that say how backends run."""
    threads = click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=2,
        show_default=True,
        help="Threads of the backends: results depend on them.",
    )
    timeout = click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        callback=_finite,
        default=60.0,
        show_default=True,
        help="Seconds a backend has for a case; five times as many to be imported (30 at least) and for its "
        "first, which may compile.",
    )
    return threads(timeout(command))


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


Files = Iterable[tuple[str, str | Path | None]]
"""Files, or - or none, each behind the name that it has on the command line."""


def make_room(written: Files, read: Files = ()) -> None:
    """Makes the folders of the files to be written, and sees before any work that they can be.

    Raises click.UsageError where one of them is another one or is read, and ReportError where it cannot be
    written.
    """
    from bnaudit.report import ReportError

    taken = [(name, Path(file).resolve()) for name, file in read if file is not None]
    for option, file in written:
        if file is None or str(file) == "-":
            continue
        path = Path(file)
        if path.is_dir():
            raise ReportError(f"cannot write {path}: it is a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ReportError(f"cannot write {path}: {path.parent} is no folder") from None
        except OSError as error:
            raise ReportError(
                f"cannot write {path}: {error.strerror} ({error.filename})"
            ) from error
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ReportError(f"cannot write {path}: permission denied")
        if path.exists() and not path.is_file():
            continue  # a device or pipe takes several
        for name, other in taken:
            if path.resolve() == other and (option, name) not in REPLACES:
                raise click.UsageError(
                    f"{option} would overwrite {name}, which is {file} as well",
                    click.get_current_context(),
                )
        taken.append((option, path.resolve()))


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
