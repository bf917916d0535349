"""Named distributions: where the values of a tensor come from.

Every value is a function of the tensor's key and the element's place in (N, C, *) order, computed in
float64 from raw Philox words with the basic operations alone (no libm, no fused multiply-add), so the
same scenario gives the same bits on every machine, whatever the dtype, memory format or chunk size.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, PrivateAttr

from bnaudit.worker.rounding import round_to, widen, widen64

Array: TypeAlias = npt.NDArray[Any]
Doubles: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

WORDS_PER_ELEMENT = 8
PRECISION = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


@dataclass(frozen=True)
class Elements:
    """A range of one tensor: the elements start ≤ i < stop in (N, C, *) order.

    key: seed, and role·2³² + step of the tensor; dtype: what the values will be rounded to.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str
    key: tuple[int, int]

    def __len__(self) -> int:
        """How many elements the range has."""
        return self.stop - self.start

    @property
    def n(self) -> int:
        """Elements per channel."""
        return self.shape[0] * self._spatial

    @property
    def step(self) -> int:
        """The training step that the tensor belongs to, from 1."""
        return (self.key[1] & 0xFFFFFFFF) + 1

    @property
    def _spatial(self) -> int:
        return math.prod(self.shape[2:])

    @cached_property
    def index(self) -> Integers:
        """Place of each element in the tensor."""
        return np.arange(self.start, self.stop, dtype=np.int64)

    @cached_property
    def channel(self) -> Integers:
        """Channel of each element."""
        return self.index // self._spatial % self.shape[1]

    @cached_property
    def position(self) -> Integers:
        """Place of each element within its channel, 0 ≤ position < n."""
        image = self.index // (self._spatial * self.shape[1])
        return image * self._spatial + self.index % self._spatial

    @cached_property
    def words(self) -> Words:
        """Eight random words for each element, shape (len, 8): words 8i to 8i + 7 of Philox(key)."""
        philox = np.random.Philox(key=np.array(self.key, np.uint64))
        philox.advance(self.start * WORDS_PER_ELEMENT // 4)  # one step of the counter is four words
        words: Words = philox.random_raw(len(self) * WORDS_PER_ELEMENT)
        return words.reshape(-1, WORDS_PER_ELEMENT)

    def draws(self, count: int) -> Words:
        """`count` random words that belong to the tensor as a whole, from a stream of their own."""
        seed, tensor = self.key
        philox = np.random.Philox(key=np.array([seed, tensor | 1 << 63], np.uint64))
        words: Words = philox.random_raw(count)
        return words


class _Distribution(BaseModel):
    """What all distributions share: their fields are checked strictly and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    within_channel: ClassVar[bool] = False
    """Whether values depend on the place within a channel, of which a per-channel tensor has one."""

    def parts(self) -> tuple[_Distribution, ...]:
        """The simple distributions that it is made of."""
        return (self,)

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """Why a tensor of this shape and dtype cannot be drawn, as a clause; None where it can."""
        return None


class Constant(_Distribution):
    """One value everywhere."""

    distribution: Literal["constant"]
    value: FiniteFloat

    def sample(self, e: Elements) -> Doubles:
        """The value, len(e) times."""
        return np.full(len(e), self.value)


class Normal(_Distribution):
    """Nearly normal: the sum of twelve uniform numbers less 6 (Irwin–Hall), so |x − mean| < 6 std."""

    distribution: Literal["normal"]
    mean: FiniteFloat = 0.0
    std: FiniteFloat = Field(default=1.0, ge=0)

    def sample(self, e: Elements) -> Doubles:
        """mean + std·z, where z is a multiple of 2⁻³²."""
        return _normal(e.words, self.mean, self.std)


class Uniform(_Distribution):
    """Uniform in [low, high)."""

    distribution: Literal["uniform"]
    low: FiniteFloat = 0.0
    high: FiniteFloat = 1.0

    def sample(self, e: Elements) -> Doubles:
        """low + (high − low)·u."""
        return self.low + (self.high - self.low) * _fraction(e.words[:, 0])


class Ramp(_Distribution):
    """Evenly spaced from low to high over each channel."""

    within_channel = True

    distribution: Literal["ramp"]
    low: FiniteFloat = 0.0
    high: FiniteFloat = 1.0

    def sample(self, e: Elements) -> Doubles:
        """low + (high − low)·position/(n − 1)."""
        return self.low + (self.high - self.low) * (e.position / max(e.n - 1, 1))


class Alternating(_Distribution):
    """mean + amplitude and mean − amplitude in turn over each channel."""

    within_channel = True

    distribution: Literal["alternating"]
    mean: FiniteFloat = 0.0
    amplitude: FiniteFloat = 1.0

    def sample(self, e: Elements) -> Doubles:
        """Even positions lie above the mean where the amplitude is positive."""
        return np.where(e.position % 2 == 0, self.mean + self.amplitude, self.mean - self.amplitude)


class Outlier(_Distribution):
    """Normal, with one element of each channel replaced by `value`."""

    within_channel = True

    distribution: Literal["outlier"]
    value: FiniteFloat
    position: Literal["first", "last", "random"]
    mean: FiniteFloat = 0.0
    std: FiniteFloat = Field(default=1.0, ge=0)

    def sample(self, e: Elements) -> Doubles:
        """A random position is drawn for each channel."""
        places: Integers | int
        if self.position == "random":
            places = (e.draws(e.shape[1]) % np.uint64(max(e.n, 1))).astype(np.int64)[e.channel]
        else:
            places = 0 if self.position == "first" else e.n - 1
        return np.where(e.position == places, self.value, _normal(e.words, self.mean, self.std))


class Wide(_Distribution):
    """±(1 + u)·2ᵉ with e uniform over the integers low_exponent to high_exponent."""

    distribution: Literal["wide"]
    low_exponent: int = Field(ge=-1074, le=1022)
    high_exponent: int = Field(ge=-1074, le=1022)

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """The exponents must be in order."""
        if self.high_exponent < self.low_exponent:
            return (
                f"found high_exponent {self.high_exponent} below low_exponent {self.low_exponent}; "
                "accepted are exponents in order"
            )
        return None

    def sample(self, e: Elements) -> Doubles:
        """u is a multiple of 2⁻⁵², so 1 + u is exact."""
        significand = 1 + (e.words[:, 0] >> np.uint64(12)) * 2.0**-52
        span = np.uint64(self.high_exponent - self.low_exponent + 1)
        exponent = (e.words[:, 1] % span).astype(np.int64) + self.low_exponent
        magnitude: Doubles = np.ldexp(significand, exponent)
        return _signs(e.words[:, 2]) * magnitude


class Sparse(_Distribution):
    """Zero, or with probability `density` normal."""

    distribution: Literal["sparse"]
    density: FiniteFloat = Field(ge=0, le=1)
    mean: FiniteFloat = 0.0
    std: FiniteFloat = Field(default=1.0, ge=0)

    def sample(self, e: Elements) -> Doubles:
        """Word 6 decides; the normal value uses words 0 to 5."""
        kept = _fraction(e.words[:, 6]) < self.density
        return np.where(kept, _normal(e.words, self.mean, self.std), 0.0)


class Subnormal(_Distribution):
    """Subnormal numbers of the tensor's dtype, of either sign and never zero."""

    distribution: Literal["subnormal"]

    def sample(self, e: Elements) -> Doubles:
        """±k·η with 1 ≤ k < 2^(p−1): η the smallest positive number, p the precision."""
        count = np.uint64(2 ** (PRECISION[e.dtype] - 1) - 1)
        magnitude: Doubles = (1 + e.words[:, 0] % count) * SMALLEST[e.dtype]
        return _signs(e.words[:, 1]) * magnitude


class Planted(_Distribution):
    """mean ± spread, half of each in every channel: its mean and variance are known exactly.

    Neighbouring positions 2j and 2j + 1 hold one of each, in random order. With n and spread powers of
    two every order of plain summation gives exactly mean and spread².
    """

    within_channel = True

    distribution: Literal["planted"]
    mean: FiniteFloat
    spread: FiniteFloat = Field(gt=0)

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """The sums must be exact in the statistics dtype."""
        n = shape[0] * math.prod(shape[2:])
        if n < 2 or n & (n - 1):
            return f"found {n} elements per channel; accepted is a power of two, for planted"
        if math.frexp(self.spread)[0] != 0.5:
            return f"found a spread of {self.spread:g}; accepted is a power of two"
        pair = np.array([self.mean - self.spread, self.mean + self.spread])
        if not np.array_equal(widen64(round_to(pair, dtype), dtype), pair):
            return f"found {self.mean!r} ± {self.spread!r}; accepted are values that {dtype} holds"
        quantum = min(_lowest_bit(v) for v in (*pair.tolist(), self.spread))
        precision, exponents = (53, 1022) if dtype == "float64" else (24, 126)
        if n * float(np.abs(pair).max()) > 2.0**precision * quantum:
            return f"found {self.mean!r} ± {self.spread!r}; accepted are values with exact sums"
        if not 2.0**-exponents <= self.spread**2 <= 2.0**exponents / n:
            return f"found a spread of {self.spread!r}; accepted is one whose square is in range"
        return None

    def sample(self, e: Elements) -> Doubles:
        """One random bit for each pair says which comes first."""
        pairs = e.n // 2
        bits = e.draws(-(-e.shape[1] * pairs // 64))
        pair = e.channel * pairs + e.position // 2
        swapped = bits[pair // 64] >> (pair % 64).astype(np.uint64) & np.uint64(1)
        above = (e.position % 2 == 0) != (swapped == 1)
        return np.where(above, self.mean + self.spread, self.mean - self.spread)


class File(_Distribution):
    """The values of an array in a .npy, .npz or .safetensors file; pickled ones are refused."""

    distribution: Literal["file"]
    path: str = Field(min_length=1)
    key: str | None = None
    _source: Path = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Finds a relative path from the folder of the scenario file, given as validation context."""
        self._source = (context or {}).get("folder", Path()) / self.path

    @property
    def source(self) -> Path:
        """The file, from here."""
        return self._source

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array. Raises FileError."""
        return read_array(self._source, self.key).shape

    def sha256(self) -> str:
        """Digest of the whole file, so that equal parameters mean equal inputs. Raises OSError."""
        digest = hashlib.sha256()
        with self._source.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """The file must hold numbers in exactly this shape."""
        try:
            found = self.shape
        except FileError as error:
            return str(error)
        if shape not in (found, (1, *found)):  # a per-channel tensor is drawn as a batch of one
            return f"found shape {_times(found)} in {self.path}; accepted is {_times(shape)}"
        return None

    def sample(self, e: Elements) -> Doubles:
        """The stored values, exactly (64-bit integers as the nearest float64)."""
        stored = read_array(self._source, self.key).reshape(-1)[e.start : e.stop]
        return stored.astype(np.float64)


Simple: TypeAlias = Annotated[
    Constant
    | Normal
    | Uniform
    | Ramp
    | Alternating
    | Outlier
    | Wide
    | Sparse
    | Subnormal
    | Planted
    | File,
    Field(discriminator="distribution"),
]


class Channels(_Distribution):
    """A distribution for each channel: channel c has item c modulo their number."""

    distribution: Literal["channels"]
    items: tuple[Simple, ...] = Field(min_length=1)

    def parts(self) -> tuple[_Distribution, ...]:
        """The items."""
        return self.items

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """That of the first item that has one."""
        return next(filter(None, (item.obstacle(shape, dtype) for item in self.items)), None)

    def sample(self, e: Elements) -> Doubles:
        """All items draw from the same words."""
        item = e.channel % len(self.items)
        result = np.empty(len(e))
        for i, distribution in enumerate(self.items):
            mine = item == i
            if mine.any():
                result[mine] = distribution.sample(e)[mine]
        return result


Finite: TypeAlias = Annotated[Simple | Channels, Field(discriminator="distribution")]


NonfiniteName: TypeAlias = Annotated[
    Literal["nan", "inf", "-inf"],
    BeforeValidator(lambda value: str(value) if isinstance(value, float) else value),
]


class Nonfinite(_Distribution):
    """`base`, with `count` elements of the whole tensor replaced by `values` in turn."""

    distribution: Literal["nonfinite"]
    base: Finite
    values: tuple[NonfiniteName, ...] = Field(min_length=1)
    count: int = Field(default=1, ge=1)

    def parts(self) -> tuple[_Distribution, ...]:
        """Those of the base."""
        return self.base.parts()

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """There must be as many elements as are replaced."""
        if self.count > math.prod(shape):
            return f"found a count of {self.count}; accepted are up to {math.prod(shape)}, the tensor's size"
        return self.base.obstacle(shape, dtype)

    def sample(self, e: Elements) -> Doubles:
        """The places are drawn for the tensor as a whole, without repetition."""
        result = self.base.sample(e)
        places = _distinct_places(e.key, math.prod(e.shape), self.count)
        mine = np.flatnonzero((e.start <= places) & (places < e.stop))
        values = np.array([float(v) for v in self.values])
        result[places[mine] - e.start] = values[mine % len(values)]
        return result


class Switch(_Distribution):
    """`before` in the training steps up to one, `after` from that `step` on, counted from 1."""

    distribution: Literal["switch"]
    step: int = Field(ge=2)
    before: Finite
    after: Finite

    def parts(self) -> tuple[_Distribution, ...]:
        """Those of both."""
        return (*self.before.parts(), *self.after.parts())

    def obstacle(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """That of the first, or of the second."""
        return self.before.obstacle(shape, dtype) or self.after.obstacle(shape, dtype)

    def sample(self, e: Elements) -> Doubles:
        """Both draw from the words of the step."""
        return (self.before if e.step < self.step else self.after).sample(e)


Distribution: TypeAlias = Annotated[
    Simple | Channels | Nonfinite | Switch, Field(discriminator="distribution")
]

DISTRIBUTIONS: dict[str, type[_Distribution]] = {
    "constant": Constant,
    "normal": Normal,
    "uniform": Uniform,
    "ramp": Ramp,
    "alternating": Alternating,
    "outlier": Outlier,
    "wide": Wide,
    "sparse": Sparse,
    "subnormal": Subnormal,
    "planted": Planted,
    "nonfinite": Nonfinite,
    "channels": Channels,
    "switch": Switch,
    "file": File,
}


class FileError(Exception):
    """A file of values cannot be used; the message says which and why, as a clause."""


@lru_cache(maxsize=2)  # x and grad_output
def read_array(path: Path, key: str | None) -> Array:
    """Reads an array of real numbers in C order, mapped rather than loaded where the format allows.

    bfloat16 comes back as float32. Raises FileError.
    """
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix)
    if reader is None:
        raise FileError(f"{path.name} is not a .npy, .npz or .safetensors file")
    if path.suffix == ".npy" and key is not None:
        raise FileError(f"{path.name} holds one array and takes no key")
    try:
        array = reader(path, key)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise FileError(f"{path} is not a valid {path.suffix} file: {error}") from None
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise FileError(
            f"{path.name} holds {array.dtype} values, not real numbers of up to 64 bits"
        )
    return np.ascontiguousarray(array).reshape(array.shape)


def _read_npy(path: Path, key: str | None) -> Array:
    array: Array = np.lib.format.open_memmap(path, mode="r")
    return array


def _read_npz(path: Path, key: str | None) -> Array:
    with path.open("rb") as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as arrays:
        array: Array = arrays[_chosen(path, key, arrays.files)]
        return array


def _read_safetensors(path: Path, key: str | None) -> Array:
    """Format: eight bytes of header length, a JSON header, raw little-endian tensors."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    header.pop("__metadata__", None)
    tensor = header[_chosen(path, key, list(header))]
    begin, end = tensor["data_offsets"]
    dtype = SAFETENSORS_DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise FileError(f"{path.name} holds {tensor['dtype']} values, not real numbers")
    shape = tuple(tensor["shape"])
    if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError("a tensor's shape and size disagree")
    array = np.memmap(path, dtype, "r", 8 + length + begin, shape)
    return widen(array.view(np.uint16), "bfloat16") if tensor["dtype"] == "BF16" else array


SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


def _chosen(path: Path, key: str | None, keys: list[str]) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    if key not in keys:
        found = "no key" if key is None else f"no array {key!r}"
        raise FileError(f"{found} for {path.name}, which holds {', '.join(sorted(keys))}")
    return key


def _times(shape: tuple[int, ...]) -> str:
    """Shape as people write it, 32x64x56x56."""
    return "x".join(map(str, shape)) or "of one number"


def _normal(words: Words, mean: float, std: float) -> Doubles:
    """Irwin–Hall from words 0 to 5: the sum of their twelve halves, times 2⁻³², less 6."""
    rows = np.ascontiguousarray(words[:, :6].T)  # sums along long rows are four times as fast
    low = rows & np.uint64(0xFFFFFFFF)
    rows >>= np.uint64(32)
    rows += low
    z: Doubles = rows.sum(axis=0).astype(np.float64)
    z *= 2.0**-32
    z -= 6.0
    z *= std
    z += mean
    return z


def _fraction(words: Words) -> Doubles:
    """Uniform in [0, 1), a multiple of 2⁻⁵³."""
    result: Doubles = (words >> np.uint64(11)) * 2.0**-53
    return result


def _signs(words: Words) -> Doubles:
    signs: Doubles = 1.0 - 2.0 * (words & np.uint64(1))
    return signs


def _lowest_bit(value: float) -> float:
    """The largest power of two of which the value is a multiple; inf for 0."""
    numerator, denominator = value.as_integer_ratio()
    return (numerator & -numerator) / denominator if numerator else math.inf


@lru_cache(maxsize=2)
def _distinct_places(key: tuple[int, int], size: int, count: int) -> Integers:
    """`count` different numbers below `size` (Bentley and Floyd, A Sample of Brilliance, 1987)."""
    e = Elements(0, 0, (), "", key)
    chosen: dict[int, None] = {}
    for limit, word in zip(range(size - count, size), e.draws(count).tolist(), strict=True):
        place = word % (limit + 1)
        chosen[limit if place in chosen else place] = None
    return np.array(list(chosen), np.int64)
