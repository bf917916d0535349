"""The probe: from masks to the order of additions, to its name, and what it says of real backends."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bnaudit.cli import main
from bnaudit.inputs import Inputs
from bnaudit.probe import (
    Finding,
    ProbeError,
    Setting,
    Tree,
    depth,
    leaves,
    node,
    probe,
    rebuild,
    sizes_of,
)
from bnaudit.render.tree import finding_text, name, nested
from bnaudit.scenario import Case, Dtype
from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.rounding import widen

Array: TypeAlias = npt.NDArray[Any]
Mean: TypeAlias = Callable[[Array], Any]

# --- trees -----------------------------------------------------------------------------------------


def chain(parts: Sequence[Tree]) -> Tree:
    return reduce(node, parts)


def neighbours(parts: Sequence[Tree]) -> Tree:
    if len(parts) == 1:
        return parts[0]
    return neighbours(
        [
            node(*p) if len(p) > 1 else p[0]
            for p in (parts[i : i + 2] for i in range(0, len(parts), 2))
        ]
    )


def halves(parts: Sequence[Tree]) -> Tree:
    half = (len(parts) + 1) // 2
    if len(parts) == 1:
        return parts[0]
    return halves([node(*p) if len(p) > 1 else p[0] for p in (parts[i::half] for i in range(half))])


def lanes(places: Sequence[int], count: int) -> list[Tree]:
    return [chain(places[i::count]) for i in range(count)]


def numpy_sum(places: Sequence[int]) -> Tree:
    """NumPy's pairwise sum of a contiguous axis, numpy/_core/src/umath/loops_utils.h.src."""
    if len(places) < 8:
        return chain(places)
    if len(places) <= 128:
        even = len(places) - len(places) % 8
        return chain([neighbours(lanes(places[:even], 8)), *places[even:]])
    half = len(places) // 2
    half -= half % 8
    return node(numpy_sum(places[:half]), numpy_sum(places[half:]))


def random_tree(size: int, seed: int, most: int = 2) -> Tree:
    """Joins `most` parts at a time at most, drawn at random."""
    draw = random.Random(seed)
    parts: list[Tree] = list(range(size))
    while len(parts) > 1:
        draw.shuffle(parts)
        count = draw.randint(2, min(most, len(parts)))
        parts[:count] = [node(*parts[:count])]
    return parts[0]


@given(st.integers(2, 40), st.integers(0, 2**32), st.integers(2, 6))
def test_a_tree_is_rebuilt_from_the_sizes_of_its_parts(size: int, seed: int, most: int) -> None:
    tree = random_tree(size, seed, most)
    assert rebuild(sizes_of(tree)) == tree


@given(st.integers(3, 12), st.integers(0, 2**32), st.data())
def test_there_is_a_tree_exactly_where_both_leaves_agree_on_every_part(
    size: int, seed: int, data: st.DataObject
) -> None:
    sizes = sizes_of(random_tree(size, seed, most=4))
    i, j = data.draw(st.permutations(range(size)))[:2]
    sizes[i, j] = sizes[j, i] = data.draw(st.integers(0, size + 1))
    agree = all(
        np.array_equal(sizes[a] <= sizes[a, b], sizes[b] <= sizes[a, b])
        and (sizes[a] <= sizes[a, b]).sum() == sizes[a, b]
        for a in range(size)
        for b in range(a)
    )
    assert (rebuild(sizes) is not None) == agree


def test_sizes_without_a_whole_are_no_tree() -> None:
    for size in (0, 1, 2, 3, 5):
        sizes = np.full((4, 4), size)
        np.fill_diagonal(sizes, 1)
        assert rebuild(sizes) is None


def test_a_tree_knows_its_leaves_and_its_depth() -> None:
    tree = node(3, node(node(0, 4), node(1, 2)))
    assert tree == (((0, 4), (1, 2)), 3)
    assert leaves(tree) == [0, 4, 1, 2, 3]
    assert depth(tree) == 3


