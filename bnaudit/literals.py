"""Inputs → source text: how a plain script makes the tensors of a case, bit for bit.

A tensor is one number, a short list or the generator in plain code, whichever is the first that gives the same
bits, which is tried; otherwise it comes from a .npy file beside the script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnaudit import distributions
from bnaudit.distributions import Array, Distribution
from bnaudit.inputs import ROLES, Inputs
from bnaudit.scenario import Case
from bnaudit.worker.layout import bits
from bnaudit.worker.rounding import widen

INLINE = 64
"""Elements up to which an array is written out."""

GENERATED = 1 << 24
"""Elements up to which a script generates a tensor: it holds eight words for each."""

NUMPY = {
    "float16": "np.float16",
    "bfloat16": "np.float32",
    "float32": "np.float32",
    "float64": "np.float64",
}
"""How a script holds values of a dtype."""


def _number(value: Any) -> str:
    """The shortest text that gives the value again in its dtype."""
    if not np.isfinite(value):
        return "np.nan" if np.isnan(value) else "np.inf" if value > 0 else "-np.inf"
    text = str(value)
    return text.removesuffix(".0") if len(text) < 12 and value != 0 else text


def _literal(array: Array, kind: str) -> str | None:
    """One number, or a list of up to INLINE."""
    flat = array.reshape(-1)
    shape = str(array.shape if array.ndim > 1 else array.size)
    if flat.size and (bits(flat) == bits(flat[:1])).all():
        if bits(flat[:1])[0] == 0:
            return f"np.zeros({shape}, {kind})"
        if flat[0] == 1:
            return f"np.ones({shape}, {kind})"
        return f"np.full({shape}, {_number(flat[0])}, {kind})"
    if flat.size > INLINE:
        return None
    numbers = ", ".join(map(_number, flat))
    reshaped = f".reshape{shape}" if array.ndim > 1 else ""
    return f"np.array([{numbers}], {kind}){reshaped}"


WORDS = """\
def words(key, count):  # random bits that are the same everywhere
    return np.random.Philox(key=np.array([{seed}, key], np.uint64)).random_raw(count)
"""

NORMAL = """\
def normal(w):  # the sum of twelve uniform numbers, less 6
    w = w[:, :6]
    return ((w >> np.uint64(32)) + (w & np.uint64(0xFFFFFFFF))).sum(1) * 2.0**-32 - 6
