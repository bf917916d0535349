"""The orders in which the BLAS's of 2016 add, bit for bit, in the products that Caffe's BatchNorm makes.

Every product is one with a vector of ones. What differs between libraries is the order of additions and
where the factor goes: on the vector, so that each term is rounded once more, or on the finished sum.

ATLAS                  Caffe's default. Rows of up to 14 and 16 <= columns < rows: factor on each term, one
                       chain of additions. Others: factor last, four lanes or chains over blocks.
REFERENCE              netlib's: factor last, one chain.
OPENBLAS_NEHALEM       factor last, four lanes over whole fours; factor first on the up to three left over.
OPENBLAS_SANDYBRIDGE   the same with two times eight lanes. Both in float64: factor last, two lanes.
OPENBLAS_HASWELL       the same with eight lanes; fuses multiply and add in ?axpy; float32 only.

In float64 ATLAS's lanes are chains. Each order was compared with its library, bit for bit: ATLAS 3.10.3
(Debian's generic build), netlib 3.11, and OpenBLAS 0.3.21 forced to the core's kernels, of which those in
float32 read the same at 0.2.18 of April 2016. OpenBLAS runs on one thread; more would cut the rows among
them. Only the sign of a zero is not reproduced.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Tuple

import numpy as np

from ._numpy import sequential

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def _axpby(alpha: float, x: Array, beta: float, y: Array) -> Array:
    """Return alpha · x + beta · y, every operation rounded."""
    real = x.dtype.type
    return real(alpha) * x + real(beta) * y


def _outer(vector: Array, columns: int) -> Array:
    return np.broadcast_to(vector[:, None], (vector.size, columns))


class Blas(NamedTuple):
    """The calls that the layers make. All arrays have one dtype, in which everything is rounded.

    Attributes:
        gemv: matrix (R, K), factor -> (R,): factor · matrix · 1.
        gemv_transposed: matrix (R, K) and, unless it is 1, a factor -> (K,): factor · matrixᵀ · 1.
        outer: vector (R,), K -> (R, K): vector · 1ᵀ, the gemm with inner dimension 1.
        axpby: alpha, x, beta, y -> alpha · x + beta · y, as ?scal of y and then ?axpy.
    """

    gemv: Callable[[Array, float], Array]
    gemv_transposed: Callable[..., Array]
    outer: Callable[[Array, int], Array] = _outer
    axpby: Callable[[float, Array, float, Array], Array] = _axpby

    def repeat(self, vector: Array, images: int) -> Array:
        """Return 1 · vectorᵀ, (images · C,), the gemm that repeats a per-channel vector (C,)."""
        return np.tile(vector, images)

    def add_outer(self, matrix: Array, sign: int, vector: Array) -> Array:
        """Return matrix (R, K) ± vector · 1ᵀ, the gemm with beta 1: one rounding in every BLAS tried."""
        return matrix + self.outer(sign * vector, matrix.shape[1])


def chain(terms: Array) -> Array:
    """(R, K) -> (R,): row sums from left to right, starting from +0."""
    return sequential(terms) + terms.dtype.type(0)


def _lanes(terms: Array, width: int, first: int = 0) -> Array:
    """(R, K) -> (R, width): sums of lanes that are dealt the columns in turn.

    first columns, fewer than width, go to the first lanes before the rest, a multiple of width, is dealt.
    """
    rows, columns = terms.shape
    rounds = (columns - first) // width
    dealt = np.zeros((rows, 1 + rounds, width), terms.dtype)
    dealt[:, 0, :first] = terms[:, :first]
    dealt[:, 1:] = terms[:, first:].reshape(rows, rounds, width)
    return np.add.accumulate(dealt, axis=1)[:, -1]


def _fold(lanes: Array) -> Array:
    """(R, 4) or (R, 8) -> (R,): the upper four on the lower four, then neighbours, as haddps has it."""
    if lanes.shape[1] == 8:
        lanes = lanes[:, :4] + lanes[:, 4:]
    return (lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3])


# --- ATLAS ------------------------------------------------------------------------------------------


def _atlas_dot(terms: Array) -> Array:
    """Row sums in the order of ?dot: four interleaved lanes in float32, a chain in float64."""
    if terms.dtype == np.float64:
        return chain(terms)
    fours = terms.shape[1] - terms.shape[1] % 4
    total = _fold(_lanes(terms[:, :fours], 4))
    for k in range(fours, terms.shape[1]):
        total = total + terms[:, k]
    return total


def atlas_asum(values: Array) -> Any:
    """(C,) -> the sum of the magnitudes as ?asum forms it on an array that starts at a multiple of 16 bytes.

    In float32 that is ?dot's order. In float64 three pairs of lanes get a pair of every eight elements each,
    the first one the last pair, too; what is left after the eights is added in turn.
    """
    terms = np.abs(values)
    if terms.dtype == np.float32:
        return _atlas_dot(terms[None])[0]
    whole = terms.size - terms.size % 8
    total = terms.dtype.type(0)
    if whole:
        pairs = terms[:whole].reshape(-1, 4, 2)
        first = chain(pairs[:, ::3].reshape(-1, 2).T)
        lanes = (first + chain(pairs[:, 1].T)) + chain(pairs[:, 2].T)
        total = lanes[0] + lanes[1]
    for term in terms[whole:]:
        total = total + term
    return total


def _atlas_size(matrix: Array) -> int:
    """Bytes of a ?gemv's operands; kernels are chosen by the cache level that holds them."""
    return (matrix.size + sum(matrix.shape)) * matrix.itemsize


