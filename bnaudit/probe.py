"""In which order a backend adds up a channel, and in how many bits: what its mean gives away.

Method: FPRev (Xie, Gao, Wang and Xue, arXiv 2411.00442). Of n values one is a mask M, one is -M and the
others are units. M swallows every unit that it meets before -M takes it away again, so the units that are
missing in the sum tell how large the smallest part of the summation tree is that holds both masks. These
sizes, of all pairs of places, are the tree. A BatchNorm has a channel for each pair: one call is enough.

Whatever does not fit a tree is not a plain sum. Welford's and Chan's formulas, however, merge averages of
equal parts with the very bits of a sum; so a second call, on an uneven number of values, looks for
roundings that only averages have. A compensated sum (Kahan) passes for the plain one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from bnaudit import __version__
from bnaudit.distributions import Constant, File
from bnaudit.inputs import make
from bnaudit.scenario import Case, Dtype, Running
from bnaudit.subject import Subject

Array: TypeAlias = npt.NDArray[Any]

MemoryFormat: TypeAlias = Literal["contiguous", "channels_last", "strided"]

Tree: TypeAlias = int | tuple["Tree", ...]
"""A leaf is a value's place in its channel; a node adds its parts, the largest first, at once."""

SCHEMA_VERSION = 1

EXPONENTS = {"float16": (15, -17)}
OTHER_EXPONENTS = (100, 0)
"""Those of the mask and of the unit, as powers of two.

Beside the mask a float64 accumulator (float16: a float32 one) has no room for all the units together; and
where the mean itself is a 16-bit number, it still tells apart the sums of up to 64 units.
"""

UNEVEN = (15, 4)
"""Images and values of the second call; one image of all, or one value for each image, as in the first.

In whichever of the usual ways 60 values are averaged part by part, by Welford's or Chan's formula in
float32 or float64, some pair of masks leaves a rounding error: 15 is 8 + 7, 7 is 4 + 3, 3 is 2 + 1.
"""

NEAR = 0.25
"""How far a number of units may be from a whole one: rounding the mean explains less."""


class ProbeError(Exception):
    """A backend that yields no mean; the message says which and why."""


class _NoOrder(Exception):  # noqa: N818 - an answer
    """A mean that shows no order of additions; the message says what it shows."""


@dataclass(frozen=True)
class Setting:
    """What a backend is given: channels of `images` times `spatial` values, image after image."""

    images: int
    spatial: int
    dtype: Dtype = "float32"
    memory_format: MemoryFormat = "contiguous"

    @property
    def size(self) -> int:
        """Values per channel."""
        return self.images * self.spatial

    @property
    def exponents(self) -> tuple[int, int]:
        """Those of the mask and of the unit, as powers of two."""
        return EXPONENTS.get(self.dtype, OTHER_EXPONENTS)


@dataclass(frozen=True)
class Finding:
    """How a backend forms its mean.

    Attributes:
        quantity: what the mean was read from, "batch_mean" or "running_mean".
        kernel: what ran, in the backend's words.
        tree: the order of additions; None where the mean shows none.
        bits: significant bits of the accumulator; None without a tree, or where they exceed what the
            dtype's range can show.
        reason: why there is no tree, in a sentence.
    """

    backend: str
    setting: Setting
    quantity: str
    kernel: str | None
    tree: Tree | None
    bits: int | None
    reason: str | None

    def to_json(self, threads: int, environment: dict[str, Any]) -> str:
        """The finding, and what it was made on, as a line of JSON; trees are nested lists."""
        head = {"schema_version": SCHEMA_VERSION, "bnaudit_version": __version__}
        own = {**vars(self), "setting": vars(self.setting)}
        found = {**head, **own, "threads": threads, "environment": environment}
        return json.dumps(found) + "\n"


