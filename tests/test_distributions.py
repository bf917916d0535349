"""Distributions: each is what it says, exactly, and the same however its tensor is cut into ranges."""

from __future__ import annotations

import json
import math
import pickle
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from pydantic import TypeAdapter

from bnaudit.distributions import (
    DISTRIBUTIONS,
    Distribution,
    Elements,
    FileError,
    read_array,
)
from bnaudit.worker.rounding import round_to, widen64

Doubles = npt.NDArray[np.float64]
SHAPE = (5, 3, 4, 7)
SIZE = math.prod(SHAPE)
KEY = (7, 3)

EXAMPLES: dict[str, dict[str, Any]] = {
    "constant": {"value": 3.3},
    "normal": {"mean": 0.1, "std": 3},
    "uniform": {"low": -1, "high": 3},
    "ramp": {"low": 1, "high": 2},
    "alternating": {"mean": 1, "amplitude": 0.5},
    "outlier": {"value": 1e6, "position": "random"},
    "wide": {"low_exponent": -3, "high_exponent": 4},
    "sparse": {"density": 0.3},
    "subnormal": {},
    "planted": {"mean": 3, "spread": 0.5},
    "nonfinite": {
        "base": {"distribution": "normal"},
        "values": ("nan", "inf", "-inf"),
        "count": 7,
    },
    "channels": {
        "items": (
            {"distribution": "normal"},
            {"distribution": "outlier", "value": 9, "position": "last"},
        )
    },
    "switch": {
        "step": 4,
        "before": {"distribution": "normal"},
        "after": {"distribution": "uniform", "low": 10, "high": 11},
    },
}


def distribution(name: str, **fields: Any) -> Distribution:
    adapter: TypeAdapter[Distribution] = TypeAdapter(Distribution)
    return adapter.validate_python({"distribution": name, **fields})


def sample(
    name: str,
    shape: tuple[int, ...] = SHAPE,
    dtype: str = "float32",
    tensor: tuple[int, int] = KEY,
    **fields: Any,
) -> Doubles:
    """The whole tensor."""
    elements = Elements(0, math.prod(shape), shape, dtype, tensor)
    return distribution(name, **fields).sample(elements).reshape(shape)


def by_channel(x: Doubles) -> Doubles:
    """(C, n), the positions of each channel in order."""
    return np.moveaxis(x.reshape(*x.shape[:2], -1), 1, 0).reshape(x.shape[1], -1)


def test_every_distribution_has_an_example_here() -> None:
    assert set(EXAMPLES) | {"file"} == set(DISTRIBUTIONS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_do_not_depend_on_the_range_that_they_are_asked_for_in(name: str) -> None:
    d = distribution(name, **EXAMPLES[name])
    whole = d.sample(Elements(0, SIZE, SHAPE, "float32", KEY))
    cuts = [0, 1, 2, 29, 30, 31, 84, 200, SIZE]
    parts = [d.sample(Elements(a, b, SHAPE, "float32", KEY)) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_switch_changes_the_distribution_at_its_step() -> None:
    fields = EXAMPLES["switch"]
    before, after = (sample("switch", tensor=(7, step - 1), **fields) for step in (3, 4))
    np.testing.assert_array_equal(before, sample("normal", tensor=(7, 2)))
    assert after.min() >= 10
    role = 5 << 32  # a tensor's role is in the same word as its step
    assert sample("switch", tensor=(7, role + 2), **fields).max() < 10
    assert sample("switch", tensor=(7, role + 3), **fields).min() >= 10


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"subnormal"}))
def test_values_do_not_depend_on_the_dtype(name: str) -> None:
    np.testing.assert_array_equal(
        sample(name, dtype="float16", **EXAMPLES[name]),
        sample(name, dtype="float64", **EXAMPLES[name]),
    )


@pytest.mark.parametrize("name", ["normal", "outlier", "planted", "nonfinite"])
def test_values_depend_on_seed_role_and_step(name: str) -> None:
    fields = EXAMPLES[name]
    one = sample(name, tensor=(7, 3), **fields)
    for other in ((8, 3), (7, 4), (7, 3 + (1 << 32))):
        assert not np.array_equal(one, sample(name, tensor=other, **fields), equal_nan=True)


def test_words_are_philox_words_counted_by_element() -> None:
    raw = np.random.Philox(key=np.array(KEY, np.uint64)).random_raw(8 * SIZE).reshape(SIZE, 8)
    np.testing.assert_array_equal(Elements(13, 57, SHAPE, "float32", KEY).words, raw[13:57])


def test_elements_know_their_channel_and_their_position_in_it() -> None:
    e = Elements(0, SIZE, SHAPE, "float32", KEY)
    n, c, h, w = np.indices(SHAPE).reshape(4, -1)
    np.testing.assert_array_equal(e.channel, c)
    np.testing.assert_array_equal(e.position, n * 28 + h * 7 + w)
    assert e.n == 140