# --- means that are made up ------------------------------------------------------------------------


class Stub:
    """Stands for the worker processes: a backend that returns the mean that a function forms of (C, n)."""

    def __init__(self, mean: Mean) -> None:
        self.mean = mean
        self.sizes: list[int] = []

    def run(self, backend: str, case: Case, inputs: Inputs) -> Reply:
        stored = inputs.x[0].swapaxes(0, 1).reshape(case.channels, -1)
        self.sizes.append(case.n)
        x = widen(stored, case.dtype) if case.dtype != "float16" else stored
        with np.errstate(all="ignore"):
            return Reply("done", outputs={"batch_mean": self.mean(x)})


def found(mean: Mean, folder: Path, setting: Setting) -> Finding:
    return probe("stub", setting, cast(Subject, Stub(mean)), folder)


def evaluate(tree: Tree, x: Array, join: Callable[..., Array]) -> Array:
    return x[:, tree] if isinstance(tree, int) else join(*(evaluate(t, x, join) for t in tree))


def added(*parts: Array) -> Array:
    return reduce(np.add, parts)


def summed(tree: Tree, dtype: Any) -> Mean:
    """The sum in this order, if n is its size; otherwise from left to right."""

    def mean(x: Array) -> Any:
        n = x.shape[1]
        order = tree if n == len(leaves(tree)) else chain(range(n))
        total = evaluate(order, x.astype(dtype), added) / dtype(n)
        return total.astype(np.float32 if x.dtype == np.float16 else x.dtype)

    return mean


ACCUMULATORS: list[tuple[Dtype, Any, int]] = [
    ("float32", np.float32, 24),
    ("float32", np.float64, 53),
    ("bfloat16", np.float32, 24),
    ("float16", np.float16, 11),
    ("float16", np.float32, 24),
    ("float64", np.float64, 53),
]


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 48), st.integers(0, 2**32))
@pytest.mark.parametrize(("dtype", "accumulator", "bits"), ACCUMULATORS)
def test_any_order_of_additions_is_found_with_its_accumulator(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: Dtype,
    accumulator: Any,
    bits: int,
    size: int,
    seed: int,
) -> None:
    tree = random_tree(size, seed)
    folder = tmp_path_factory.getbasetemp()
    finding = found(summed(tree, accumulator), folder, Setting(1, size, dtype))
    assert (finding.tree, finding.bits, finding.reason) == (tree, bits, None)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 48), st.integers(0, 2**32))
def test_what_is_added_at_once_is_found_at_once(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int
) -> None:
    tree = random_tree(size, seed, most=6)

    def at_once(*parts: Array) -> Array:
        """Cut off below the last bit of the largest part, as in a tensor core."""
        unit = np.spacing(np.abs(parts).max(axis=0).astype(np.float32)).astype(np.float64)
        return cast(Array, sum(np.trunc(part / unit) * unit for part in parts))

    def mean(x: Array) -> Any:
        n = x.shape[1]
        order = tree if n == size else chain(range(n))
        return (evaluate(order, x.astype(np.float64), at_once) / n).astype(np.float32)

    finding = found(mean, tmp_path_factory.getbasetemp(), Setting(1, size))
    assert (finding.tree, finding.reason) == (tree, None)


@pytest.mark.parametrize("size", [9, 15, 31, 32, 33, 65, 97, 129, 200])
@pytest.mark.parametrize("fused", [False, True])
def test_dividing_first_hides_neither_order_nor_width(
    tmp_path: Path, size: int, fused: bool
) -> None:
    """1/n is rounded; fused: as in s = fma(x, 1/n, s), here with exact products."""
    tree = random_tree(size, size)

    def mean(x: Array) -> Any:
        n = x.shape[1]
        order = tree if n == size else chain(range(n))
        scaled = x.astype(np.float64 if fused else np.float32) * np.float32(1 / n)

        def join(a: Array, b: Array) -> Array:
            return (a + b).astype(np.float32)

        return evaluate(order, scaled, join)

    finding = found(mean, tmp_path, Setting(1, size))
    assert (finding.tree, finding.bits, finding.reason) == (tree, 24, None)


