"""How a backend forms its mean → what a person reads: the order's name, if it has one, and its whole tree.

In the tree, (0 1 2) adds values from left to right, [a + b + c] larger parts, and {0, 1, 2} adds at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType

from bnaudit.probe import Finding, Tree, depth, leaves, node
from bnaudit.render.words import Hanging

FORMATS = {8: "bfloat16", 11: "float16", 24: "float32", 53: "float64"}
"""Dtypes by their significant bits."""

ABBREVIATED = 6
"""Evenly spaced places from this many on are shown by the first two and the last."""

TOPIC = 16
"""Columns in front of what is told."""


def finding_text(finding: Finding, threads: int, width: int) -> RenderableType:
    """What a probe found, for a terminal of this width."""
    setting = finding.setting
    split = f" in {setting.images} images of {setting.spatial}" if setting.images > 1 else ""
    entries = {"order": [str(finding.reason)]}
    if finding.tree is not None:
        order = name(finding.tree)
        if order == "left to right":
            order += ", or a compensated sum (Kahan), which looks the same"
        entries = {
            "order": [order],
            "tree": nested(finding.tree, width - TOPIC),
            "accumulator": [_accumulator(finding)],
            "additions": [f"at most {depth(finding.tree)} in a row"],
        }
    if finding.kernel is not None:
        entries["kernel"] = [finding.kernel]
    return Group(
        Hanging(
            "",
            f"{finding.backend}: {finding.quantity} of {setting.size} {setting.dtype} values{split}, "
            f"{setting.memory_format}, {threads} threads",
        ),
        *(Hanging(f"  {topic:{TOPIC - 2}}", *lines) for topic, lines in entries.items()),
    )


def _accumulator(finding: Finding) -> str:
    if finding.bits is None:
        top, bottom = finding.setting.exponents
        return f"more than {top - bottom} significant bits"
    dtype = f" ({FORMATS[finding.bits]})" if finding.bits in FORMATS else ""
    return f"{finding.bits} significant bits{dtype}"


# --- the name --------------------------------------------------------------------------------------


def name(tree: Tree) -> str:
    """What the order of additions is called, in a line."""
    whole = _pattern(tree)
    if whole is not None:
        return whole
    blocks = _blocks(tree)
    among = _skeleton(tree, {block: i for i, block in enumerate(blocks)})
    assert among is not None  # noqa: S101 - the blocks are all of the tree
    first, *rest = blocks
    kind = _pattern(first)
    if kind is not None and all(_pattern(block) == kind for block in rest):
        size = _span(len(leaves(block)) for block in blocks)
        return f"{len(blocks)} blocks of {size}, each {kind}; then {_added(among, len(blocks))}"
    if kind is not None and _pattern(among) == "left to right":
        span = _span(place for block in rest for place in leaves(block))
        if all(isinstance(block, int) for block in rest):
            return f"{kind}; then {span} one by one"
        if len(rest) == 1:
            return f"{kind}; then {span}, {_pattern(rest[0])}"
    return "one that has no name"


def _span(numbers: Iterable[int]) -> str:
    known = sorted(numbers)
    return " to ".join(map(str, dict.fromkeys((known[0], known[-1]))))


def _pattern(tree: Tree) -> str | None:
    """The name of an order of consecutive places; None where it has none, or is a single place."""
    if isinstance(tree, int):
        return None
    places = sorted(leaves(tree))
    first, size = places[0], len(places)
    if places != list(range(first, first + size)):
        return None
    patterns = {  # of few places several are the same: the last name counts
        node(*places): "all at once",
        _halves(places): f"pairwise, {(size + 1) // 2} apart first",
        _neighbours(places): "pairwise, neighbours first",
        _chain(places[::-1]): "right to left",
        _chain(places): "left to right",
    }
    if tree in patterns:
        return patterns[tree]
    count = _partner(tree, first) - first
    if count > size // 2:
        return None
    lanes = _skeleton(tree, {_chain(places[i::count]): i for i in range(count)})
    return None if lanes is None else f"{count} interleaved lanes, {_added(lanes, count)}"


def _added(parts: Tree, count: int) -> str:
    if count == 2:
        return "added"
    pattern = _pattern(parts)
    if pattern is None:
        return "added as the tree shows"
    return f"added in {pattern}" if pattern[0].isdigit() else f"added {pattern}"


def _chain(parts: Sequence[Tree]) -> Tree:
    total, *rest = parts
    for part in rest:
        total = node(total, part)
    return total


def _neighbours(parts: Sequence[Tree]) -> Tree:
    while len(parts) > 1:
        parts = [
            node(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i]
            for i in range(0, len(parts), 2)
        ]
    return parts[0]


def _halves(parts: Sequence[Tree]) -> Tree:
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [
            node(parts[i], parts[i + half]) if i + half < len(parts) else parts[i]
            for i in range(half)
        ]
    return parts[0]


def _partner(tree: Tree, place: int) -> int:
    """The first of the places that `place` is joined with first."""
    while isinstance(tree, tuple):
        inner = next(part for part in tree if place in leaves(part))
        if isinstance(inner, int):
            break
        tree = inner
    return sorted(leaves(tree))[1]


def _skeleton(tree: Tree, numbers: Mapping[Tree, int]) -> Tree | None:
    """The tree with parts replaced by their numbers; None where it is not made of these parts."""
    if tree in numbers:
        return numbers[tree]
    if isinstance(tree, int):
        return None
    parts = [_skeleton(part, numbers) for part in tree]
    known = [part for part in parts if part is not None]
    return node(*known) if len(known) == len(parts) else None


def _blocks(tree: Tree) -> list[Tree]:
    """The largest parts with a name, and single places, by their first place."""
    if isinstance(tree, int) or _pattern(tree) is not None:
        return [tree]
    return sorted((block for part in tree for block in _blocks(part)), key=lambda b: min(leaves(b)))


# --- the tree --------------------------------------------------------------------------------------


def nested(tree: Tree, width: int) -> list[str]:
    """The whole tree in a line of this width, otherwise each of its parts in lines of its own."""
    line = _line(tree)
    if len(line) <= width or isinstance(tree, int) or line[0] != "[":
        return [line]
    lines = []
    for sign, part in zip("[" + "+" * len(leaves(tree)), _terms(tree), strict=False):
        first, *more = nested(part, width - 4)  # the sign in front, brackets behind
        lines += [f"{sign} {first}", *(f"  {line}" for line in more)]
    lines[-1] += " ]"
    return lines


def _line(tree: Tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    if len(tree) > 2:
        return "{" + ", ".join(_words(tree)) + "}"
    terms = _terms(tree)
    if all(isinstance(term, int) for term in terms):
        return "(" + " ".join(_words(terms)) + ")"
    return "[" + " + ".join(map(_line, terms)) + "]"


def _terms(tree: tuple[Tree, ...]) -> list[Tree]:
    """The parts that are added from left to right, all but the first of one size; those of a node of many."""
    if len(tree) > 2:
        return list(tree)
    first, last = tree
    terms = [last]
    while (
        isinstance(first, tuple) and len(first) == 2 and len(leaves(first[1])) == len(leaves(last))
    ):
        first, last = first
        terms.append(last)
    return [first, *reversed(terms)]


def _words(terms: Sequence[Tree]) -> list[str]:
    words = [_line(term) for term in terms]
    places = [term for term in terms if isinstance(term, int)]
    steps = {b - a for a, b in pairwise(places)}
    if len(places) == len(terms) >= ABBREVIATED and len(steps) == 1:
        words[2:-1] = ["…"]
    return words
