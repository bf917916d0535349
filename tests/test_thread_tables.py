"""The tables of BVLC/caffe#3963 re-run: what each system makes of constant channels, to the last bit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bnaudit.worker.backends import _caffe, _chainer, _cudnn, _mxnet, _nvcaffe
from bnaudit.worker.backends._blas import OPENBLAS_HASWELL, REFERENCE, chain

Array = npt.NDArray[Any]

SYSTEMS: dict[str, Callable[..., dict[str, Array]]] = {
    "caffe-2016": _caffe.caffe_2016,
    "caffe-2016-gemv2": _caffe.caffe_2016_gemv2,
    "caffe-2016-split": _caffe.caffe_2016_split,
    "caffe-2016-reference": _caffe.caffe_2016_reference,
    "caffe-2016-openblas-nehalem": _caffe.caffe_2016_openblas_nehalem,
    "caffe-2016-openblas-sandybridge": _caffe.caffe_2016_openblas_sandybridge,
    "caffe-2016-openblas-haswell": _caffe.caffe_2016_openblas_haswell,
    "reference, gemv2": _caffe.Caffe2016(REFERENCE, _caffe.in_second),
    "openblas-haswell, gemv2": _caffe.Caffe2016(OPENBLAS_HASWELL, _caffe.in_second),
    "borisgin-0.15": _nvcaffe.borisgin_0_15,
    "borisgin-0.15, openblas-haswell": _nvcaffe.NvCaffe(
        _nvcaffe.no_clip, copies_first=False, blas=OPENBLAS_HASWELL
    ),
    "nvcaffe-0.15": _nvcaffe.nvcaffe_0_15,
    "chainer-2016": _chainer.chainer_2016,
    "chainer-2016-gpu": _chainer.chainer_2016_gpu,
    "mxnet-2016": _mxnet.mxnet_2016,
    "mxnet-2016-gpu": _mxnet.mxnet_2016_gpu,
    "cudnn-v5": _cudnn.cudnn_v5,
}

VALUES = (1, 10, 100, 1000, 0.1, 3.3, 12345.678)

# For each of VALUES the mean and the y that is largest in magnitude, with as many digits as tell every number
# of the dtype from the others; "=" where the mean is the value itself and y is 0.
TABLES = {
    (1, 1, 3, 3): """
caffe-2016:
    = = 100.000015|-0.00482519669 999.999878|0.0385732949 = 3.30000019|-7.53945787e-05
    12345.6787|-0.295066655
caffe-2016-gemv2:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
caffe-2016-split:
    = = 100.000015|-0.00482519669 999.999878|0.0385732949 = 3.30000019|-7.53945787e-05
    12345.6787|-0.295066655
caffe-2016-reference:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
reference, gemv2:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
caffe-2016-openblas-haswell:
    = = 100.000008|-0.00241261953 = = 3.30000019|-7.53945787e-05 =
openblas-haswell, gemv2:
    = = = = = = =
caffe-2016-openblas-nehalem:
    = = 100.000008|-0.00241261953 = = 3.30000019|-7.53945787e-05 =
caffe-2016-openblas-sandybridge:
    = = 100.000008|-0.00241261953 = = 3.30000019|-7.53945787e-05 =
caffe-2016, double:
    1.0000000000000002|-7.021667025844518e-14 9.9999999999999982|5.6173336206756144e-13
    100.00000000000001|-4.4938668965404915e-12 999.99999999999989|3.5950935172323932e-11 =
    3.2999999523162837|1.4043334051689036e-13 =
borisgin-0.15:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
nvcaffe-0.15:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
borisgin-0.15, openblas-haswell:
    = = = = = = =
chainer-2016:
    = = = = = = =
chainer-2016-gpu:
    = = = = 0.099999994|2.35608059e-06 3.30000019|-7.53945787e-05 12345.6768|0.295066655
mxnet-2016, eps 1e-3:
    = = = = 0.100000009|-2.35608027e-07 3.29999971|7.53945687e-06 12345.6787|-0.0308669042
