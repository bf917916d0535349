"""Shows on stderr how far a run or a build is: live on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

INTERVAL = 10.0
"""Seconds between two lines where no bar can be drawn."""


class CaseProgress:
    """Counts the cases of a run. A context manager; nothing is shown when quiet."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        """total: cases to come."""
        self._total = total
        self._done = -1
        self._bar: Progress | None = None
        self._lines = not quiet
        self._line_at = self._start = time.monotonic()
        if not quiet and _is_live():
            self._lines = False
            console = _terminal()
            self._bar = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> CaseProgress:
        """Draws the bar, where there is one."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()

    def case(self, name: str) -> None:
        """A case begins; the one before it is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=name)
        elif self._lines and time.monotonic() - self._line_at >= INTERVAL:
            self._line_at = time.monotonic()
            seconds = self._line_at - self._start
            print(f"{self._done}/{self._total} cases, {seconds:.0f} s: {name}", file=sys.stderr)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the bar away while something is printed, which may go to the same terminal."""
        if self._bar is not None:
            self._bar.stop()
        yield
        if self._bar is not None:
            self._bar.start()


def watch(*, quiet: bool) -> Callable[[str], AbstractContextManager[Callable[[str], None]]]:
    """What shows a build: its headline, and the installer's line of the moment. Nothing when quiet."""

    @contextmanager
    def watched(headline: str) -> Iterator[Callable[[str], None]]:
        start = time.monotonic()
        if quiet:
            yield lambda line: None
        elif _is_live():
            console = _terminal()
            with console.status("") as status:

                def update(line: str) -> None:
                    text = Text(f"{headline} {time.monotonic() - start:.0f} s: {line}")
                    text.truncate(console.width - 2, overflow="ellipsis")
                    status.update(text)

                update("")
                yield update
        else:
            print(f"bnaudit: {headline}", file=sys.stderr)
            line_at = start

            def tell(line: str) -> None:
                nonlocal line_at
                if time.monotonic() - line_at >= INTERVAL:
                    line_at = time.monotonic()
                    print(f"  {line_at - start:.0f} s: {line}", file=sys.stderr)

            yield tell
            print(f"  done in {time.monotonic() - start:.0f} s", file=sys.stderr)

    return watched


def _is_live() -> bool:
    """Whether lines on stderr can be drawn over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _terminal() -> Console:
    console = Console(stderr=True)
    console.width -= len("^C ")  # which the terminal echoes; a full line would break there
    return console