def _atlas_block(matrix: Array) -> int:
    """Columns that ?gemv takes at a time."""
    size = _atlas_size(matrix)
    if matrix.dtype == np.float32:
        return 720 if size <= 2**15 else 6552
    return 472 if size <= 2**15 else 3272 if size <= 2**20 else 5460


def _atlas_gemv(matrix: Array, factor: float) -> Array:
    rows, columns = matrix.shape
    alpha = matrix.dtype.type(factor)
    if columns < 15:
        return chain(matrix * alpha)
    if columns == 15 or rows < 4:
        return alpha * _atlas_dot(matrix)
    # The factor goes on the shorter of the two vectors.
    terms = matrix * alpha if columns < rows else matrix
    fours = rows - rows % 4
    width = _atlas_block(matrix)
    total = np.zeros(rows, matrix.dtype)
    for start in range(0, columns, width):
        block = terms[:, start : start + width]
        total[:fours] += chain(block[:fours])
        if fours < rows:
            total[fours:] += _atlas_dot(block[fours:])
    return total if columns < rows else alpha * total


def _atlas_gemv_transposed(matrix: Array, factor: float = 1.0) -> Array:
    """As on arrays that start at one place modulo 32 bytes; on others, some put the factor last."""
    rows, columns = matrix.shape
    alpha = matrix.dtype.type(factor)
    large = matrix.dtype == np.float64 and _atlas_size(matrix) > 2**20
    few = rows < (12 if large else 4)
    if columns == 15 or (columns > 15 and (few or rows > columns)):
        return chain((matrix * alpha).T)
    return alpha * chain(matrix.T)


ATLAS = Blas(_atlas_gemv, _atlas_gemv_transposed)


# --- netlib's reference BLAS ------------------------------------------------------------------------


def _reference_gemv(matrix: Array, factor: float) -> Array:
    return matrix.dtype.type(factor) * chain(matrix)


def _reference_gemv_transposed(matrix: Array, factor: float = 1.0) -> Array:
    return chain((matrix * matrix.dtype.type(factor)).T)


REFERENCE = Blas(_reference_gemv, _reference_gemv_transposed)


# --- OpenBLAS ---------------------------------------------------------------------------------------

_BLOCK = 4096
"""Columns that its ?gemv takes at a time in float32."""


def _nehalem_fours(terms: Array) -> Array:
    return _fold(_lanes(terms, 4))


def _haswell_fours(terms: Array) -> Array:
    """An odd four goes to the lower half of eight lanes first."""
    return _fold(_lanes(terms, 8, terms.shape[1] % 8))