mxnet-2016:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
mxnet-2016-gpu:
    = = = = = 3.30000019|-7.53945787e-05 12345.6768|0.295066655
cudnn-v5:
    = = = = = 3.30000019|-7.53945787e-05 12345.6768|0.295066655
""",
    (8, 4, 28, 28): """
caffe-2016:
    = = = = 0.0999991968|0.000254456681 3.30002594|-0.00821773056 12345.6553|0.990234017
caffe-2016-gemv2:
    = = = = 0.0999992043|0.000252100581 3.30002594|-0.00821773056 12345.6543|0.991020203
caffe-2016-split:
    = = = = 0.0999991968|0.000254456681 3.30002594|-0.00821773056 12345.6553|0.990234017
caffe-2016-reference:
    = = = = 0.0999991968|0.000254456681 3.30002594|-0.00821773056 12345.6553|0.990234017
reference, gemv2:
    = = = = 0.0999991968|0.000254456681 3.30002594|-0.00821773056 12345.6553|0.990234017
caffe-2016-openblas-haswell:
    = = = = 0.100000009|-2.35608059e-06 3.299999|0.000301578286 12345.6758|0.525483847
openblas-haswell, gemv2:
    = = = = 0.100000009|-2.35608059e-06 3.299999|0.000301578286 12345.6758|0.525483847
caffe-2016-openblas-nehalem:
    = = = = 0.100000195|-6.12580916e-05 3.29999328|0.00211104355 12345.667|0.959297478
caffe-2016-openblas-sandybridge:
    = = = = 0.0999999493|1.64925641e-05 3.30000138|-0.000452367414 12345.6826|-0.839349687
caffe-2016, double:
    0.99999999999999989|3.510833512922259e-14 = 99.999999999999986|4.4938668965404915e-12
    999.99999999999989|3.5950935172323932e-11 0.10000000149011611|4.3885418911528237e-15
    3.2999999523162837|1.4043334051689036e-13 12345.677734374998|5.7521496275718291e-10
borisgin-0.15:
    = = = = 0.0999992043|0.00025210061 3.30002594|-0.00821773056 12345.6543|0.991020203
nvcaffe-0.15:
    = = = = 0.0999992043|0.00025210061 3.30002594|-0.00821773056 12345.6543|0.991020203
borisgin-0.15, openblas-haswell:
    = = = = 0.100000009|-2.35608059e-06 3.299999|0.000301578286 12345.6758|0.525483847
chainer-2016:
    = = = = 0.100000024|-7.0682413e-06 3.29999924|0.000226183707 12345.6787|-0.295066655
chainer-2016-gpu:
    = = = = 0.100000009|-2.35608059e-06 3.29999971|7.53945787e-05 12345.6787|-0.295066655
mxnet-2016, eps 1e-3:
    = = = = 0.0999992043|2.52100599e-05 3.30002594|-0.000821800495 12345.6543|0.595444381
mxnet-2016:
    = = = = 0.0999992043|0.000252100581 3.30002594|-0.00821773056 12345.6543|0.991020203
mxnet-2016-gpu:
    = = = = 0.0999999866|4.71216117e-06 3.30000019|-7.53945787e-05 12345.6768|0.295066655
cudnn-v5:
    = = = = 0.100000009|-2.35608059e-06 3.29999948|0.000150789157 12345.6787|-0.295066655
