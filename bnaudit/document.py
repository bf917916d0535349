"""YAML text → trees of nodes that know where they stand in the file.

Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: 1e-5 is a number; yes, 010 and 1:30 are
not what they seem there. Nothing is constructed, so a file can run no code.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_NODES = 100_000
MAX_DEPTH = 30
MAX_DIGITS = 1000
"""Of a number, in any notation: Python writes no integer of more than 4300 decimal digits."""

Scalar: TypeAlias = bool | int | float | str | None
Model = TypeVar("Model", bound=BaseModel)


class ScenarioError(Exception):
    """A scenario cannot be used: file:line:column, the field, what was found and what is accepted."""


class Place(NamedTuple):
    """Line and column of a file, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Node:
    """A scalar, a list or a mapping, where it stands, and where its keys stand."""

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    place: Place
    keys: dict[str, Place] = field(default_factory=dict)

    def plain(self) -> object:
        """The same as built-in types, lists as tuples."""
        if isinstance(self.value, tuple):
            return tuple(item.plain() for item in self.value)
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


def complain(file: str, place: Place, message: str) -> ScenarioError:
    """The error that says where and what."""
    return ScenarioError(f"{file}:{place.line}:{place.column}: {message}")


def parse(content: bytes, file: str) -> Iterator[Node]:
    """The documents of a YAML file. Raises ScenarioError, with `file` as the file's name."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        raise complain(
            file,
            _place_after(before),
            f"found the byte 0x{content[error.start]:02x}, which is not UTF-8; "
            "accepted is YAML in UTF-8",
        ) from None
    try:
        for document in yaml.compose_all(text, _Loader):
            yield _Reader(file).read(document)
    except yaml.reader.ReaderError as error:
        raise complain(
            file,
            _place_after(text[: error.position]),
            f"found the character U+{ord(text[error.position]):04X}; accepted are printable ones",
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem)
        if r"'\t'" in problem:
            problem = "found a tab; accepted are spaces for indentation"
        else:
            problem = f"not valid YAML: {problem}"
        place = Place(1, 1) if mark is None else Place(mark.line + 1, mark.column + 1)
        raise complain(file, place, problem) from None
    except RecursionError:
        raise complain(
            file, Place(1, 1), f"found very deep nesting; accepted are {MAX_DEPTH} levels"
        ) from None


class _Loader(yaml.SafeLoader):
    """Gives every scalar the same tag, so that any other tag was written by hand."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares it, and for instances


class _Reader:
    """Turns one composed document into nodes, counting them with all aliases written out."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.count = 0

    def read(self, node: yaml.Node, ancestors: tuple[yaml.Node, ...] = ()) -> Node:
        place = Place(node.start_mark.line + 1, node.start_mark.column + 1)
        self.count += 1
        if self.count > MAX_NODES:
            raise complain(
                self.file,
                place,
                f"found aliases that write out to more than {MAX_NODES} values; accepted are fewer",
            )
        if any(node is ancestor for ancestor in ancestors):
            raise complain(
                self.file, place, "found an alias to something that contains it; accepted is a tree"
            )
        if len(ancestors) == MAX_DEPTH:
            raise complain(
                self.file, place, f"found very deep nesting; accepted are {MAX_DEPTH} levels"
            )
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag[18:] not in CORE_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise complain(self.file, place, f"found the tag {tag}; accepted are plain values")
        inside = (*ancestors, node)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, place), place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, inside)
        return Node(tuple(self.read(item, inside) for item in node.value), place)

    def _mapping(self, node: yaml.MappingNode, place: Place, inside: tuple[yaml.Node, ...]) -> Node:
        items: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        for key_node, value_node in node.value:
            key = self.read(key_node, inside)
            if not isinstance(key.value, str) or not key.value.isprintable():
                raise complain(
                    self.file, key.place, f"found {describe(key)} as a field; accepted are names"
                )
            if key.value in items:
                raise complain(
                    self.file,
                    key.place,
                    f"found the field {key.value} again, after line {keys[key.value].line}; "
                    "accepted is one",
                )
            keys[key.value] = key.place
            items[key.value] = self.read(value_node, inside)
        return Node(items, place, keys)

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Scalar:
        text = str(node.value)
        if node.style is not None:  # quoted or a block
            return text
        if text in KEYWORDS:
            return KEYWORDS[text]
        for pattern, read in NUMBERS:
            if pattern.fullmatch(text):
                if len(text) > MAX_DIGITS:
                    raise complain(
                        self.file,
                        place,
                        f"found a number of {len(text)} digits; accepted are fewer",
                    )
                return read(text)
        return text


CORE_TAGS = ("str", "seq", "map")
KEYWORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
NUMBERS = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text, 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text, 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: float("nan")),
)


def describe(node: Node) -> str:
    """What stands there, in a few words."""
    value = node.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, tuple):
        text = f"[{', '.join(map(describe, value))}]"
        return text if len(text) <= 30 else f"a list of {len(value)}"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def _place_after(text: str) -> Place:
    return Place(text.count("\n") + 1, len(text) - text.rfind("\n"))


def load_as(model: type[Model], path: Path, error: type[Exception]) -> Model:
    """The one document of a YAML file as a model whose fields are plain (no axes, no distributions).

    Raises `error` with one sentence that begins with file:line:column.
    """
    try:
        documents = list(parse(path.read_bytes(), str(path)))
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}") from None
    except ScenarioError as fault:
        raise error(str(fault)) from None
    if len(documents) != 1 or not isinstance(documents[0].value, dict):
        raise error(f"{path}:1:1: accepted is one document, a mapping")
    try:
        return model.model_validate(documents[0].plain())
    except ValidationError as fault:
        # A misspelled field may also be a missing one; the spelling is what helps.
        details = min(fault.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        place, owner, names = _find(documents[0], details["loc"])
        field_ = ".".join(names)
        if details["type"] == "extra_forbidden":
            accepted = _fields_at(model, names[:-1])
            near = difflib.get_close_matches(names[-1], accepted, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            complaint = f"there is no such field; accepted are {', '.join(accepted)}{hint}"
        elif details["type"] == "missing":
            complaint = f"missing: {details['loc'][-1]}"
        else:
            complaint = f"found {describe(owner)}; {_accepted(details)}"
        raise error(f"{path}:{place.line}:{place.column}: {field_}: {complaint}") from None


def _accepted(details: ErrorDetails) -> str:
    """What a field takes, of an error that pydantic found."""
    if details["type"] in ("dict_type", "model_type", "dataclass_type"):
        return "accepted is a mapping"
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    return details["msg"].replace("Input should be", "it should be")


def _find(node: Node, location: tuple[int | str, ...]) -> tuple[Place, Node, list[str]]:
    """The place of the deepest node at a location, that node, and the path to it."""
    place, names = node.place, []
    for part in location:
        if isinstance(node.value, dict) and part in node.value:
            name = str(part)
            place, node = node.keys[name], node.value[name]
        elif isinstance(node.value, tuple) and isinstance(part, int):
            node = node.value[part]
            place = node.place
        else:
            break
        names.append(str(part))
    return place, node, names


def _fields_at(model: type[BaseModel], names: list[str]) -> list[str]:
    """The fields of the model at a path, through lists and mappings of models."""
    schema = model.model_json_schema()
    inner = schema
    for name in names:
        inner = inner.get("properties", {}).get(
            name, inner.get("items", inner.get("additionalProperties"))
        )
        if "$ref" in inner:
            inner = schema["$defs"][inner["$ref"].rpartition("/")[2]]
    return list(inner.get("properties", {}))
