"""The recipes for CI systems: their files are well formed, and their commands are ones that bnaudit knows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from bnaudit.cli import cli
from bnaudit.report import load

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "ci"

SCENARIO = "name: small\ninput: {distribution: constant, value: 3}\nshape: [4, 2, 8]\n"


def commands(text: str) -> list[list[str]]:
    """The bnaudit commands of a recipe, also in comments, and those that a container is started with."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^(?:[\s#-]|run:|exec)*(bnaudit (?:run|show|check) .*)$", joined, re.M)
    return [shlex.split(line.replace('"$@"', ""))[1:] for line in found]


@pytest.mark.parametrize("file", ["github.yml", "gitlab.yml", "audit.sh"])
def test_every_command_is_one_that_bnaudit_knows(file: str) -> None:
    text = (RECIPES / file).read_text()
    if file == "github.yml":
        steps = yaml.safe_load(text)["jobs"]["audit"]["steps"]
        text += "\n".join(step["run"] for step in steps if "run" in step)
    found = commands(text)
    assert found
    for name, *arguments in found:
        cli.commands[name].make_context(name, arguments)
    with pytest.raises(click.UsageError):
        cli.commands["run"].make_context("run", ["--no-such-option"])


def test_the_recipes_keep_the_evidence_where_the_audit_fails() -> None:
    github = yaml.safe_load((RECIPES / "github.yml").read_text())
    uploads = [
        step for step in github["jobs"]["audit"]["steps"] if "upload" in step.get("uses", "")
    ]
    assert [step["if"] for step in uploads] == ["always()"] * 2
    gitlab = yaml.safe_load((RECIPES / "gitlab.yml").read_text())
    assert gitlab["bnaudit"]["artifacts"]["when"] == "always"
    assert gitlab["bnaudit"]["artifacts"]["reports"]["junit"] == "bnaudit.xml"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which `bnaudit` is this one."""
    script = tmp_path / "bin" / "bnaudit"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bnaudit "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def test_the_shell_script_audits_and_keeps_everything(tmp_path: Path, path: str) -> None:
    (tmp_path / "s.yaml").write_text(SCENARIO)
    command = [str(RECIPES / "audit.sh"), "s.yaml", "-b", "one-pass", "-q"]
    environment = {**os.environ, "PATH": path, "OUT": "out", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"report.json", "junit.xml", "summary.md", "report.html"}
    assert load(tmp_path / "out" / "report.json").verdict == "pass"
    environment["BASELINE"] = "none.yaml"
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_the_container_installs_what_the_project_has() -> None:
    text = (RECIPES / "Containerfile").read_text()
    extras = re.findall(r"EXTRAS=([\w,]+)", text)
    assert extras == ["torch,cuda13", "torch"]
    known = (ROOT / "pyproject.toml").read_text()
    for extra in {name for given in extras for name in given.split(",")}:
        assert f"\n{extra} = [" in known
    assert 'ENTRYPOINT ["bnaudit"]' in text