@pytest.mark.parametrize(("images", "spatial"), [(1, 12), (4, 3), (12, 1)])
def test_places_are_counted_image_after_image(tmp_path: Path, images: int, spatial: int) -> None:
    tree = random_tree(12, 5)
    assert found(summed(tree, np.float32), tmp_path, Setting(images, spatial)).tree == tree


# --- what is no plain sum --------------------------------------------------------------------------

CHAN: dict[str, Callable[..., Array]] = {
    "factor": lambda a, b, n, m: a + (b - a) * (m / n),
    "division": lambda a, b, n, m: a + (b - a) * m / n,
    "division first": lambda a, b, n, m: a + (b - a) / n * m,
}
"""The mean of n values, of which the last m have the mean b, the others a."""

ORDERS: dict[str, Callable[[Sequence[int]], Tree]] = {
    "left to right": chain,
    "neighbours": neighbours,
    "halves": halves,
    "4 lanes": lambda places: neighbours(lanes(places, 4)),
    "8 lanes": lambda places: halves(lanes(places, min(8, len(places)))),
    "blocks": lambda places: halves([chain(places[i : i + 8]) for i in range(0, len(places), 8)]),
}


def averaged(order: Callable[[Sequence[int]], Tree], formula: str, dtype: Any) -> Mean:
    def merge(tree: Tree, x: Array) -> tuple[Any, Array]:
        if isinstance(tree, int):
            return dtype(1), x[:, tree]
        (n, a), (m, b) = (merge(part, x) for part in tree)
        return n + m, CHAN[formula](a, b, n + m, m)

    return lambda x: merge(order(range(x.shape[1])), x.astype(dtype))[1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("formula", CHAN)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("images", "spatial"), [(1, 32), (4, 8), (32, 1)])
def test_merged_averages_are_no_sum(
    tmp_path: Path, order: str, formula: str, dtype: Any, images: int, spatial: int
) -> None:
    mean = averaged(ORDERS[order], formula, dtype)
    finding = found(mean, tmp_path, Setting(images, spatial))
    assert finding.tree is None
    assert finding.bits is None
    assert (finding.reason or "").endswith("as where averages are merged (Welford, Chan)")


def test_without_the_second_call_averages_of_equal_parts_would_pass_for_a_sum(
    tmp_path: Path,
) -> None:
    averages = averaged(halves, "factor", np.float32)
    sums = summed(halves(range(32)), np.float32)
    stub = lambda x: averages(x) if x.shape[1] == 32 else sums(x)  # noqa: E731
    assert found(stub, tmp_path, Setting(1, 32)).tree == halves(range(32))


def test_a_shifted_sum_is_no_plain_one(tmp_path: Path) -> None:
    def mean(x: Array) -> Any:
        first = x[:, :1]
        return first[:, 0] + (x - first).mean(axis=1, dtype=np.float32)

    finding = found(mean, tmp_path, Setting(1, 32))
    assert finding.reason == (
        "not a plain sum: with a huge M at 1 and -M at 2, the 30 equal values beside them count as 32"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1.0, 1 / 32, 32.0])
def test_a_mean_that_means_nothing_is_no_sum(tmp_path: Path, value: float) -> None:
    def mean(x: Array) -> Any:
        return np.full(len(x), value if x.shape[1] == 32 else 0, np.float32)

    finding = found(mean, tmp_path, Setting(1, 32))
    assert (finding.tree, finding.bits) == (None, None)
    assert "count as" in (finding.reason or "") or value == 1 / 32


def test_an_exact_sum_shows_no_order(tmp_path: Path) -> None:
    def mean(x: Array) -> Any:
        total = [
            sum(map(int, row)) for row in x.tolist()
        ]  # half a unit is left out: none is halved
        return np.array([t / x.shape[1] for t in total], np.float32)

    finding = found(mean, tmp_path, Setting(1, 8))
    assert finding.tree is None
    assert finding.reason == (
        "the order does not matter: the sum comes out exact, whatever the masks"
    )


