"""The command line: the only place that reads arguments, prints and exits.

Only click is imported at once, so that `bnaudit --help` is immediate.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit import __version__

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from bnaudit.audit import ControlOutcome, Event, Result, Selected
    from bnaudit.compare import FailOn
    from bnaudit.probe import MemoryFormat
    from bnaudit.progress import CaseProgress
    from bnaudit.report import CaseRecord, Environment, Report, ResultRecord, Writer
    from bnaudit.scenario import Dtype, Scenario

USAGE, INCOMPLETE, UNTRUSTED, INTERRUPTED = 2, 3, 4, 130
"""Exit codes; the audit itself decides on the others."""

CHECKS = ("repeat", "threads", "channels", "batch-order", "inference", "backends")
"""Those of bnaudit.consistency, which loads too much for --help."""

PATHS = click.argument("paths", nargs=-1, metavar="[PATH]...")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; an error is one line on stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # σ and × in a locale that has neither
    try:
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
        code = error.code if isinstance(error, _Failure) else USAGE
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


class _Failure(click.ClickException):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def _explained(verbose: bool = False) -> Iterator[None]:
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
            raise _Failure(str(error), USAGE) from error
        if isinstance(error, SubjectError):
            raise _Failure(str(error), INCOMPLETE) from error
        if isinstance(error, EnvironmentFaultError):
            raise _Failure(str(error), UNTRUSTED) from error
        if verbose:
            traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error} (-v shows where)"
        raise _Failure(message, INCOMPLETE) from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
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


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]}, epilog="Start with: bnaudit run smoke"
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Audits BatchNorm implementations numerically against a certified float64 reference."""


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds", context, parameter)
    return value


# --- run -------------------------------------------------------------------------------------------


