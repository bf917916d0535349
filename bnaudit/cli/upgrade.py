"""bnaudit upgrade."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import (
    CONFIG,
    INCOMPLETE,
    PATHS,
    Failure,
    explained,
    interruptible,
    limits,
    make_room,
    save,
)
from bnaudit.cli.compare import judged_by, present, refuse_contradictions, saved_as
from bnaudit.cli.conduct import Audit
from bnaudit.cli.screen import Screen

if TYPE_CHECKING:
    from bnaudit.audit import Selected
    from bnaudit.compare import FailOn
    from bnaudit.report import CaseRecord, Environment, Report, ResultRecord
    from bnaudit.scenario import Scenario

SIDES = ("old", "new")
"""The names of the two environments, within the audit."""


@click.command(
    epilog="Exit: 0 no regression, 1 regression, 2 usage, 3 cannot be built or run, 4 untrusted, "
    "5 nothing in common, 130."
)
@click.argument("old")
@click.argument("new")
@PATHS
@click.option(
    "--backend",
    "-b",
    "backends",
    multiple=True,
    metavar="BACKEND",
    help="A backend of both, also a plug-in; repeatable. Default: those of the packages that OLD and NEW "
    "name, or every framework that one of them has.",
)
@CONFIG
@judged_by
@limits
@click.option("--reports", metavar="FOLDER", help="Keep both reports, as old.json and new.json.")
@saved_as
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def upgrade(
    old: str,
    new: str,
    paths: tuple[str, ...],
    backends: tuple[str, ...],
    config: str | None,
    factor: float,
    fail_on: FailOn,
    threads: int,
    timeout: float,
    reports: str | None,
    target: str | None,
    markdown: str | None,
    quiet: bool,
) -> int:
    """Shows what an upgrade changes: runs OLD and NEW on the same inputs and compares them.

    OLD and NEW are requirements such as 'onnxruntime==1.20.1' or 'python3.10 torch==2.4.0 numpy<2', which
    are installed into a cache; an interpreter; the folder of a virtual environment; the name of an
    environment in bnaudit.yaml; or current, the interpreter that bnaudit runs in. PATH is what bnaudit run
    takes.
    """
    refuse_contradictions(factor, target, markdown)
    with explained(), interruptible():
        from bnaudit import compare as comparing
        from bnaudit import config as settings
        from bnaudit.scenario import load
        from bnaudit.sides import side

        kept = [("--reports", Path(reports or "") / f"{name}.json") for name in SIDES if reports]
        make_room([("--json", target), ("--markdown", markdown), *kept])
        known = settings.load(config).environments
        specifications = {
            name: known.get(spec, spec) for name, spec in zip(SIDES, (old, new), strict=True)
        }
        scenarios = load(paths)
        chosen = backends or _frameworks(specifications, quiet)
        audit = Audit(
            scenarios=scenarios,
            specifications=specifications,
            backends=[f"{name}:{backend}" for backend in chosen for name in SIDES],
            path=None,
            threads=threads,
            timeout=timeout,
            fail_on="never",
        )
        both, _, end = audit.conduct(Unseen(stderr=True, verbose=False), quiet=quiet)
        if isinstance(end, BrokenPipeError):
            raise end
        before, after = (
            side(both, name, f"bnaudit upgrade, {name}: {spec}")
            for name, spec in specifications.items()
        )
        if reports is not None:
            _keep(Path(reports), {"old": before, "new": after})
        if end is not None:
            raise KeyboardInterrupt
        found = comparing.compare(before, after, factor=factor, fail_on=fail_on)
        code = present(found, after.cases, target, markdown)
        return max(code, both.exit_code) if both.verdict == "untrusted" else code


def _frameworks(specifications: Mapping[str, str], quiet: bool) -> list[str]:
    """The backends to compare: of the packages that are named, or of all, those that either side has.

    Raises Failure where there are none.
    """
    from bnaudit import environments
    from bnaudit.progress import watch
    from bnaudit.selection import frameworks
    from bnaudit.subject import Subject, scratch_folder
    from bnaudit.worker.backends import BACKENDS

    usual = frameworks(BACKENDS)
    named = {
        backend
        for name, spec in specifications.items()
        for backend in environments.frameworks(name, spec, BACKENDS)
    }
    candidates = [backend for backend in usual if backend in named] or usual
    reasons = []
    with scratch_folder() as scratch:
        for name, spec in specifications.items():
            place = environments.resolve(name, spec, watch(quiet=quiet))
            with Subject(name=name, command=place.command, scratch=scratch) as subject:
                reasons.append(subject.describe(candidates))
    able = [backend for backend in candidates if any(reason[backend] is None for reason in reasons)]
    if not able:
        nearest = min(candidates, key=lambda b: "not installed" in (reasons[1][b] or ""))
        raise Failure(
            "neither OLD nor NEW has a framework that bnaudit knows (--backend names another); "
            f"NEW: {nearest}: {reasons[1][nearest]}",
            INCOMPLETE,
        )
    return able


class Unseen(Screen):
    """Of a run of which only the comparison is to be seen."""

    def open(
        self,
        environment: Environment,
        scenarios: Sequence[Scenario],
        selected: Sequence[Selected],
        reasons: Mapping[str, str | None],
        matches: Callable[[str, str], bool],
        missing: Mapping[str, str],
    ) -> int:
        """Returns the number of cases."""
        return sum(len(scenario.cases) for scenario in scenarios)

    def rows(self, results: Sequence[ResultRecord], cases: Mapping[str, CaseRecord]) -> None:
        """Prints nothing."""

    def say(self, text: str) -> None:
        """Prints nothing."""


def _keep(folder: Path, reports: Mapping[str, Report]) -> None:
    """Saves reports in a folder, by their names."""
    from bnaudit.report import ReportError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make the folder {folder}: {error.strerror}") from error
    for name, report in reports.items():
        save(str(folder / f"{name}.json"), report.to_json())
