"""Case and fault → a stand-alone script that makes the input, calls the framework and compares.

The script needs NumPy and the framework alone.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from bnaudit import calls
from bnaudit.distributions import Array
from bnaudit.findings import clusters
from bnaudit.inputs import Inputs
from bnaudit.literals import Source, helpers, written
from bnaudit.report import CaseRecord, Report, ResultRecord
from bnaudit.scenario import Case, Parameters
from bnaudit.verdict import DEFAULT_THRESHOLDS, DIED, Judged, Thresholds
from bnaudit.worker.rounding import widen

WIDTH = 100

QUANTITIES = (
    "y",
    "running_mean",
    "running_var",
    "grad_input",
    "grad_weight",
    "grad_bias",
    "batch_mean",
    "batch_var",
    "invstd",
)
"""In the order in which a failing one is chosen to be shown: what users see comes first."""


class ReproError(Exception):
    """There can be no script; the message is one sentence that says why."""


@dataclass(frozen=True)
class Fault:
    """What is wrong, and in which element it shows.

    status: "fail", "crash" or "timeout"; the rest is None for the latter two. allowed: the largest error that
    is none; None where the element should be finite and is not, or the reverse. index is None where the
    element that fails is not the one that was recorded.
    """

    status: str
    quantity: str | None = None
    index: tuple[int, ...] | None = None
    value: float = math.nan
    expected: float = math.nan
    allowed: float | None = None

    @property
    def excess(self) -> float:
        """The error in units of what is allowed; inf where that is no number."""
        if not self.allowed:
            return math.inf
        return abs(self.value - self.expected) / self.allowed

    def summary(self) -> str:
        """What is wrong, as a title."""
        if self.quantity is None or self.index is None:
            return "the process dies" if self.status == "crash" else "it does not end"
        return f"{self.quantity}[{_index(self.index)}] is {self.value:.6g}, not {self.expected:.6g}"


def find(report: Report, number: int) -> tuple[CaseRecord, ResultRecord]:
    """The worst result of a finding, and its case. Raises ReproError."""
    found = {finding.number: finding for finding in clusters(report)}
    if number not in found:
        there = f"its findings are 1 to {max(found)}" if found else "it has none"
        raise ReproError(f"there is no finding {number} in the report: {there}")
    worst, case = found[number].worst, found[number].case
    for name in {"y", "grad_input"} & worst.quantities.keys():
        element = worst.quantities[name].worst
        if element is not None and not _is_in(element.index, case.shape):
            raise ReproError(
                f"the report's {name} of {case.id} has no element {_index(element.index)}"
            )
    return case, worst


def _is_in(index: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape has an element of this index."""
    return len(index) == len(shape) and all(
        0 <= i < size for i, size in zip(index, shape, strict=True)
    )