def test_an_order_that_depends_on_the_channel_is_no_tree(tmp_path: Path) -> None:
    def mean(x: Array) -> Any:
        forwards, backwards = (
            summed(chain(p), np.float32)(x) for p in (range(16), range(16)[::-1])
        )
        return np.where(np.arange(len(x)) % 2, forwards, backwards)

    finding = found(mean, tmp_path, Setting(1, 16))
    assert finding.reason == (
        "the order differs between channels: what the masks swallow fits no single tree"
    )


def test_a_compensated_sum_looks_like_a_plain_one(tmp_path: Path) -> None:
    def mean(x: Array) -> Any:
        total = lost = np.zeros(len(x), np.float32)
        for column in x.T:
            term = column - lost
            longer = total + term
            total, lost = longer, (longer - total) - term
        return total / np.float32(x.shape[1])

    finding = found(mean, tmp_path, Setting(1, 16))
    assert finding.tree == chain(range(16))
    assert "a compensated sum (Kahan), which looks the same" in shown(finding)


# --- names and text --------------------------------------------------------------------------------


def shown(finding: Finding) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(finding_text(finding, 2, console.width))
    return " ".join(captured.get().split())


PLACES = range(32)

NAMES: list[tuple[str, Tree]] = [
    ("left to right", chain(PLACES)),
    ("right to left", chain(PLACES[::-1])),
    ("left to right", (0, 1)),
    ("all at once", tuple(PLACES)),
    ("pairwise, neighbours first", neighbours(PLACES)),
    ("pairwise, 16 apart first", halves(PLACES)),
    ("pairwise, 17 apart first", halves(range(33))),
    ("8 interleaved lanes, added pairwise, neighbours first", numpy_sum(PLACES)),
    ("4 interleaved lanes, added left to right", chain(lanes(PLACES, 4))),
    ("2 interleaved lanes, added", chain(lanes(PLACES, 2))),
    (
        "8 interleaved lanes, added in 4 interleaved lanes, added pairwise, neighbours first",
        neighbours([node(*lanes(PLACES[i::4], 2)) for i in range(4)]),
    ),
    (
        "4 interleaved lanes, added pairwise, neighbours first; then 12 to 14 one by one",
        chain([neighbours(lanes(range(12), 4)), 12, 13, 14]),
    ),
    (
        "4 interleaved lanes, added left to right; then 12 one by one",
        chain([*[chain(lanes(range(12), 4))], 12]),
    ),
    (
        "8 interleaved lanes, added left to right; then 32 to 39, left to right",
        node(chain(lanes(PLACES, 8)), chain(range(32, 40))),
    ),
    (
        "2 blocks of 16, each left to right; then added",
        node(chain(range(16)), chain(range(16, 32))),
    ),
    (
        "3 blocks of 10 to 11, each left to right; then added left to right",
        chain([chain(range(11)), chain(range(11, 22)), chain(range(22, 32))]),
    ),
    (
        "2 blocks of 96 to 104, each 8 interleaved lanes, added pairwise, neighbours first; then added",
        numpy_sum(range(200)),
    ),
    ("one that has no name", random_tree(32, 1)),
]


@pytest.mark.parametrize(("expected", "tree"), NAMES)
def test_an_order_is_called_by_its_name(expected: str, tree: Tree) -> None:
    assert name(tree) == expected


