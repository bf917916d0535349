"""YAML → Scenario → Cases.

A list in a scenario is an axis: the cases are the product of its axes in the order of the document.
Every complaint about a file is one sentence that begins with file:line:column.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError
from pydantic_core import ErrorDetails

from bnaudit.distributions import DISTRIBUTIONS, Constant, Distribution, File, FileError, Normal
from bnaudit.document import Node, Place, ScenarioError, complain, describe, parse
from bnaudit.worker.backends import BACKENDS
from bnaudit.worker.rounding import statistics_dtype

__all__ = [
    "Affine",
    "Case",
    "Controls",
    "Dtype",
    "Parameters",
    "Running",
    "Scenario",
    "ScenarioError",
    "displayed",
    "json_schema",
    "load",
    "shipped",
]

Dtype: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]

MAX_CASES = 10_000
MAX_ELEMENTS = 2**33
Fault: TypeAlias = tuple[tuple[str, ...], str]
"""A field, by its path, and what is wrong with it."""
NATURAL_LISTS = ("shape", "items", "values")
"""Fields that hold a list by nature: only a list of lists is an axis there."""


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _constant(value: object) -> object:
    """A number where a distribution may stand means that constant."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"distribution": "constant", "value": value}
    return value


PerChannel: TypeAlias = Annotated[Distribution, BeforeValidator(_constant)]


class Affine(_Fields):
    """Per-channel scale and shift."""

    weight: PerChannel = Constant(distribution="constant", value=1.0)
    bias: PerChannel = Constant(distribution="constant", value=0.0)


class Running(_Fields):
    """Running statistics before the first step."""

    mean: PerChannel = Constant(distribution="constant", value=0.0)
    var: PerChannel = Constant(distribution="constant", value=1.0)


