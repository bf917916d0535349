"""What a run runs: backends from names and globs (-b, --require), cases from an expression (-k)."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from bnaudit.audit import Selected
from bnaudit.environments import CURRENT, split
from bnaudit.worker.backends import Backend

GROUPS = ("real", "specimens", "all")
"""Names that -b takes besides those of backends."""

Match: TypeAlias = Callable[[str], bool]


class SelectionError(Exception):
    """A backend or an expression that means nothing; the message says what would."""


# --- backends --------------------------------------------------------------------------------------


def select(
    names: Sequence[str],
    required: Sequence[str],
    table: Mapping[str, Backend],
    environments: Sequence[str] = (),
) -> list[Selected]:
    """The backends to run, in the order named.

    Each name is a backend, with or without its device, a plug-in (FILE.py:NAME, package.module:NAME), a
    glob, or one of GROUPS, and runs in another of the environments with that one's name and a colon in
    front. Real frameworks and plug-ins are gated, specimens only where they are named themselves. What is
    named itself must be available; without a device, that on the cpu. Without names the default ones of
    the table run or, where there are other environments, what these have (see `frameworks`).
    Raises SelectionError.
    """
    chosen: dict[str, Selected] = {}

    def add(environment: str, name: str, *, gated: bool, required: bool) -> None:
        real = name not in table or table[name].kind == "real"
        full = name if environment == CURRENT else f"{environment}:{name}"
        earlier = chosen.get(full, Selected(full, gated=False))
        chosen[full] = Selected(
            full, gated=earlier.gated or gated or real, required=earlier.required or required
        )

    for given in names:
        environment, rest = split(given, environments)
        _refuse_unknown(given, table, environments)
        members = _group(rest, table)
        if members is None:
            for name, must_run in _resolve(rest, table):
                add(environment, name, gated=True, required=must_run)
        else:
            for name in members:
                add(environment, name, gated=False, required=False)
    if not names:
        for environment in environments or [CURRENT]:
            for name in frameworks(table) if environments else table:
                if environments or table[name].default:
                    add(environment, name, gated=False, required=False)
    for given in required:
        environment, rest = split(given, environments)
        for name, must_run in _resolve(rest, table):
            if must_run:
                add(environment, name, gated=False, required=True)
    return list(chosen.values())


def _refuse_unknown(given: str, table: Mapping[str, Backend], environments: Sequence[str]) -> None:
    """Raises SelectionError for ENV:BACKEND where no such environment was given."""
    name, colon, rest = given.partition(":")
    known = any(rest in (backend, backend.partition("@")[0]) for backend in table)
    if colon and known and name not in environments:
        given_ = ", ".join(environments) or "none"
        raise SelectionError(
            f"{given!r}: there is no environment {name!r}; given with --env: {given_}"
        )


def frameworks(table: Mapping[str, Backend]) -> list[str]:
    """What is run of an environment of which no backend is named: real frameworks, as their users call them.

    Of torch, whose other paths are forced ones, only the default.
    """
    return [
        name
        for name, backend in table.items()
        if backend.kind == "real" and (backend.default or not name.startswith("torch"))
    ]


def _group(given: str, table: Mapping[str, Backend]) -> list[str] | None:
    """The members of a group or the matches of a glob, in the table's order; None for other names."""
    if given in GROUPS:
        kind = given.removesuffix("s")
        return [name for name, backend in table.items() if given == "all" or backend.kind == kind]
    if ":" in given or not any(sign in given for sign in "*?["):
        return None
    members = fnmatch.filter(table, given) or fnmatch.filter(table, f"{given}@*")
    if not members:
        raise SelectionError(f"no backend matches {given!r}; bnaudit list shows all")
    return members


