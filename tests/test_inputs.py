"""Inputs: the same bits everywhere, in bounded memory."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnaudit import inputs
from bnaudit.distributions import Elements
from bnaudit.inputs import ROLES, Inputs, make
from bnaudit.scenario import Case
from bnaudit.worker.rounding import DTYPES, round_to, storage, widen64

NORMAL = {"distribution": "normal", "mean": 0.1, "std": 3}
EVERYTHING: dict[str, Any] = {
    "input": NORMAL,
    "shape": (3, 5, 7, 11),
    "backward": True,
    "steps": 2,
    "affine": {"weight": NORMAL, "bias": {"distribution": "uniform"}},
    "running": {"mean": 1.5, "var": {"distribution": "uniform", "low": 1, "high": 2}},
    "seed": 2016,
}


def a_case(**fields: Any) -> Case:
    label = {"id": "a/b", "scenario": "a", "file": "a.yaml", "line": 1, "thresholds": {}}
    return Case.model_validate({"input": NORMAL, "shape": (3, 5, 7, 11), **fields, **label})


def arrays(made: Inputs) -> dict[str, Any]:
    return {name: tensor for name in ROLES if (tensor := getattr(made, name)) is not None}


@pytest.mark.parametrize("chunk", [1, 7, 385, 1 << 20])
def test_the_bits_do_not_depend_on_the_size_of_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    (tmp_path / "usual").mkdir()
    usual = make(a_case(**EVERYTHING), tmp_path / "usual")
    monkeypatch.setattr(inputs, "CHUNK", chunk)
    other = make(a_case(**EVERYTHING), tmp_path)
    assert other.sha256 == usual.sha256
    for name, tensor in arrays(usual).items():
        np.testing.assert_array_equal(getattr(other, name), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_its_distribution_rounded_once_under_its_own_key(
    tmp_path: Path, dtype: str
) -> None:
    case = a_case(**{**EVERYTHING, "dtype": dtype})
    made = make(case, tmp_path)
    statistics = "float64" if dtype == "float64" else "float32"
    assert case.affine is not None
    for name, source, shape, steps, own in (
        ("x", case.input, case.shape, 2, dtype),
        ("weight", case.affine.weight, (1, 5), 1, statistics),
        ("bias", case.affine.bias, (1, 5), 1, statistics),
        ("running_mean", case.running.mean, (1, 5), 1, statistics),
        ("running_var", case.running.var, (1, 5), 1, statistics),
        ("grad_output", case.grad_output, case.shape, 2, dtype),
    ):
        tensor = getattr(made, name)
        assert tensor.dtype == storage(own)
        assert tensor.shape == ((steps, *shape) if steps == 2 else (5,))
        for step in range(steps):
            key = (2016, (ROLES[name] << 32) + step)
            size = int(np.prod(shape))
            drawn = source.sample(Elements(0, size, shape, own, key))
            part = tensor[step].reshape(-1) if steps == 2 else tensor
            np.testing.assert_array_equal(part, round_to(drawn, own))


def test_a_narrower_dtype_has_the_same_values_rounded(tmp_path: Path) -> None:
    made = {}
    for dtype in DTYPES:
        (tmp_path / dtype).mkdir()
        made[dtype] = make(a_case(dtype=dtype), tmp_path / dtype).x
    for dtype in DTYPES:
        np.testing.assert_array_equal(made[dtype], round_to(made["float64"], dtype))


def test_the_memory_format_and_the_mode_change_no_bit(tmp_path: Path) -> None:
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"memory_format": "channels_last"},
        {"mode": "inference"},
        {"eps": 1e-3},
    )
    digests = set()
    for i, fields in enumerate(variants):
        (tmp_path / str(i)).mkdir()
        digests.add(make(a_case(**fields), tmp_path / str(i)).sha256)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        (EVERYTHING, "b9c0a5a91e2ea75b"),
        ({**EVERYTHING, "dtype": "float64"}, "85a54e6173ed80f6"),
        ({**EVERYTHING, "dtype": "bfloat16", "param_dtype": "same"}, "8dc7597e9aa1e2cb"),
        ({**EVERYTHING, "dtype": "float16", "affine": None, "seed": 2**64 - 1}, "f7f7796e7ff68028"),
        (
            {"shape": (1, 1, 3, 3), "input": {"distribution": "constant", "value": 100}},
            "af578345f7d1f8af",
        ),
        (
            {
                "shape": (4, 6, 8, 8),
                "dtype": "float16",
                "input": {
                    "distribution": "nonfinite",
                    "values": ("nan", "inf"),
                    "count": 5,
                    "base": {
                        "distribution": "channels",
                        "items": (
                            {"distribution": "outlier", "value": 1e4, "position": "random"},
                            {"distribution": "wide", "low_exponent": -9, "high_exponent": 9},
                            {"distribution": "sparse", "density": 0.5},
                            {"distribution": "subnormal"},
                            {"distribution": "planted", "mean": 1, "spread": 0.5},
                            {"distribution": "ramp"},
                        ),
                    },
                },
            },
            "f79da285618165bb",
        ),
    ],
    ids=["float32", "float64", "bfloat16", "float16", "constant", "many"],
)
def test_the_bits_are_those_of_every_other_machine(
    tmp_path: Path, fields: dict[str, Any], digest: str
) -> None:
    """A changed digest makes every stored report and baseline incomparable."""
    assert make(a_case(**fields), tmp_path).sha256[:16] == digest


def test_the_digest_is_that_of_the_little_endian_bytes_in_order(tmp_path: Path) -> None:
    made = make(a_case(**EVERYTHING), tmp_path)
    digest = hashlib.sha256()
    for tensor in arrays(made).values():
        digest.update(tensor.astype(tensor.dtype.newbyteorder("<")).tobytes())
    assert made.sha256 == digest.hexdigest()


def test_the_files_hold_the_tensors_and_only_those_that_there_are(tmp_path: Path) -> None:
    made = make(a_case(**EVERYTHING), tmp_path)
    assert list(made.files) == list(ROLES)
    for name, path in made.files.items():
        np.testing.assert_array_equal(np.load(path), getattr(made, name))
    (tmp_path / "plain").mkdir()
    plain = make(a_case(affine=None), tmp_path / "plain")
    assert list(plain.files) == ["x", "running_mean", "running_var"]
    assert plain.weight is plain.bias is plain.grad_output is None


def test_the_tensors_cannot_be_written_to(tmp_path: Path) -> None:
    for tensor in arrays(make(a_case(**EVERYTHING), tmp_path)).values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_take_the_dtype_of_the_activations_where_asked_to(
    tmp_path: Path, dtype: str
) -> None:
    made = make(a_case(**{**EVERYTHING, "dtype": dtype, "param_dtype": "same"}), tmp_path)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(made, name).dtype == storage(dtype)
    np.testing.assert_array_equal(widen64(made.running_mean, dtype), 1.5)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5)])
def test_an_empty_batch_has_empty_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = make(a_case(shape=shape, backward=True, steps=2), tmp_path)
    assert made.grad_output is not None
    assert made.x.shape == made.grad_output.shape == (2, *shape)
    assert np.load(made.files["x"]).shape == (2, *shape)
    assert made.running_var.tolist() == [1, 1, 1]


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    case = a_case(shape=(64, 16, 64, 64))  # 32 MiB of float64, 256 MiB of random words
    case = case.model_copy(update={"dtype": "float64"})
    tracemalloc.start()
    try:
        make(case, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < inputs.THREADS * inputs.CHUNK * 8 * 24


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_an_error_and_not_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        make(a_case(), tmp_path)


def test_values_come_from_a_file(tmp_path: Path) -> None:
    stored = np.linspace(0, 1, 12).reshape(2, 3, 2)
    np.save(tmp_path / "stored.npy", stored)
    source = {"distribution": "file", "path": str(tmp_path / "stored.npy")}
    made = make(a_case(input=source, shape=(2, 3, 2), dtype="bfloat16", steps=2), tmp_path)
    np.testing.assert_array_equal(made.x, np.stack([round_to(stored, "bfloat16")] * 2))
