"""Settings of a project: bnaudit.yaml, or [tool.bnaudit] in pyproject.toml.

    environments:
      old: python3.10 torch==2.4.0
      new: .venv

An environment is what --env takes (see `bnaudit.environments`); paths are relative to the file. Complaints
are those of scenario files: one sentence that begins with file:line:column.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bnaudit import environments
from bnaudit.document import Node, Place, ScenarioError, complain, describe, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

YAML, TOML = "bnaudit.yaml", "pyproject.toml"
"""The files that are looked for; the first that has settings counts."""

TABLE = ("tool", "bnaudit")


class ConfigError(Exception):
    """The file cannot be read, or is not one of ours; the message says why in a sentence."""


class Config(BaseModel):
    """environments: specifications by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    environments: dict[str, str] = {}

    def with_given(self, given: Sequence[str]) -> dict[str, str]:
        """Its environments and those given as NAME=SPEC, which win. Raises EnvironmentSpecError."""
        return {**self.environments, **dict(environments.parse_all(given))}


def load(given: str | None) -> Config:
    """The settings of the file given, or of the working directory's, if it has any.

    Raises ScenarioError with the place of a mistake, and ConfigError.
    """
    if given is not None:
        path = Path(given)
        root = _root(path)
        if root is None:
            raise ConfigError(f"{given} has no [{'.'.join(TABLE)}]")
        return _config(root, path)
    for path in (Path(YAML), Path(TOML)):
        root = _root(path) if path.is_file() else None
        if root is not None:
            return _config(root, path)
    return Config()


def _root(path: Path) -> Node | None:
    """The settings in a file; None where a TOML file has none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the settings {path}: {error.strerror}") from error
    if path.suffix == ".toml":
        return _toml(content, str(path))
    documents = list(parse(content, str(path)))
    if len(documents) > 1:
        raise complain(
            str(path), documents[1].place, "found a second document; accepted is one of settings"
        )
    return documents[0] if documents else Node({}, Place(1, 1))


def _toml(content: bytes, file: str) -> Node | None:
    try:
        text = content.decode("utf-8-sig")
        table: Any = tomllib.loads(text)
    except UnicodeDecodeError:
        raise complain(file, Place(1, 1), "found bytes that are not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        place = Place(int(found[1]), int(found[2])) if found else Place(1, 1)
        message = str(error)[: found.start()] if found else str(error)
        raise complain(file, place, f"not valid TOML: {message}") from None
    for name in TABLE:
        if not isinstance(table, dict) or name not in table:
            return None
        table = table[name]
    return _node(table, TABLE, text.splitlines())


def _node(value: Any, path: tuple[str, ...], lines: Sequence[str]) -> Node:
    """A value of TOML with its place, as far as that can be told: tomllib keeps none."""
    place = _place(path, lines)
    if isinstance(value, dict):
        items = {key: _node(item, (*path, key), lines) for key, item in value.items()}
        return Node(items, place, {key: item.place for key, item in items.items()})
    if isinstance(value, list):
        return Node(tuple(_node(item, path, lines) for item in value), place)
    return Node(value if isinstance(value, bool | int | float | str) else str(value), place)


def _place(path: tuple[str, ...], lines: Sequence[str]) -> Place:
    """Where a key stands: in the header of its own table, or in a line of its parent's."""
    own, parent = (_header(path), _header(path[:-1]))
    header: str | None = None
    for number, line in enumerate(lines, 1):
        found = re.match(r"\s*\[([^\[\]]+)\]", line)
        if found:
            header = _header([part.strip(" \"'") for part in found[1].split(".")])
            if header == own:
                return Place(number, 1)
        key = re.match(rf"\s*[\"']?{re.escape(path[-1])}[\"']?\s*[=.]", line)
        if header == parent and key:
            return Place(number, 1)
    return Place(1, 1) if len(path) <= len(TABLE) else _place(path[:-1], lines)


def _header(path: Sequence[str]) -> str:
    return ".".join(path)


def _config(root: Node, path: Path) -> Config:
    file = str(path)
    if root.value is None:
        return Config()  # a file of comments
    try:
        config = Config.model_validate(root.plain())
    except ValidationError as error:
        # A misspelled field may be followed by other faults; the spelling is what helps.
        details = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise _complaint([str(part) for part in details["loc"]], root, file) from None
    section = root.value["environments"] if isinstance(root.value, dict) and root.value else None
    for name, spec in config.environments.items():
        try:
            environments.parse(f"{name}={spec}")
        except environments.EnvironmentSpecError as error:
            place = section.keys[name] if section is not None else root.place
            raise complain(file, place, f"environments.{name}: {error}") from None
    specs = {name: _anchored(spec, path.parent) for name, spec in config.environments.items()}
    return Config(environments=specs)


def _complaint(location: Sequence[str], root: Node, file: str) -> ScenarioError:
    """What is wrong at a location, where it stands."""
    node, place = root, root.place
    for part in location:
        if not isinstance(node.value, dict) or part not in node.value:
            break
        place, node = node.keys[part], node.value[part]
    field = ".".join(location)
    if len(location) == 1 and location[0] not in Config.model_fields:
        near = difflib.get_close_matches(field, Config.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        accepted = ", ".join(Config.model_fields)
        return complain(file, place, f"{field}: found an unknown field; accepted: {accepted}{hint}")
    accepted = "a specification as text" if len(location) > 1 else "a mapping"
    before = f"{field}: " if field else ""
    return complain(file, node.place, f"{before}found {describe(node)}; accepted is {accepted}")


def _anchored(spec: str, folder: Path) -> str:
    """A specification whose path, if it is one, no longer depends on the working directory."""
    try:
        path = folder / Path(spec).expanduser()
        is_path = (path / "bin" / "python").exists() or ("/" in spec and path.exists())
    except (OSError, RuntimeError):  # too long for a path, or ~ of an unknown user
        return spec
    return str(path.absolute()) if is_path else spec