""",
}


def rows() -> list[Any]:
    found: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for shape, table in TABLES.items():
        name = ""
        for line in table.splitlines():
            if line.endswith(":"):
                name = line[:-1]
            else:
                found.setdefault((shape, name), []).extend(line.split())
    return [
        pytest.param(shape, name, cells, id=f"{name} {'x'.join(map(str, shape))}")
        for (shape, name), cells in found.items()
        if cells
    ]


def train(name: str, x: Array, eps: float = 1e-5) -> dict[str, Array]:
    system = SYSTEMS[name]
    zero = np.zeros(x.shape[1], x.dtype)
    options = {"step": 1} if getattr(system, "counts_steps", False) else {}
    return system(x, None, None, zero, zero + 1, training=True, momentum=0.1, eps=eps, **options)


@pytest.mark.parametrize(("shape", "row", "cells"), rows())
def test_a_constant_channel_comes_out_as_it_did(
    shape: tuple[int, ...], row: str, cells: list[str]
) -> None:
    name = row.removesuffix(", double").removesuffix(", eps 1e-3")
    dtype, digits = ("float64", 17) if row.endswith("double") else ("float32", 9)
    found = []
    for value in VALUES:
        x = np.full(shape, np.float32(value), dtype)
        got = train(name, x, 1e-3 if row.endswith("1e-3") else 1e-5)
        (mean,) = np.unique(got["batch_mean"])
        y = got["y"].ravel()
        worst = y[np.abs(y).argmax()]
        exact = mean == x.flat[0] and worst == 0
        found.append("=" if exact else f"{mean:.{digits}g}|{worst + 0.0:.{digits}g}")
    assert found == cells


def test_logs_with_six_digits_show_the_mean_right_and_the_difference_wrong() -> None:
    x = np.full((1, 1, 3, 3), 100, np.float32)
    got = train("caffe-2016", x)
    difference = x - got["batch_mean"]
    shown = [f"{values.flat[0]:.6g}" for values in (got["batch_mean"], difference, got["y"])]
    assert shown == ["100", "-1.52588e-05", "-0.0048252"]


# Sums over every binary tree of nine equal terms fl(value · fl(1/9)): how many trees give which bits.
TREES: dict[float, dict[str, int]] = {
    100: {"42c80000": 196, "42c80001": 818, "42c80002": 416},
    1000: {"4479fffe": 224, "4479ffff": 112, "447a0000": 998, "447a0001": 96},
    12345.678: {"4640e6b5": 88, "4640e6b6": 1182, "4640e6b7": 160},
    3.3: {"40533333": 264, "40533334": 1166},
}


def tree_sums(term: np.float32, leaves: int) -> Counter[np.float32]:
    """How many of the binary trees over equal terms have which sum."""
    sums: list[Counter[np.float32]] = [Counter(), Counter({term: 1})]
    for size in range(2, leaves + 1):
        counts: Counter[np.float32] = Counter()
        for left in range(1, size):
            pairs = itertools.product(sums[left].items(), sums[size - left].items())
            for (a, trees_a), (b, trees_b) in pairs:
                counts[a + b] += trees_a * trees_b
        sums.append(counts)
    return sums[leaves]


@pytest.mark.parametrize("value", TREES)
def test_the_thread_s_figure_is_that_of_several_trees_and_of_the_chain(value: float) -> None:
    term = np.float32(value) * np.float32(1 / 9)
    counts = tree_sums(term, 9)
    assert sum(counts.values()) == 1430
    assert {f"{total.view(np.uint32):08x}": n for total, n in counts.items()} == TREES[value]
    got = train("caffe-2016", np.full((1, 1, 3, 3), value, np.float32))
    assert got["batch_mean"] == chain(np.full((1, 9), term))


PARTIAL_SUMS = {
    100: "11.1111116 22.2222233 33.3333359 44.4444466 55.5555573 66.6666718 77.7777863 88.8889008 100.000015",
    1000: "111.111115 222.222229 333.333344 444.444458 555.555542 666.666626 777.77771 888.888794 999.999878",
    12345.678: "1371.74194 2743.48389 4115.22559 5486.96777 6858.70996 8230.45215 9602.19434 10973.9365 "
    "12345.6787",
    3.3: "0.366666675 0.733333349 1.10000002 1.4666667 1.83333337 2.20000005 2.5666666 2.9333334 3.30000019",
}


@pytest.mark.parametrize("value", PARTIAL_SUMS)
def test_the_chain_goes_wrong_step_by_step(value: float) -> None:
    term = np.float32(value) * np.float32(1 / 9)
    terms = np.full(9, term)
    found = [f"{chain(terms[None, :count])[0]:.9g}" for count in range(1, 10)]
    assert " ".join(found) == PARTIAL_SUMS[value]
