"""Upgrades: two environments, one run, the difference; with stand-ins for what an installer would bring."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standins import facts, judged, report, result, scenarios

from bnaudit import building
from bnaudit.audit import ControlOutcome
from bnaudit.cli import main
from bnaudit.cli.upgrade import _frameworks
from bnaudit.report import load
from bnaudit.sides import side

Invoke = Callable[..., tuple[int, str, str]]

SCENARIO = """
name: planted
description: Two inputs of which one is hard on sums.
input: [{distribution: constant, value: 3.3}, {distribution: normal}]
shape: [4, 8, 28, 28]
affine: null
"""

PLUGIN = """
import numpy as np

def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    rows = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    mean = AVERAGE(rows)
    var = AVERAGE((rows - mean[:, None]) ** 2)
    n = rows.shape[1]
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * n / (n - 1) - running_var)
    return ((x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)).astype(x.dtype)

def precise(rows):
    return rows.mean(axis=1, dtype=np.float64)

def serial(rows):
    return np.add.accumulate(rows, axis=1, dtype=np.float32)[:, -1] / np.float32(rows.shape[1])
"""


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Invoke:
    """Runs the command line in this process, in a folder of its own with a scenario."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "s.yaml").write_text(SCENARIO)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(list(arguments))
        return int(exit_info.value.code or 0), *capsys.readouterr()

    return run


def environment(folder: Path, average: str) -> None:
    """What looks like a virtual environment, with a module `kernel` whose statistics use `average`."""
    modules = folder / "modules"
    modules.mkdir(parents=True)
    (modules / "kernel.py").write_text(PLUGIN.replace("AVERAGE", average))
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{modules}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


def test_a_planted_regression_is_found_between_two_environments(
    invoke: Invoke, tmp_path: Path
) -> None:
    environment(tmp_path / "before", "precise")
    environment(tmp_path / "after", "serial")
    (tmp_path / "bnaudit.yaml").write_text("environments: {ours: before}")
    options = ("s.yaml", "-b", "kernel:batch_norm", "-q")
    code, out, err = invoke(
        "upgrade", "ours", "after", *options, "--reports", "kept", "--json", "found.json"
    )
    assert (code, err) == (1, "")
    assert out.startswith("OLD: bnaudit upgrade, old:")
    assert "newly failing 1\n planted, kernel:batch_norm@cpu\n" in out
    found = json.loads(Path("found.json").read_text())
    assert (found["verdict"], found["old"]["verdict"]) == ("regression", "pass")
    for name in ("old", "new"):
        kept = load(Path("kept", f"{name}.json"))
        assert {r.backend for r in kept.results} == {"kernel:batch_norm@cpu"}
        assert [place.name for place in kept.environments] == ["current"]
    again = invoke("compare", "kept/old.json", "kept/new.json")
    assert (again[0], again[1]) == (1, out)
    code, out, _ = invoke("upgrade", "ours", "before", *options)
    assert (code, "SAME (exit 0)" in out) == (0, True)


def test_a_backend_that_only_the_old_one_has_is_a_regression(
    invoke: Invoke, tmp_path: Path
) -> None:
    environment(tmp_path / "before", "precise")
    options = ("s.yaml", "-b", "kernel:batch_norm", "-q")
    code, out, _ = invoke("upgrade", "before", "current", *options)
    assert (code, "newly unavailable 2" in out) == (1, True)
    code, out, _ = invoke("upgrade", "current", "before", *options)
    assert (code, "newly running 2" in out) == (5, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no/such", "current"], 2, "old: there is no file or folder no/such"),
        (["current", "current", "-b", "nope"], 2, "there is no backend 'nope'"),
        (["current", "current", "nope.yaml"], 2, "nope.yaml"),
        (["/bin/false", "/bin/false"], 3, "neither OLD nor NEW has a framework"),
        (["a", "b", "--json", "-", "--markdown", "-"], 2, "only one of --json and --markdown"),
        (["a", "b", "--factor", "nan"], 2, "--factor takes"),
        (["a", "b", "--config", "no.yaml"], 2, "cannot read the settings no.yaml"),
    ],
)
def test_mistakes_are_one_line(invoke: Invoke, arguments: list[str], code: int, words: str) -> None:
    outcome = invoke("upgrade", *arguments, "-q")
    assert (outcome[0], outcome[1], outcome[2].count("\n")) == (code, "", 1)
    assert words in outcome[2]


# --- which backends --------------------------------------------------------------------------------