def probe(backend: str, setting: Setting, subject: Subject, scratch: Path) -> Finding:
    """Finds out how a backend forms its mean, in two calls. Raises ProbeError where there is no mean."""
    masked = _masked(setting, 2.0 ** setting.exponents[1])
    channels = np.concatenate([masked, _narrowing(setting)])
    means, quantity, kernel = _ask(backend, setting, channels, subject, scratch)
    known = (backend, setting, quantity, kernel)
    try:
        _refuse_averages(backend, setting, subject, scratch)
        tree = _order(setting, means[: len(masked)])
    except _NoOrder as found:
        return Finding(*known, None, None, str(found))
    return Finding(*known, tree, _bits(means[len(masked) :]), None)


def _ask(
    backend: str, setting: Setting, channels: Array, subject: Subject, scratch: Path
) -> tuple[Array, str, str | None]:
    """The means of channels (C, n), of which quantity they are, and what ran. Raises ProbeError."""
    x = channels.reshape(len(channels), setting.images, 1, setting.spatial).swapaxes(0, 1)
    with TemporaryDirectory(prefix="probe-", dir=scratch) as folder:
        source = Path(folder, "masks.npy")
        np.save(source, x)
        case = Case(
            id="probe",
            scenario="probe",
            file="",
            line=0,
            thresholds={},
            input=File(distribution="file", path=str(source)),
            shape=x.shape,
            dtype=setting.dtype,
            memory_format=setting.memory_format,
            momentum=1.0,  # running_mean becomes the batch's, and where that is 0 it is seen to move
            running=Running(mean=Constant(distribution="constant", value=-0.0)),
        )
        reply = subject.run(backend, case, make(case, Path(folder)))
    if reply.outcome != "done":
        raise ProbeError(f"{backend}: {reply.outcome}: {reply.reason}")
    for quantity in ("batch_mean", "running_mean"):
        if quantity in reply.outputs:
            return reply.outputs[quantity].astype(np.float64), quantity, reply.kernel
    raise ProbeError(f"{backend} returns neither batch_mean nor running_mean: no mean to look at")


# --- the order -------------------------------------------------------------------------------------


def _pairs(setting: Setting) -> Array:
    """All pairs of places i < j, (pairs, 2)."""
    return np.column_stack(np.triu_indices(setting.size, 1))


def _masked(setting: Setting, others: float) -> Array:
    """A channel for each pair of places: M at the first, -M at the second, the same elsewhere."""
    pairs = _pairs(setting)
    channels = np.full((len(pairs), setting.size), others, np.float32)
    mask = 2.0 ** setting.exponents[0]
    np.put_along_axis(channels, pairs, np.array([[mask, -mask]], np.float32), axis=1)
    return channels


def _order(setting: Setting, means: Array) -> Tree:
    """The tree that leaves these means of units with masks at each pair of places. Raises _NoOrder."""
    size, pairs = setting.size, _pairs(setting)
    with np.errstate(invalid="ignore", over="ignore"):  # a mean may be anything
        sums = means * size / 2.0 ** setting.exponents[1]
        joined = np.rint(size - sums)
        fits = (np.abs(size - sums - joined) <= NEAR) & (joined >= 2) & (joined <= size)
    if not fits.all():
        first = int(fits.argmin())
        i, j = pairs[first]
        raise _NoOrder(
            f"not a plain sum: with a huge M at {i} and -M at {j}, the {size - 2} equal values beside "
            f"them count as {sums[first]:.3g}"
        )
    if (joined == 2).all():
        raise _NoOrder("the order does not matter: the sum comes out exact, whatever the masks")
    sizes = np.ones((size, size))
    sizes[tuple(pairs.T)] = sizes[tuple(pairs.T[::-1])] = joined
    tree = rebuild(sizes)
    if tree is None:
        raise _NoOrder(
            "the order differs between channels: what the masks swallow fits no single tree"
        )
    return tree


