"""Text that is dangerous to some format, and a report that has it wherever text of others can stand."""

from __future__ import annotations

from standins import facts, report, result, scenarios, wrong

from bnaudit.audit import ControlOutcome, Event
from bnaudit.consistency import Consistency
from bnaudit.report import Report, SourcePlace

TEXTS = (
    "]]> <script>alert(1)</script> & &amp; 'single' \"double\"",
    "a | b \\| c \\",
    "`tick` ``two`` ```three``` *bold* _it_ ~~gone~~ $x$ [link](http://x.example) ![i](j)",
    "\x00\x01\x08\x0b\x1b[31m\x7f\x85\ufffe\uffff",
    "first\nsecond\r\nthird\u2028fourth ::error::% %0A",
    "# heading\n- item\n1. one\n> quote\n</details><details>",
    "x" * 300,
    "1. one",
    "- two",
    "---",
    "=== ___ +++",
    "\U0001f600 Ünïcødé \u202e reversed",
    "",
)


def hostile(text: str) -> Report:
    """A red report of one case that has the text in every field that others write."""
    case = scenarios()[0].cases[0]
    named = f"a{text}.py:f@cpu"
    events: list[Event] = [
        facts(case),
        result(
            case,
            "torch@cpu",
            "fail",
            reason=text,
            kernel=text,
            quantities={"y": wrong(0.5, reason=text)},
        ),
        result(case, "torch@cuda", "crash", reason=text, detail=text),
        result(case, f"torch-{named}", "timeout", reason=text, detail=text),
        result(case, "torch-sync@cpu", "unsupported", reason=text),
        result(case, named, "fail", reason=text),
        ControlOutcome(case.scenario, named, "fail", text, False),
        Consistency(case, named, "threads", False, text, detail=text),
        Consistency(case, named, "repeat", False, text, died=True, detail=text),
        Consistency(case, named, "channels", None, text),
    ]
    made = report(*events, verdict="untrusted", exit_code=4)
    return made.model_copy(
        update={
            "command": text,
            "notes": [text],
            "missing": {named: text},
            "unmade": [text],
            "places": {"torch@cpu": SourcePlace(file=f"dir {text}/x.py", line=3)},
        }
    )