def test_a_tree_that_differs_in_one_place_has_another_name() -> None:
    swapped = chain([0, 1, 3, 2, *range(4, 32)])
    assert name(swapped) != "left to right"


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (chain(range(5)), "(0 1 2 3 4)"),
        (chain(PLACES), "(0 1 … 31)"),
        (chain(range(0, 40, 8)), "(0 8 16 24 32)"),
        (chain(range(0, 48, 8)), "(0 8 … 40)"),
        (chain([0, 1, 2, 3, 4, 6]), "(0 1 2 3 4 6)"),
        (tuple(range(4)), "{0, 1, 2, 3}"),
        (neighbours(range(8)), "[[(0 1) + (2 3)] + [(4 5) + (6 7)]]"),
        (chain(lanes(range(12), 4)), "[(0 4 8) + (1 5 9) + (2 6 10) + (3 7 11)]"),
        (chain([node(node(0, 1), node(2, 3)), 4, 5]), "[[(0 1) + (2 3)] + 4 + 5]"),
    ],
)
def test_a_tree_is_written_in_nested_form(tree: Tree, line: str) -> None:
    assert nested(tree, 80) == [line]


def test_a_tree_that_is_too_wide_is_written_in_several_lines() -> None:
    assert nested(neighbours(range(8)), 20) == [
        "[ [(0 1) + (2 3)]",
        "+ [(4 5) + (6 7)] ]",
    ]


@given(st.integers(3, 60), st.integers(0, 2**32))
def test_no_value_is_left_out_of_the_text(size: int, seed: int) -> None:
    lines = nested(random_tree(size, seed), 60)
    words = " ".join(lines).translate(str.maketrans("[](){}+,", " " * 8)).split()
    if "…" not in words:
        assert sorted(map(int, words)) == list(range(size))
    assert sum(line.count("[") + line.count("(") for line in lines) == sum(
        line.count("]") + line.count(")") for line in lines
    )


# --- backends --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def two_threads(scratch: Path) -> Iterator[Subject]:
    with Subject(scratch=scratch, threads=2) as subject:
        yield subject


@pytest.mark.parametrize("size", [3, 9, 14])
@pytest.mark.parametrize("images", [1, 3])
def test_caffe_adds_up_to_14_values_of_an_image_from_left_to_right(
    two_threads: Subject, scratch: Path, images: int, size: int
) -> None:
    finding = probe("caffe-2016@cpu", Setting(images, size), two_threads, scratch)
    rows = [chain(range(i * size, (i + 1) * size)) for i in range(images)]
    assert (finding.tree, finding.bits) == (chain(rows), 24)


def test_the_dot_product_of_atlas_has_four_lanes(two_threads: Subject, scratch: Path) -> None:
    finding = probe("caffe-2016@cpu", Setting(1, 15), two_threads, scratch)
    assert finding.tree == chain([neighbours(lanes(range(12), 4)), 12, 13, 14])
    assert finding.bits == 24


@pytest.mark.parametrize("size", [31, 32])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
def test_two_pass_adds_pairwise_whatever_the_memory_format(
    two_threads: Subject, scratch: Path, size: int, memory_format: Any
) -> None:
    setting = Setting(1, size, "float32", memory_format)
    finding = probe("two-pass@cpu", setting, two_threads, scratch)
    assert (finding.tree, finding.bits) == (halves(range(size)), 24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("backend", ["welford@cpu", "welford-sequential@cpu", "shifted@cpu"])
@pytest.mark.parametrize(("images", "spatial"), [(1, 32), (4, 8), (1, 33)])
def test_welford_and_shifted_are_no_plain_sums(
    two_threads: Subject, scratch: Path, backend: str, dtype: Dtype, images: int, spatial: int
) -> None:
    finding = probe(backend, Setting(images, spatial, dtype), two_threads, scratch)
    assert finding.tree is None
    assert (finding.reason or "").startswith("not a plain sum")


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 24), ("bfloat16", 24), ("float64", 53)])
def test_a_yardstick_accumulates_in_the_statistics_dtype(
    two_threads: Subject, scratch: Path, dtype: Dtype, bits: int
) -> None:
    finding = probe("two-pass-sequential@cpu", Setting(1, 20, dtype), two_threads, scratch)
    assert (finding.tree, finding.bits) == (chain(range(20)), bits)