@cli.command(
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
    callback=_finite,
    default=60.0,
    show_default=True,
    help="Seconds a backend has for a case; five times as many for its first, which may compile.",
)
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
    "--fail-on",
    type=click.Choice(["fail", "warn", "never"]),
    default="fail",
    show_default=True,
    help="The deviation that exits with 1.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Every row and every finding, with whole tracebacks."
)
def run(
    paths: tuple[str, ...],
    backends: tuple[str, ...],
    specifications: tuple[str, ...],
    expression: str | None,
    required: tuple[str, ...],
    threads: int,
    timeout: float,
    stop_early: bool,
    consistency: bool,
    checks: tuple[str, ...],
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
        raise click.UsageError("-q and -v exclude each other", click.get_current_context())
    with _explained(verbose), _interruptible():
        _find_cache()
        from bnaudit import audit, environments, selection
        from bnaudit.progress import CaseProgress
        from bnaudit.report import Writer
        from bnaudit.scenario import load
        from bnaudit.subject import Subject, scratch_folder
        from bnaudit.worker.backends import BACKENDS

        matches = selection.matcher(expression) if expression is not None else _anything
        scenarios = load(paths)
        places = [
            environments.resolve(name, spec, _announce)
            for name, spec in environments.parse_all(specifications)
        ]
        names = [place.name for place in places]
        selected = selection.select(backends, required, BACKENDS, names)
        path = Path(target) if target not in (None, "-") else None
        writer = Writer(path, ["bnaudit", *sys.argv[1:]])
        with scratch_folder() as scratch, contextlib.ExitStack() as stack:

            def start(threads: int) -> environments.AnySubject:
                make = functools.partial(Subject, threads=threads, timeout=timeout, scratch=scratch)
                current = stack.enter_context(make())
                if not places:
                    return current
                others = {
                    place.name: stack.enter_context(make(name=place.name, command=place.command))
                    for place in places
                }
                return environments.Subjects({environments.CURRENT: current, **others})

            subject, other = start(threads), start(1 if threads > 1 else 2)
            reasons = subject.describe([backend.name for backend in selected])
            if places and not backends:
                selected = _available(selected, reasons, names)
            environment, *rest = map(writer.add_environment, subject.environments())
            writer.missing = {
                b.name: why for b in selected if b.required and (why := reasons[b.name])
            }
            screen = _Screen(stderr=target == "-", verbose=verbose)
            cases = screen.open(environment, scenarios, selected, reasons, matches, writer.missing)
            for place in rest:
                screen.say(f"{place.name}: {place.summary()}")
            if not cases:
                screen.say(f"no case and backend match -k {expression!r}")
            events = audit.run(
                scenarios,
                selected,
                subject,
                scratch,
                matches=matches,
                stop_early=stop_early,
                checks=frozenset(CHECKS if consistency else checks),
                other=other,
            )
            results, controls, end = _follow(
                events, writer, screen, CaseProgress(cases, quiet=quiet)
            )
        writer.unmade = audit.unmade(writer.consistency, checks)
        summary = audit.summarize(
            len(writer.cases),
            results,
            controls,
            selected,
            reasons,
            checks=writer.consistency,
            asked=checks,
            fail_on=fail_on,
            interrupted=end is not None,
        )
        report = writer.finish(summary.verdict, summary.exit_code)
        if target == "-":
            sys.stdout.buffer.write(writer.text())
        if end is None:
            if len(report.cases) < cases:
                screen.say("stopped at the first gated failure (-x)")
            screen.close(report)
            if path is not None:
                screen.say(f"report {path}")
        elif isinstance(end, BrokenPipeError):
            raise end
        else:
            saved = f", which are in {path}" if path is not None else ""
            click.echo(f"bnaudit: interrupted after {len(results)} results{saved}", err=True)
        return summary.exit_code


def _announce(text: str) -> None:
    click.echo(f"bnaudit: {text}", err=True)


def _available(
    selected: Sequence[Selected], reasons: Mapping[str, str | None], environments: Sequence[str]
) -> list[Selected]:
    """Of backends that nobody named, those that other environments have; each must have one."""
    for name in environments:
        own = {b.name: reasons[b.name] for b in selected if b.name.startswith(f"{name}:")}
        if None not in own.values():
            first, reason = next(iter(own.items()))
            raise _Failure(
                f"{name} has no framework that bnaudit knows; {first}: {reason}", INCOMPLETE
            )
    return [backend for backend in selected if backend.required or reasons[backend.name] is None]


def _anything(case: str, backend: str) -> bool:
    return True


def _follow(
    events: Iterable[Event], writer: Writer, screen: _Screen, progress: CaseProgress
) -> tuple[list[Result], list[ControlOutcome], BaseException | None]:
    """Saves what happens and shows each scenario when it is complete.

    Returns the results, the controls' outcomes, and what ended the audit early, if anything did.
    """
    from bnaudit.audit import CaseFacts, Result
    from bnaudit.consistency import Consistency, Disagreement

    results: list[Result] = []
    controls: list[ControlOutcome] = []
    pending: list[ResultRecord] = []

    def show() -> None:
        writer.save()
        with progress.aside():
            screen.rows(pending, writer.cases)
        pending.clear()

    scenario = None
    try:
        with progress:
            for event in events:
                if isinstance(event, CaseFacts):
                    if event.case.scenario != scenario and pending:
                        show()
                    scenario = event.case.scenario
                    writer.add_case(event)
                    progress.case(event.case.id)
                elif isinstance(event, Result):
                    results.append(event)
                    pending.append(writer.add_result(event))
                elif isinstance(event, Disagreement):
                    writer.add_disagreement(event)
                elif isinstance(event, Consistency):
                    writer.add_consistency(event)
                else:
                    controls.append(event)
                    writer.add_control(event)
                    if pending:
                        show()
            if pending:
                show()
    except (KeyboardInterrupt, BrokenPipeError) as end:
        return results, controls, end
    finally:
        writer.save()
    return results, controls, None


class _Screen:
    """What a run prints, from the first line to the verdict."""

    def __init__(self, *, stderr: bool, verbose: bool) -> None:
        self._console = _console(stderr=stderr)
        self._verbose = verbose
        self._has_heading = False

    def open(
        self,
        environment: Environment,
        scenarios: Sequence[Scenario],
        selected: Sequence[Selected],
        reasons: Mapping[str, str | None],
        matches: Callable[[str, str], bool],
        missing: Mapping[str, str],
    ) -> int:
        """Says what will run and on what, fixes the table's columns, and returns the number of cases."""
        from bnaudit.render.console import Layout, opening

        cases = [
            sum(any(matches(case.id, s.name) for s in selected) for case in scenario.cases)
            for scenario in scenarios
        ]
        controls = {
            name
            for scenario in scenarios
            for name in (*scenario.controls.must_fail, *scenario.controls.must_pass)
        }
        names = [backend.name for backend in selected]
        self._layout = Layout.fit(
            self._console.width,
            [scenario.name for scenario in scenarios],
            [*names, *controls],
            max(cases, default=0),
        )
        gated = [backend.name for backend in selected if backend.gated]
        specimens = {*names, *controls} - {*gated}
        available = [name for name in gated if reasons[name] is None]
        for line in opening(environment, sum(cases), available, missing, bool(specimens)):
            self._console.print(line)
        return sum(cases)

    def rows(self, results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord]) -> None:
        """Prints the table's lines of one scenario."""
        from bnaudit.render.console import heading, rows

        lines = rows(self._layout, results, cases, verbose=self._verbose)
        if lines and not self._has_heading:
            self._has_heading = True
            lines.insert(0, heading(self._layout))
        for line in lines:
            self._console.print(line, no_wrap=True, overflow="crop")

    def close(self, report: Report) -> None:
        """Prints what follows the table."""
        from bnaudit.render.console import closing

        for part in closing(report, verbose=self._verbose):
            self._console.print(part)

    def say(self, text: str) -> None:
        """Prints a remark."""
        self._console.print(text, style="dim")