def test_normal_is_irwin_hall_with_one_rounding_per_operation() -> None:
    mean, std = 0.1, 1e-3
    x = sample("normal", mean=mean, std=std).reshape(-1)
    words = Elements(0, SIZE, SHAPE, "float32", KEY).words
    for i in range(SIZE):
        halves = [int(w) >> shift & 0xFFFFFFFF for w in words[i, :6] for shift in (0, 32)]
        z = Fraction(sum(halves), 2**32) - 6
        product = Fraction(float(z * Fraction(std)))
        assert x[i] == float(product + Fraction(mean))


def test_normal_looks_normal() -> None:
    x = sample("normal", (1, 1, 500, 500))
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.01
    assert abs(np.mean(x**4) - 2.9) < 0.05  # the kurtosis of twelve uniform terms
    assert 4 < np.abs(x).max() < 6


def test_uniform_lies_between_its_ends_and_fills_the_space() -> None:
    x = sample("uniform", (1, 1, 100, 100), low=-1, high=3)
    assert x.min() >= -1
    assert x.max() < 3
    assert np.histogram(x, 8, (-1, 3))[0].min() > 1000


def test_ramp_runs_from_low_to_high_over_each_channel() -> None:
    x = by_channel(sample("ramp", low=1, high=2))
    np.testing.assert_array_equal(x, np.tile(1 + np.arange(140) / 139, (3, 1)))
    assert sample("ramp", (1, 2), low=4, high=5).tolist() == [[4, 4]]


def test_alternating_takes_turns() -> None:
    x = by_channel(sample("alternating", mean=1, amplitude=0.5))
    np.testing.assert_array_equal(x, np.tile([1.5, 0.5], (3, 70)))


@pytest.mark.parametrize(("position", "place"), [("first", 0), ("last", 139), ("random", None)])
def test_outlier_replaces_one_element_of_each_channel(position: str, place: int | None) -> None:
    x = by_channel(sample("outlier", value=1e6, position=position))
    channels, places = np.nonzero(x == 1e6)
    assert channels.tolist() == [0, 1, 2]
    assert len(set(places)) == 3 if place is None else set(places) == {place}


def test_wide_takes_every_exponent_with_both_signs() -> None:
    x = sample("wide", (1, 1, 100, 100), low_exponent=-3, high_exponent=4)
    exponents = np.frexp(x)[1] - 1
    for sign in (-1, 1):
        assert set(exponents[np.sign(x) == sign].tolist()) == set(range(-3, 5))


def test_sparse_is_mostly_zero() -> None:
    x = sample("sparse", (1, 1, 100, 100), density=0.3, mean=50)
    assert 0.28 < np.mean(x != 0) < 0.32
    assert x[x != 0].min() > 40


@pytest.mark.parametrize(
    ("dtype", "smallest_normal"),
    [
        ("float16", 2.0**-14),
        ("bfloat16", 2.0**-126),
        ("float32", 2.0**-126),
        ("float64", 2.0**-1022),
    ],
)
def test_subnormal_numbers_are_exactly_that(dtype: str, smallest_normal: float) -> None:
    x = sample("subnormal", dtype=dtype)
    np.testing.assert_array_equal(widen64(round_to(x, dtype), dtype), x)
    assert (x != 0).all()
    assert (np.abs(x) < smallest_normal).all()
    assert {-1, 1} == set(np.sign(x).reshape(-1).tolist())


@pytest.mark.parametrize("shape", [(64, 3), (4, 3, 8, 8), (16, 2, 1, 4)])
def test_planted_statistics_are_exact_in_any_order_of_summation(shape: tuple[int, ...]) -> None:
    d = distribution("planted", mean=100, spread=0.25)
    assert d.obstacle(shape, "float32") is None
    x = by_channel(d.sample(Elements(0, math.prod(shape), shape, "float32", KEY)).reshape(shape))
    rng = np.random.default_rng(0)
    for row in x.astype(np.float32):
        assert (row[::2] != row[1::2]).all()
        assert 0 < np.mean(row[::2] > 100) < 1
        for order in (row, row[::-1], np.sort(row), rng.permutation(row)):
            mean = np.add.accumulate(order)[-1] / np.float32(row.size)
            var = np.add.accumulate(np.square(order - mean))[-1] / np.float32(row.size)
            assert (mean, var) == (100, 0.0625)


@pytest.mark.parametrize(
    ("shape", "mean", "spread", "dtype", "found"),
    [
        ((3, 3), 0, 1, "float32", "3 elements per channel"),
        ((0, 3), 0, 1, "float32", "0 elements per channel"),
        ((1, 3), 0, 1, "float32", "1 elements per channel"),
        ((4, 3), 0, 3, "float32", "spread of 3"),
        ((4, 3), 0.1, 1, "float32", "0.1 ± 1.0"),
        ((4, 3), 1000, 0.25, "float16", "1000.0 ± 0.25"),
        ((4, 3), 2**23, 1, "float32", "8388608.0 ± 1.0"),
        ((4, 3), 0, 2**-80, "float32", "whose square"),
    ],
)
def test_planted_is_refused_where_it_would_not_be_exact(
    shape: tuple[int, ...], mean: float, spread: float, dtype: str, found: str
) -> None:
    obstacle = distribution("planted", mean=mean, spread=spread).obstacle(shape, dtype)
    assert obstacle is not None
    assert found in obstacle