def test_exact_shows_no_order(two_threads: Subject, scratch: Path) -> None:
    finding = probe("exact@cpu", Setting(1, 16), two_threads, scratch)
    assert (finding.reason or "").startswith("the order does not matter")


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self) -> None:
        pytest.importorskip("torch")

    def test_contiguous_float32_is_added_in_float64(
        self, two_threads: Subject, scratch: Path
    ) -> None:
        finding = probe("torch@cpu", Setting(1, 32), two_threads, scratch)
        assert (finding.tree, finding.bits) == (chain(PLACES), 53)
        assert "contiguous" in (finding.kernel or "")

    def test_channels_last_is_added_in_float32_by_threads(
        self, two_threads: Subject, scratch: Path
    ) -> None:
        setting = Setting(1, 32, "float32", "channels_last")
        finding = probe("torch@cpu", setting, two_threads, scratch)
        assert (finding.tree, finding.bits) == (node(chain(range(16)), chain(range(16, 32))), 24)
        with Subject(scratch=scratch, threads=1) as one_thread:
            finding = probe("torch@cpu", setting, one_thread, scratch)
        assert (finding.tree, finding.bits) == (chain(PLACES), 24)


# --- plug-ins --------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np

def numpy_mean(x, weight, bias, running_mean, running_var, **options):
    return {"y": np.zeros_like(x), "batch_mean": x.mean((0, 2, 3))}

def moves(x, weight, bias, running_mean, running_var, *, momentum, **options):
    running_mean += momentum * (x.mean((0, 2, 3)) - running_mean)
    return np.zeros_like(x)

def none(x, weight, bias, running_mean, running_var, **options):
    return np.zeros_like(x)

def refuses(x, *arguments, **options):
    raise NotImplementedError("not this")

def raises(x, *arguments, **options):
    raise ValueError("no luck")

def dies(x, *arguments, **options):
    import os
    os._exit(7)

def order(x, weight, bias, running_mean, running_var, **options):
    rows = x.reshape(x.shape[1], -1)
    def total(tree):
        return rows[:, tree] if isinstance(tree, int) else total(tree[0]) + total(tree[1])
    n = rows.shape[1]
    sums = total(TREE) if n == SIZE else np.add.accumulate(rows, axis=1)[:, -1]
    return {"y": np.zeros_like(x), "batch_mean": sums / x.dtype.type(n), "kernel": "drawn"}
