"""Ways to damage a text, JSON or not: a function of its bytes and of a source of random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**18, 10**400, -(10**400)),
    *(0.5, -0.0, 5e-324, 1e308, -1e308, float("nan"), float("inf"), 1e-400),
    *(
        "",
        "y",
        "nan",
        "inf",
        "fail",
        "crash",
        "unsupported",
        "\x00",
        "\n",
        "\x1b[2J",
        "\ud800",
        "é",
    ),
    *("../y", "/dev/zero", "x" * 300, "1" * 5000, [], {}, [[]], [0], {"y": {}}, [1] * 50),
)
"""What a field may be given in place of its value."""

WORDS = (
    *(
        "[",
        "]",
        "{",
        "}",
        ": ",
        ", ",
        "- ",
        "\n",
        "\n---\n",
        "  ",
        "\t",
        "&a ",
        "*a",
        "!!set ",
        "|",
        "'",
    ),
    *('"', "#", "null", "true", "yes", "~", ".inf", "-.inf", ".nan", "-1", "0", "1e400", "5e-324"),
    *("1e308", "-1e308", "9" * 400, "0x" + "f" * 5000, "1e-5", "0o17", "<<: ", "? ", "%YAML 1.1\n"),
    *("input", "shape", "[0, 1]", "[1, 1, 3, 3]", "[999999, 999999, 9]", "dtype: float16", "steps"),
    *(
        "distribution: ",
        "channels",
        "items",
        "values",
        "nonfinite",
        "switch",
        "file",
        "path: x.npy",
    ),
    *("planted", "wide", "low_exponent: ", "affine: ", "running: ", "thresholds: ", "controls: "),
    *(
        "memory_format: strided",
        "mode: inference",
        "backward: true",
        "\x00",
        "\ufeff",
        "\u2028",
        "é",
    ),
)
"""What may turn up in a text."""

Place = tuple[Any, Any]
"""A list or a mapping, and an index or a key of it."""


def damaged(content: bytes, random: Random) -> bytes:
    """The content with one to four things changed: as JSON, where it is lines of that, or as text."""
    change: Callable[[bytes, Random], bytes] = spliced if random.random() < 0.3 else _changed_tree
    for _ in range(random.randint(1, 4)):
        content = change(content, random)
    return content


def spliced(content: bytes, random: Random) -> bytes:
    """With a piece cut out, doubled, moved, flipped or replaced; sometimes without all that follows."""
    start = random.randint(0, len(content))
    stop = min(len(content), start + random.choice((0, 1, 1, 2, 5, 12, 40)))
    piece, target = content[start:stop], random.randint(0, len(content))
    kind = random.randrange(6)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[stop:]
    if kind == 2:
        return content[:target] + piece * random.choice((1, 2, 50)) + content[target:]
    if kind == 3:
        flipped = bytes(byte ^ 1 << random.randrange(8) for byte in piece)
        return content[:start] + flipped + content[stop:]
    word = random.choice(WORDS).encode()
    return content[:start] + word + content[start if kind == 4 else stop :]


def _changed_tree(content: bytes, random: Random) -> bytes:
    """With a value of one of its lines of JSON changed; spliced where there is none."""
    lines = content.splitlines(keepends=True)
    whole = random.randrange(len(lines)) if lines and random.random() < 0.5 else None
    try:
        tree = json.loads(content if whole is None else lines[whole])
    except (ValueError, RecursionError):
        return spliced(content, random)
    box = [tree]
    _change(box, random)
    text = json.dumps(box[0]).encode()
    if whole is None:
        return text
    lines[whole] = text + b"\n"
    return b"".join(lines)


def _change(box: list[Any], random: Random) -> None:
    """Replaces, removes, adds, moves or wraps one value somewhere in the box."""
    places = list(_places(box))
    owner, key = random.choice(places)
    kind = random.randrange(8)
    if kind < 4:
        owner[key] = random.choice(VALUES)
    elif kind == 4 and owner is not box:
        del owner[key]
    elif kind == 5:
        other, place = random.choice(places)
        owner[key] = json.loads(json.dumps(other[place]))
    elif kind == 6:
        owner[key] = [owner[key]] * random.choice((1, 2, 300))
    elif isinstance(owner[key], dict):
        owner[key][random.choice(("y", "a", "", "name"))] = random.choice(VALUES)
    elif isinstance(owner[key], list):
        owner[key].append(random.choice(VALUES))


def _places(box: list[Any]) -> Iterator[Place]:
    pending: list[Any] = [box]
    while pending:
        owner = pending.pop()
        for key in list(owner) if isinstance(owner, dict) else range(len(owner)):
            yield owner, key
            if isinstance(owner[key], dict | list):
                pending.append(owner[key])


def pick(originals: Sequence[bytes], random: Random) -> bytes:
    """One of the originals, damaged."""
    return damaged(random.choice(originals), random)