def _resolve(given: str, table: Mapping[str, Backend]) -> list[tuple[str, bool]]:
    """The backends of one name, and whether each must be available."""
    if given in GROUPS:
        raise SelectionError(f"--require takes the name of one backend, not the group {given!r}")
    if given in table:
        return [(given, True)]
    if ":" in given:
        return [(_plugin(given), True)]
    devices = [name for name in table if name.partition("@")[0] == given]
    if devices:
        return [(name, name.endswith("@cpu") or len(devices) == 1) for name in devices]
    if given.endswith(".py"):
        raise SelectionError(
            f"{given!r} names a file; a plug-in is FILE.py:NAME, its function's name"
        )
    if "." in given and "*" not in given and not any(given in name for name in table):
        module, _, name = given.rpartition(".")
        raise SelectionError(
            f"there is no backend {given!r}; a plug-in is named with a colon: {module}:{name}"
        )
    short = {name.partition("@")[0] for name in table}
    close = difflib.get_close_matches(given, [*table, *sorted(short), *GROUPS], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise SelectionError(f"there is no backend {given!r}{hint} (bnaudit list shows all)")


def _plugin(given: str) -> str:
    target, _, function = given.rpartition(":")
    name, at, device = function.partition("@")
    if ("@" in target and not target.endswith(".py")) or (at and device not in ("cpu", "cuda")):
        raise SelectionError(
            f"{given!r} names no device: accepted are @cpu and @cuda, which CUDA_VISIBLE_DEVICES chooses"
        )
    if not target or not name.isidentifier():
        raise SelectionError(f"{given!r} is no plug-in; one is FILE.py:NAME or package.module:NAME")
    if target.endswith(".py") and not Path(target).is_file():
        raise SelectionError(f"the plug-in {given!r} is in no file: {target} does not exist")
    return given if at else f"{given}@cpu"


# --- cases -----------------------------------------------------------------------------------------


def matcher(expression: str) -> Callable[[str, str], bool]:
    """Whether a case's id and a backend's name match an expression of substrings.

    Substrings are joined by `and`, `or`, `not` and parentheses; letter case does not matter, and all
    signs but blanks and parentheses are ordinary. Raises SelectionError with the position of a mistake.
    """
    parser = _Parser(expression)
    match = parser.parse()
    return lambda case, backend: match(f"{case} {backend}".lower())


class _Parser:
    """Recursive descent: alternatives of conjunctions of factors."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._tokens = [
            (found.group().lower(), found.start())
            for found in re.finditer(r"[()]|[^\s()]+", expression)
        ]
        self._tokens.append(("", len(expression)))
        self._next = 0

    def parse(self) -> Match:
        match = self._alternatives()
        word, _ = self._tokens[self._next]
        if word == ")":
            raise self._error("no parenthesis is open here")
        if word:
            raise self._error(f"expected 'and' or 'or' before {word!r}")
        return match

    def _accept(self, word: str) -> bool:
        found = self._tokens[self._next][0] == word
        self._next += found
        return found

    def _error(self, complaint: str) -> SelectionError:
        position = self._tokens[self._next][1]
        return SelectionError(f"{complaint}, at position {position + 1} of {self._expression!r}")

    def _alternatives(self) -> Match:
        match = self._conjunction()
        while self._accept("or"):
            match = _either(match, self._conjunction())
        return match

    def _conjunction(self) -> Match:
        match = self._factor()
        while self._accept("and"):
            match = _both(match, self._factor())
        return match

    def _factor(self) -> Match:
        if self._accept("not"):
            inner = self._factor()
            return lambda text: not inner(text)
        if self._accept("("):
            inner = self._alternatives()
            if not self._accept(")"):
                raise self._error("expected ')'")
            return inner
        word, _ = self._tokens[self._next]
        if word in ("", "and", "or", ")"):
            raise self._error("expected a part of a case's or a backend's name")
        self._next += 1
        return lambda text: word in text


def _either(left: Match, right: Match) -> Match:
    return lambda text: left(text) or right(text)


def _both(left: Match, right: Match) -> Match:
    return lambda text: left(text) and right(text)
