"""Cases and numbers in the words of a terminal, and paragraphs with a hanging indent."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bnaudit.report import CaseRecord

CONSTANT_INPUT = re.compile(r"constant\(value=([^(),]*)\)")
"""An axis value that is the same as an axis `value`, and is shown as one."""

CALL = re.compile(r"(\w*)\((.*)\)")
"""An axis value with fields: normal(mean=1,std=2), (mean=0,var=1)."""

MARKUP = re.compile(
    r"[\\|*`\[\]#~$<&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^>|^[-+](?=[-+ ])|(?<=^\d)[.)](?= )"
)
"""What Markdown may take for more than text; _ only where it is not inside a word."""

NUMBER = re.compile(r"(?<![\w.])-?\d+\.?\d*(e[+-]?\d+)?(?![\w.])")


class Hanging:
    """Paragraphs beside a prefix: wrapped lines are indented by its width."""

    def __init__(self, prefix: Text | str, *paragraphs: Text | str) -> None:
        """prefix: stands before the first line."""
        self._prefix = Text(prefix) if isinstance(prefix, str) else prefix
        self._paragraphs = [Text(p) if isinstance(p, str) else p for p in paragraphs]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines of the console's width at most, without blanks at their ends."""
        indent = self._prefix.cell_len
        width = max(options.max_width - indent, 20)
        before = self._prefix
        for paragraph in self._paragraphs:
            for line in paragraph.wrap(console, width, overflow="fold"):
                line.rstrip()
                yield Text.assemble(before, line, overflow="ignore", no_wrap=True)
                before = Text(" " * indent)


def number(value: float | None, digits: int) -> str:
    """Such as 0.467, 5.5e-5, 7.1e3, nan; "-" for what does not apply."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    text = f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{digits - 1}e}"
    mantissa, e, exponent = text.partition("e")
    if not e:
        return text
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def listed(words: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def count(number: int, noun: str) -> str:
    """Such as "2 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def axes(case: CaseRecord) -> dict[str, str]:
    """The axes in a case's id: "value=3.3,input=normal(mean=1, std=2)" has two."""
    found: dict[str, str] = {}
    depth, part = 0, ""
    for character in case.id[len(case.scenario) + 1 :] + ",":
        depth += (character in "([") - (character in ")]")
        if character == "," and depth <= 0:
            name, _, value = part.partition("=")
            if name:
                found[name] = value
            part = ""
        else:
            part += character
    return found


def _parts(case: CaseRecord, *, brief: bool) -> list[str]:
    """A case in words: its own axes, then memory format, dtype and shape, the usual ones left out.

    brief: without names where a value speaks for itself.
    """
    own_axes = {name: NUMBER.sub(_tidy, value) for name, value in axes(case).items()}
    constant = CONSTANT_INPUT.fullmatch(own_axes.get("input", ""))
    if constant is not None:
        own_axes = {"value": constant[1], **own_axes}
        del own_axes["input"]
    own = [name for name in own_axes if name not in ("memory_format", "dtype", "shape")]
    words = []
    for name in own:
        value = own_axes[name]
        call = CALL.fullmatch(value)
        if value in ("true", "false"):
            words.append(name if value == "true" else f"no {name}")
        elif brief and call is not None:
            values = call[2] if call[1] in ("", "normal") else re.sub(r"\w+=", "", call[2])
            words.append(f"{call[1]} {values}".removeprefix("normal ").lstrip())
        elif name == "input" or (brief and len(own) == 1):
            words.append(value)
        else:
            words.append(f"{name}={value}")
    if case.memory_format != "contiguous" or "memory_format" in own_axes:
        words.append(case.memory_format)
    if case.dtype != "float32" or "dtype" in own_axes:
        words.append(case.dtype)
    return [*words, "x".join(str(size) for size in case.shape)]


def _tidy(found: re.Match[str]) -> str:
    """A number as people write it: 1e6 for 1000000.0."""
    short = number(float(found[0]), 6)
    return short if float(short) == float(found[0]) else found[0]


def label(case: CaseRecord) -> str:
    """All of a case's parts: value=3.3 channels_last 32x64x56x56."""
    return " ".join(_parts(case, brief=False))


def brief(case: CaseRecord, width: int) -> str:
    """As many parts of the case as fit, the telling ones first."""
    text = ""
    for part in _parts(case, brief=True):
        longer = f"{text} {part}".lstrip()
        if len(longer) <= width or not text:
            text = longer
    return text


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines. rows: of cells that are Markdown already."""
    return [f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *rows)]


def markdown_text(text: str) -> str:
    """Text on one line that Markdown shows as it is, in a table as well; no HTML comes of it."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return MARKUP.sub(r"\\\g<0>", line)