# --- compare ---------------------------------------------------------------------------------------


@cli.command(
    epilog="Exit: 0 no regression, 1 regression, 2 usage, 3 inputs differ, 5 nothing in common, 130."
)
@click.argument("old")
@click.argument("new")
@click.option(
    "--factor",
    type=click.FloatRange(min=1),
    default=4.0,
    show_default=True,
    help="Growth of ×bound from which on a deviation above the tight bound is a regression.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["regression", "change", "never"]),
    default="regression",
    show_default=True,
    help="What exits with 1, in a gated backend.",
)
@click.option(
    "--map",
    "renamed",
    multiple=True,
    metavar="OLD=NEW",
    help="Compare OLD's backend with NEW's backend of another name; repeatable.",
)
@click.option("--json", "target", metavar="FILE", help="Save the comparison as JSON; - for stdout.")
@click.option("--markdown", metavar="FILE", help="Save it as Markdown; - for stdout.")
def compare(
    old: str,
    new: str,
    factor: float,
    fail_on: FailOn,
    renamed: tuple[str, ...],
    target: str | None,
    markdown: str | None,
) -> int:
    """Shows what changed between two reports, the worst first.

    OLD and NEW are files that bnaudit run --json wrote.
    """
    context = click.get_current_context()
    if not math.isfinite(factor):
        raise click.UsageError(f"--factor takes a finite number, not {factor}", context)
    if target == "-" == markdown:
        raise click.UsageError("only one of --json and --markdown can be -", context)
    with _explained(), _interruptible():
        from bnaudit import compare as comparing
        from bnaudit.render import comparison as rendering
        from bnaudit.report import load

        names = {}
        for pair in renamed:
            before, equals, after = pair.partition("=")
            if not (before and equals and after):
                raise click.UsageError(f"--map takes OLD=NEW, not {pair!r}", context)
            names[before] = after
        reports = load(Path(old)), load(Path(new))
        try:
            found = comparing.compare(*reports, factor=factor, renamed=names, fail_on=fail_on)
        except comparing.ComparisonError as error:
            raise click.UsageError(str(error), context) from error
        cases = {case.id: case for case in reports[1].cases}
        console = _console(stderr="-" in (target, markdown))
        for part in rendering.comparison(found, cases):
            console.print(part)
        for destination, text in (
            (target, f"{found.model_dump_json(indent=1)}\n"),
            (markdown, rendering.markdown(found, cases)),
        ):
            _save(destination, text)
        return found.exit_code


def _save(destination: str | None, text: str) -> None:
    """Writes a text where an option says: nowhere, to stdout (-) or into a file."""
    from bnaudit.report import ReportError

    if destination == "-":
        click.echo(text, nl=False)
    elif destination is not None:
        try:
            Path(destination).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReportError(f"cannot write {destination}: {error.strerror}") from error


# --- probe -----------------------------------------------------------------------------------------