class Described:
    """A subject that has what its environment's name says."""

    asked: list[str]

    def __init__(self, *, name: str, **_: Any) -> None:
        self.has = {"old": ("torch@cpu", "jax@cpu"), "new": ("torch@cpu", "mlx@cpu")}[name]

    def __enter__(self) -> Described:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def describe(self, backends: list[str]) -> dict[str, str | None]:
        Described.asked = backends
        return {name: None if name in self.has else "is not installed" for name in backends}


def test_what_either_side_has_is_compared_unless_a_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bnaudit.subject.Subject", Described)
    monkeypatch.setattr(building, "ensure", lambda name, request, watch: tmp_path / name)
    here = {"old": sys.executable, "new": sys.executable}
    assert set(_frameworks(here, quiet=True)) == {"torch@cpu", "jax@cpu", "mlx@cpu"}
    assert _frameworks({**here, "new": "torch==2.14.0"}, quiet=True) == ["torch@cpu"]
    assert Described.asked == ["torch@cpu", "torch@cuda"]


# --- one side of a report --------------------------------------------------------------------------


def test_a_side_is_the_report_of_a_run_of_its_own() -> None:
    constant, _ = scenarios()
    case = constant.cases[0]
    failing = {"y": judged("fail")}

    def ran(name: str, status: str, **changed: Any) -> Any:
        return result(case, f"{name}:torch@cpu", status, environment=name, gated=True, **changed)

    control = ControlOutcome("constant-channel", "exact@cpu", "pass", "4 of 4 passed", True)
    both = report(
        facts(case),
        ran("old", "pass"),
        ran("new", "fail", quantities=failing),
        result(case, "exact@cpu"),
        control,
    )
    old, new = (side(both, name, "a command") for name in ("old", "new"))
    assert (old.verdict, old.exit_code, old.summary.passed) == ("pass", 0, 1)
    assert (new.verdict, new.exit_code, new.summary.fail) == ("fail", 1, 1)
    for part in (old, new):
        (only,) = part.results
        assert (only.backend, only.environment) == ("torch@cpu", "current")
        assert part.controls == both.controls
        assert part.cases == both.cases
    assert [r.finding for r in new.results] == [1]


@pytest.mark.parametrize(
    ("statuses", "missing", "verdict"),
    [
        (["pass", "warn"], {}, ("warn", 0)),
        (["fail", "crash"], {}, ("incomplete", 3)),
        (["unavailable"], {"old:torch@cpu": "gone"}, ("incomplete", 3)),
        (["unavailable"], {"new:torch@cpu": "gone"}, ("nothing-gated", 5)),
    ],
)
def test_a_side_has_its_own_verdict(
    statuses: list[str], missing: dict[str, str], verdict: tuple[str, int]
) -> None:
    constant, _ = scenarios()
    results = [
        result(case, "old:torch@cpu", status, environment="old", gated=True)
        for case, status in zip(constant.cases, statuses, strict=False)
    ]
    made = report(*map(facts, constant.cases), *results).model_copy(update={"missing": missing})
    found = side(made, "old", "")
    assert (found.verdict, found.exit_code) == verdict
    untrusted = made.model_copy(update={"verdict": "untrusted", "exit_code": 4})
    assert side(untrusted, "old", "").verdict == "untrusted"


# --- installed for real ----------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel with these files."""
    info = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in contents.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{path},sha256={digest.decode().rstrip('=')},{len(text.encode())}\n"
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


def test_requirements_are_built_once_and_compared(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(tmp_path / "before", "precise")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "kernel", "2.0", {"kernel.py": PLUGIN.replace("AVERAGE", "serial")})
    # NumPy's own wheel is large and on the network; this one leads to the auditor's.
    here = str(Path(np.__file__).parent.parent)
    wheel(wheels, "numpy", "0.1", {"numpy.pth": f"{here}\n"})
    for variable in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    arguments = ("upgrade", "before", "kernel==2.0", "s.yaml", "-b", "kernel:batch_norm")
    code, out, err = invoke(*arguments)
    assert (code, "newly failing 1" in out) == (1, True), err
    assert err.startswith("bnaudit: building new: kernel==2.0 numpy\n")
    code, out, err = invoke(*arguments)
    assert (code, "newly failing 1" in out) == (1, True), err
    assert "building" not in err


@pytest.mark.skipif(os.environ.get("BNAUDIT_NETWORK") != "1", reason="BNAUDIT_NETWORK is not 1")
def test_two_versions_of_a_framework_are_installed_and_compared(invoke: Invoke) -> None:
    code, out, err = invoke("upgrade", "onnxruntime==1.20.1", "onnxruntime==1.32.0", "smoke")
    assert code == 0, err
    assert "onnxruntime: 1.20.1 → 1.32.0" in out