class Parameters(_Fields):
    """Everything that decides a case's inputs and right answers; no field is an axis any more."""

    input: Distribution
    shape: tuple[int, ...] = Field(min_length=2, max_length=5)
    dtype: Dtype = "float32"
    operation: Literal["batch_norm"] = "batch_norm"
    mode: Literal["training", "inference"] = "training"
    backward: bool = False
    grad_output: Distribution = Normal(distribution="normal")
    memory_format: Literal["contiguous", "channels_last", "strided"] = "contiguous"
    eps: FiniteFloat = Field(default=1e-5, ge=0)
    momentum: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = 0.1
    steps: int = Field(default=1, ge=1, le=1000)
    affine: Affine | None = Affine()
    running: Running = Running()
    param_dtype: Literal["statistics", "same"] = "statistics"
    seed: int = Field(default=0, ge=0, le=2**64 - 1)

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def n(self) -> int:
        """Elements per channel."""
        return self.shape[0] * math.prod(self.shape[2:])

    @property
    def statistics_dtype(self) -> str:
        """float64 for float64 cases, float32 for all others."""
        return statistics_dtype(self.dtype)

    @property
    def parameter_dtype(self) -> str:
        """Dtype of weight, bias and running statistics."""
        return self.dtype if self.param_dtype == "same" else self.statistics_dtype

    @cached_property
    def key(self) -> str:
        """SHA-256 of the parameters, and of the files they name: equal keys, equal inputs and answers."""
        parameters = self.model_dump(mode="json", include=set(Parameters.model_fields))
        files = [
            part.sha256()
            for _, distribution in self._distributions()
            for part in distribution.parts()
            if isinstance(part, File)
        ]
        text = json.dumps([parameters, files], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def unsupported(self) -> str | None:
        """Why no backend can run this combination; None where one can."""
        if self.memory_format == "channels_last":
            spatial = self.shape[2:]
            if len(spatial) < 2 or self.channels < 2 or math.prod(spatial) < 2:
                return "channels_last takes rank 4 or 5 with several channels and several spatial elements"
        return None

    def faults(self) -> Iterator[Fault]:
        """What the fields say that cannot be, as paths of fields and sentences."""
        batch, *rest = self.shape
        if batch < 0 or min(rest) < 1:
            yield (
                ("shape",),
                (
                    f"found {list(self.shape)}; accepted are sizes of at least 1, and 0 for the batch"
                ),
            )
            return
        elements = self.steps * math.prod(self.shape)
        if elements > MAX_ELEMENTS:
            found = f"{Decimal(elements).normalize():.6g}"  # it may be more than a float can be
            yield ("shape",), f"found {found} elements; accepted are up to {MAX_ELEMENTS:g}"
        if self.steps > 1 and self.mode == "inference":
            yield ("steps",), f"found {self.steps} steps of inference; accepted is 1"
        for path, distribution in self._distributions():
            per_channel = len(path) == 2
            shape = (1, self.channels) if per_channel else self.shape
            dtype = self.parameter_dtype if per_channel else self.dtype
            if path == ("grad_output",) and not self.backward:
                continue
            obstacle = distribution.obstacle(shape, dtype)
            if obstacle is not None:
                yield path, obstacle
            for part in distribution.parts():
                if per_channel and part.within_channel:
                    name = type(part).__name__.lower()
                    yield (
                        path,
                        (
                            f"found {name}, which varies within a channel; accepted is one value for each "
                            "channel, such as a number, normal or channels"
                        ),
                    )

    def _distributions(self) -> Iterator[tuple[tuple[str, ...], Distribution]]:
        yield ("input",), self.input
        yield ("grad_output",), self.grad_output
        if self.affine is not None:
            yield ("affine", "weight"), self.affine.weight
            yield ("affine", "bias"), self.affine.bias
        yield ("running", "mean"), self.running.mean
        yield ("running", "var"), self.running.var


class Case(Parameters):
    """One combination of a scenario's axes.

    Attributes:
        id: readable label, such as constant-channel/value=100,dtype=float32.
        file: as displayed; line: where the scenario begins in it.
        thresholds: of each quantity, by name; None switches one off.
    """

    id: str
    scenario: str
    file: str
    line: int
    thresholds: Mapping[str, Mapping[str, float | None]]


class Controls(_Fields):
    """Backends that are known to fail, or to pass, in a scenario."""

    must_fail: tuple[str, ...] = ()
    must_pass: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One YAML document."""

    name: str
    description: str
    source: str | None
    file: Path
    line: int
    controls: Controls
    cases: tuple[Case, ...]


Limit: TypeAlias = Annotated[FiniteFloat, Field(ge=0)] | None


class Limits(_Fields):
    """Thresholds of one quantity: each adds a condition, null switches a default off."""

    max_abs_error: Limit = None
    max_ulp_error: Limit = None
    bound_ratio: Limit = None
    tight_ratio: Limit = None
    constant_abs_error: Limit = None


class Thresholds(_Fields):
    """Thresholds by quantity."""

    y: Limits = Limits()
    batch_mean: Limits = Limits()
    batch_var: Limits = Limits()
    invstd: Limits = Limits()
    running_mean: Limits = Limits()
    running_var: Limits = Limits()
    grad_input: Limits = Limits()
    grad_weight: Limits = Limits()
    grad_bias: Limits = Limits()


class Header(_Fields):
    """What a scenario says once for all its cases."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    source: str | None = None
    thresholds: Thresholds = Thresholds()
    controls: Controls = Controls()

    def faults(self) -> Iterator[Fault]:
        """Controls that no backend is named after."""
        for kind, names in (
            ("must_fail", self.controls.must_fail),
            ("must_pass", self.controls.must_pass),
        ):
            for i, name in enumerate(names):
                if name not in BACKENDS:
                    yield ("controls", kind, str(i)), f"found {name!r}; {_accepted(name, BACKENDS)}"


FIELDS = (*Header.model_fields, *Parameters.model_fields)


def shipped() -> Path:
    """The folder of the scenarios that come with bnaudit."""
    installed = Path(__file__).parent / "scenarios"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "scenarios"


def load(paths: Sequence[str] = ()) -> list[Scenario]:
    """Loads the scenarios of files, folders and shipped names; of none, all shipped ones.

    In a folder smoke.yaml comes first. Raises ScenarioError.
    """
    scenarios: dict[str, Scenario] = {}
    for given in paths or [str(path) for path in _shipped_files()]:
        for scenario in _scenarios(given):
            earlier = scenarios.setdefault(scenario.name, scenario)
            if (earlier.file.resolve(), earlier.line) != (scenario.file.resolve(), scenario.line):
                raise ScenarioError(
                    f"{displayed(scenario.file)}:{scenario.line}:1: name: found {scenario.name!r} again, "
                    f"after {displayed(earlier.file)}:{earlier.line}; accepted is one scenario of a name"
                )
    return list(scenarios.values())


def _shipped_files() -> list[Path]:
    """Those that run by default."""
    return sorted(shipped().glob("*.yaml"), key=_smoke_first)


def _named_files() -> list[Path]:
    """All that can be named: also those that only a GPU runs in reasonable time."""
    return [*_shipped_files(), *sorted(shipped().with_name("scenarios-gpu").glob("*.yaml"))]


def _smoke_first(path: Path) -> tuple[bool, Path]:
    return path.stem != "smoke", path


def _scenarios(given: str) -> list[Scenario]:
    """The scenarios of a file, a folder, a shipped file's stem or, of a shipped one, its own name."""
    path = Path(given)
    try:
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix in (".yaml", ".yml") and p.is_file()]
            if not found:
                raise ScenarioError(f"{given}: found no .yaml or .yml file in this folder")
            return [s for file in sorted(found, key=_smoke_first) for s in _load_file(file)]
        if path.is_file() and path.suffix != ".py":
            return list(_load_file(path))
    except OSError as error:
        raise ScenarioError(f"{given}: cannot be read: {error.strerror}") from None
    files = {file.stem: file for file in _named_files()}
    if given in files:
        return list(_load_file(files[given]))
    named = {s.name: s for file in files.values() for s in _load_file(file)}
    if given in named:
        return [named[given]]
    if path.suffix == ".py" or ":" in given:
        raise ScenarioError(f"{given}: found no scenario; a plug-in is named with -b FILE.py:NAME")
    raise ScenarioError(
        f"{given}: found no such file, folder or shipped scenario{_suggestion(given, [*files, *named])}; "
        "accepted is what `bnaudit list scenarios` shows, or a path"
    )