@cli.command(epilog="Exit: 0, 2 usage, 3 unavailable, crashed or without a mean, 130.")
@click.argument("backend")
@click.option(
    "--size",
    type=click.IntRange(3, 256),
    default=32,
    show_default=True,
    help="Values per channel: every pair of them is asked about, in a channel of its own.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images that these values are spread over, in equal shares.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--memory-format",
    type=click.Choice(["contiguous", "channels_last", "strided"]),
    default="contiguous",
    show_default=True,
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Threads of the backend: orders depend on them.",
)
@click.option("--json", "target", metavar="FILE", help="Save the finding as JSON; - for stdout.")
def probe(
    backend: str,
    size: int,
    images: int,
    dtype: Dtype,
    memory_format: MemoryFormat,
    threads: int,
    target: str | None,
) -> None:
    """Shows in which order a backend adds up its mean, and in how many bits.

    BACKEND is one of bnaudit list, FILE.py:NAME or package.module:NAME.
    """
    context = click.get_current_context()
    if size % images:
        raise click.UsageError(f"{size} values cannot be shared by {images} images", context)
    if memory_format == "channels_last" and size == images:
        raise click.UsageError("channels_last takes several values in each image", context)
    with _explained(), _interruptible():
        from bnaudit import probe as probing
        from bnaudit.render.tree import finding_text
        from bnaudit.report import ReportError
        from bnaudit.subject import Subject, scratch_folder

        name = _one_backend(backend)
        setting = probing.Setting(images, size // images, dtype, memory_format)
        with scratch_folder() as scratch, Subject(threads=threads, scratch=scratch) as subject:
            try:
                finding = probing.probe(name, setting, subject, scratch)
            except probing.ProbeError as error:
                raise _Failure(str(error), INCOMPLETE) from error
            text = finding.to_json(threads, subject.environment())
        console = _console(stderr=target == "-")
        console.print(finding_text(finding, threads, console.width))
        if target == "-":
            click.echo(text)
        elif target is not None:
            try:
                Path(target).write_bytes(text)
            except OSError as error:
                raise ReportError(f"cannot write {target}: {error.strerror}") from error


def _one_backend(given: str) -> str:
    """The backend of this name; without a device, that on the cpu."""
    from bnaudit.selection import select
    from bnaudit.worker.backends import BACKENDS

    named = [backend.name for backend in select([given], [], BACKENDS) if backend.required]
    if len(named) != 1:
        raise click.UsageError(
            f"{given!r} is not the name of one backend", click.get_current_context()
        )
    return named[0]


# --- list, doctor, schema --------------------------------------------------------------------------


@cli.command("list")
@click.argument(
    "what",
    type=click.Choice(["backends", "scenarios", "cases", "environments"]),
    default="backends",
    metavar="[WHAT]",
)
@PATHS
@click.option("--prune", is_flag=True, help="Remove the environments that were built (--env).")
def list_(what: str, paths: tuple[str, ...], prune: bool) -> None:
    """Lists backends (the default), scenarios, cases or built environments.

    PATH limits scenarios and cases, as in bnaudit run.
    """
    with _explained(), _interruptible():
        if paths and what in ("backends", "environments"):
            raise click.UsageError(f"list {what} takes no PATH", click.get_current_context())
        if prune and what != "environments":
            raise click.UsageError(
                "--prune belongs to list environments", click.get_current_context()
            )
        if what == "backends":
            _list_backends()
            return
        if what == "environments":
            _list_environments(prune)
            return
        from bnaudit.render.console import scenario_list
        from bnaudit.scenario import load

        scenarios = load(paths)
        if what == "scenarios":
            _print(scenario_list([(s.name, len(s.cases), s.description) for s in scenarios]))
        else:
            for scenario in scenarios:
                for case in scenario.cases:
                    click.echo(case.id)


def _list_backends() -> None:
    from bnaudit.render.console import backend_list
    from bnaudit.subject import Subject, scratch_folder
    from bnaudit.worker.backends import BACKENDS

    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        reasons = subject.describe(list(BACKENDS))
    entries = [
        (name, backend.kind, backend.default, reasons[name], backend.summary)
        for name, backend in BACKENDS.items()
    ]
    _print(backend_list(entries))


def _list_environments(prune: bool) -> None:
    from bnaudit import environments

    for folder, request in environments.built():
        click.echo(f"{request['python']} {' '.join(request['requirements'])}\n    {folder}")
    if prune:
        click.echo(f"removed {len(environments.prune())} from {environments.cache_folder()}")
    elif not any(environments.built()):
        click.echo(f"none built yet; they would be in {environments.cache_folder()}")


@cli.command()
@click.argument("what", type=click.Choice(["scenario", "report"]), default="scenario")
def schema(what: str) -> None:
    """Prints the JSON Schema of scenario files or of the report."""
    with _explained():
        if what == "scenario":
            from bnaudit.scenario import json_schema
        else:
            from bnaudit.report import json_schema
        click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@cli.command()
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def doctor(threads: int) -> int:
    """Shows what an audit would run on here, and what is missing."""
    with _explained(), _interruptible():
        from bnaudit.doctor import examine
        from bnaudit.render.console import examination

        found = examine(threads)
        _print(examination(found))
        return UNTRUSTED if any(entry.is_fault for entry in found) else 0


def _find_cache() -> None:
    """Gives Numba a folder for compiled code where it would find none that it may write to."""
    own = Path(__file__).parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    nearest = next(path for path in (home, *home.parents) if path.exists())
    if not any(os.access(path, os.W_OK) for path in (own, nearest)):
        folder = Path(tempfile.gettempdir(), f"bnaudit-numba-{os.getuid()}")
        os.environ.setdefault("NUMBA_CACHE_DIR", str(folder))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1 here
            raise BrokenPipeError

    return QuietConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


def _print(renderable: RenderableType) -> None:
    _console().print(renderable)