@pytest.mark.parametrize("count", [1, 7, SIZE])
def test_nonfinite_replaces_exactly_so_many_elements_in_turn(count: int) -> None:
    values = ("nan", "inf", "-inf")
    x = sample("nonfinite", base={"distribution": "normal"}, values=values, count=count)
    assert np.sum(~np.isfinite(x)) == count
    assert np.isnan(x).sum() == -(-count // 3)
    assert (x == math.inf).sum() == (count + 1) // 3
    same = sample("normal")
    np.testing.assert_array_equal(x[np.isfinite(x)], same[np.isfinite(x)])


def test_channels_are_dealt_to_the_items_in_turn() -> None:
    items = tuple({"distribution": "constant", "value": v} for v in (5, 6))
    assert sample("channels", (1, 5), items=items).tolist() == [[5, 6, 5, 6, 5]]


def write(path: Path, array: npt.NDArray[Any]) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, x=array, other=np.zeros(1))
    else:
        safetensors.numpy.save_file({"x": array, "other": np.zeros(1)}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "u1", "i8"])
def test_a_file_gives_its_values_exactly(tmp_path: Path, suffix: str, dtype: str) -> None:
    array = (np.random.default_rng(0).normal(100, 30, SHAPE)).astype(dtype)
    path = write(tmp_path / f"x{suffix}", array)
    fields: dict[str, Any] = {"path": str(path), "key": None if suffix == ".npy" else "x"}
    np.testing.assert_array_equal(sample("file", **fields), array.astype(np.float64))
    assert distribution("file", **fields).obstacle(SHAPE, "float32") is None
    obstacle = distribution("file", **fields).obstacle((5, 3, 4, 8), "float32")
    assert obstacle == f"found shape 5x3x4x7 in {path}; accepted is 5x3x4x8"


def test_order_and_endianness_of_a_file_do_not_matter(tmp_path: Path) -> None:
    array = np.asfortranarray(np.random.default_rng(0).normal(size=SHAPE).astype(">f4"))
    path = write(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(sample("file", path=str(path)), array.astype(np.float64))


def test_the_only_array_of_a_file_needs_no_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.arange(3.0))
    assert sample("file", (3,), path=str(tmp_path / "x.npz")).tolist() == [0, 1, 2]


def test_bfloat16_safetensors_are_widened(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([0x81, 0x3F, 0x00, 0xC0]))
    assert sample("file", (2,), path=str(path)).tolist() == [1.0078125, -2.0]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_pickled_arrays_are_refused_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.array([Bomb()], object)
    np.save("x.npy", array, allow_pickle=True)
    np.savez("x.npz", array)
    Path("raw.npy").write_bytes(pickle.dumps(array))
    for name in ("x.npy", "x.npz", "raw.npy"):
        with pytest.raises(FileError, match="is not a valid"):
            read_array(Path(name), None)
    assert not Path("exploded").exists()


def tensors(**entry: Any) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}})
    return len(header).to_bytes(8, "little") + header.encode() + bytes(8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"x\.txt is not a \.npy, \.npz or \.safetensors file"),
        ("x.npy", b"", "not a valid .npy"),
        ("x.npy", b"\x93NUMPY\x01\x00\xff\xff{", "not a valid .npy"),
        ("x.npz", b"PK\x03\x04nonsense", "not a valid .npz"),
        ("x.npz", b"", "not a valid .npz"),
        ("x.safetensors", b"", "not a valid .safetensors"),
        ("x.safetensors", b"\xff" * 12, "its header is longer than the file"),
        ("x.safetensors", b"\x02" + bytes(7) + b"[]", "its header is not a table"),
        ("x.safetensors", tensors(data_offsets=[0, 4]), "shape and size disagree"),
        ("x.safetensors", tensors(shape=[9], data_offsets=[0, 36]), "not a valid .safetensors"),
        ("x.safetensors", tensors(shape="ab"), "not a valid .safetensors"),
        ("x.safetensors", tensors(dtype="C64"), "holds C64 values, not real numbers"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_array(tmp_path / name, None)


def test_a_missing_file_key_or_number_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read: No such file"):
        read_array(tmp_path / "none.npy", None)
    path = write(tmp_path / "x.npz", np.zeros(2))
    with pytest.raises(FileError, match=r"no key for x\.npz, which holds other, x"):
        read_array(path, None)
    with pytest.raises(FileError, match=r"no array 'z' for x\.npz, which holds other, x"):
        read_array(path, "z")
    path = write(tmp_path / "c.npy", np.zeros(2, np.complex64))
    with pytest.raises(FileError, match="holds complex64 values, not real numbers"):
        read_array(path, None)
    with pytest.raises(FileError, match=r"c\.npy holds one array and takes no key"):
        read_array(path, "x")
