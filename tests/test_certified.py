"""The certified sums and what follows from them, against exact rational arithmetic."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from adversarial import CATEGORIES, Draw, channels, normal, stored
from mpmath.libmp import to_rational

from bnaudit import certified
from bnaudit.bounds import FORMATS
from bnaudit.certified import (
    OK,
    Moments,
    Normalization,
    Scaled,
    exact_sums,
    expand,
    grad_input_element,
    gradients,
    line_of,
    moments,
    nearest,
    normalization,
    root,
    running_statistics,
    step_weight,
    tangent_of,
    y_element,
)
from bnaudit.worker.rounding import round_to, widen

LENGTHS = (1, 2, 3, 7, 16, 17, 100, 1000)
EPS = 1e-5


def fractions(tensor: certified.Array, dtype: str, c: int) -> list[Fraction]:
    return [Fraction(v) for v in widen(tensor[:, c], dtype).astype(np.float64).ravel().tolist()]


def value(scaled: Scaled | None) -> Fraction:
    assert scaled is not None
    return Fraction(scaled.numerator) * Fraction(2) ** scaled.exponent


def square_root(square: Fraction, digits: int = 400) -> Fraction:
    """√square to `digits` decimal digits, by mpmath."""
    with mpmath.workdps(digits):
        return Fraction(
            *to_rational(mpmath.sqrt(mpmath.mpf(square.numerator) / square.denominator)._mpf_)
        )


def affine(count: int) -> tuple[certified.Doubles, certified.Doubles]:
    rng = np.random.default_rng(count)
    return (
        rng.uniform(-2, 2, count).astype(np.float32).astype(np.float64),
        rng.uniform(-1, 1, count).astype(np.float32).astype(np.float64),
    )


def coefficients(
    m: Moments, weight: certified.Doubles, bias: certified.Doubles, eps: float = EPS
) -> Normalization:
    return normalization(m.mean, m.var, m.largest, m.size, eps, weight, bias, n=m.n, training=True)


def check_batch(dtype: str, x: certified.Array, dy: certified.Array, elements: int = 6) -> int:
    """Asserts sums, statistics, y and gradients of every channel; returns how many channels were checked."""
    count = x.shape[1]
    weight, bias = affine(count)
    batch = moments(dtype, x)
    norm = coefficients(batch, weight, bias)
    grads = gradients(dtype, x, dy, batch, EPS, norm)
    sums = exact_sums(dtype, dy, x)
    own = exact_sums(dtype, x)
    eps = Fraction(EPS)
    for c in range(count):
        xs, gs = fractions(x, dtype, c), fractions(dy, dtype, c)
        n, zero = len(xs), Fraction(0)
        assert value(own.first[c]) == sum(xs)
        assert value(own.cross[c]) == sum(v * v for v in xs)
        assert value(sums.first[c]) == sum(gs)
        assert value(sums.cross[c]) == sum(g * v for g, v in zip(gs, xs, strict=True))
        size = float(sum(map(abs, xs), zero) / n)
        assert batch.size[c] == pytest.approx(size, rel=1e-9, abs=5e-324)
        assert batch.largest[c] == max(map(abs, xs))
        mean = sum(xs, zero) / n
        var = sum(((v - mean) ** 2 for v in xs), zero) / n
        check_pair(norm.mean, c, mean)
        check_pair(norm.var, c, var)
        assert norm.constant[c] == (len(set(xs)) == 1)
        r = 1 / square_root(var + eps)
        check_root(norm.invstd, c, 1 / (var + eps))
        w, b = Fraction(weight[c]), Fraction(bias[c])
        total = sum(gs, zero)
        d = sum((g * (v - mean) for g, v in zip(gs, xs, strict=True)), zero)
        check_pair(grads.grad_bias, c, total)
        check_root(grads.grad_weight, c, d * d / (var + eps), negative=d < 0)
        tilt = d / (n * (var + eps))
        tiny = 8 * Fraction(5e-324)
        for i in np.linspace(0, n - 1, min(n, elements)).astype(int):
            xh = (xs[i] - mean) * r
            h, low, _ = y_element(float(xs[i]), line_of(norm.line, c))
            error = abs(Fraction(h) + Fraction(low) - (w * xh + b))
            assert error <= Fraction(2) ** -80 * (abs(w * xh) + abs(b)) + tiny
            h, low, _ = grad_input_element(
                float(xs[i]), float(gs[i]), line_of(norm.line, c), tangent_of(grads.tangent, c)
            )
            right = w * r * (gs[i] - total / n - (xs[i] - mean) * tilt)
            scale = abs(w) * r * (abs(gs[i]) + abs(total / n) + abs((xs[i] - mean) * tilt))
            if scale < Fraction(2) ** 1023:
                error = abs(Fraction(h) + Fraction(low) - right)
                # Where dy is scaled, what is below 2^-1074 of its largest value is lost.
                lost = tiny * Fraction(2) ** max(0, int(grads.exponent[c]))
                assert error <= Fraction(2) ** -78 * scale + lost * (1 + abs(w) * r)
    return int(count)


def check_pair(pair: certified.Pair, c: int, exact: Fraction) -> None:
    """high is the correctly rounded exact value, and high + low agrees to 2^-104."""
    high, low = float(pair.high[c]), float(pair.low[c])
    assert high == nearest(exact.numerator, exact.denominator)
    if math.isfinite(high):
        error = abs(Fraction(high) + Fraction(low) - exact)
        assert error <= abs(exact) * Fraction(2) ** -104 + Fraction(5e-324)


def check_root(pair: certified.Pair, c: int, square: Fraction, *, negative: bool = False) -> None:
    """As check_pair, for a root: decided by exact squares, since it may lie arbitrarily near a tie."""
    sign = -1 if negative else 1
    high, low = sign * float(pair.high[c]), sign * float(pair.low[c])
    if high == math.inf:
        return
    below = (Fraction(math.nextafter(high, -math.inf)) + Fraction(high)) / 2
    above = (Fraction(math.nextafter(high, math.inf)) + Fraction(high)) / 2
    assert max(below, Fraction(0)) ** 2 <= square <= above**2
    total = Fraction(high) + Fraction(low)
    slack = total * Fraction(2) ** -104 + Fraction(5e-324)
    assert max(total - slack, Fraction(0)) ** 2 <= square <= (total + slack) ** 2


@pytest.mark.parametrize("draw", CATEGORIES, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("dtype", FORMATS)
def test_sums_statistics_y_and_gradients_are_certified(dtype: str, draw: Draw) -> None:
    for n in LENGTHS:
        count = 12 if n < 1000 else 2
        x = channels(draw, dtype, n, count, seed=1)
        other = CATEGORIES[(CATEGORIES.index(draw) + n) % len(CATEGORIES)] if n % 2 else normal
        dy = channels(other, dtype, n, count, seed=2)
        assert check_batch(dtype, x, dy) == count


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("draw", CATEGORIES, ids=lambda draw: draw.__name__)
def test_sums_of_a_million_are_exact(dtype: str, draw: Draw) -> None:
    rng = np.random.default_rng(5)
    n = 1_000_000 if dtype == "float32" else 60_000
    x = stored(draw(rng, n, dtype), dtype).reshape(4, 1, n // 4)
    sums = exact_sums(dtype, x)
    wide = widen(x, dtype).astype(np.float64).ravel()
    # integers on the scale of the smallest subnormal of the format
    form = FORMATS[dtype]
    bits = -math.frexp(form.smallest)[1] + 1
    mantissa, exponent = np.frexp(wide)
    ints = [
        int(m) << (e + bits - 53) if e + bits >= 53 else int(m) >> (53 - e - bits)
        for m, e in zip(np.ldexp(mantissa, 53).tolist(), exponent.tolist(), strict=True)
    ]
    assert value(sums.first[0]) == Fraction(sum(ints), 1 << bits)
    assert value(sums.cross[0]) == Fraction(sum(i * i for i in ints), 1 << 2 * bits)


@pytest.mark.parametrize("shape", [(1, 3, 1), (5, 2, 7), (3000, 2, 1), (2, 3, 5000), (7, 1, 2048)])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_element_is_summed_once_whatever_the_shape(
    dtype: str, shape: tuple[int, int, int]
) -> None:
    x = stored(np.arange(1.0, math.prod(shape) + 1) % 64, dtype).reshape(shape)
    sums = exact_sums(dtype, x)
    wide = widen(x, dtype).astype(np.float64)
    for c in range(shape[1]):
        assert value(sums.first[c]) == wide[:, c].sum()
        assert value(sums.cross[c]) == (wide[:, c] ** 2).sum()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_value_that_is_not_finite_spoils_its_own_channel_only(dtype: str, bad: float) -> None:
    for position in (0, 2500, 4999):
        x = np.ones((2, 3, 2500))
        x[position // 2500, 1, position % 2500] = bad
        tensor = stored(np.ones_like(x), dtype)
        with np.errstate(invalid="ignore"):
            spoiled = widen(tensor, dtype).astype(np.float64) * x
        batch = moments(dtype, round_to(spoiled, dtype))
        assert batch.mean[1] is None
        assert batch.var[1] is None
        assert [batch.mean[c] for c in (0, 2)] == [(5000, 5000)] * 2


@pytest.mark.parametrize(
    ("name", "tamper"),
    [
        (
            "_collect",
            lambda right: (
                lambda limbs: Scaled(2 * right(limbs).numerator + 1, right(limbs).exponent - 1)
            ),
        ),
        ("nearest", lambda right: lambda p, q: np.nextafter(right(p, q), math.inf)),
        (
            "root",
            lambda right: (
                lambda p, q: (right(p, q)[0] * 2**52 + right(p, q)[0], right(p, q)[1] * 2**52)
            ),
        ),
    ],
)
def test_a_planted_error_of_one_bit_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, tamper: object
) -> None:
    x = channels(normal, "float32", 100, 4, seed=1)
    dy = channels(normal, "float32", 100, 4, seed=2)
    check_batch("float32", x, dy)
    monkeypatch.setattr(certified, name, tamper(getattr(certified, name)))  # type: ignore[operator]
    with pytest.raises(AssertionError):
        check_batch("float32", x, dy)


def test_a_root_is_enclosed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        p, q = (
            int(v) + 1 << int(s)
            for v, s in zip(rng.integers(0, 2**60, 2), rng.integers(0, 2200, 2), strict=True)
        )
        r, k = root(p, q)
        above = Fraction(r, k) * (1 + Fraction(1, 2**198))
        assert Fraction(r, k) ** 2 <= Fraction(p, q) < above**2


def test_the_root_of_a_perfect_square_is_exact() -> None:
    assert Fraction(*root(1, 16)) == Fraction(1, 4)


def test_the_root_next_to_a_tie_is_rounded_to_the_right_side() -> None:
    tie = Fraction(2**53 + 1, 2**53)  # halfway between two float64
    for offset in (Fraction(1, 2**300), Fraction(-1, 2**300)):
        square = (tie + offset) ** 2
        p, q = root(square.numerator, square.denominator)
        assert nearest(p, q) == (1 + 2.0**-52 if offset > 0 else 1.0)


def test_expand_adds_up_to_the_ratio() -> None:
    for p, q in ((1, 3), (-7, 11), (2**80 + 1, 3**40), (0, 5)):
        parts = expand(p, q, terms=3)
        assert abs(sum(map(Fraction, parts)) - Fraction(p, q)) <= abs(Fraction(p, q)) / 2**155


def test_float64_extremes_keep_their_precision() -> None:
    for scale in (1e300, 1e-300, 1e307, 1e-310):
        x = (np.random.default_rng(3).standard_normal((4, 3, 25)) * scale).clip(-1e308, 1e308)
        dy = np.random.default_rng(4).standard_normal((4, 3, 25))
        check_batch("float64", x, dy)


def test_running_statistics_are_the_exact_average() -> None:
    batches = [[(step, 3)] for step in range(1, 101)]
    weights = [step_weight(0.1, step) for step in range(1, 101)]
    right = Fraction(1)
    for ((step, _),) in batches:
        right += Fraction(0.1) * (Fraction(7, 6) * Fraction(step, 3) - right)
    pair = running_statistics(np.array([1.0]), batches, weights, Fraction(7, 6))  # type: ignore[arg-type]
    check_pair(pair, 0, right)


def test_cumulative_average_weighs_all_batches_alike() -> None:
    batches = [[(v, 1)] for v in (3, 5, 10)]
    weights = [step_weight(None, step) for step in (1, 2, 3)]
    pair = running_statistics(np.array([99.0]), batches, weights, Fraction(1))  # type: ignore[arg-type]
    check_pair(pair, 0, Fraction(6))


def test_variance_plus_eps_of_zero_is_not_judged() -> None:
    batch = moments("float32", np.full((1, 1, 4), 3.0, np.float32))
    norm = coefficients(batch, np.ones(1), np.zeros(1), eps=0.0)
    assert norm.state[0] == certified.UNJUDGED
    assert coefficients(batch, np.ones(1), np.zeros(1)).state[0] == OK


def test_the_floating_point_environment_is_checked() -> None:
    certified.check_environment()


@pytest.mark.skipif(sys.platform != "linux", reason="sets the processor's flags through glibc")
@pytest.mark.parametrize(("flag", "sentence"), [(0x8040, "flushes subnormal"), (0x2000, "round")])
def test_a_changed_floating_point_environment_is_refused(flag: int, sentence: str) -> None:
    if not hasattr(ctypes.CDLL(None), "fesetenv"):
        pytest.skip("no fesetenv in this C library")
    # x86-64 glibc: fenv_t is 28 bytes of x87 state followed by MXCSR.
    program = f"""
import ctypes, struct
from bnaudit import certified
certified.check_environment()
libc = ctypes.CDLL("libm.so.6")
state = ctypes.create_string_buffer(32)
libc.fegetenv(state)
mxcsr = struct.unpack_from("<I", state, 28)[0]
struct.pack_into("<I", state, 28, mxcsr | {flag})
libc.fesetenv(state)
try:
    certified.check_environment()
except certified.EnvironmentFaultError as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert sentence in done.stdout, done.stderr
