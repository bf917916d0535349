"""From a run to a report shown, judged again, accepted, and told to CI: on a plug-in that is wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from standins import facts, judged, report, result, scenarios, wrong

from bnaudit.cli import cli, main
from bnaudit.findings import FORMAT_FAULT
from bnaudit.report import Report, SourcePlace, load
from bnaudit.sources import place_of

SCENARIOS = """
name: offset
input: {distribution: normal, mean: [0, 100], std: 1}
shape: [4, 3, 5, 7]
controls: {must_fail: [one-pass@cpu], must_pass: [exact@cpu]}
thresholds: {y: {max_abs_error: 1e-6}}
---
name: formats
input: {distribution: normal}
shape: [4, 3, 5, 7]
memory_format: [contiguous, channels_last]
"""

PLUGIN = """
import numpy as np


def other():
    pass


def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    axes, shape = (0, 2, 3), (1, -1, 1, 1)
    mean, var = x.mean(axes, dtype=np.float64), x.var(axes, dtype=np.float64)
    wide = x.astype(np.float64)
    if x.strides[1] == x.itemsize:  # takes channels_last for contiguous
        wide = wide.transpose(0, 2, 3, 1).reshape(x.shape)
    y = (wide - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return {"y": (y * FACTOR).astype(x.dtype), "batch_mean": mean.astype(x.dtype)}
"""


def invoke(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(cli, [str(part) for part in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reports of two runs: r.json of a plug-in that is off, worse.json of one more so."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "s.yaml").write_text(SCENARIOS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, factor in {"r": "1.0001", "worse": "1.01"}.items():
            (folder / "bn.py").write_text(PLUGIN.replace("FACTOR", factor))
            done = invoke("run", "s.yaml", "-b", "bn.py:batch_norm", "-q", "--json", f"{name}.json")
            assert done.return_value == 1, done.output
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def statuses(made: Report) -> list[str]:
    return [result.status for result in made.results]


# --- what a run leaves -----------------------------------------------------------------------------


def test_a_plugin_is_found_in_its_file(here: Path) -> None:
    made = load(here / "r.json")
    line = 1 + (here / "bn.py").read_text().splitlines().index(
        "def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, "
        "grad_output=None):"
    )
    assert {name: (p.file, p.line) for name, p in made.places.items()} == {
        "bn.py:batch_norm@cpu": ("bn.py", line)
    }


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("plug.py:f@cpu", 3),
        ("plug:f", 3),
        ("plug.py:C", 6),
        ("plug.py:g@cuda", 8),
        ("plug.py:imported", 1),
        ("broken.py:f", None),
        ("no.py:f", None),
        ("torch@cpu", None),
        ("numpy.linalg:norm@cpu", None),
    ],
)
def test_a_place_is_that_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, line: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plug.py").write_text(
        "from x import imported\n\ndef f(): pass\n\n\nclass C: pass\n\ng = f\n"
    )
    (tmp_path / "broken.py").write_text("def f(:")
    found = place_of(backend)
    assert found == (None if line is None else SourcePlace(file="plug.py", line=line))


def test_a_fault_of_the_memory_format_is_named_and_only_that(here: Path) -> None:
    made = load(here / "worse.json")
    causes = {r.case.partition("/")[2]: r.cause for r in made.results if "formats/" in r.case}
    # In the contiguous format it fails as well: nothing says that the format is to blame.
    assert set(causes.values()) == {None}
    case = scenarios()[0].cases
    pair = [case[0], case[1]]
    assert {c.memory_format for c in pair} == {"contiguous", "channels_last"}
    off = {"y": wrong(0.5)}
    for twin, expected in (("pass", FORMAT_FAULT), ("warn", FORMAT_FAULT), ("fail", None)):
        made = report(
            *(facts(c) for c in pair),
            result(pair[0], status=twin, quantities={"y": judged(twin)}),
            result(pair[1], status="fail", label="broken", quantities=off),
        )
        assert made.results[1].cause == expected
    known = "BN003 low-precision accumulation"
    made = report(
        *(facts(c) for c in pair),
        result(pair[0]),
        result(pair[1], status="fail", label="broken", cause=known, quantities=off),
    )
    assert made.results[1].cause == known


# --- check -----------------------------------------------------------------------------------------


def test_a_report_judged_again_is_what_it_was(here: Path) -> None:
    done = invoke("check", "r.json", "--json", "again.json")
    assert done.return_value == 1
    old, new = load(here / "r.json"), load(here / "again.json")
    assert new == old


def test_other_thresholds_decide_on_what_is_gated_and_not_on_controls(here: Path) -> None:
    (here / "t.yaml").write_text(
        "thresholds: {y: {bound_ratio: null, max_abs_error: null}}\n"
        "scenarios: {formats: {y: {max_abs_error: 1e-9}}}\n"
    )
    done = invoke("check", "r.json", "--thresholds", "t.yaml", "--json", "t.json")
    made = load(here / "t.json")
    failing = {r.case.partition("/")[0] for r in made.results if r.gated and r.status == "fail"}
    assert failing == {"formats"}
    assert done.return_value == 1
    assert all(control.ok for control in made.controls)
    (here / "t.yaml").write_text("thresholds: {y: {bound_ratio: null, max_abs_error: null}}")
    assert invoke("check", "r.json", "--thresholds", "t.yaml").return_value == 0


def test_checking_gives_what_a_run_gives(here: Path) -> None:
    text = invoke("check", "r.json").output
    assert text.endswith(
        "σ: standard deviations of y.  ×bound: 1 = worst a stable algorithm may do.\n"
    )
    assert "FAIL (exit 1)" in text
    assert invoke("check", "r.json", "--fail-on", "never").return_value == 0


def test_where_warnings_fail_they_are_findings(here: Path) -> None:
    (here / "mixed.json").write_text(report().model_dump_json(by_alias=True))
    invoke(
        "check", "mixed.json", "--fail-on", "warn", "--json", "strict.json", "--markdown", "s.md"
    )
    strict = load(here / "strict.json")
    gated = [r for r in strict.results if r.gated and r.status in ("warn", "fail")]
    assert [r.finding for r in gated] == [1, 2]
    assert (here / "s.md").read_text().partition("<details>")[0].count("torch@cpu |") == 2
    assert [r.finding for r in report().results if r.gated and r.status == "warn"] == [None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("threshold: {}", "t.yaml:1:1: threshold: there is no such field; accepted are thresholds"),
        ("thresholds: {z: {}}", "t.yaml:1:14: thresholds.z: there is no such field"),
        ("thresholds: {y: {bound_ratio: x}}", "t.yaml:1:18: thresholds.y.bound_ratio: found 'x'"),
        ("thresholds: {y: {bound_ratio: -1}}", "found -1; it should be greater than or equal to 0"),
        ("scenarios: {offset: 1}", "t.yaml:1:13: scenarios.offset: found 1; accepted is a mapping"),
        ("scenarios: {ofset: {}}", "found 'ofset'; the report has formats, offset"),
    ],
)
def test_a_mistake_in_thresholds_is_one_sentence(here: Path, text: str, words: str) -> None:
    (here / "t.yaml").write_text(text)
    with pytest.raises(Exception, match=re.escape(words)):
        invoke("check", "r.json", "--thresholds", "t.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["check", "--thresholds", "s.yaml", "--json", "s.yaml"],
            "--json would overwrite --thresholds",
        ),
        (
            ["check", "--baseline", "s.yaml", "--html", "s.yaml"],
            "--html would overwrite --baseline",
        ),
        (["check", "--write-baseline", "-"], "--write-baseline takes a file, not -"),
        (["compare", "worse.json", "--json", "worse.json"], "--json would overwrite NEW"),
        (["compare", "worse.json", "--markdown", "."], "it is a folder"),
        (["repro", "1", "-o", "r.json"], "-o would overwrite REPORT"),
        (["repro", "1", "--shrink", "-o", "x.yaml"], "--shrink would overwrite -o"),
        (["repro", "1", "-o", "s.yaml/x.py"], "cannot write s.yaml/x.py: s.yaml is no folder"),
    ],
)
def test_no_file_is_written_over_one_that_is_read(
    here: Path, arguments: list[str], words: str
) -> None:
    before = [(here / name).read_bytes() for name in ("r.json", "worse.json", "s.yaml")]
    command, *rest = arguments
    with pytest.raises(Exception, match=re.escape(words)):
        invoke(command, "r.json", *rest)
    assert before == [(here / name).read_bytes() for name in ("r.json", "worse.json", "s.yaml")]


def test_a_report_may_be_judged_in_place_and_a_device_takes_several_formats(here: Path) -> None:
    (here / "again.json").write_bytes((here / "r.json").read_bytes())
    invoke(
        "check", "again.json", "--json", "again.json", "--junit", os.devnull, "--html", os.devnull
    )
    assert load(here / "again.json").verdict == "fail"


# --- baselines -------------------------------------------------------------------------------------


def test_known_deviations_are_accepted_and_worse_ones_are_not(here: Path) -> None:
    invoke("check", "r.json", "--write-baseline", "b.yaml")
    done = invoke("check", "r.json", "--baseline", "b.yaml", "--json", "accepted.json")
    assert done.return_value == 0
    assert "accepted: known since" in done.output
    made = load(here / "accepted.json")
    assert made.verdict == "warn"
    assert statuses(made) == statuses(load(here / "r.json"))
    assert all(r.accepted for r in made.results if r.gated and r.status == "fail")
    worse = invoke("check", "worse.json", "--baseline", "b.yaml")
    assert worse.return_value == 1
    assert "not accepted: y has" in worse.output


def test_a_run_accepts_what_a_baseline_knows(here: Path) -> None:
    (here / "bn.py").write_text(PLUGIN.replace("FACTOR", "1.0001"))
    options = ("run", "s.yaml", "-b", "bn.py:batch_norm", "-q", "-k", "offset")
    first = invoke(*options, "--write-baseline", "run.yaml")
    assert first.return_value == 1
    assert "baseline run.yaml: 2 entries" in first.output
    second = invoke(*options, "--baseline", "run.yaml")
    assert second.return_value == 0, second.output
    assert "WARN (exit 0)" in second.output


def test_a_baseline_and_stopping_early_exclude_each_other(here: Path) -> None:
    with pytest.raises(Exception, match="leave out one of them"):
        invoke("run", "s.yaml", "-x", "--baseline", "b.yaml")


# --- show ------------------------------------------------------------------------------------------


def test_a_saved_report_is_shown_as_after_its_run(here: Path) -> None:
    text = invoke("show", "r.json").output
    assert text.splitlines()[0].startswith("bnaudit ")
    assert "FAIL (exit 1)" in text
    assert invoke("show", "r.json").return_value == 0
    assert "bnaudit show r.json 1" in " ".join(text.split())


def test_a_finding_is_shown_with_all_that_is_known(here: Path) -> None:
    text = invoke("show", "r.json", "1").output
    made = load(here / "r.json")
    first = next(r for r in made.results if r.finding == 1)
    worst = first.quantities["y"].worst
    assert worst is not None
    case = next(case for case in made.cases if case.id == first.case)
    for known in (worst.value_hex, worst.reference_hex, str(case.input_sha256), case.key, "bn.py:"):
        assert known in re.sub(r"\s", "", text), known
    assert made.environments[0].platform in text
    same = invoke("show", "r.json", "--case", first.case, "--backend", first.backend).output
    assert same.startswith(text.splitlines()[0])


def test_any_result_can_be_shown(here: Path) -> None:
    (here / "mixed.json").write_text(report().model_dump_json(by_alias=True))
    for one in load(here / "mixed.json").results:
        text = invoke("show", "mixed.json", "--case", one.case, "--backend", one.backend).output
        assert f"{one.backend} {one.case.partition('/')[0]}" in text
        assert one.status in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["99"], "the report has no finding 99; accepted: 1 to "),
        (["0"], "0 is not in the range"),
        (["--case", "x"], "--case and --backend go together"),
        (["1", "--case", "x", "--backend", "y"], "exclude each other"),
        (["--case", "x", "--backend", "y"], "there is no such case"),
        (
            ["--case", "formats/memory_format=contiguous", "--backend", "y"],
            "its results are of bn.py:batch_norm",
        ),
        (["--junit", "-", "--sarif", "-"], "only one of --junit and --sarif can be -"),
        (["--junit", "."], "it is a folder"),
        (["--case", "format/memory_format=contiguous", "--backend", "y"], "did you mean formats/"),
        (["1", "--junit", "j.xml"], "--junit saves the whole report: leave out N"),
        (["--html", "r.json"], "--html would overwrite REPORT, which is r.json as well"),
        (["--html", "./x", "--sarif", "x"], "--sarif would overwrite --html"),
        (["--json", "r.json"], "No such option"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(
    here: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(Exception, match=re.escape(words)):
        invoke("show", "r.json", *arguments)


def test_formats_are_written_from_a_saved_report(here: Path) -> None:
    invoke(
        *("show", "r.json", "--junit", "out/j.xml", "--sarif", "out/s.sarif"),
        *("--markdown", "out/m.md", "--html", "out/h.html"),
    )
    assert (here / "out/j.xml").read_text().startswith("<?xml")
    found = json.loads((here / "out/s.sarif").read_text())["runs"][0]["results"][0]
    place = found["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "bn.py", "uriBaseId": "%SRCROOT%"}
    assert (here / "out/m.md").read_text().startswith("## bnaudit: FAIL")
    assert "<!doctype html>" in (here / "out/h.html").read_text().lower()


def test_a_format_on_stdout_is_alone_there(here: Path) -> None:
    done = invoke("show", "r.json", "--sarif", "-")
    json.loads(done.stdout)
    assert "FAIL (exit 1)" in done.stderr


# --- GitHub Actions --------------------------------------------------------------------------------


def actions(monkeypatch: pytest.MonkeyPatch, summary: Path) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))


def test_under_github_actions_the_summary_grows_and_findings_are_annotations(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("what was there\n")
    actions(monkeypatch, summary)
    done = invoke("check", "r.json")
    text = summary.read_text()
    assert text.startswith("what was there\n## bnaudit: FAIL (exit 1)")
    lines = [line for line in done.stdout.splitlines() if line.startswith("::error ")]
    assert 1 <= len(lines) <= 10
    assert all("file=bn.py,line=" in line for line in lines)


def test_a_full_summary_is_left_as_it_is(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_bytes(b"x" * ((1 << 20) - 10))
    actions(monkeypatch, summary)
    assert invoke("check", "r.json").return_value == 1
    assert summary.stat().st_size == (1 << 20) - 10


def test_a_summary_that_cannot_be_written_changes_no_verdict(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions(monkeypatch, tmp_path)
    done = invoke("check", "r.json")
    assert done.return_value == 1
    assert "no job summary" in done.stderr


def test_elsewhere_nothing_of_the_sort_is_printed(here: Path) -> None:
    assert "::error" not in invoke("check", "r.json").output


def test_outcomes_are_those_of_the_program(here: Path) -> None:
    for arguments, code in (
        (["check", "r.json"], 1),
        (["show", "r.json"], 0),
        (["show", "n.json"], 2),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == code
