"""One case on one backend: hands the tensors over, calls, checks what was returned and what was left."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .layout import BLOCK, bits, changed_gap, first_change, lay_out
from .poison import poison_numpy
from .rounding import round_to, statistics_dtype, storage, widen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .rounding import Array

    Files = Mapping[str, str]

IN_FULL = ("y", "grad_input")
PER_CHANNEL = ("batch_mean", "batch_var", "invstd", "grad_weight", "grad_bias")
RUNNING = ("running_mean", "running_var")
QUANTITIES = (*IN_FULL, *PER_CHANNEL, *RUNNING)

ALIKE = 0.8
"""Keys of a result that resemble a quantity's name this much are taken for a slip of the pen."""

ASKING = 'a function gets torch tensors if its attribute tensors is "torch"'

SYNONYMS = {
    "output": "y",
    "out": "y",
    "mean": "batch_mean",
    "save_mean": "batch_mean",
    "var": "batch_var",
    "variance": "batch_var",
    "save_var": "batch_var",
    "rstd": "invstd",
    "save_invstd": "invstd",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
    "dx": "grad_input",
    "grad_x": "grad_input",
    "dweight": "grad_weight",
    "dgamma": "grad_weight",
    "dbias": "grad_bias",
    "dbeta": "grad_bias",
}
"""What others call a quantity."""

AGAIN = " (when called again with the same tensors)"

OUT_OF_MEMORY = "the case needs more GPU memory than"
"""How every refusal for want of memory begins: it may come at the second call only."""

OWN_FOLDER = " (plug-ins run in a folder of their own; use Path(__file__).parent)"

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but newline and tab."""

MAPPED = 1 << 20
"""Files from this many bytes on are mapped instead of read."""

KEPT = 1 << 26
"""Inputs of up to this many bytes stay laid out for the next backend that gets the same ones."""

MESSAGE = 2000
LINES = 3
TRACEBACK = 20000
"""Most characters and lines that are passed on of an exception's message, and characters of its traceback."""

IMPORTING = ("<frozen importlib", importlib.__file__)
"""How the names of the files begin that an import runs through."""


class NoResult(Exception):  # noqa: N818 - an outcome, not an error of the worker
    """A case that ended without outputs: "unsupported", "contract" or "raised", and the reason in words."""

    def __init__(self, outcome: str, reason: str, trace: str | None = None) -> None:
        """trace: a traceback to show, where the backend's author can use one."""
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.trace = trace


class Implementation(NamedTuple):
    """A backend ready to be called.

    form: how 16-bit tensors are handed over. "stored": as in the files, bfloat16 as uint16. "widened": as
    float32. "numpy": bfloat16 as ml_dtypes.bfloat16. repeated: the last step is called twice, and must
    give the same bits. poisoned: what NumPy hands out next holds NaN when it is called.
    """

    function: Callable[..., Any]
    form: str
    repeated: bool = False
    poisoned: bool = False


class Execution(NamedTuple):
    """What a backend did with a case.

    outputs: arrays; y and grad_input as stored, per-channel quantities in float32 or float64. seconds:
    inside the backend, all steps together, each once. not_repeatable: where the last step, called again
    with the same tensors, gave other bits, in words.
    """

    outputs: dict[str, Array]
    kernel: str | None
    seconds: float
    not_repeatable: str | None = None


