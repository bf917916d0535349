"""The self-test: planted faults are found for the right reason, and correct variants are left alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bnaudit import selftest
from bnaudit.cli.selftest import selftest as command
from bnaudit.defects import CORRECT, FAULTS, RESEMBLES
from bnaudit.defects.layer import Array, Call, Layer
from bnaudit.render.selftest import letter
from bnaudit.render.selftest import selftest as render
from bnaudit.scenario import Scenario, load
from bnaudit.selftest import Matrix, Outcome, Task, examine, plan
from bnaudit.worker.backends import BACKENDS

LARGE_OFFSET = "input: {distribution: normal, mean: 1e4}\nshape: [4, 3, 8, 8]\n"
CONSTANT = "input: {distribution: constant, value: 100}\nshape: [2, 3, 8, 8]\n"


def scenario(folder: Path, text: str) -> Scenario:
    path = folder / "s.yaml"
    path.write_text(f"name: s\n{text}")
    [found] = load([str(path)])
    return found


def found_in(folder: Path, text: str, faults: list[str]) -> Outcome:
    """What the only case of a scenario finds, with all correct variants."""
    [task] = plan([scenario(folder, text)], faults)
    return examine(task, folder / "case")


# --- what is planted --------------------------------------------------------------------------------


def test_every_fault_says_in_one_line_what_is_wrong_and_where_it_is_known_from() -> None:
    for name, fault in FAULTS.items():
        assert fault.__doc__, name
        first = fault.__doc__.splitlines()[0]
        assert re.search(r"\. .*[\w.-]+/[\w.-]+#\d+", first), name


def test_there_are_faults_and_correct_variants_enough() -> None:
    assert len(FAULTS) >= 30
    assert len(CORRECT) >= 3
    assert set(RESEMBLES) <= set(CORRECT)
    assert set(RESEMBLES.values()) <= set(BACKENDS)


def test_no_two_faults_are_the_same_class() -> None:
    assert len(set(FAULTS.values())) == len(FAULTS)
    assert not set(FAULTS) & set(CORRECT)


# --- one case ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "text", "quantity"),
    [
        ("one-pass-variance", LARGE_OFFSET, "y"),
        ("premultiplied-mean", CONSTANT.replace("[2, 3, 8, 8]", "[1, 1, 3, 3]"), "y"),
        ("biased-running-variance", LARGE_OFFSET.replace("[4, 3, 8, 8]", "[2, 3]"), "running_var"),
        ("mean-term-missing", LARGE_OFFSET + "backward: true\n", "grad_input"),
        ("channels-last-misread", LARGE_OFFSET + "memory_format: channels_last\n", "y"),
        ("returned-invstd", LARGE_OFFSET, "batch_var"),
        ("updated-in-inference", LARGE_OFFSET + "mode: inference\n", "running_mean"),
        ("float64-as-float32", LARGE_OFFSET + "dtype: float64\n", "y"),
        ("empty-batch", LARGE_OFFSET.replace("[4, 3, 8, 8]", "[0, 3]"), "running_mean"),
    ],
)
def test_a_fault_is_found_by_what_it_spoils(
    tmp_path: Path, fault: str, text: str, quantity: str
) -> None:
    outcome = found_in(tmp_path, text, [fault])
    assert quantity in outcome.kills[fault]
    assert outcome.flags == {}


def test_quantities_that_a_fault_leaves_alone_do_not_fail(tmp_path: Path) -> None:
    outcome = found_in(tmp_path, LARGE_OFFSET, ["inverted-momentum", "affine-folding"])
    assert outcome.kills["inverted-momentum"] == {"running_mean", "running_var"}


def test_a_fault_whose_condition_is_not_met_survives_the_case(tmp_path: Path) -> None:
    outcome = found_in(tmp_path, CONSTANT, ["first-channels", "skipped-nan", "empty-batch"])
    assert outcome.kills == {}
    assert outcome.errors == {}


class _Raises(Layer):
    def apply(self, call: Call) -> dict[str, Any]:
        raise ValueError("no")


class _Shapeless(Layer):
    def write(self, call: Call, rows: Array) -> Array:
        return rows


@pytest.mark.parametrize(
    ("layer", "reason"), [(_Raises, "ValueError: no"), (_Shapeless, "y has shape")]
)
def test_a_crash_or_a_broken_contract_finds_no_fault_but_flags_a_correct_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: type[Layer], reason: str
) -> None:
    monkeypatch.setitem(FAULTS, "broken", layer)
    monkeypatch.setitem(CORRECT, "broken-too", layer)
    [case] = scenario(tmp_path, CONSTANT).cases
    outcome = examine(Task(case, ["broken"], ["broken-too"]), tmp_path / "case")
    assert outcome.kills == {}
    assert reason in outcome.errors["broken"]
    assert reason in outcome.flags["broken-too"]


def test_a_variant_that_is_not_correct_is_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CORRECT, "wrong", FAULTS["eps-outside-root"])
    [case] = scenario(tmp_path, CONSTANT).cases
    [near] = scenario(tmp_path, "input: {distribution: normal, std: 1e-3}\nshape: [4, 3]\n").cases
    assert examine(Task(case, [], ["wrong"]), tmp_path / "a").flags == {}
    assert "y: deviates" in examine(Task(near, [], ["wrong"]), tmp_path / "b").flags["wrong"]


def test_every_call_has_a_fault_of_its_own(tmp_path: Path) -> None:
    text = LARGE_OFFSET + "steps: 2\n"
    first = found_in(tmp_path, text, ["stale-statistics"])
    assert first.kills == found_in(tmp_path, text, ["stale-statistics"]).kills != {}


def test_a_variant_is_excused_where_the_yardstick_that_it_is_like_must_fail(tmp_path: Path) -> None:
    [scenario] = load(["magnitude-overflow"])
    assert {tuple(task.variants) for task in plan([scenario])} == {("float64-statistics",)}


def test_cases_that_no_backend_can_run_are_left_out(tmp_path: Path) -> None:
    text = CONSTANT.replace("[2, 3, 8, 8]", "[2, 3]") + "memory_format: [contiguous, channels_last]"
    assert len(plan([scenario(tmp_path, text)])) == 1


def test_nothing_is_left_of_a_case(tmp_path: Path) -> None:
    found_in(tmp_path, CONSTANT, [])
    assert not (tmp_path / "case").exists()


def test_cases_run_in_several_processes(tmp_path: Path) -> None:
    tasks = plan([scenario(tmp_path, LARGE_OFFSET + "eps: [1e-5, 1]\n")], ["one-pass-variance"])
    outcomes = list(selftest.run(tasks, tmp_path, processes=2))
    assert {outcome.case for outcome in outcomes} == {"s/eps=1e-05", "s/eps=1"}
    assert all("y" in outcome.kills["one-pass-variance"] for outcome in outcomes)


# --- all cases together -----------------------------------------------------------------------------


def outcome(file: str, kills: dict[str, set[str]], **rest: Any) -> Outcome:
    return Outcome(f"{file}/x", file, {k: frozenset(v) for k, v in kills.items()}, **rest)


def matrix(*outcomes: Outcome) -> Matrix:
    return Matrix(("eps-fixed", "eps-twice"), ("float64-statistics",), ("a", "b"), outcomes)


BOTH = (
    outcome("a", {"eps-fixed": {"y"}}),
    outcome("a", {"eps-fixed": {"grad_input"}, "eps-twice": {"y"}}),
    outcome("b", {"eps-fixed": {"y", "running_var"}}),
)


def test_a_file_finds_what_its_cases_find() -> None:
    assert matrix(*BOTH).kills == {
        "eps-fixed": {"a": {"y", "grad_input"}, "b": {"y", "running_var"}},
        "eps-twice": {"a": {"y"}},
    }


def test_what_only_one_file_finds_is_a_matter_of_fault_and_quantity() -> None:
    assert matrix(*BOTH).alone == {
        "a": [("eps-fixed", "grad_input"), ("eps-twice", "y")],
        "b": [("eps-fixed", "running_var")],
    }


def test_it_passes_if_all_are_found_and_none_is_flagged() -> None:
    assert matrix(*BOTH).exit_code == 0
    survivor = matrix(BOTH[0])
    assert (survivor.survivors, survivor.exit_code) == (["eps-twice"], 1)
    flagged = matrix(*BOTH, outcome("b", {}, flags={"float64-statistics": "y: no"}))
    assert flagged.flags == [("float64-statistics", "b/x", "y: no")]
    assert flagged.exit_code == 1


def test_the_json_holds_everything() -> None:
    document = json.loads(matrix(*BOTH).to_json())
    assert document["faults"]["eps-fixed"]["killed_by"]["a"] == ["grad_input", "y"]
    assert document["faults"]["eps-fixed"]["description"] == FAULTS["eps-fixed"].__doc__
    assert document["alone"]["b"] == [{"fault": "eps-fixed", "quantity": "running_var"}]
    assert (document["cases"], document["survivors"], document["exit_code"]) == (3, [], 0)


# --- what is shown ----------------------------------------------------------------------------------


def shown(found: Matrix, width: int = 80) -> list[str]:
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        for line in render(found, width):
            console.print(line)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_matrix_has_a_line_for_each_fault_and_a_column_for_each_file() -> None:
    lines = shown(matrix(*BOTH))
    assert lines[1] == "          12"
    assert lines[2:4] == ["eps-fixed yy", "eps-twice y·"]
    assert "  1 a finds 2; alone: eps-fixed (grad_input), eps-twice (y)" in lines
    assert "  2 b finds 1; alone: eps-fixed (running_var)" in lines
    assert lines[-1] == (
        "PASS (exit 0): 2 of 2 faults found, 1 of 1 correct variants clean, 3 cases"
    )


def test_survivors_flags_and_errors_are_named() -> None:
    text = "\n".join(
        shown(
            matrix(
                outcome(
                    "a",
                    {"eps-fixed": {"y"}},
                    flags={"float64-statistics": "y: off"},
                    errors={"eps-twice": "ValueError: no"},
                )
            ),
            200,
        )
    )
    assert f"eps-twice survived: {FAULTS['eps-twice'].__doc__}" in text
    assert "eps-twice gave no outputs: a/x: ValueError: no" in text
    assert "float64-statistics is correct, and was flagged in a/x: y: off" in text
    assert "FAIL (exit 1): 1 of 2 faults found, 0 of 1 correct variants clean" in text


def test_all_faults_and_files_fit_into_80_columns() -> None:
    scenarios = load()
    lines = shown(Matrix.of(scenarios, []))
    rows = [line for line in lines if re.fullmatch(r"\S+ +·+", line)]
    assert len(rows) == len(FAULTS)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("quantities", "expected"),
    [({"y", "grad_bias"}, "y"), ({"grad_bias", "batch_var"}, "g"), ({"running_var"}, "r")],
)
def test_a_cell_says_by_what_a_fault_was_found(quantities: set[str], expected: str) -> None:
    assert letter(quantities) == expected


# --- the command ------------------------------------------------------------------------------------


def test_the_command_prints_saves_and_exits_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(tasks: list[Task], scratch: Path, *, processes: int) -> list[Outcome]:
        return [Outcome(task.case.id, task.case.file) for task in tasks]

    monkeypatch.setattr(selftest, "run", one)
    target = tmp_path / "found.json"
    arguments = ["caffe-3963", "--json", str(target), "-q"]
    assert command.main(arguments, standalone_mode=False) == 1
    assert json.loads(target.read_text())["survivors"] == list(FAULTS)
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL (exit 1): 0 of ")