def _sandybridge_fours(terms: Array) -> Array:
    """Two times eight lanes; an odd four and an odd eight go to the first eight before the rest.

    In the second of four rows the two then change places.
    """
    columns = terms.shape[1]
    odd, uneven = columns % 8, columns % 16
    start = _lanes(terms[:, :uneven], 8, odd)
    rest = terms[:, uneven:].reshape(len(terms), columns // 16, 16).copy()
    rest[1::4] = np.roll(rest[1::4], 8, axis=2)
    both = np.concatenate([start, rest.reshape(len(terms), columns - uneven)], axis=1)
    lanes = _lanes(both, 16, 8)
    return _fold(lanes[:, :8] + lanes[:, 8:])


def _openblas_gemv(kernel: Callable[[Array], Array], matrix: Array, factor: float) -> Array:
    """Rows in fours by the core's own kernel, then two, then one by kernels that all cores share."""
    if matrix.dtype == np.float64:
        return _openblas_gemv_double(matrix, factor)
    rows, columns = matrix.shape
    alpha = matrix.dtype.type(factor)
    fours, whole = rows - rows % 4, columns - columns % 4
    total = np.zeros(rows, matrix.dtype)
    for start in range(0, whole, _BLOCK):
        block = matrix[:, start : min(start + _BLOCK, whole)]
        pairs = fours + (rows & 2)
        sums = (
            kernel(block[:fours]),
            _nehalem_fours(block[fours:pairs]),
            _haswell_fours(block[pairs:]),
        )
        total += alpha * np.concatenate(sums)
    if whole < columns:
        total += chain(matrix[:, whole:] * alpha)
    return total


def _openblas_gemv_double(matrix: Array, factor: float) -> Array:
    """?gemv of the cores without kernels of their own in float64: two lanes, or four for rows left over."""
    rows, columns = matrix.shape
    fours = rows - rows % 4
    padded = np.zeros((rows, columns + -columns % 4), matrix.dtype)
    padded[:, :columns] = matrix
    left_over = padded[fours:].copy()
    if columns % 4 == 3:  # the last element is added to the first lane, on its own
        left_over = np.concatenate([left_over, np.zeros((rows - fours, 4))], axis=1)
        left_over[:, columns + 1] = left_over[:, columns - 1]
        left_over[:, columns - 1] = 0
    pair = _lanes(padded[:fours], 2)
    lanes = _lanes(left_over, 4)
    four = (lanes[:, 0] + lanes[:, 2]) + (lanes[:, 1] + lanes[:, 3])
    return matrix.dtype.type(factor) * np.concatenate([pair[:, 0] + pair[:, 1], four])


def _fused(alpha: float, x: Array, y: Array) -> Array:
    """Return alpha · x + y rounded once, in float32.

    The product is exact in float64. Rounding the sum there to odd leaves the second rounding as if it were
    the only one (Boldo and Melquiond 2008).
    """
    product, addend = float(np.float32(alpha)) * x.astype(np.float64), y.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    towards_zero = (error < 0) == (total > 0)
    bits = total.view(np.int64)
    even = (np.abs(error) > 0) & (bits % 2 == 0)  # not where it is NaN: the sum is no number
    bits[even] += np.where(towards_zero[even], -1, 1)
    return total.astype(np.float32)


# Kernels of ?gemv on the transposed matrix: groups of rows (G, rows in a group, K) -> sums (G, K).


def _chained(groups: Array) -> Array:
    return np.add.accumulate(groups, axis=1)[:, -1]


def _evens_and_odds(groups: Array) -> Array:
    """A chain of the even rows plus a chain of the odd ones."""
    return _chained(groups[:, ::2]) + _chained(groups[:, 1::2])


# How a group's sums are added to what there is: factor, sums (G, K) -> (K,).


def _in_turn(factor: float, sums: Array) -> Array:
    return chain((sums.dtype.type(factor) * sums).T)


def _in_turn_fused(factor: float, sums: Array) -> Array:
    if factor == 1:  # nothing is rounded before the addition
        return _in_turn(factor, sums)
    total = np.zeros(sums.shape[1], sums.dtype)
    for row in sums:
        total = _fused(factor, row, total)
    return total


def _grouped(matrix: Array, kernels: Mapping[int, Callable[[Array], Array]]) -> Tuple[Array, Array]:
    """Return the sums of groups of rows, the largest groups first, each by its kernel, and the rows left."""
    rows, columns = matrix.shape
    sums, start = [], 0
    for size, kernel in kernels.items():
        count = (rows - start) // size
        stop = start + count * size
        sums.append(kernel(matrix[start:stop].reshape(count, size, columns)))
        start = stop
    return np.concatenate(sums), matrix[start:]


def _openblas_narrow(matrix: Array) -> Array:
    """Column sums of a matrix of up to three columns: whole fours of rows in groups, then the rest."""
    rows, columns = matrix.shape
    fours = rows - rows % 4
    sums, left = _grouped(matrix[:fours], {4 if columns == 1 else 2: _chained})
    return chain(np.concatenate([sums, left, matrix[fours:]]).T)


def _openblas_columns(
    matrix: Array,
    factor: float,
    kernels: Mapping[int, Callable[[Array], Array]],
    add: Callable[[float, Array], Array] = _in_turn,
) -> Array:
    """Column sums over groups of rows and then over single rows."""
    sums, left = _grouped(matrix, kernels)
    total = add(factor, sums)[None] if len(sums) else sums
    return chain(np.concatenate([total, left.dtype.type(factor) * left]).T)


def _openblas_left_over(matrix: Array, factor: float, columns: int) -> Array:
    """Sums of the up to three last of `columns` columns: a chain, where these are not all there are."""
    sums = _openblas_narrow(matrix) if columns < 4 else chain(matrix.T)
    return matrix.dtype.type(factor) * sums


def _nehalem_gemv_transposed(matrix: Array, factor: float = 1.0) -> Array:
    columns = matrix.shape[1]
    whole = columns - columns % 4
    kernels = {8: _evens_and_odds, 4: _chained}
    if matrix.dtype == np.float64:
        del kernels[8]
    sums = _openblas_columns(matrix[:, :whole], factor, kernels)
    return np.concatenate([sums, _openblas_left_over(matrix[:, whole:], factor, columns)])


def _avx_gemv_transposed(
    add: Callable[[float, Array], Array], matrix: Array, factor: float = 1.0
) -> Array:
    """The 4, 8 or 12 columns in front of a block's sixteens go through Nehalem's kind of kernels."""
    columns = matrix.shape[1]
    whole = columns - columns % 4
    start = whole - whole % _BLOCK
    stop = start + (whole - start) % 16
    sums = _openblas_columns(matrix[:, :whole], factor, {8: _chained, 4: _chained}, add)
    kernels = {8: _evens_and_odds, 4: _evens_and_odds}
    sums[start:stop] = _openblas_columns(matrix[:, start:stop], factor, kernels)
    return np.concatenate([sums, _openblas_left_over(matrix[:, whole:], factor, columns)])


def _sandybridge_gemv_transposed(matrix: Array, factor: float = 1.0) -> Array:
    if matrix.dtype == np.float64:
        return _reference_gemv_transposed(matrix, factor)
    return _avx_gemv_transposed(_in_turn, matrix, factor)


def _haswell_axpby(alpha: float, x: Array, beta: float, y: Array) -> Array:
    """?axpy fuses whole groups of 32 elements."""
    real = y.dtype.type
    scaled = real(beta) * y
    whole = x.size - x.size % 32
    head, tail = slice(0, whole), slice(whole, None)
    return np.concatenate(
        [_fused(alpha, x[head], scaled[head]), real(alpha) * x[tail] + scaled[tail]]
    )


def _single_only(function: Callable[..., Array]) -> Callable[..., Array]:
    def product(matrix: Array, factor: float = 1.0) -> Array:
        if matrix.dtype == np.float64:
            text = "OpenBLAS's Haswell kernels are known in float32 only: in float64 the compiler fuses some"
            raise NotImplementedError(text)
        return function(matrix, factor)

    return product


OPENBLAS_NEHALEM = Blas(partial(_openblas_gemv, _nehalem_fours), _nehalem_gemv_transposed)
OPENBLAS_SANDYBRIDGE = Blas(
    partial(_openblas_gemv, _sandybridge_fours), _sandybridge_gemv_transposed
)
OPENBLAS_HASWELL = Blas(
    _single_only(partial(_openblas_gemv, _haswell_fours)),
    _single_only(partial(_avx_gemv_transposed, _in_turn_fused)),
    axpby=_haswell_axpby,
)