def printable(text: str) -> str:
    """The text with control characters and what UTF-8 cannot carry (lone surrogates) spelled out."""
    text = CONTROL.sub(lambda found: "\\x%02x" % ord(found.group()), text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def message(error: BaseException) -> str:
    """An exception's message, cut where it is long; also of one that cannot be turned into text."""
    try:
        text = str(error).strip()
    except Exception:
        return "(its message cannot be shown)"
    kept = "\n".join(text[:MESSAGE].split("\n")[:LINES])
    return printable(kept + (" …" if len(kept) < len(text) else ""))


def describe(error: BaseException) -> str:
    """`Type: message` of an exception; of a file that was looked for in the worker's folder, what to do."""
    name, text = type(error).__name__, message(error)
    described = "%s: %s" % (name, text) if text else name
    return described + (OWN_FOLDER if _is_beside(error) else "")


def _is_beside(error: BaseException) -> bool:
    """Whether a file was not found by a name relative to the working folder; a program is no file here."""
    name = getattr(error, "filename", None)
    if not isinstance(error, FileNotFoundError) or not isinstance(name, str) or os.path.isabs(name):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or os.path.basename(frames[-1].filename) != "subprocess.py"


def traced(error: BaseException) -> str:
    """The traceback, without the frames of the worker and of an import in front."""
    here = os.path.dirname(os.path.abspath(__file__))
    frames = error.__traceback__
    while frames is not None:
        filename = frames.tb_frame.f_code.co_filename
        if os.path.dirname(filename) != here and not filename.startswith(IMPORTING):
            break
        frames = frames.tb_next
    return printable("".join(traceback.format_exception(type(error), error, frames)))[-TRACEBACK:]


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        text = "bfloat16 reaches a NumPy function as ml_dtypes.bfloat16; ml_dtypes is not installed"
        raise NoResult("unsupported", text) from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _load(path: str, mode: str) -> Array:
    # An empty file cannot be mapped, and a small one is read faster.
    mapped: Any = mode if os.path.getsize(path) >= MAPPED else None
    return np.asarray(np.load(path, mmap_mode=mapped, allow_pickle=False))


class Tensors:
    """The inputs of one case in the form and memory format that one kind of backend gets.

    files maps names to .npy files: x and grad_output (steps, N, C, *), weight, bias, running_mean and
    running_var (C,).
    """

    def __init__(self, case: Mapping[str, Any], files: Files, form: str) -> None:
        """Opens the files; a step is laid out when it is first asked for."""
        self.dtype: str = case["dtype"]
        same = case["param_dtype"] == "same"
        self.param_dtype = self.dtype if same else statistics_dtype(self.dtype)
        self.kept = sum(os.path.getsize(path) for path in files.values()) <= KEPT
        self._memory_format: str = case["memory_format"]
        self._form = form
        self._native = {
            dtype: _bfloat16() if (form, dtype) == ("numpy", "bfloat16") else storage(dtype)
            for dtype in (self.dtype, self.param_dtype)
        }
        self._files = files
        self._sources = {name: _load(path, "r") for name, path in files.items()}
        self.names = frozenset(files)
        self._laid: dict[tuple[str, int], Array] = {}

    def get(self, name: str, step: int) -> Array | None:
        """The tensor at a step counted from 0; None where the case has none."""
        return self.given(name, step) if name in self.names else None

    def given(self, name: str, step: int) -> Array:
        """The tensor at a step counted from 0, in memory that is private to this process."""
        key = (name, step if self._sources[name].ndim > 1 else 0)
        if key not in self._laid:
            self._laid[key] = self._lay_out(*key)
        return self._laid[key]

    def forget(self, step: int) -> None:
        """Frees what is held of a step, unless the case is small enough to be kept for the next backend."""
        if not self.kept:
            for name in ("x", "grad_output"):
                self._laid.pop((name, step), None)

    def _lay_out(self, name: str, step: int) -> Array:
        source = self._sources[name]
        if source.ndim == 1:
            return self.hand_over(source.copy(), self.param_dtype)
        if self._memory_format == "contiguous":
            # Mapped copy-on-write: nothing is copied unless the backend writes to it.
            return self.hand_over(_load(self._files[name], "c")[step], self.dtype)
        return lay_out(self.hand_over(source[step], self.dtype), self._memory_format)

    def hand_over(self, stored: Array, dtype: str) -> Array:
        """From the files' form to the backend's; exact."""
        if self._form == "widened":
            return widen(stored, dtype)
        return stored.view(self._native[dtype])

    def take_back(self, name: str, value: Any) -> Array:
        """A returned y or grad_input as stored; raises NoResult "contract" if it is no such tensor."""
        array = _array(name, value, self._sources["x"].shape[1:])
        if self._form == "widened":
            if array.dtype not in (np.float32, np.float64):
                raise NoResult("contract", "%s is %s, not float32 or float64" % (name, array.dtype))
            same = array.dtype == storage(self.dtype)
            return array if same else round_to(array, self.dtype)
        if array.dtype != self._native[self.dtype]:
            wanted = self._native[self.dtype].name
            raise NoResult("contract", "%s is %s, not %s" % (name, array.dtype, wanted))
        return array.view(storage(self.dtype))

    def take_back_channels(self, name: str, value: Any) -> Array:
        """A returned per-channel quantity in float32 or float64; raises NoResult "contract"."""
        array = _array(name, value, self._sources["running_mean"].shape)
        if self._form == "stored" and array.dtype == np.uint16:
            return widen(array, "bfloat16")
        if array.dtype.kind == "f":
            return array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64)
        if array.dtype.name == "bfloat16":
            return array.astype(np.float32)
        raise NoResult("contract", "%s is %s, not a floating-point dtype" % (name, array.dtype))

    def check(self, step: int) -> None:
        """Raises NoResult "contract" if the backend wrote to a tensor that is not its to change."""
        for name in ("x", "weight", "bias", "grad_output"):
            if name not in self.names:
                continue
            laid = self.given(name, step)
            source, dtype = self._sources[name], self.param_dtype
            if source.ndim > 1:
                source, dtype = source[step], self.dtype
            index = first_change(laid, source, partial(self.hand_over, dtype=dtype))
            if index is not None:
                place = "%s[%s]" % (name, ",".join(map(str, index)))
                was = self.hand_over(source[index], dtype)
                text = "%s was changed in place: %s was %s and is now %s"
                raise NoResult("contract", text % (name, place, was, laid[index]))
            if laid.ndim > 1 and self._memory_format == "strided":
                gap = changed_gap(laid)
                if gap is not None:
                    text = "%s: a gap was written to, %d place%s %s the first element"
                    side = "after" if gap > 0 else "before"
                    plural = "" if abs(gap) == 1 else "s"
                    raise NoResult("contract", text % (name, abs(gap), plural, side))


