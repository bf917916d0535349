"""What a run prints, as results come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bnaudit.cli.common import console

if TYPE_CHECKING:
    from bnaudit.audit import Selected
    from bnaudit.report import CaseRecord, Environment, Report, ResultRecord
    from bnaudit.scenario import Scenario


class Screen:
    """What a run prints, from the first line to the verdict."""

    def __init__(self, *, stderr: bool, verbose: bool, path: str | None = None) -> None:
        """verbose: every row and every finding. path: where the report is saved."""
        self._console = console(stderr=stderr)
        self._verbose = verbose
        self._path = None if path == "-" else path
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

        for part in closing(report, verbose=self._verbose, path=self._path):
            self._console.print(part)

    def say(self, text: str) -> None:
        """Prints a remark."""
        self._console.print(text, style="dim")
