"""The shipped scenarios on algorithms whose behaviour is known: what the thresholds are worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bnaudit import audit
from bnaudit.audit import ControlOutcome, Result, Selected
from bnaudit.scenario import Scenario, load, shipped
from bnaudit.subject import Subject, scratch_folder

FLOAT64_STATISTICS = f"{Path(__file__).parent / 'plugins' / 'float64_statistics.py'}:batch_norm@cpu"
FAULTLESS = ("exact@cpu", FLOAT64_STATISTICS)
GOOD = ("two-pass@cpu", "welford@cpu", "shifted@cpu")
BAD = ("one-pass@cpu", "caffe-2016@cpu", "two-pass-sequential@cpu")


class Audit:
    """All shipped scenarios on all of these backends."""

    def __init__(self) -> None:
        self.scenarios: Sequence[Scenario] = load([str(shipped())])
        self.results: dict[str, list[Result]] = defaultdict(list)
        self.controls: list[ControlOutcome] = []
        selection = [Selected(name, gated=True) for name in (*FAULTLESS, *GOOD, *BAD)]
        with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
            for event in audit.run(self.scenarios, selection, subject, scratch):
                if isinstance(event, Result):
                    self.results[event.backend].append(event)
                elif isinstance(event, ControlOutcome):
                    self.controls.append(event)

    def failing(self, backend: str) -> dict[str, list[str]]:
        """Scenario → its failing cases, with the reason."""
        found: dict[str, list[str]] = defaultdict(list)
        for result in self.results[backend]:
            if result.status not in ("pass", "warn", "unsupported"):
                found[result.case.scenario].append(
                    f"{result.case.id}: {result.status}: {result.reason}"
                )
        return dict(found)

    def expected(self, backend: str) -> set[str]:
        """The scenarios that list the backend in must_fail."""
        return {s.name for s in self.scenarios if backend in s.controls.must_fail}


@pytest.fixture(scope="module")
def everything() -> Audit:
    return Audit()


def _text(found: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(f"{len(cases)} in {name}, such as {cases[0]}" for name, cases in found.items())


@pytest.mark.parametrize("backend", FAULTLESS, ids=["exact", "float64-statistics"])
def test_a_faultless_implementation_never_fails_and_never_warns(
    everything: Audit, backend: str
) -> None:
    results = everything.results[backend]
    assert sum(r.status == "pass" for r in results) > 300
    wrong = [
        f"{r.case.id}: {r.status}: {r.reason}"
        for r in results
        if r.status not in ("pass", "unsupported")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("backend", GOOD)
def test_a_good_algorithm_fails_where_it_is_known_to_and_nowhere_else(
    everything: Audit, backend: str
) -> None:
    found, expected = everything.failing(backend), everything.expected(backend)
    unexpected = {name: cases for name, cases in found.items() if name not in expected}
    assert not unexpected, _text(unexpected)
    assert expected <= found.keys()


@pytest.mark.parametrize("backend", BAD)
def test_a_bad_algorithm_fails_where_it_should(everything: Audit, backend: str) -> None:
    expected = everything.expected(backend)
    assert expected
    assert expected <= everything.failing(backend).keys()


def test_every_control_of_the_shipped_scenarios_behaves(everything: Audit) -> None:
    assert everything.controls
    assert [c for c in everything.controls if not c.ok] == []