def rebuilt(record: CaseRecord) -> Case:
    """The case that a record describes. Raises ReproError where the record or a file lacks something."""
    if record.running is None or record.param_dtype is None:
        raise ReproError(
            f"the report does not have all parameters of {record.id}: it was made by an earlier bnaudit"
        )
    fields = json.loads(record.to_json())
    context = {"folder": Path(record.file).parent}
    try:
        case = Case.model_validate(
            {name: _tupled(fields[name]) for name in Case.model_fields if name in fields},
            context=context,
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ReproError(
            f"the report's case {record.id} is not valid: {place}: {first['msg']}"
        ) from error
    for path, message in case.faults():
        raise ReproError(f"{record.id}: {'.'.join(path)}: {message}")
    return case


def _tupled(value: Any) -> Any:
    """JSON's value with tuples for lists, as a case has them."""
    if isinstance(value, dict):
        return {key: _tupled(item) for key, item in value.items()}
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def fault_of(
    status: str,
    quantities: Mapping[str, Judged],
    thresholds: Mapping[str, Thresholds],
    weight: Array | None,
    wanted: str | None = None,
) -> Fault | None:
    """What of a result a script can show; None where nothing that it can show fails.

    wanted: the only quantity that counts. weight: that of the channels, as float64.
    """
    if status in DIED:
        return Fault(status)
    failed = [n for n in QUANTITIES if n in quantities and quantities[n].status == "fail"]
    if wanted is not None:
        failed = [name for name in failed if name == wanted]
    if status != "fail" or not failed:
        return None
    name = failed[0]
    found = quantities[name]
    worst = found.worst
    if worst is None:
        return Fault(status, name)
    value, right, index = float(worst.value), float(worst.reference), tuple(worst.index)
    if found.nonfinite:
        shows = math.isfinite(value) != math.isfinite(right)
        return Fault(status, name, index if shows else None, value, right)
    error = abs(value - right)
    sigma = 1.0 if weight is None or name != "y" else abs(float(weight[index[1]]))
    limits = {**DEFAULT_THRESHOLDS, **thresholds.get(name, {})}
    excesses = {
        key: size / limit if limit else math.inf
        for key, size in (
            ("bound_ratio", found.bound_ratio),
            ("max_abs_error", found.max_abs_error),
            ("max_ulp_error", found.max_ulp_error),
            ("tight_ratio", found.tight_ratio),
            ("constant_abs_error", found.constant_error if found.constant_misses else None),
        )
        if size is not None and (limit := limits[key]) is not None and not size <= limit
    }
    # Only the first is sure to be of the worst element.
    largest = {"max_abs_error": found.max_abs_error, "constant_abs_error": None}
    if found.constant_error is not None:
        largest["constant_abs_error"] = found.constant_error * sigma
    excess = max(
        (
            excess
            for key, excess in excesses.items()
            if (whole := largest.get(key)) is None or math.isclose(error, whole, rel_tol=1e-6)
        ),
        default=None,
    )
    if excess is None:
        return Fault(status, name, None, value, right)
    return Fault(status, name, index, value, right, error / excess if error else 0.0)


# --- the script ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """A script, the arrays that are to lie beside it (FILE.py.NAME.npy), and a proof of what it expects.

    proof: a script of its own, with exact rational arithmetic; None where there is none.
    """

    text: str
    files: Mapping[str, Array]
    proof: str | None


def script(
    case: Case,
    inputs: Inputs,
    fault: Fault,
    backend: str,
    *,
    threads: int,
    found: str,
    timeout: float = 60.0,
    correction: int | None = 1,
) -> Script:
    """The script that shows a fault. Raises ReproError.

    found: where it was seen, in words. backend: without its environment's name. correction: that of the
    running variance; None where the running statistics follow a rule of their own.
    """
    try:
        call = calls.call(backend, case, threads)
    except calls.NoCallError as error:
        raise ReproError(str(error)) from error
    if fault.quantity is not None and fault.index is None:
        raise ReproError(
            "the report does not say which element fails (the worst one is within its bound); "
            "--shrink finds out"
        )
    if fault.quantity is not None and fault.quantity not in call.values:
        raise ReproError(f"{backend} hands out no {fault.quantity} that a script could compare")
    source = written(case, inputs)
    loop = case.steps > 1
    once = [line for lines in source.once.values() for line in lines]
    is_left = loop or (fault.quantity or "").startswith("running")
    each = [*source.each, *call.step, *(call.left if is_left else ())]
    if loop:
        each = [f"for step in range({case.steps}):", *(f"    {line}".rstrip() for line in each)]
    body = [
        *_imports(call, fault, timeout),
        "",
        *helpers([*once, *each], case.seed),
        *once,
        *call.setup,
        *([""] if loop or len(call.step) > 4 else []),
        *each,
        "",
        *_comparison(call, fault),
    ]
    code = "Dies while it is so, else exits with 0" if fault.status == "crash" else ""
    code = code or "Exit code: 1 while it is so, else 0"
    text = textwrap.fill(f'"""{backend}: {fault.summary()}. {code}. {found}"""', WIDTH)
    lines = [line for long in body for line in _wrapped(long)]
    return Script(
        f"{text}\n" + "\n".join(lines) + "\n",
        source.files,
        _proof(case, inputs, fault, source, correction),
    )


def _imports(call: calls.Call, fault: Fault, timeout: float) -> list[str]:
    standard = ["import sys"]
    settings = []
    if fault.status == "timeout":
        standard.insert(0, "import faulthandler")
        settings = [
            "",
            f"faulthandler.dump_traceback_later({timeout:g}, exit=True)  # exits with 1",
        ]
    if call.environ:
        standard.insert(-1, "import os")
        given = ", ".join(f'{name}="{value}"' for name, value in call.environ.items())
        standard.append("")
        standard.append(f"os.environ.update({given})")
    return [*standard, "", "import numpy as np", *"\n".join(call.imports).splitlines(), *settings]


def _index(index: Sequence[int]) -> str:
    return ", ".join(map(str, index))


def _float(value: float) -> str:
    """A float64 as source text, in decimal where that is as short as it is exact."""
    if not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _comparison(call: calls.Call, fault: Fault) -> list[str]:
    if fault.quantity is None or fault.index is None:
        return ['print("done: the fault is gone")']
    place = f"{fault.quantity}[{_index(fault.index)}]"
    lines = [
        f"value = float({call.values[fault.quantity]}[{_index(fault.index)}])",
        f"expected = {_float(fault.expected)}"
        + (f"  # {fault.expected.hex()}" if fault.expected % 1 else ""),
    ]
    if fault.allowed is None:
        lines += [
            f'print("{place} is", value, "and should be", expected)',
            "sys.exit(0 if np.isfinite(value) == np.isfinite(expected) else 1)",
        ]
        return lines
    return [
        *lines,
        f"allowed = {fault.allowed:.3g}",
        "error = abs(value - expected)",
        f'print("{place} is", value, "and should be", expected)',
        'print("off by", error, "where", allowed, "is allowed")',
        "sys.exit(0 if error <= allowed else 1)",
    ]


def _wrapped(line: str) -> list[str]:
    """A long line broken at commas, which only arrays and calls need."""
    if len(line) <= WIDTH or "(" not in line:
        return [line]
    indent = len(line) - len(line.lstrip()) + 4
    pieces = textwrap.wrap(
        line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    try:
        compile(textwrap.dedent("\n".join(pieces)), "<script>", "exec")
    except SyntaxError:  # broken within a string, or outside of all brackets
        return [line]
    return pieces


# --- the proof -------------------------------------------------------------------------------------

EXACT: Mapping[str, str] = {
    "y": "(value - mean) / root * weight + bias",
    "batch_mean": "mean",
    "batch_var": "var",
    "invstd": "1 / root",
    "running_mean": "(1 - momentum) * running_mean + momentum * mean",
    "running_var": "(1 - momentum) * running_var + momentum * var * n / {divisor}",
    "grad_bias": "sum(dy)",
    "grad_weight": "dot / root",
}


def _proof(
    case: Case, inputs: Inputs, fault: Fault, source: Source, correction: int | None
) -> str | None:
    """The expected value from Python's fractions: only the root is not rational, and has 128 bits."""
    if (
        fault.quantity is None
        or fault.index is None
        or case.steps > 1
        or source.files
        or not case.n
    ):
        return None
    if not math.isfinite(fault.expected) or not np.isfinite(widen(inputs.x, case.dtype)).all():
        return None
    name, training = fault.quantity, case.mode == "training"
    exact = EXACT.get(name)
    if name == "grad_input":
        centred = " - sum(dy) / n - (value - mean) * dot / (n * square)" if training else ""
        exact = f"(upstream{centred}) * weight / root"
    if exact is None or (name.startswith("running") and (correction is None or not training)):
        return None
    channel = fault.index[1] if name in ("y", "grad_input") else fault.index[0]
    names = set() if training else {"running_mean", "running_var"}
    names |= {name} if name.startswith("running") else set()
    if case.affine is not None and name in ("y", "grad_input"):
        names |= {"weight", "bias"}
    needed = {"x"} | (names & source.once.keys())
    needed |= {"grad_output"} if name.startswith("grad") else set()
    made = [line for tensor in source.once if tensor in needed for line in source.once[tensor]]
    lines = [
        "from fractions import Fraction",
        "from math import isqrt",
        "",
        "import numpy as np",
        "",
        *helpers(made, case.seed),
        *made,
        f"c, n = {channel}, {case.n}",
        "channel = [Fraction(float(v)) for v in x[:, c].ravel()]",
    ]
    if training:
        lines += [
            "mean = sum(channel) / n",
            "var = sum((v - mean) ** 2 for v in channel) / n",
        ]
    else:
        lines.append(
            "mean, var = Fraction(float(running_mean[c])), Fraction(float(running_var[c]))"
        )
    for wanted in sorted(names - (set() if training else {"running_mean", "running_var"})):
        lines.append(f"{wanted} = Fraction(float({wanted}[c]))")
    if case.affine is None and name in ("y", "grad_input"):
        lines.append("weight, bias = 1, 0")
    if name.startswith("grad"):
        lines += [
            "dy = [Fraction(float(v)) for v in grad_output[:, c].ravel()]",
            "dot = sum(g * (v - mean) for g, v in zip(dy, channel))",
        ]
    if "root" in exact:
        lines += [
            f"square = var + Fraction({case.eps!r})",
            "p, q = square.numerator, square.denominator",
            "root = Fraction(isqrt(p * q << 256), q << 128)  # to 128 bits",
        ]
    if name in ("y", "grad_input"):
        lines.append(f"value = Fraction(float(x[{_index(fault.index)}]))")
    if name == "grad_input":
        lines.append(f"upstream = Fraction(float(grad_output[{_index(fault.index)}]))")
    if name.startswith("running"):
        lines.append(f"momentum = Fraction({1.0 if case.momentum is None else case.momentum!r})")
    divisor = max(case.n - (correction or 0), 1)
    lines.append(f"print(float({exact.format(divisor=divisor)}))")
    return "\n".join(piece for line in lines for piece in _wrapped(line)) + "\n"


# --- the scenario ----------------------------------------------------------------------------------


def scenario_text(
    case: Case, name: str, description: str, files: Mapping[str, str] | None = None
) -> str:
    """A scenario file with this case alone; what has its default is left out.

    files: where the values of input and grad_output are, seen from the scenario, if they are in files.
    """
    import yaml

    fields: dict[str, Any] = {"name": name, "description": description}
    given = case.model_dump(mode="json", include=set(Parameters.model_fields))
    for key, value in given.items():
        default = Parameters.model_fields[key].get_default(call_default_factory=True)
        own = getattr(case, key)
        if key in ("input", "shape") or (
            own != default and not (key == "grad_output" and not case.backward)
        ):
            fields[key] = value
    for key, path in (files or {}).items():
        fields[key] = {"distribution": "file", "path": path}
    if case.thresholds:
        fields["thresholds"] = {k: dict(v) for k, v in case.thresholds.items()}
    text: str = yaml.safe_dump(
        fields, sort_keys=False, default_flow_style=None, width=WIDTH, allow_unicode=True
    )
    return text