def _array(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    if not isinstance(value, np.ndarray):
        raise wrong_type(name, value, "NumPy array")
    if value.shape != shape:
        raise NoResult("contract", "%s has shape %s, not %s" % (name, value.shape, shape))
    return np.asarray(value)


def wrong_type(name: str, value: Any, wanted: str) -> NoResult:
    """The fault of a returned quantity that is no `wanted` at all."""
    text = "%s is of type %s, not a %s" % (name, type(value).__name__, wanted)
    if isinstance(value, (tuple, list)):
        text += "; more than y is returned as a dict"
    elif type(value).__name__ == "Tensor":
        text += "; " + ASKING
    return NoResult("contract", text)


def run(implementation: Implementation, case: Mapping[str, Any], tensors: Tensors) -> Execution:
    """Calls the backend once per step, with the running statistics it left; the last step's outputs count.

    A repeated backend is called once more on the last step, with the same running statistics as before;
    only the bits of what that returns count. Where a training step neither returns running statistics nor
    changes one in place they are not among the outputs; in inference they always are. Raises NoResult.
    """
    running = {name: tensors.given(name, 0) for name in RUNNING}
    left: dict[str, Array] = {}
    last = case["steps"] - 1
    seconds = 0.0
    for step in range(last):
        done = _step(implementation, case, tensors, step, running)
        tensors.forget(step)
        seconds += done.seconds
        left.update(done.left)
        running.update(
            (name, tensors.hand_over(round_to(array, tensors.param_dtype), tensors.param_dtype))
            for name, array in done.left.items()
        )
    done = _step(implementation, case, tensors, last, running)
    seconds += done.seconds
    outputs = {**left, **done.left, **checked_outputs(tensors, done.returned)}
    kernel = done.returned.get("kernel")
    not_repeatable = None
    if implementation.repeated:
        # Copied, because a backend may return the same memory again.
        outputs = {name: array.copy() for name, array in outputs.items()}
        del done
        again = {**left, **_again(implementation, case, tensors, last, running)}
        not_repeatable = difference(outputs, again, tensors.dtype)
    tensors.forget(last)
    text = printable(kernel[:MESSAGE]) if isinstance(kernel, str) else None
    return Execution(outputs, text, seconds, not_repeatable)


class _Step(NamedTuple):
    """What one call did: its result as a dict, the running statistics it left, and its duration."""

    returned: dict[Any, Any]
    left: dict[str, Array]
    seconds: float


def _step(
    implementation: Implementation,
    case: Mapping[str, Any],
    tensors: Tensors,
    step: int,
    running: Mapping[str, Array],
) -> _Step:
    """One call; step counts from 0."""
    function = implementation.function
    training = case["mode"] == "training"
    lent = {name: array.copy() for name, array in running.items()}
    options = {"training": training, "eps": case["eps"], "momentum": case["momentum"]}
    if getattr(function, "counts_steps", False):
        options["step"] = step + 1
    elif case["momentum"] is None:
        options["momentum"] = 1.0 / (step + 1)
    # Views: shape and flags may be set by whom they are given to.
    given = {
        name: None if array is None else array.view()
        for name in ("x", "weight", "bias", "grad_output")
        for array in (tensors.get(name, step),)
    }
    arguments = [given[name] for name in ("x", "weight", "bias")]
    arguments += [lent[name] for name in RUNNING]
    options["grad_output"] = given["grad_output"]
    if implementation.poisoned:
        poison_numpy()
    start = time.perf_counter()
    value = _call(implementation, arguments, options)
    seconds = time.perf_counter() - start
    tensors.check(step)
    returned = value if isinstance(value, dict) else {"y": value}
    left = {}
    # A mean that does not move is kept all the same where the variance moves, and the reverse.
    are_kept = not training or any(_differ(lent[name], running[name]) for name in RUNNING)
    for name in RUNNING:
        after = returned.get(name)
        if after is None and are_kept:
            after = lent[name]
        if after is not None:
            left[name] = tensors.take_back_channels(name, after)
    return _Step(returned, left, seconds)


def _again(
    implementation: Implementation,
    case: Mapping[str, Any],
    tensors: Tensors,
    step: int,
    running: Mapping[str, Array],
) -> dict[str, Array]:
    """The outputs of a step that is called for the second time; to refuse it only then is a fault."""
    try:
        done = _step(implementation, case, tensors, step, running)
        return dict(done.left, **checked_outputs(tensors, done.returned))
    except NoResult as end:
        refused = end.outcome == "unsupported" and not end.reason.startswith(OUT_OF_MEMORY)
        outcome = "contract" if refused else end.outcome
        raise NoResult(outcome, end.reason + AGAIN, end.trace) from end


def _differ(a: Array, b: Array) -> bool:
    return not np.array_equal(bits(a), bits(b))


def difference(first: Mapping[str, Array], second: Mapping[str, Array], dtype: str) -> str | None:
    """Where two results have other bits, in words, or None; a NaN is a NaN.

    dtype: that of y and grad_input.
    """
    text, also = "", []
    for name in QUANTITIES:
        if name not in first and name not in second:
            continue
        if name not in first or name not in second:
            found = "%s was %s" % (
                name,
                "returned, then not" if name in first else "not returned, then it was",
            )
        elif first[name].dtype != second[name].dtype:
            found = "%s was %s, then %s" % (name, first[name].dtype, second[name].dtype)
        else:
            a, b = first[name], second[name]
            stored = dtype if name in IN_FULL else a.dtype.name
            count, place = _differing(a, b, stored)
            if place is None:
                continue
            values = (
                name,
                ",".join(map(str, place)),
                widen(a[place], stored),
                widen(b[place], stored),
            )
            found = "%s[%s] was %s, then %s" % values
            if count > 1:
                found += " (and %d more)" % (count - 1)
        if text:
            also.append(name)
        else:
            text = found
    return ", also ".join([text, *also]) or None


def _differing(a: Array, b: Array, dtype: str) -> tuple[int, tuple[int, ...] | None]:
    """How many elements have other bits, NaN excepted, and the index of the first of them in C order."""
    count, place = 0, None
    rows = max(1, BLOCK // max(1, a[:1].size))
    for start in range(0, len(a), rows):
        block = slice(start, start + rows)
        differs = bits(a[block]) != bits(b[block])
        if differs.any():
            differs &= ~(np.isnan(widen(a[block], dtype)) & np.isnan(widen(b[block], dtype)))
            if place is None and differs.any():
                index = np.unravel_index(int(differs.argmax()), differs.shape)
                place = (start + int(index[0]), *map(int, index[1:]))
            count += int(np.count_nonzero(differs))
    return count, place


def checked_outputs(tensors: Tensors, returned: dict[Any, Any]) -> dict[str, Array]:
    """The last step's y, batch statistics and gradients; gradients only where they were asked for."""
    for key in returned:
        meant = _meant(key)
        # Beside the quantity itself it may be something of its own.
        if meant is not None and returned.get(meant) is None:
            raise NoResult("contract", "%r is no quantity: %s is meant?" % (key, meant))
    present = [name for name in (*IN_FULL, *PER_CHANNEL) if returned.get(name) is not None]
    if "y" not in present:
        others = ", ".join(str(key) for key, value in returned.items() if value is not None)
        text = "no y was returned" + (", only " + others if others else "")
        raise NoResult("contract", printable(text[:MESSAGE]))
    outputs = {}
    for name in present:
        if name.startswith("grad_") and "grad_output" not in tensors.names:
            continue
        if name in ("grad_weight", "grad_bias") and "weight" not in tensors.names:
            continue
        if name in IN_FULL:
            outputs[name] = tensors.take_back(name, returned[name])
        else:
            outputs[name] = tensors.take_back_channels(name, returned[name])
    return outputs


def _meant(key: object) -> str | None:
    """The quantity that a key of a result looks like, or is another's name for; None for the right names."""
    if not isinstance(key, str) or key in (*QUANTITIES, "kernel"):
        return None
    lower = key.lower()
    close = difflib.get_close_matches(lower, QUANTITIES, 1, ALIKE)
    return SYNONYMS.get(lower) or (close[0] if close else None)


def _call(implementation: Implementation, arguments: list[Any], options: dict[str, Any]) -> Any:
    process = os.getpid()
    try:
        with np.errstate(all="ignore"):
            return implementation.function(*arguments, **options)
    except NoResult:
        raise
    except NotImplementedError as error:
        raise NoResult("unsupported", message(error) or "not implemented") from error
    except BaseException as error:  # SystemExit and KeyboardInterrupt are a backend's fault, too
        reason = describe(error)
        mistaken = implementation.form == "numpy" and "torch" in sys.modules
        if mistaken and isinstance(error, (AttributeError, TypeError)):
            reason += " (x is a NumPy array; %s)" % ASKING
        raise NoResult("raised", reason, traced(error)) from error
    finally:
        if os.getpid() != process:
            os._exit(0)  # the backend forked, and this is the copy