def rebuild(sizes: Array) -> Tree | None:
    """The tree whose smallest part with the leaves i and j has sizes[i, j] leaves; None if there is none.

    sizes is symmetric, with ones on the diagonal.
    """

    def grow(places: Array) -> Tree:
        if len(places) == 1:
            return int(places[0])
        parts, rest = [], places
        while len(rest):
            is_near = sizes[rest[0], rest] < len(places)
            if is_near.sum() == len(places):  # there is no such tree: its sizes will differ
                is_near[1:] = False
            parts.append(grow(rest[is_near]))
            rest = rest[~is_near]
        return node(*parts)

    tree = grow(np.arange(len(sizes)))
    return tree if np.array_equal(sizes_of(tree), sizes) else None


def sizes_of(tree: Tree) -> Array:
    """For each pair of leaves (i, j), the number of leaves in the smallest part that holds both."""
    places = leaves(tree)
    sizes = np.ones((len(places), len(places)))

    def fill(part: Tree) -> None:
        if isinstance(part, tuple):
            within = leaves(part)
            sizes[np.ix_(within, within)] = len(within)
            for smaller in part:
                fill(smaller)

    fill(tree)
    np.fill_diagonal(sizes, 1)
    return sizes


def node(*parts: Tree) -> Tree:
    """The parts added at once, in the order in which trees are written: the largest, then the first, first."""
    return tuple(sorted(parts, key=lambda part: (-len(leaves(part)), min(leaves(part)))))


def leaves(tree: Tree) -> list[int]:
    """The places of a tree, in the order in which it is written."""
    found, rest = [], [tree]
    while rest:
        part = rest.pop()
        if isinstance(part, int):
            found.append(part)
        else:
            rest.extend(reversed(part))
    return found


def depth(tree: Tree) -> int:
    """The most additions that one of the values goes through."""
    return 0 if isinstance(tree, int) else 1 + max(map(depth, tree))


def _refuse_averages(backend: str, setting: Setting, subject: Subject, scratch: Path) -> None:
    """Raises _NoOrder where masks without anything beside them leave something, as they do in no sum."""
    images, spatial = UNEVEN
    if setting.images == 1:
        images, spatial = 1, images * spatial
    elif setting.spatial == 1:
        images, spatial = images * spatial, 1
    uneven = replace(setting, images=images, spatial=spatial)
    means, _, _ = _ask(backend, uneven, _masked(uneven, 0.0), subject, scratch)
    is_sum = means == 0
    if not is_sum.all():
        first = int(is_sum.argmin())
        i, j = _pairs(uneven)[first]
        raise _NoOrder(
            f"not a plain sum: the mean of {uneven.size} values, a huge M at {i}, -M at {j} and zeros, "
            f"is {means[first]:.3g}, as where averages are merged (Welford, Chan)"
        )


# --- the accumulator -------------------------------------------------------------------------------


def _narrowing(setting: Setting) -> Array:
    """Channels of M, -M and ever smaller values beside them, each at three places in turn.

    Whichever two of the three places are joined first, there is a channel in which they are M and the small
    value, which is lost unless the accumulator has one bit more. The small value of step k is just above
    half of M / 2ᵏ, so that it makes no difference whether M / n is formed first, and where ties go.
    """
    top, bottom = setting.exponents
    places = (0, setting.size // 2, setting.size - 1)
    channels = np.zeros((top - bottom, 3, setting.size), np.float32)
    for turn in range(3):
        small, plus, minus = np.roll(places, turn)
        channels[:, turn, plus] = 2.0**top
        channels[:, turn, minus] = -(2.0**top)
        channels[:, turn, small] = [
            (1 + 2**-7) * 2.0 ** (top - k) for k in range(2, top - bottom + 2)
        ]
    return channels.reshape(-1, setting.size)


def _bits(means: Array) -> int | None:
    """The first step of `_narrowing` that loses its small value; None where none does."""
    lost = (means.reshape(-1, 3) == 0).any(axis=1)
    return int(lost.argmax()) + 1 if lost.any() else None