"""

BFLOAT16 = """\
def bfloat16(values):  # rounded to 8 bits, as float32
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256), exponent - 8).astype(np.float32)
"""


class _NotPlainError(Exception):
    """A distribution that is not written as an expression."""


def _scaled(text: str, factor: float, offset: float) -> str:
    """text · factor + offset, which is left out where it changes no bit."""
    scaled = text if factor == 1 else f"{text} * {factor!r}"
    return scaled if offset == 0 else f"{scaled} + {offset!r}"


def _fraction(column: int) -> str:
    return f"(w[:, {column}] >> np.uint64(11)) * 2.0**-53"


def _sign(column: int) -> str:
    return f"(1.0 - 2.0 * (w[:, {column}] & np.uint64(1)))"


def _expression(source: Distribution, shape: tuple[int, ...], dtype: str, key: str) -> str:
    """Values of a distribution from words w, channel c and position p of each element."""
    d = distributions
    n = shape[0] * math.prod(shape[2:])
    if isinstance(source, d.Constant):
        return f"np.full(i.size, {source.value!r})"
    if isinstance(source, d.Normal):
        return _scaled("normal(w)", source.std, source.mean)
    if isinstance(source, d.Uniform):
        return f"{source.low!r} + ({source.high!r} - {source.low!r}) * ({_fraction(0)})"
    if isinstance(source, d.Ramp):
        return f"{source.low!r} + ({source.high!r} - {source.low!r}) * (p / {max(n - 1, 1)})"
    if isinstance(source, d.Alternating):
        above, below = source.mean + source.amplitude, source.mean - source.amplitude
        return f"np.where(p % 2 == 0, {above!r}, {below!r})"
    if isinstance(source, d.Outlier):
        place = "0" if source.position == "first" else str(n - 1)
        if source.position == "random":
            place = f"(words({key} + (1 << 63), {shape[1]}) % np.uint64({n})).astype(int)[c]"
        others = _scaled("normal(w)", source.std, source.mean)
        return f"np.where(p == {place}, {source.value!r}, {others})"
    if isinstance(source, d.Wide):
        span = source.high_exponent - source.low_exponent + 1
        exponent = f"(w[:, 1] % np.uint64({span})).astype(int) + {source.low_exponent}"
        return f"{_sign(2)} * np.ldexp(1 + (w[:, 0] >> np.uint64(12)) * 2.0**-52, {exponent})"
    if isinstance(source, d.Sparse):
        values = _scaled("normal(w)", source.std, source.mean)
        return f"np.where({_fraction(6)} < {source.density!r}, {values}, 0.0)"
    if isinstance(source, d.Subnormal):
        count = 2 ** (d.PRECISION[dtype] - 1) - 1
        return f"{_sign(1)} * ((1 + w[:, 0] % np.uint64({count})) * {d.SMALLEST[dtype]!r})"
    if isinstance(source, d.Planted):
        pairs = n // 2
        above, below = source.mean + source.spread, source.mean - source.spread
        drawn = f"words({key} + (1 << 63), {-(-shape[1] * pairs // 64)})"
        pair = f"(c * {pairs} + p // 2)"
        swapped = f"({drawn}[{pair} // 64] >> ({pair} % 64).astype(np.uint64) & np.uint64(1)) == 1"
        return f"np.where((p % 2 == 0) != ({swapped}), {above!r}, {below!r})"
    if isinstance(source, d.Channels):
        items = [_expression(item, shape, dtype, key) for item in source.items]
        chosen = ", ".join(f"c % {len(items)} == {k}" for k in range(len(items)))
        return f"np.select([{chosen}], [{', '.join(items)}])"
    raise _NotPlainError


def helpers(lines: Iterable[str], seed: int) -> list[str]:
    """The functions that the lines call, each with a blank line behind it."""
    text = "\n".join(lines)
    functions = {"words(": WORDS.format(seed=seed), "normal(": NORMAL, "bfloat16(": BFLOAT16}
    return [
        line
        for call, function in functions.items()
        if call in text
        for line in (*function.splitlines(), "")
    ]


def _generated(
    name: str, source: Distribution, shape: tuple[int, ...], dtype: str, case: Case, made: Array
) -> list[str]:
    """The generator of a tensor that is `made` in the first step. Raises _NotPlainError."""
    if math.prod(shape) > GENERATED or isinstance(source, distributions.Switch):
        raise _NotPlainError
    key = f"({ROLES[name]} << 32)" if ROLES[name] else "0"
    if case.steps > 1 and name in ("x", "grad_output"):
        key = "step" if key == "0" else f"{key} + step"
    base, after = source, []
    if isinstance(source, distributions.Nonfinite):
        if case.steps > 1:
            raise _NotPlainError
        places = np.flatnonzero(~np.isfinite(made))
        if len(places) > INLINE:
            raise _NotPlainError
        base = source.base
        after = [f"{name}.flat[{place}] = {_number(made.flat[place])}" for place in places]
    expression = _expression(base, shape, dtype, key)
    plane = math.prod(shape[2:])
    lines = [f"i = np.arange({math.prod(shape)})"]
    if "c " in expression or "[c]" in expression or "p " in expression:
        lines.append(
            f"c, p = i // {plane} % {shape[1]}, i // {plane * shape[1]} * {plane} + i % {plane}"
        )
    if "w[" in expression or "(w)" in expression:
        lines.append(f"w = words({key}, 8 * i.size).reshape(-1, 8)")
    stored = (shape[1],) if name not in ("x", "grad_output") else shape
    if dtype == "bfloat16":
        expression = f"bfloat16({expression})"
    elif expression.startswith(("np.", "normal(")) and expression.endswith(")"):  # one call
        expression = f"{expression}.astype({NUMPY[dtype]})"
    else:
        expression = f"({expression}).astype({NUMPY[dtype]})"
    lines.append(f"{name} = {expression}.reshape({stored})")
    return lines + after


def _same(lines: Sequence[str], name: str, wanted: Array, steps: Sequence[int]) -> bool:
    """Whether the lines give these bits; wanted: by step."""
    scope: dict[str, Any] = {"np": np}
    source = compile("\n".join(lines), "<script>", "exec")
    for step in steps:
        scope["step"] = step
        with np.errstate(all="ignore"):
            exec(source, scope)  # noqa: S102 - what was just written
        made = scope[name]
        if made.shape != wanted[step].shape or made.dtype != wanted[step].dtype:
            return False
        if not np.array_equal(bits(made), bits(np.ascontiguousarray(wanted[step]))):
            return False
    return True


@dataclass
class Source:
    """Source text of all inputs: once, by tensor, and in each step. files: arrays that are loaded."""

    once: dict[str, list[str]] = field(default_factory=dict)
    each: list[str] = field(default_factory=list)
    files: dict[str, Array] = field(default_factory=dict)


def written(case: Case, inputs: Inputs) -> Source:
    """The source text of a case's inputs."""
    affine, running = case.affine, case.running
    plan: dict[str, tuple[Distribution, Array | None, str]] = {
        "x": (case.input, inputs.x, case.dtype),
        "weight": (case.input if affine is None else affine.weight, inputs.weight, ""),
        "bias": (case.input if affine is None else affine.bias, inputs.bias, ""),
        "running_mean": (running.mean, inputs.running_mean, ""),
        "running_var": (running.var, inputs.running_var, ""),
        "grad_output": (case.grad_output, inputs.grad_output, case.dtype),
    }
    result = Source()
    for name, (source, stored, own) in plan.items():
        if stored is None:
            continue
        dtype = own or case.parameter_dtype
        array = widen(stored, dtype) if dtype == "bfloat16" else stored
        full = bool(own)
        shape = case.shape if full else (1, case.channels)
        first = array[0] if full else array
        same = len(array) == 1 or not full or bool((bits(array) == bits(array[:1])).all())
        literal = _literal(first, NUMPY[dtype]) if same else None
        if literal is not None:
            result.once[name] = [f"{name} = {literal}"]
            continue
        several = full and case.steps > 1
        by_step = array if full else array[None]
        try:
            lines = _generated(name, source, shape, dtype, case, first)
            program = [*helpers(lines, case.seed), *lines]
            fits = _same(program, name, by_step, sorted({0, len(by_step) - 1}))
        except _NotPlainError:
            fits = False
        if fits:
            if several:
                result.each += lines
            else:
                result.once[name] = lines
        else:
            result.files[name] = array if several else first
            loaded = f'np.load(__file__ + ".{name}.npy")'
            if several:
                result.once[name] = [f"{name}_steps = {loaded}"]
                result.each.append(f"{name} = {name}_steps[step]")
            else:
                result.once[name] = [f"{name} = {loaded}"]
    return result
