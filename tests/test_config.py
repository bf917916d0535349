"""Settings: where they are found, what they say, and how a mistake is answered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bnaudit.config import ConfigError, load
from bnaudit.document import ScenarioError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


YAML = """
# what we compare
environments:
  old: python3.10 torch==2.4.0
  new: torch==2.14.0
"""

TOML = """
[project]
name = "ours"

[tool.bnaudit.environments]
old = "python3.10 torch==2.4.0"
"new" = "torch==2.14.0"
"""

SPECS = {"old": "python3.10 torch==2.4.0", "new": "torch==2.14.0"}


def test_without_a_file_there_are_no_settings(here: Path) -> None:
    assert load(None).environments == {}
    (here / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    assert load(None).environments == {}


@pytest.mark.parametrize(("name", "text"), [("bnaudit.yaml", YAML), ("pyproject.toml", TOML)])
def test_settings_are_found_in_the_working_directory_or_given(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    (here / name).write_text(text)
    assert load(None).environments == SPECS
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(None).environments == {}
    assert load(f"../{name}").environments == SPECS


def test_the_yaml_file_comes_first_and_may_be_empty(here: Path) -> None:
    (here / "pyproject.toml").write_text(TOML)
    (here / "bnaudit.yaml").write_text("# nothing yet\n")
    assert load(None).environments == {}


def test_what_is_given_on_the_command_line_wins(here: Path) -> None:
    (here / "bnaudit.yaml").write_text(YAML)
    found = load(None).with_given(["new=.venv", "third=numpy==1.26.4"])
    assert found == {"old": SPECS["old"], "new": ".venv", "third": "numpy==1.26.4"}


def test_paths_are_relative_to_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = here / "project" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    text = "environments: {a: .venv, b: .venv/bin/python, c: numpy}"
    (here / "project" / "bnaudit.yaml").write_text(text)
    assert load("project/bnaudit.yaml").environments == {
        "a": str(here / "project" / ".venv"),
        "b": str(python),
        "c": "numpy",
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "environment:\n  a: b\n",
            r"1:1: environment: found an unknown field; accepted: environments; "
            r"did you mean 'environments'\?",
        ),
        ("environments: [a]\n", r"1:15: environments: found \['a'\]; accepted is a mapping"),
        ("environments:\n  a: 1\n", r"2:6: environments.a: found 1; accepted is a specification"),
        ("environments:\n  a b: c\n", r"2:3: environments.a b: 'a b=c' is no environment"),
        ("environments:\n  current: c\n", r"2:3: environments.current: the name 'current'"),
        ("environments:\n  a: ''\n", r"2:3: environments.a: 'a=' is no environment"),
        ("environments:\n  a: b\n  a: c\n", r"3:3: found the field a again"),
        ("- a\n", r"1:1: found \['a'\]; accepted is a mapping"),
        ("environments: {}\n---\n{}\n", r"3:1: found a second document"),
        ("environments: {a: b\n", r"2:1: not valid YAML"),
    ],
)
def test_a_mistake_in_yaml_is_answered_with_its_place(
    here: Path, text: str, complaint: str
) -> None:
    (here / "bnaudit.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=f"^bnaudit.yaml:{complaint}"):
        load(None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[tool.bnaudit]\nenvironment = 1\n", "2:1: environment: found an unknown field"),
        ("[tool.bnaudit]\nenvironments = 1\n", "2:1: environments: found 1; accepted is a mapping"),
        ("[tool.bnaudit.environments]\nold = 'a'\nnew = 2\n", "3:1: environments.new: found 2"),
        ("[tool.bnaudit.enviroments]\nold = 'a'\n", "1:1: enviroments: found an unknown field"),
        ("[tool]\nbnaudit.nope = 1\n", r"2:1: nope: found an unknown field"),
        ("[tool.bnaudit]\nx =\n", r"2:\d: not valid TOML"),
    ],
)
def test_a_mistake_in_toml_is_answered_with_its_place(
    here: Path, text: str, complaint: str
) -> None:
    (here / "pyproject.toml").write_text(text)
    with pytest.raises(ScenarioError, match=f"^pyproject.toml:{complaint}"):
        load(None)


def test_a_file_that_is_given_must_be_there_and_have_settings(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings no\.yaml"):
        load("no.yaml")
    (here / "other.toml").write_text("[tool.ruff]\n")
    with pytest.raises(ConfigError, match=r"other\.toml has no \[tool\.bnaudit\]"):
        load("other.toml")