def displayed(path: Path) -> str:
    """A path as people see it: relative to the working directory where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _load_file(path: Path) -> list[Scenario]:
    file = displayed(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ScenarioError(f"{file}: cannot be read: {error.strerror}") from None
    documents = list(parse(content, file))
    if not documents:
        raise complain(file, Place(1, 1), "found no document; accepted is at least one scenario")
    return [_scenario(document, path) for document in documents]


def _scenario(document: Node, path: Path) -> Scenario:
    file = displayed(path)
    fields = document.value
    if not isinstance(fields, dict):
        raise complain(
            file,
            document.place,
            f"found {describe(document)}; accepted is a mapping with name, input and shape",
        )
    for field, place in document.keys.items():
        if field not in FIELDS:
            raise complain(file, place, f"{field}: {_unknown(field, FIELDS)}")
    header = _checked(Header, _part(document, Header), {}, Header.faults, file, path.parent)
    common = {
        "scenario": header.name,
        "file": file,
        "line": document.place.line,
        "thresholds": header.thresholds.model_dump(exclude_unset=True),
    }
    cases: dict[str, Case] = {}
    for node, label in _expand(_part(document, Parameters), file):
        known = {**common, "id": f"{header.name}/{label}" if label else header.name}
        if isinstance(node.value, dict) and "shape" not in node.value:
            known.update(_shape_of_file(node, file, path.parent))
        case = _checked(Case, node, known, Case.faults, file, path.parent)
        cases.setdefault(case.key, case)
    return Scenario(
        header.name,
        header.description,
        header.source,
        path,
        document.place.line,
        header.controls,
        tuple(cases.values()),
    )


def _part(document: Node, model: type[BaseModel]) -> Node:
    """The document with only the fields of this model."""
    assert isinstance(document.value, dict)  # noqa: S101 - for the type checker; the caller looked
    fields = {name: node for name, node in document.value.items() if name in model.model_fields}
    return Node(fields, document.place, document.keys)


def _expand(node: Node, file: str) -> Iterator[tuple[Node, str]]:
    """The product of the axes below a node, each combination with its label."""
    count = _count(node)
    if count > MAX_CASES:
        raise complain(file, node.place, f"found {count} cases; accepted are up to {MAX_CASES}")
    for variant, chosen in _variants(node, (), file):
        leaves = [path[-1] for path in chosen]
        yield (
            variant,
            ",".join(
                f"{path[-1] if leaves.count(path[-1]) == 1 else '.'.join(path)}={_label(value)}"
                for path, value in chosen.items()
            ),
        )


def _is_axis(items: tuple[Node, ...], field: str) -> bool:
    return field not in NATURAL_LISTS or (
        bool(items) and all(isinstance(item.value, tuple) for item in items)
    )


def _count(node: Node, field: str = "") -> int:
    """How many variants a node has."""
    if isinstance(node.value, dict):
        return math.prod(_count(item, name) for name, item in node.value.items())
    if isinstance(node.value, tuple):
        combine = sum if _is_axis(node.value, field) else math.prod
        return combine(_count(item, field) for item in node.value)
    return 1


def _variants(
    node: Node, path: tuple[str, ...], file: str
) -> Iterator[tuple[Node, dict[tuple[str, ...], Node]]]:
    """Every choice of one value from each axis below a node, with the values chosen, by path."""
    if isinstance(node.value, dict):
        parts = [list(_variants(item, (*path, name), file)) for name, item in node.value.items()]
        for combination in itertools.product(*parts):
            values = dict(zip(node.value, (value for value, _ in combination), strict=True))
            yield Node(values, node.place, node.keys), _merged(combination)
    elif not isinstance(node.value, tuple):
        yield node, {}
    elif _is_axis(node.value, path[-1]):
        if not node.value:
            raise _complaint(
                file, node, path, "found an empty list; accepted is at least one value"
            )
        for item in node.value:
            if isinstance(item.value, tuple) and _is_axis(item.value, path[-1]):
                raise _complaint(file, item, path, "found a list in a list; accepted is one list")
            for value, _ in _variants(item, path, file):
                yield value, {path: value}
    else:
        for item in node.value:
            if isinstance(item.value, tuple):
                raise _complaint(
                    file,
                    item,
                    path,
                    "found a list among single values; accepted is one or the other",
                )
        parts = [list(_variants(item, (*path, str(i)), file)) for i, item in enumerate(node.value)]
        for combination in itertools.product(*parts):
            yield Node(tuple(value for value, _ in combination), node.place), _merged(combination)


def _merged(
    combination: Sequence[tuple[Node, dict[tuple[str, ...], Node]]],
) -> dict[tuple[str, ...], Node]:
    return {path: value for _, chosen in combination for path, value in chosen.items()}


def _label(node: Node) -> str:
    """A value as it stands in a case's id."""
    value = node.value
    if isinstance(value, dict):
        name = value.get("distribution")
        fields = ",".join(f"{k}={_label(v)}" for k, v in value.items() if k != "distribution")
        return ("" if name is None else _label(name)) + (f"({fields})" if fields else "")
    if isinstance(value, tuple):
        numbers = all(isinstance(item.value, int) for item in value)
        return ("x" if numbers else "+").join(map(_label, value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else repr(value)


def _shape_of_file(node: Node, file: str, folder: Path) -> dict[str, object]:
    """The shape of the array that is the input, where the scenario leaves it out."""
    source = node.value.get("input") if isinstance(node.value, dict) else None
    if source is None or not isinstance(source.value, dict):
        return {}
    try:
        shape = File.model_validate(source.plain(), context={"folder": folder}).shape
    except ValidationError:  # another distribution, or faults that the whole case's check reports
        return {}
    except FileError as error:
        raise _complaint(file, source, ("input",), str(error)) from None
    return {"shape": shape}


Checked = TypeVar("Checked", bound=BaseModel)


def _checked(
    model: type[Checked],
    node: Node,
    known: Mapping[str, object],
    faults: Callable[[Checked], Iterator[Fault]],
    file: str,
    folder: Path,
) -> Checked:
    """The model with a node's fields and the known ones. Raises ScenarioError for the first fault."""
    fields = node.plain()
    assert isinstance(fields, dict)  # noqa: S101 - for the type checker; the callers looked
    try:
        value = model.model_validate({**fields, **known}, context={"folder": folder})
    except ValidationError as error:
        # A misspelled field is also a missing one; the spelling is what helps.
        details = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise _translated(details, node, file) from None
    for path, message in faults(value):
        raise _complaint(file, _walk(node, path)[0], path, message)
    return value


def _walk(node: Node, location: Sequence[str | int]) -> tuple[Node, tuple[str, ...]]:
    """The deepest node at a location, and its path.

    Locations of pydantic also name the distribution taken, which is no part of the path.
    """
    path: list[str] = []
    tag = None
    for part in location:
        if part == tag:
            tag = None
            continue
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, tuple):
            node = node.value[int(part)]
        else:
            break
        path.append(str(part))
        tag = _tag(node)
    return node, tuple(path)


def _tag(node: Node) -> object:
    """The name of the distribution that a node describes."""
    if isinstance(node.value, dict) and "distribution" in node.value:
        return node.value["distribution"].value
    return None


ACCEPTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "a number of at most {le}",
    "model_attributes_type": "a mapping such as {{distribution: normal}}",
    "model_type": "a mapping",
    "string_pattern_mismatch": "a name of letters, digits, dots, dashes and underscores",
    "string_too_short": "some text",
    "string_type": "text",
    "string_unicode": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What is accepted, by the type of pydantic's error."""

NULLABLE = ("source", "momentum", "affine", "key", *Limits.model_fields)

NEEDED = {
    "shape": "accepted is a list such as [32, 64, 56, 56]; only with `distribution: file` is it optional",
    "distribution": f"accepted are {', '.join(DISTRIBUTIONS)}",
}


def _translated(details: ErrorDetails, root: Node, file: str) -> ScenarioError:
    """pydantic's complaint in words for people."""
    kind, location = details["type"], details["loc"]
    context = details.get("ctx", {})
    node, path = _walk(root, location)
    if kind == "extra_forbidden":
        field = path[-1]
        owner, _ = _walk(root, path[:-1])
        return complain(
            file,
            owner.keys[field],
            f"{'.'.join(path)}: {_unknown(field, _fields(owner, path[:-1]))}",
        )
    if kind == "union_tag_invalid" and isinstance(node.value, dict):
        node, path = node.value["distribution"], (*path, "distribution")
    if kind in ("union_tag_invalid", "literal_error"):
        choices = re.findall("'([^']*)'", context.get("expected_tags", context.get("expected", "")))
        return _complaint(
            file, node, path, f"found {describe(node)}; {_accepted(node.value, choices)}"
        )
    if kind in ("missing", "union_tag_not_found"):
        field = "distribution" if kind == "union_tag_not_found" else str(location[-1])
        for misspelled in difflib.get_close_matches(field, node.keys, n=1):
            message = f"there is no such field (did you mean {field}?)"
            return complain(
                file, node.keys[misspelled], f"{'.'.join((*path, misspelled))}: {message}"
            )
        needed = NEEDED.get(field, "it has no default")
        return _complaint(file, node, (*path, field), f"missing; {needed}")
    accepted = ACCEPTED[kind].format_map(
        {name: f"{v:g}" if isinstance(v, float) else v for name, v in context.items()}
    )
    hint = ""
    if kind == "model_attributes_type":
        if path[0] in ("affine", "running"):
            accepted = f"a number, or {accepted}"
        if isinstance(node.value, str) and node.value in DISTRIBUTIONS:
            hint = f" (did you mean {{distribution: {node.value}}}?)"
    if path[-1] in NULLABLE:
        accepted += ", or null"
    return _complaint(file, node, path, f"found {describe(node)}; accepted is {accepted}{hint}")


def _complaint(file: str, node: Node, path: Sequence[str], message: str) -> ScenarioError:
    return complain(file, node.place, f"{'.'.join(path)}: {message}")


def _fields(owner: Node, path: Sequence[str]) -> Iterable[str]:
    """The fields that a mapping at this path may have."""
    models: dict[tuple[str, ...], type[BaseModel]] = {
        ("affine",): Affine,
        ("running",): Running,
        ("controls",): Controls,
        ("thresholds",): Thresholds,
    }
    model = models.get(tuple(path), Limits if path[0] == "thresholds" else None)
    return (model or DISTRIBUTIONS[str(_tag(owner))]).model_fields


def _unknown(field: str, fields: Iterable[str]) -> str:
    return f"there is no such field; {_accepted(field, fields)}"


def _accepted(found: object, choices: Iterable[str]) -> str:
    names = tuple(choices)
    verb = "is" if len(names) == 1 else "are"
    return f"accepted {verb} {', '.join(names)}{_suggestion(found, names)}"


def _suggestion(found: object, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(found), choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def json_schema() -> dict[str, Any]:
    """JSON Schema of a scenario as it is written, its axes included."""
    header = _tidied(Header.model_json_schema())
    parameters = _tidied(Parameters.model_json_schema())
    definitions = parameters["$defs"]
    for name in ("Affine", "Running"):
        fields = definitions[name]["properties"]
        for field, distribution in fields.items():
            fields[field] = {"anyOf": [{"type": "number"}, distribution]}
    for owner in (parameters, *definitions.values()):
        for field, schema in owner["properties"].items():
            axis = {"type": "array", "items": schema, "minItems": 1}
            if field == "distribution":  # an axis of names: each one's schema must allow the others
                axis = {"type": "array", "items": {"enum": [*DISTRIBUTIONS]}, "contains": schema}
            owner["properties"][field] = {"anyOf": [schema, axis]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bnaudit scenario",
        "type": "object",
        "properties": {**header["properties"], **parameters["properties"]},
        "required": ["name", "input"],
        "additionalProperties": False,
        "$defs": {**header["$defs"], **definitions},
    }


def _tidied(schema: Any) -> Any:
    """A schema of pydantic without generated titles and defaults, its unions open to axes of names."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        "anyOf" if key == "oneOf" else key: _tidied(value)
        for key, value in schema.items()
        if key not in ("title", "discriminator")
        and not (key == "default" and isinstance(value, dict))
    }