"""

DRAWN = random_tree(24, 7)


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[[str], str]:
    path = tmp_path / "my_bn.py"
    path.write_text(f"{PLUGIN}\nTREE, SIZE = {DRAWN}, {len(leaves(DRAWN))}\n")
    return lambda function: f"{path}:{function}@cpu"


def test_the_order_of_a_plugin_is_found(
    two_threads: Subject, scratch: Path, plugin: Callable[[str], str]
) -> None:
    finding = probe(plugin("order"), Setting(1, 24), two_threads, scratch)
    assert (finding.tree, finding.bits, finding.kernel) == (DRAWN, 24, "drawn")
    assert finding.quantity == "batch_mean"


@pytest.mark.parametrize("size", [7, 8, 32, 45, 128, 200])
def test_numpy_adds_a_contiguous_axis_pairwise(
    two_threads: Subject, scratch: Path, plugin: Callable[[str], str], size: int
) -> None:
    finding = probe(plugin("numpy_mean"), Setting(1, size), two_threads, scratch)
    assert (finding.tree, finding.bits) == (numpy_sum(range(size)), 24)


def test_a_mean_is_read_from_the_running_mean_where_there_is_no_other(
    two_threads: Subject, scratch: Path, plugin: Callable[[str], str]
) -> None:
    finding = probe(plugin("moves"), Setting(1, 32), two_threads, scratch)
    assert (finding.tree, finding.quantity) == (numpy_sum(PLACES), "running_mean")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("none", " returns neither batch_mean nor running_mean: no mean to look at"),
        ("refuses", ": unsupported: not this"),
        ("raises", ": crash: ValueError: no luck"),
        ("dies", ": crash: exited with code 7"),
    ],
)
def test_a_backend_without_a_mean_gets_one_sentence(
    two_threads: Subject,
    scratch: Path,
    plugin: Callable[[str], str],
    function: str,
    reason: str,
) -> None:
    with pytest.raises(ProbeError) as error:
        probe(plugin(function), Setting(1, 8), two_threads, scratch)
    assert str(error.value).startswith(plugin(function))
    assert str(error.value).endswith(reason)
    assert "\n" not in str(error.value)


# --- the command -----------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["probe", *arguments])
    return int(end.value.code or 0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("terminal")
def test_the_command_prints_the_order_and_saves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "order.json"
    assert command("caffe-2016", "--size", "15", "--json", str(target)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.rstrip() for line in out.splitlines()] == [
        "caffe-2016@cpu: batch_mean of 15 float32 values, contiguous, 2 threads",
        "  order         4 interleaved lanes, added pairwise, neighbours first; then 12",
        "                to 14 one by one",
        "  tree          [[[(0 4 8) + (1 5 9)] + [(2 6 10) + (3 7 11)]] + 12 + 13 + 14]",
        "  accumulator   24 significant bits (float32)",
        "  additions     at most 7 in a row",
    ]
    saved = json.loads(target.read_text())
    lane = [[[[0, 4], 8], [[1, 5], 9]], [[[2, 6], 10], [[3, 7], 11]]]
    assert saved["tree"] == [[[lane, 12], 13], 14]
    assert (saved["schema_version"], saved["backend"], saved["bits"]) == (1, "caffe-2016@cpu", 24)
    assert saved["setting"] == {
        "images": 1,
        "spatial": 15,
        "dtype": "float32",
        "memory_format": "contiguous",
    }
    assert (saved["threads"], saved["environment"]["threads"]) == (2, 2)


@pytest.mark.usefixtures("terminal")
def test_json_on_stdout_leaves_the_text_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--size", "256", "--images", "4", "--dtype", "float64", "--threads", "1")
    assert command("two-pass-sequential@cpu", *arguments, "--json", "-") == 0
    out, err = capsys.readouterr()
    tree = json.loads(out)["tree"]
    for place in range(255, 0, -1):
        tree, last = tree
        assert last == place
    assert tree == 0
    assert err.startswith(
        "two-pass-sequential@cpu: batch_mean of 256 float64 values in 4 images of 64,"
    )
    assert "accumulator   53 significant bits (float64)" in err


@pytest.mark.usefixtures("terminal")
def test_what_is_no_sum_is_said_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("welford@cpu", "--json", "-") == 0
    out, err = capsys.readouterr()
    saved = json.loads(out)
    assert (saved["tree"], saved["bits"]) == (None, None)
    assert saved["reason"].startswith("not a plain sum")
    assert "  order         not a plain sum" in err
    assert "tree" not in err


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["caffe-2017"], 2, "there is no backend 'caffe-2017'; did you mean 'caffe-2016'?"),
        (["torch*"], 2, "'torch*' is not the name of one backend"),
        (["all"], 2, "'all' is not the name of one backend"),
        (["exact", "--size", "2"], 2, "2 is not in the range 3<=x<=256"),
        (["exact", "--images", "5"], 2, "32 values cannot be shared by 5 images"),
        (
            ["exact", "--images", "32", "--memory-format", "channels_last"],
            2,
            "channels_last takes several values in each image",
        ),
        (
            ["two-pass", "--json", "/dev/null/x.json"],
            2,
            "cannot write /dev/null/x.json: /dev/null is no folder",
        ),
        (["exact", "--size", "256"], 3, "exact@cpu: unsupported: exact takes up to 1000000"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert command(*arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bnaudit: ")
    assert message in line


@pytest.mark.usefixtures("terminal")
def test_an_unavailable_backend_says_why(
    capsys: pytest.CaptureFixture[str], plugin: Callable[[str], str]
) -> None:
    assert command(plugin("nowhere")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert ": unavailable: " in line
    assert "has no function named nowhere" in line
