"""An audit from its environments to its report, for the commands that run one."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnaudit.cli.common import INCOMPLETE, Failure

if TYPE_CHECKING:
    from bnaudit import environments
    from bnaudit.audit import Earlier, Event, Selected
    from bnaudit.baseline import Baseline
    from bnaudit.building import Watch
    from bnaudit.cli.screen import Screen
    from bnaudit.progress import CaseProgress
    from bnaudit.report import FailOn, Report, ResultRecord
    from bnaudit.scenario import Scenario
    from bnaudit.writer import Writer


@dataclass(frozen=True)
class Audit:
    """What is to be audited, where and how: scenarios × backends × environments.

    specifications: of other environments, by name; those without a selected backend are not even built.
    backends, required, expression: as given with -b, --require and -k.
    checks: those of consistency that are made; must_check: those that were asked for one by one.
    baseline: known deviations that are accepted.
    """

    scenarios: Sequence[Scenario]
    specifications: Mapping[str, str]
    backends: Sequence[str]
    path: Path | None
    threads: int
    timeout: float
    required: Sequence[str] = ()
    expression: str | None = None
    stop_early: bool = False
    checks: Sequence[str] = ()
    must_check: Sequence[str] = ()
    fail_on: FailOn = "fail"
    baseline: Baseline | None = None
    resume: bool = False

    def conduct(
        self, screen: Screen, *, quiet: bool
    ) -> tuple[Report, Writer, BaseException | None]:
        """Runs it, showing and saving results as they come.

        Returns the report, its writer, and what ended the audit early, if anything did.
        """
        from bnaudit import audit, environments, selection, sources
        from bnaudit.progress import CaseProgress, watch
        from bnaudit.subject import scratch_folder
        from bnaudit.worker.backends import BACKENDS
        from bnaudit.writer import Writer

        names = list(self.specifications)
        selected = selection.select(self.backends, self.required, BACKENDS, names)
        matches = _anything if self.expression is None else selection.matcher(self.expression)
        used = {environments.split(backend.name, names)[0] for backend in selected}
        places, unbuilt = _resolved(
            {name: spec for name, spec in self.specifications.items() if name in used},
            watch(quiet=quiet),
        )
        with scratch_folder() as scratch, contextlib.ExitStack() as stack:
            subject = self._start(self.threads, places, unbuilt, scratch, stack)
            other = self._start(1 if self.threads > 1 else 2, places, unbuilt, scratch, stack)
            reasons = subject.describe([backend.name for backend in selected])
            selected = self._present(selected, reasons)
            found = subject.environments()
            earlier, kept = self._earlier(found)
            writer = Writer(self.path, ["bnaudit", *sys.argv[1:]], kept=kept)
            current, *others = map(writer.add_environment, found)
            for backend in selected:
                place = sources.place_of(environments.split(backend.name, names)[1])
                if place is not None:
                    writer.places[backend.name] = place
                reason = reasons[backend.name]
                if backend.required and reason is not None:
                    writer.missing[backend.name] = reason
            cases = screen.open(current, self.scenarios, selected, reasons, matches, writer.missing)
            for environment in others:
                screen.say(f"{environment.name}: {environment.summary()}")
            if not cases:
                screen.say(f"no case and backend match -k {self.expression!r}")
            events = audit.run(
                self.scenarios,
                selected,
                subject,
                scratch,
                matches=matches,
                stop_early=self.stop_early,
                checks=frozenset(self.checks),
                other=other,
                earlier=earlier,
            )
            progress = CaseProgress(cases, quiet=quiet)
            end = _follow(events, writer, screen, progress)
        report = self._concluded(writer, interrupted=end is not None)
        if end is None and len(report.cases) < cases:
            screen.say("stopped at the first gated failure (-x)")
        return report, writer, end

    def _present(
        self, selected: Sequence[Selected], reasons: Mapping[str, str | None]
    ) -> list[Selected]:
        """The selected backends without those that another environment does not have.

        Kept are those that were named themselves, which are then missing.
        """
        from bnaudit.environments import CURRENT, split

        names = list(self.specifications)
        if names and not self.backends:
            selected = _available(selected, reasons, names)
        return [
            backend
            for backend in selected
            if backend.required
            or reasons[backend.name] is None
            or split(backend.name, names)[0] == CURRENT
        ]

    def _concluded(self, writer: Writer, *, interrupted: bool) -> Report:
        """The report with what the baseline accepts, and the verdict."""
        from bnaudit import audit, baseline

        writer.unmade = audit.unmade(writer.consistency, self.must_check)
        writer.fail_on = self.fail_on
        kept: Sequence[ResultRecord] = writer.results
        if self.baseline is not None:
            kept, writer.notes = baseline.accept(
                self.baseline,
                kept,
                writer.cases,
                writer.environments,
                today=date.today(),
                fail_on=self.fail_on,
            )
        verdict, code = audit.conclude(
            kept,
            controls_ok=all(control.ok for control in writer.controls),
            missing=writer.missing,
            checks=writer.consistency,
            unmade=writer.unmade,
            fail_on=self.fail_on,
            interrupted=interrupted,
        )
        return writer.finish(verdict, code, kept)

    def _earlier(self, environments: Sequence[Mapping[str, Any]]) -> tuple[Earlier, int]:
        """What an interrupted report of the same name holds, where it is to be continued; how many results."""
        from bnaudit import resume
        from bnaudit.report import Environment, ReportError, load

        if not self.resume or self.path is None or not self.path.exists():
            return (lambda case, backends: None), 0
        before = load(self.path)
        records = [Environment.model_validate(found) for found in environments]
        try:
            known = resume.earlier(before, self.scenarios, records, self.checks)
        except resume.ResumeError as error:
            raise ReportError(
                f"cannot resume {self.path}: {error}; without --resume it is begun anew"
            ) from error
        return known, len(before.results)

    def _start(
        self,
        threads: int,
        places: Sequence[environments.Environment],
        unbuilt: Mapping[str, environments.Missing],
        scratch: Path,
        stack: contextlib.ExitStack,
    ) -> environments.AnySubject:
        from bnaudit.environments import CURRENT, Subjects
        from bnaudit.subject import Subject

        make = functools.partial(Subject, threads=threads, timeout=self.timeout, scratch=scratch)
        current = stack.enter_context(make())
        if not places and not unbuilt:
            return current
        others = {
            place.name: stack.enter_context(make(name=place.name, command=place.command))
            for place in places
        }
        return Subjects({CURRENT: current, **others}, unbuilt)


def _resolved(
    specifications: Mapping[str, str], watch: Watch
) -> tuple[list[environments.Environment], dict[str, environments.Missing]]:
    """The environments, and those that cannot be built, which cost only what was to run in them.

    Raises BuildError where there is no other.
    """
    from bnaudit.building import BuildError
    from bnaudit.environments import Missing, resolve

    places, missing = [], {}
    for name, spec in specifications.items():
        try:
            places.append(resolve(name, spec, watch))
        except BuildError as error:
            if len(specifications) == 1:
                raise
            click.echo(f"{error.output}\nbnaudit: {error}", err=True)
            missing[name] = Missing(str(error))
    return places, missing


def _available(
    selected: Sequence[Selected], reasons: Mapping[str, str | None], environments: Sequence[str]
) -> list[Selected]:
    """Of backends that nobody named, those that other environments have.

    Of an environment that has none, the one that comes nearest, as required: so that the audit goes on
    without it, but is not complete.
    """
    kept = [backend for backend in selected if backend.required or reasons[backend.name] is None]
    for name in environments:
        own = [b for b in selected if b.name.startswith(f"{name}:")]
        if not any(backend in kept for backend in own):
            # One that is there but broken tells more than one that is not.
            nearest = min(own, key=lambda b: "not installed" in (reasons[b.name] or ""))
            kept.append(replace(nearest, required=True))
    if all(reasons[backend.name] is not None for backend in kept):
        first = kept[0].name
        name = first.partition(":")[0]
        raise Failure(
            f"{name} has no framework that bnaudit knows; {first}: {reasons[first]}", INCOMPLETE
        )
    return kept


def _anything(case: str, backend: str) -> bool:
    return True


def _follow(
    events: Iterable[Event], writer: Writer, screen: Screen, progress: CaseProgress
) -> BaseException | None:
    """Saves what happens and shows each scenario when it is complete.

    Returns what ended the audit early, if anything did.
    """
    from bnaudit.audit import CaseFacts, Result
    from bnaudit.consistency import Consistency, Disagreement

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
                    pending.append(writer.add_result(event))
                elif isinstance(event, Disagreement):
                    writer.add_disagreement(event)
                elif isinstance(event, Consistency):
                    writer.add_consistency(event)
                else:
                    writer.add_control(event)
                    if pending:
                        show()
            if pending:
                show()
    except (KeyboardInterrupt, BrokenPipeError) as end:
        return end
    finally:
        writer.save()
    return None
